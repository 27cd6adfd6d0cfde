"""What the compiler says of the Triton kernels, with no GPU: `nice -n 19 python -m bench.gpu_static --write`.

Compiles the grid of `bench.gpu_grid` ahead of time, as far as sources have changed since it was last compiled, and
keeps a record of every kernel at once: a run that is stopped goes on where it was. The whole grid takes about half
an hour of processor time. ``--write`` puts the tables into docs/gpu.md, also of a grid that is not complete.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from bench import gpu_grid, gpu_roofline
from bench.gpu_inspect import inspect
from bench.tables import write_between_markers

PAGE = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"


def compile_cell(cell: gpu_grid.Cell) -> dict[str, object]:
    """A record of what the compiler says of a cell's kernels today."""
    import triton

    tile, source, _ = gpu_grid.source_of(cell)
    found = [inspect(source, name, cell.target, tile) for name in gpu_grid.kernels_of(cell, source)]
    return gpu_grid.record(cell, found, triton.__version__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile what has no record that is up to date; exit code 1 if something did not compile."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_static", description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", metavar="TEXT", help="cells whose key contains TEXT; repeatable")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no new kernel starts after so long")
    parser.add_argument("--list", action="store_true", help="print the keys that have no up-to-date record and stop")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/gpu.md")
    options = parser.parse_args(arguments)
    records = gpu_grid.current(gpu_grid.read_records())
    missing = [cell for cell in gpu_grid.grid() if cell.key not in records]
    missing = [cell for cell in missing if all(text in cell.key for text in options.only or ())]
    if options.list:
        print("\n".join(cell.key for cell in missing))
        return 0
    began, failed = time.monotonic(), 0
    for number, cell in enumerate(missing, start=1):
        if time.monotonic() - began > 60 * options.minutes:
            break
        print(f"{number} of {len(missing)}: {cell.key} ...", end=" ", file=sys.stderr, flush=True)
        started = time.monotonic()
        try:
            made = compile_cell(cell)
        except Exception:
            failed += 1
            traceback.print_exc()
            continue
        told = f"{made['registers']} registers, {made['spills']} spills, {made['stack']} bytes of stack"
        print(f"{told}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        records[cell.key] = made
        gpu_grid.write_records(records)
    gpu_grid.write_records(records)
    if options.write:
        write_between_markers(PAGE, "static", gpu_grid.page(records))
        write_between_markers(PAGE, "roofline", gpu_roofline.page())
        write_between_markers(PAGE, "tiles", gpu_grid.tiles_page())
        print(f"wrote {PAGE.name}: {len(records)} kernels")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

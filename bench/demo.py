"""`python -m bench.demo --before CHECKOUT`: the whole demo now and in a checkout of an earlier commit, in turn.

Each run is `python -m gdpd.cli demo` in a process of its own with an empty folder: imports, data, teachers, students,
evaluation and report. Both checkouts use this interpreter; build the earlier one's native module in it first.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import tables
from gdpd_kernels.benchmark import cases

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
TARGET = 2.0


class Demo:
    """Seconds of the whole demo with one seed, by the package that is installed with its command line."""

    timeout = 600
    number, repeat = 1, 3
    smoke = False  # half a minute; `make demo` is run by itself

    def setup(self) -> None:
        if importlib.util.find_spec("typer") is None or importlib.util.find_spec("aeon") is None:
            raise cases.Unavailable("the package is installed without its extra cli")

    def time_demo(self) -> None:
        run_demo(None, seeds=1)


def run_demo(checkout: Path | None, seeds: int) -> tuple[float, float]:
    """Wall-clock and processor seconds of the demo of a checkout, or of the installed package.

    Raises:
        RuntimeError: the demo failed; the message holds the end of what it printed.
    """
    environment = {**os.environ, **({"PYTHONPATH": str(checkout)} if checkout else {})}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gdpd.cli", "demo", "--folder", folder, "--seeds", str(seeds)]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(
            command, cwd=checkout or folder, env=environment, capture_output=True, text=True, check=False
        )
        took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(
            f"the demo in {checkout or folder} ended with exit code {done.returncode}: {done.stderr[-2000:]}"
        )
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def rows(found: dict[str, list[tuple[float, float]]]) -> tables.Rows:
    """The table: medians with the least and the most, and the ratio of medians."""
    made: tables.Rows = [("whole demo", "before", "now", "ratio")]
    for index, what in enumerate(("wall clock", "processor time")):
        seconds = {name: sorted(run[index] for run in runs) for name, runs in found.items()}
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        cells = [
            f"{medians[name]:.1f} s ({seconds[name][0]:.1f}–{seconds[name][-1]:.1f})" for name in ("before", "now")
        ]
        ratio = medians["before"] / medians["now"]
        verdict = f" (target {TARGET:g}×: {'met' if ratio >= TARGET else 'missed'})" if index == 0 else ""
        made.append((what, *cells, f"{ratio:.2f}×{verdict}"))
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--before", type=Path, required=True, metavar="CHECKOUT", help="checkout of the earlier commit")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the demo (default %(default)s, as `gdpd demo`)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    options = parser.parse_args(argv)
    if not (options.before / "gdpd" / "cli").is_dir():
        parser.error(f"--before {options.before}: no checkout of this project is there")
    found: dict[str, list[tuple[float, float]]] = {"before": [], "now": []}
    for _ in range(options.repeats):
        for name, checkout in (("before", options.before.resolve()), ("now", ROOT)):
            found[name].append(run_demo(checkout, options.seeds))
            print(f"{name}: {found[name][-1][0]:.1f} s", file=sys.stderr, flush=True)
    made = rows(found)
    print(tables.plain(made))
    if options.write:
        seeds = f"{options.seeds} seed{'s' * (options.seeds != 1)}"
        body = f"{tables.markdown(made)}\n\nMedians of {options.repeats} runs each, in turn, with {seeds} (least–most)."
        tables.write_between_markers(PAGE, "demo", body)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m bench.compare`: the native kernels against their rivals in one run, checked before they are timed.

Prints every figure with its target, then lines through the grid; with --write puts the tables into
docs/performance.md. A contender whose correctness check fails is not timed, and its ratios are not printed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench import figures, peak, tables
from bench.figures import Figure
from gdpd_kernels.benchmark import cases
from gdpd_kernels.benchmark.cases import Case
from gdpd_kernels.benchmark.measure import Measured, measure

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
GRID_HOWS = ("eager", "reference", "native", "native_bf16")
PAPER_HOWS = ("release", *GRID_HOWS)
EXTRAS = ("memory", "overhead", "threads")


@dataclass(frozen=True)
class Pace:
    """Seconds: for a case of the table, for a case of the grid, for the peak; and a limit for everything."""

    table: float
    grid: float
    peak: float
    limit: float


FULL, QUICK = Pace(6.0, 1.2, 5.0, 11 * 60.0), Pace(0.3, 0.2, 1.0, 5 * 60.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; exit code 1 if a contender of this library failed its check."""
    options = _options(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.list:
        print("\n".join([*(case.name for case in figures.TIMED), *EXTRAS, *(case.name for case in cases.short_grid())]))
        return 0
    pace = QUICK if options.quick else replace(FULL, limit=60 * options.minutes)
    began = time.perf_counter()
    wanted = _selection(options.case, options.quick)

    limits = peak.measure(pace.peak)
    _show("machine", tables.machine(limits))
    timed = {case: _tell(case.name, lambda c=case: measure(c, figures.TIMED[c], pace.table)) for case in wanted.table}
    lines = figures.from_timings(timed, limits)
    if "memory" in wanted.extras:
        lines += [_tell(f"memory {case.name}", lambda c=case: figures.extra_memory(c)) for case in figures.MEMORY]
    if "overhead" in wanted.extras:
        lines += _tell("overhead", lambda: figures.overhead(pace.table / 2))
    if "threads" in wanted.extras:
        lines.append(_tell("threads", lambda: figures.threads_together(pace.table)))
    _show("figures", tables.figures(lines))

    grid, left_out = _grid(wanted.grid, pace, began)
    measured = [*timed.values(), *grid]
    _show("grid", tables.grid(measured, limits))
    _show("losses", tables.losses(measured))
    if left_out:
        print(f"left out for lack of time: {', '.join(case.name for case in left_out)}")
    for found in measured:
        for how, reason in found.refused.items():
            print(f"{found.case.name}: no {how}: {reason}")
    print(f"{time.perf_counter() - began:.0f} s")
    if options.write:
        _write(limits, lines, list(timed.values()), grid, left_out)
    own = {"native", "native_bf16", "reference"}
    return 1 if any(found.wrong & own for found in measured) else 0


@dataclass(frozen=True)
class _Selection:
    table: list[Case]
    grid: list[Case]
    extras: list[str]


def _selection(names: list[str] | None, quick: bool) -> _Selection:
    """What to run. A name selects the cases that contain it; one that selects none, but is a case, is run by itself."""
    table, extras = list(figures.TIMED), list(EXTRAS)
    grid = [case for case in cases.short_grid() if case not in figures.TIMED]
    if not names:
        return _Selection(table, [] if quick else grid, extras)

    def chosen(name: str) -> bool:
        return any(part in name for part in names)

    picked = _Selection(
        [c for c in table if chosen(c.name)], [c for c in grid if chosen(c.name)], [*filter(chosen, extras)]
    )
    for part in names:
        if not any(part in name for name in (*(c.name for c in picked.table + picked.grid), *picked.extras)):
            picked.grid.append(Case.parse(part))
    return picked


def _grid(chosen: list[Case], pace: Pace, began: float) -> tuple[list[Measured], list[Case]]:
    """Measure the cases, those with less arithmetic first, until the time is up."""
    found: list[Measured] = []
    ordered = sorted(chosen, key=lambda case: case.flops)
    for number, case in enumerate(ordered):
        if time.perf_counter() - began > pace.limit:
            return found, ordered[number:]
        hows = PAPER_HOWS if case.network == "paper" else GRID_HOWS
        found.append(_tell(case.name, lambda c=case, h=hows: measure(c, h, pace.grid)))
    order = {case: number for number, case in enumerate(chosen)}
    return sorted(found, key=lambda measured: order[measured.case]), []


def _write(
    limits: peak.Peak, lines: list[Figure], timed: list[Measured], grid: list[Measured], left_out: list[Case]
) -> None:
    """Put the tables into docs/performance.md."""
    slower = tables.losses([*timed, *grid])
    lost = tables.markdown(slower) if len(slower) > 1 else "None in this run."
    if left_out:
        lost += f"\n\nNot measured for lack of time: {', '.join(case.name for case in left_out)}."
    parts = {
        "machine": tables.markdown(tables.machine(limits)),
        "contenders": tables.markdown(tables.contenders()),
        "figures": tables.markdown(tables.figures(lines)),
        "floors": tables.markdown(tables.floors(timed, limits)),
        "grid": tables.markdown(tables.grid([*timed, *grid], limits)),
        "losses": lost,
    }
    for name, body in parts.items():
        tables.write_between_markers(PAGE, name, body)
    print(f"wrote {PAGE.name}")


def _tell(what: str, function: Callable[[], object]) -> object:
    """Run a function, saying on standard error what runs and how long it took."""
    print(f"{what} ...", end=" ", file=sys.stderr, flush=True)
    began = time.perf_counter()
    result = function()
    print(f"{time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    return result


def _show(title: str, rows: tables.Rows) -> None:
    if len(rows) > 1:
        print(f"\n== {title}\n{tables.plain(rows)}\n", flush=True)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the table of figures alone, with short repeats")
    parser.add_argument(
        "--case", action="append", metavar="NAME", help="only cases whose name contains NAME; repeatable"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--threads", type=int, default=0, help="threads (default: as many as torch takes)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=FULL.limit / 60,
        help="no new case of the grid starts after so long (%(default)g)",
    )
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    options = parser.parse_args(argv)
    if options.write and (options.case or options.quick):
        parser.error("--write puts a whole run into the page; leave out --case and --quick")
    return options


if __name__ == "__main__":
    sys.exit(main())

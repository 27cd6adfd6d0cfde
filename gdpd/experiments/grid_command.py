"""What `gdpd grid` does around `run_grid`: a live view, a summary of failures, the table of what was found."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdpd.experiments.grid import Grid
from gdpd.experiments.progress import LiveProgress
from gdpd.experiments.results import DATABASE, TABLE, read_results, result_records
from gdpd.experiments.runner import Outcome, Task, plan, run_grid
from gdpd.experiments.summary import summarise, table
from gdpd.experiments.workers import Workers

if TYPE_CHECKING:
    from rich.console import Console


def run(
    grid: Grid,
    folder: Path,
    *,
    workers: int,
    threads: int,
    ray: str | None,
    keep_runs: bool,
    dry_run: bool,
    console: Console,
) -> bool:
    """Carry out a grid and print what came of it; True if no job failed.

    Args:
        grid: from `read_grid`.
        folder: of the results table.
        workers, threads: of local processes.
        ray: address of a Ray cluster, or None.
        keep_runs: keep run folders.
        dry_run: check everything and say what is left to do.
        console: where it is printed.

    Raises:
        ValueError, FileNotFoundError, ImportError: bad input, before the first job.
        KeyboardInterrupt: interrupted, by key or by SIGTERM; the table holds what had ended.
    """
    if dry_run:
        missing = plan(grid, folder)
        console.print(f"jobs: {len(grid.jobs())}; to be done in {folder}: {len(missing)}", soft_wrap=True)
        return True
    place: Workers | int = workers
    if ray is not None:
        from gdpd.experiments.ray_workers import RayWorkers

        place = RayWorkers(ray, threads)
    with _terminated_is_interrupted(), LiveProgress(console) as progress:
        outcomes = run_grid(grid, folder, workers=place, threads=threads, keep_runs=keep_runs, listener=progress)
    for warning in dict.fromkeys(text for outcome in outcomes for text in outcome.warnings):
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    if (folder / DATABASE).is_file() and read_results(folder):
        console.print(table(summarise(result_records(folder))))
    console.print(f"results: {folder / TABLE}", soft_wrap=True)
    return _tell_failures(outcomes, console)


def _tell_failures(outcomes: Sequence[Outcome], console: Console) -> bool:
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if failed:
        told = f"{len(failed)} of {len(outcomes)} jobs failed; the next call tries them again:"
        console.print(told, style="red", highlight=False, soft_wrap=True)
    for outcome in failed:
        line = f"  {Task(outcome.job.teacher, outcome.job)}: {outcome.reason}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return not failed


@contextlib.contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """SIGTERM ends a grid as the interrupt key does: workers ended, table exported."""

    def interrupt(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

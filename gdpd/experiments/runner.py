"""Carries out a grid in local worker processes with pinned threads; finished runs are skipped, stopped ones resumed."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from gdpd.config import RunConfig
from gdpd.experiments.grid import GridRun

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Outcome:
    """How one run of a grid ended: `done`, `skipped` (it was finished before) or `failed` with a reason.

    `warnings` are those of the run, each once, as text: a worker's own terminal output would be lost among others'.
    """

    run: GridRun
    folder: Path
    status: str
    reason: str = ""
    warnings: tuple[str, ...] = ()


def run_grid(
    runs: Sequence[GridRun],
    folder: Path,
    *,
    workers: int = 2,
    threads: int = 1,
    on_outcome: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Carry out `runs`, one folder each below `folder`, and return how each ended, in the order given.

    The first run of every (dataset, seed) trains the teacher that the others of that pair read, so these start
    first and the others follow as their teacher is ready. A run that fails does not stop the others.

    Args:
        runs: from `Grid.runs(folder)`.
        folder: the grid's folder; made if need be.
        workers: worker processes; 0 runs everything in this process, one after another.
        threads: threads of torch and the numeric libraries in each worker.
        on_outcome: called in this process as each run ends.

    Raises:
        ValueError: workers or threads out of range, or a run's folder holds a run of another configuration.
    """
    if workers < 0 or threads < 1:
        raise ValueError(
            f"workers={workers}, threads={threads}: workers must be at least 0 (0: no further process), "
            "threads at least 1."
        )
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, Outcome] = {}

    def ended(outcome: Outcome) -> None:
        outcomes[outcome.run.name] = outcome
        if on_outcome is not None:
            on_outcome(outcome)

    waiting: dict[tuple[str, int], list[GridRun]] = defaultdict(list)
    for run in runs:
        if _finished(folder / run.name, run.config):
            ended(Outcome(run, folder / run.name, "skipped"))
        else:
            waiting[run.teacher].append(run)
    if workers == 0:
        for run in [run for group in waiting.values() for run in group]:
            ended(_outcome(run, folder, *_carry_out(run.config, folder / run.name)))
    elif waiting:
        with _pool(workers, threads) as pool:
            for outcome in _schedule(pool, waiting, folder):
                ended(outcome)
    return [outcomes[run.name] for run in runs]


def _schedule(
    pool: ProcessPoolExecutor, waiting: dict[tuple[str, int], list[GridRun]], folder: Path
) -> Iterator[Outcome]:
    under_way: dict[Future[tuple[str, list[str]]], GridRun] = {}

    def submit(run: GridRun) -> None:
        under_way[pool.submit(_carry_out, run.config, folder / run.name)] = run

    for group in waiting.values():
        submit(group[0])
    while under_way:
        finished, _ = wait(under_way, return_when=FIRST_COMPLETED)
        for future in finished:
            run = under_way.pop(future)
            failure = future.exception()
            yield _outcome(run, folder, *(future.result() if failure is None else (f"the worker died: {failure}", [])))
            group = waiting[run.teacher]
            for follower in group[1:] if run is group[0] else ():
                if failure is None:
                    submit(follower)
                else:  # a pool that lost a worker takes nothing more
                    yield _outcome(follower, folder, "not started: a worker died before", [])


def _outcome(run: GridRun, folder: Path, reason: str, warned: Iterable[str]) -> Outcome:
    return Outcome(run, folder / run.name, "failed" if reason else "done", reason, tuple(dict.fromkeys(warned)))


@contextlib.contextmanager
def _pool(workers: int, threads: int) -> Iterator[ProcessPoolExecutor]:
    # Spawned, not forked: torch's thread pool does not survive a fork. The numeric libraries read these variables
    # when they load, in the child, so they must stand in its environment from the start.
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _pin, (threads,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _pin(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _carry_out(config: RunConfig, folder: Path) -> tuple[str, list[str]]:
    """Carry out one run; why it failed (or nothing) and its warnings come back as text, which always pickles."""
    from gdpd.training import run

    reason = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            run(config, folder, resume=True)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
    quiet = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
    return reason, [str(warning.message) for warning in caught if not issubclass(warning.category, quiet)]


def _finished(folder: Path, config: RunConfig) -> bool:
    if not (folder / "metrics.json").is_file():
        return False
    from gdpd.training.checkpoint import check_same_config

    check_same_config(config, json.loads((folder / "config.json").read_text(encoding="utf-8")), str(folder))
    return True

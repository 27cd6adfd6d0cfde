"""Carries out a grid: teachers first, each once; a row for every finished job; a failure stops nothing else."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdpd.experiments.grid import Grid, Job
from gdpd.experiments.grid_file import check_folder, check_unfinished
from gdpd.experiments.job import TEACHER_FILES, Done, carry_out, train_teacher
from gdpd.experiments.preflight import preflight
from gdpd.experiments.results import DATABASE, RECIPE, TABLE, Result, ResultsTable, read_results
from gdpd.experiments.workers import LocalProcesses, ThisProcess, WorkerLost, Workers, check_counts

LOCK = "grid.lock"
TRIES = 3  # a task whose worker died is run again until it has been tried so often


@dataclass(frozen=True)
class Outcome:
    """How one job of a grid ended: `done`, `skipped` (the table had it) or `failed` with a reason."""

    job: Job
    status: str
    reason: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """What a worker is given: a job, or the teacher of a (data set, seed)."""

    teacher: tuple[str, int]
    job: Job | None = None

    def __str__(self) -> str:
        dataset, seed = self.teacher
        if self.job is None:
            return f"{Path(dataset).stem}, teacher, seed {seed}"
        config, told = self.job.config, "".join(f", {key} {value}" for key, value in self.job.trial.items())
        share = f"{100 * config.earliness:g} % read"
        return f"{Path(dataset).stem}, {share}, {self.job.label}, seed {seed}{told}"


class Listener:
    """Is told how a grid goes on; the methods do nothing until overridden."""

    def planned(self, total: int) -> None:
        """So many jobs are to be done."""

    def started(self, task: Task) -> None:
        """A task was given to a worker."""

    def stopped(self, task: Task, note: str = "") -> None:
        """A task is with no worker any more; `note` says what went wrong, if anything, and what follows from it."""

    def ended(self, outcome: Outcome) -> None:
        """A job has ended."""


def plan(grid: Grid, folder: Path) -> list[Job]:
    """The jobs of `grid` that the table in `folder` does not hold, after every check that needs no training.

    Nothing is written.

    Raises:
        As `run_grid`.
    """
    begun = (folder / DATABASE).is_file() or (folder / TABLE).is_file()
    missing = _plan(grid, folder, read_results(folder) if begun else [])[1]
    preflight(missing)
    return missing


def run_grid(
    grid: Grid,
    folder: Path,
    *,
    workers: Workers | int = 2,
    threads: int = 1,
    keep_runs: bool = False,
    listener: Listener | None = None,
) -> list[Outcome]:
    """Carry out the jobs of `grid` that the table in `folder` does not hold, and return how each ended, in order.

    Before the first job everything is read and tried that can be (`gdpd.experiments.preflight`). A job that fails
    stops no other, and is tried again by the next call. However the call ends, the table is exported.

    Args:
        grid: what to run.
        folder: the grid's folder; made if need be.
        workers: where the tasks run; a number is so many local processes, 0 this process.
        threads: threads of each local worker.
        keep_runs: keep every run folder, in `runs/` of the grid's folder.
        listener: told how it goes on, in this process.

    Raises:
        ValueError: bad input, see `read_grid`, `check_folder`, `check_unfinished` and `preflight`; worker or thread
            counts out of range; another process at work in the folder.
        FileNotFoundError: a data set that is not there.
    """
    from gdpd.training.atomic import write_json

    listener = listener or Listener()
    if isinstance(workers, int):
        check_counts(workers, threads)
    with _alone(folder), ResultsTable(folder) as table, contextlib.ExitStack() as stack:
        jobs, missing, recipe = _plan(grid, folder, table.results())
        # Before everything is tried, so that workers import what they need meanwhile.
        place = stack.enter_context(_place(workers, threads)) if missing else None
        preflight(missing)
        write_json(folder / RECIPE, recipe)
        listener.planned(len(jobs))
        waiting = {job.key for job in missing}
        outcomes = {job.key: Outcome(job, "skipped") for job in jobs if job.key not in waiting}
        for outcome in outcomes.values():
            listener.ended(outcome)
        try:
            if place is not None:
                for outcome in _Schedule(grid, folder, table, place, keep_runs, listener).carry_out(missing):
                    outcomes[outcome.job.key] = outcome
                    listener.ended(outcome)
        finally:
            table.export()
    return [outcomes[job.key] for job in jobs]


def _plan(grid: Grid, folder: Path, results: list[Result]) -> tuple[list[Job], list[Job], dict[str, Any]]:
    """All jobs, those to be done, and what grid.json has to say."""
    jobs = grid.jobs()
    recipe = check_folder(grid, folder, jobs, results)
    known = {result.key for result in results}
    missing = [job for job in jobs if job.key not in known]
    check_unfinished(folder, missing)
    return jobs, missing, recipe


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the lock is SQLite's, so that it goes with the process however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = sqlite3.connect(folder / LOCK, timeout=0, isolation_level=None)
    with contextlib.closing(lock):
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            told = f"another process carries out a grid in {folder} ({error}). Wait for it, or stop it."
            raise ValueError(told) from error
        yield


@contextlib.contextmanager
def _place(workers: Workers | int, threads: int) -> Iterator[Workers]:
    place = workers
    if isinstance(place, int):
        place = LocalProcesses(place, threads) if place else ThisProcess()
    try:
        yield place
    finally:
        place.close()


class _Schedule:
    """Hands tasks to workers: jobs in their order, each after its teacher, of which there is one per pair."""

    def __init__(
        self, grid: Grid, folder: Path, table: ResultsTable, workers: Workers, keep_runs: bool, listener: Listener
    ) -> None:
        self._grid = grid
        self._folder = folder
        self._table = table
        self._workers = workers
        self._keep_runs = keep_runs
        self._listener = listener
        self._under_way: dict[Any, Task] = {}
        self._tries: Counter[Task] = Counter()
        self._without: dict[tuple[str, int], str] = {}  # pairs whose teacher could not be trained, and why

    def carry_out(self, jobs: list[Job]) -> Iterator[Outcome]:
        waiting = list(jobs)
        while waiting or self._under_way:
            while len(self._under_way) < self._workers.capacity and (task := self._next(waiting)) is not None:
                self._start(task)
            for job in [job for job in waiting if job.teacher in self._without]:
                waiting.remove(job)
                yield Outcome(job, "failed", f"no teacher: {self._without[job.teacher]}")
            if not self._under_way:
                continue
            for handle, came in self._workers.wait(list(self._under_way)):
                task = self._under_way.pop(handle)
                if isinstance(came, WorkerLost) and self._tries[task] < TRIES:
                    self._listener.stopped(task, f"{came}; it is run again")
                    if task.job is not None:
                        waiting.insert(0, task.job)
                    continue
                done = Done(reason=f"tried {TRIES} times: {came}") if isinstance(came, WorkerLost) else came
                self._listener.stopped(task, "" if task.job is not None else done.reason)
                if task.job is None:
                    self._keep_teacher(task.teacher, done)
                else:
                    yield self._ended(task.job, done)

    def _next(self, waiting: list[Job]) -> Task | None:
        """The first waiting job that can start, taken off the list; or the first teacher that one waits for."""
        in_training = {task.teacher for task in self._under_way.values() if task.job is None}
        for number, job in enumerate(waiting):
            if job.teacher in self._without or job.teacher in in_training:
                continue
            if not (self._teacher_home(job.teacher) / TEACHER_FILES[-1]).is_file():
                return Task(job.teacher)
            return Task(job.teacher, waiting.pop(number))
        return None

    def _start(self, task: Task) -> None:
        self._tries[task] += 1
        self._listener.started(task)
        if task.job is None:
            handle = self._workers.submit(train_teacher, self._grid.teacher_config(task.teacher))
        else:
            home = self._teacher_home(task.teacher)
            teacher = {name: (home / name).read_bytes() for name in TEACHER_FILES}
            here = self._keep_runs or self._workers.shares_files
            run = str(self._folder / "runs" / task.job.name) if here else None
            handle = self._workers.submit(carry_out, task.job.config, teacher, run, self._keep_runs)
        self._under_way[handle] = task

    def _teacher_home(self, teacher: tuple[str, int]) -> Path:
        """Where the teacher lies; its name changes with the options that it depends on."""
        from gdpd.training.teacher_cache import teacher_key

        dataset, seed = teacher
        config = self._grid.teacher_config(teacher)
        key = teacher_key(config, f"{dataset} {config.resample_to} {config.missing}")
        return self._folder / "teachers" / f"{Path(dataset).stem}-s{seed}-{key[:8]}"

    def _keep_teacher(self, teacher: tuple[str, int], done: Done) -> None:
        from gdpd.training.atomic import write_bytes

        if done.reason:
            self._without[teacher] = done.reason
            return
        for name in TEACHER_FILES:
            write_bytes(self._teacher_home(teacher) / name, done.value[name])

    def _ended(self, job: Job, done: Done) -> Outcome:
        if done.reason:
            return Outcome(job, "failed", done.reason, done.warnings)
        dataset, earliness, method, seed, _ = job.key
        row = Result(dataset=dataset, earliness=earliness, method=method, seed=seed, options=job.options, **done.value)
        self._table.add(row)
        return Outcome(job, "done", warnings=done.warnings)

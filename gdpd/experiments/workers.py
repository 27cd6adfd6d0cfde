"""Where a grid's tasks run: in this process, or in local worker processes with pinned threads.

`gdpd.experiments.ray_workers` is a third place. All three have the same four members; a task is a function of
`gdpd.experiments.job` with its arguments.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, Protocol

from gdpd.experiments.job import Done

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


class WorkerLost(RuntimeError):
    """A worker died with its task; the task can be run again."""


class Workers(Protocol):
    """A place for tasks.

    Attributes:
        capacity: tasks that run at once.
        shares_files: whether the workers see the folders of this process.
    """

    capacity: int
    shares_files: bool

    def submit(self, function: Callable[..., Done], *arguments: Any) -> Any:
        """Start a task; returns a handle."""

    def wait(self, handles: list[Any]) -> list[tuple[Any, Done | WorkerLost]]:
        """Wait until at least one of the handles has ended; those that have, with what came of them."""

    def close(self) -> None:
        """End the workers; what is under way is dropped."""


def check_counts(workers: int, threads: int) -> None:
    """Raise ValueError unless `workers` is at least 0 and `threads` at least 1."""
    if workers < 0 or threads < 1:
        raise ValueError(
            f"workers={workers}, threads={threads}: workers must be at least 0 (0: no further process), "
            "threads at least 1."
        )


class ThisProcess:
    """Tasks one after another in this process."""

    capacity = 1
    shares_files = True

    def submit(self, function: Callable[..., Done], *arguments: Any) -> Any:
        """Run the task."""
        future: Future[Done] = Future()
        future.set_result(function(*arguments))
        return future

    def wait(self, handles: list[Any]) -> list[tuple[Any, Done | WorkerLost]]:
        """Every task has ended."""
        return [(handle, handle.result()) for handle in handles]

    def close(self) -> None:
        """Nothing to end."""


class LocalProcesses:
    """Tasks in worker processes of this machine, with pinned threads.

    Dead workers are replaced; none outlives the grid.

    Args:
        workers: processes, at least 1.
        threads: threads of torch and the numeric libraries in each.
    """

    shares_files = True

    def __init__(self, workers: int, threads: int) -> None:
        check_counts(workers, threads)
        self.capacity = workers
        self._threads = threads
        self._idle = [_Process(threads) for _ in range(workers)]
        self._busy: dict[Future[Done], _Process] = {}

    def submit(self, function: Callable[..., Done], *arguments: Any) -> Any:
        """Start a task; returns its future."""
        process = self._idle.pop()
        try:
            future = process.pool.submit(function, *arguments)
        except BrokenProcessPool:  # it died with a task, or idle
            process.close()
            process = _Process(self._threads)
            future = process.pool.submit(function, *arguments)
        self._busy[future] = process
        return future

    def wait(self, handles: list[Any]) -> list[tuple[Any, Done | WorkerLost]]:
        """Wait for the first of the futures; when a worker dies, its task alone is lost."""
        ended, _ = wait(handles, return_when=FIRST_COMPLETED)
        found: list[tuple[Any, Done | WorkerLost]] = []
        for handle in (handle for handle in handles if handle in ended):
            process = self._busy.pop(handle)
            self._idle.append(process)
            error = handle.exception()
            if isinstance(error, BrokenProcessPool):
                found.append((handle, WorkerLost(process.told_end())))
            elif error is not None:
                found.append((handle, Done(reason=f"{type(error).__name__}: {error}")))
            else:
                found.append((handle, handle.result()))
        return found

    def close(self) -> None:
        """End the worker processes."""
        for process in (*self._idle, *self._busy.values()):
            process.close()


class _Process:
    """One worker process in an executor of its own, so that no other task is lost when it dies."""

    def __init__(self, threads: int) -> None:
        others = set(multiprocessing.active_children())
        with pinned_environment(threads):
            # Spawned, not forked: torch's thread pool does not survive a fork.
            self.pool = ProcessPoolExecutor(1, get_context("spawn"), _begin, (threads,))
            self.pool.submit(os.getpid)  # the process starts with a task
        self._started = set(multiprocessing.active_children()) - others

    def told_end(self) -> str:
        """How it ended."""
        for process in self._started:
            process.join(timeout=5)
            code = process.exitcode
            if code is not None and code < 0:
                name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
                return f"its worker died of {name}" + (" (often: no memory left)" if name == "SIGKILL" else "")
            if code is not None:
                return f"its worker ended with exit code {code}"
        return "its worker died"

    def close(self) -> None:
        """End the process."""
        for process in self._started:
            process.terminate()
        self.pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def pinned_environment(threads: int) -> Iterator[None]:
    """An environment with pinned threads: numeric libraries read it as they load, so a child has to begin with it."""
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(thread_variables(threads))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def thread_variables(threads: int) -> dict[str, str]:
    """Environment variables that pin the threads of the numeric libraries."""
    return dict.fromkeys(_THREAD_VARIABLES, str(threads))


def _begin(threads: int) -> None:
    import torch

    threading.Thread(target=_end_with_the_grid, name="gdpd-grid-watch", daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the interrupt key is for the process that the terminal knows
    import gdpd.training  # noqa: F401  what every task needs, while the grid is checked

    torch.set_num_threads(threads)


def _end_with_the_grid() -> None:
    """End this worker when the grid's process is gone, however it ended.

    A worker that a SIGKILL of the grid left behind would train on in a run folder that the next grid goes on with, and
    wait for ever after that.
    """
    grid = multiprocessing.parent_process()
    if grid is not None:
        grid.join()
        os._exit(1)

"""A grid's tasks on a Ray cluster. Needs the extra `ray`; imported only where a cluster is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gdpd.experiments.job import Done
from gdpd.experiments.workers import WorkerLost, check_counts, thread_variables


class RayWorkers:
    """Tasks on a Ray cluster, each with as many of its CPUs as it has threads.

    The machines of the cluster need this package and the data sets (installed, or in `data_dir` under the same path).
    Teachers and results travel with the tasks; only `keep_runs` asks for a folder that all machines share.

    Args:
        address: as `ray.init` takes it, such as "auto" or "ray://host:10001"; "local" starts a cluster here.
        threads: threads of each task.

    Raises:
        ImportError: Ray is not installed; names the extra.
        ConnectionError: no cluster there.
        ValueError: the cluster has no machine for a task of so many threads.
    """

    shares_files = False

    def __init__(self, address: str, threads: int = 1) -> None:
        check_counts(0, threads)
        try:
            import ray
        except ImportError as error:
            raise ImportError('--ray needs Ray, which is not installed: pip install "gdpd-kernels[ray]"') from error
        self._ray = ray
        self._began = not ray.is_initialized()
        if self._began:
            environment = {"env_vars": thread_variables(threads)}
            try:
                ray.init(address, runtime_env=environment, log_to_driver=False, logging_level="error")
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ConnectionError(
                    f"--ray {address} leads to no cluster ({str(error).strip().splitlines()[0]}). Give the address of "
                    "one, such as ray://host:10001; 'auto' finds one on this machine, 'local' starts one here."
                ) from error
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if cpus < threads:
            self.close()
            raise ValueError(f"threads={threads}: the cluster at {address} has {cpus} CPUs. Give fewer threads.")
        self.capacity = cpus // threads
        # Lost tasks come back to the grid, which counts the tries of all kinds of workers alike.
        self._remote = ray.remote(num_cpus=threads, max_retries=0)(_pinned)
        self._threads = threads

    def submit(self, function: Callable[..., Done], *arguments: Any) -> Any:
        """Start a task; returns Ray's reference to its result."""
        return self._remote.remote(self._threads, function, *arguments)

    def wait(self, handles: list[Any]) -> list[tuple[Any, Done | WorkerLost]]:
        """Wait for the first of the tasks."""
        ended, _ = self._ray.wait(handles, num_returns=1)
        return [(handle, self._came_of(handle)) for handle in ended]

    def _came_of(self, handle: Any) -> Done | WorkerLost:
        errors = self._ray.exceptions
        try:
            done: Done = self._ray.get(handle)
            return done
        except errors.RayTaskError as error:  # raised by the task, such as a package that is missing there
            return Done(reason=str(error).strip().splitlines()[-1])
        except errors.RayError as error:  # the worker, its machine or its memory
            return WorkerLost(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")

    def close(self) -> None:
        """Leave the cluster, which drops what is under way, or end the one that was started here."""
        if self._began:
            self._ray.shutdown()


def _pinned(threads: int, function: Callable[..., Done], *arguments: Any) -> Done:
    import torch

    torch.set_num_threads(threads)
    return function(*arguments)

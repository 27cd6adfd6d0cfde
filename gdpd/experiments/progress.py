"""How a grid goes on, in a terminal: a bar over all jobs, a line per task under way, a line per job that ended."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

from gdpd.experiments.runner import Listener, Outcome, Task

if TYPE_CHECKING:
    from rich.console import Console


class LiveProgress(Listener):
    """A live view of a grid; a context manager around `run_grid`.

    The time left is told from the first job on that ended in this call, by the pace so far; teachers, which come first,
    make it too long at the beginning.

    Args:
        console: where it is shown; where that is no terminal, lines alone.
    """

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console)
        self._all = self._progress.add_task("checking", total=None)
        self._lines: dict[Task, object] = {}
        self._failed = self._skipped = self._ended = self._total = 0
        self._began = time.monotonic()

    def __enter__(self) -> LiveProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in list(self._lines):
            self.stopped(task)
        self._progress.stop()
        if self._skipped:
            self._say(f"{self._skipped} job{'s were' if self._skipped > 1 else ' was'} in the table already")

    def planned(self, total: int) -> None:
        """See `Listener`."""
        self._total, self._began = total, time.monotonic()
        self._progress.update(self._all, total=total, description="jobs")

    def started(self, task: Task) -> None:
        """See `Listener`."""
        self._lines[task] = self._progress.add_task(f"  {task}", total=None)

    def stopped(self, task: Task, note: str = "") -> None:
        """See `Listener`."""
        self._progress.remove_task(self._lines.pop(task))  # type: ignore[arg-type]
        if note:
            self._say(f"{task}: {note}")

    def ended(self, outcome: Outcome) -> None:
        """See `Listener`."""
        self._progress.advance(self._all)
        if outcome.status == "skipped":
            self._skipped += 1
            return
        told = f": {outcome.reason}" if outcome.reason else ""
        self._say(f"{outcome.status:8} {Task(outcome.job.teacher, outcome.job)}{told}")
        self._ended += 1
        self._failed += outcome.status == "failed"
        self._progress.update(self._all, description=self._description())

    def _description(self) -> str:
        left = self._total - self._skipped - self._ended
        seconds = round((time.monotonic() - self._began) / self._ended * left)
        told = [f"{self._failed} failed"] if self._failed else []
        told += [f"about {timedelta(seconds=seconds)} left"] if left else []
        return f"jobs ({', '.join(told)})" if told else "jobs"

    def _say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

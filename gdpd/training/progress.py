"""Who listens to training: rich progress bars in the terminal, TensorBoard, or several listeners at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gdpd.training.history import Progress


class RichProgress:
    """One progress bar per stage, with the loss, the validation score and, for GDPD, the mean of alpha.

    Args:
        console: a `rich.console.Console`; rich's own by default.
    """

    def __init__(self, console: Any = None) -> None:
        self.console = console
        self._bars: Any = None
        self._task: Any = None

    def start(self, stage: str, epochs: int, done: int) -> None:
        """A new bar of `epochs` epochs, `done` of them filled."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.stop()
        self._bars = Bars(
            TextColumn("[bold]{task.description:<9}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._bars.start()
        self._task = self._bars.add_task(stage, total=epochs, completed=done, told="")

    def epoch(self, record: dict[str, Any]) -> None:
        """Advance the bar."""
        told = f"loss {record['train']['loss']:.3f}  val AUC-PRC {record['val']['auc_prc']:.1f} %"
        if "alpha" in record:
            told += f"  alpha {record['alpha']['mean']:.2f}"
        self._bars.update(self._task, advance=1, told=told)

    def stop(self) -> None:
        """Leave the bar as it is."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


class TensorBoard:
    """Writes every number of the history as TensorBoard scalars, one tag per stage and quantity.

    Args:
        folder: of the event files.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                'tensorboard=True needs TensorBoard: pip install "gdpd-kernels[tensorboard]", or leave the option out'
            ) from error
        self._make_writer = SummaryWriter
        self.folder = folder
        self._writer: Any = None

    def start(self, stage: str, epochs: int, done: int) -> None:
        """Open an event file; points from epoch `done` on, of a run that was killed, are hidden."""
        self._writer = self._make_writer(str(self.folder / stage), purge_step=done)

    def epoch(self, record: dict[str, Any]) -> None:
        """Write the record's numbers."""
        for group, values in record.items():
            named = values if isinstance(values, dict) else {"": values}
            for name, value in named.items():
                if isinstance(value, float):
                    self._writer.add_scalar("/".join(filter(None, (group, name))), value, record["epoch"])

    def stop(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Several:
    """Hands everything to several listeners, in order."""

    def __init__(self, listeners: Sequence[Progress]) -> None:
        self.listeners = listeners

    def start(self, stage: str, epochs: int, done: int) -> None:
        """As `Progress.start`."""
        for listener in self.listeners:
            listener.start(stage, epochs, done)

    def epoch(self, record: dict[str, Any]) -> None:
        """As `Progress.epoch`."""
        for listener in self.listeners:
            listener.epoch(record)

    def stop(self) -> None:
        """As `Progress.stop`."""
        for listener in self.listeners:
            listener.stop()

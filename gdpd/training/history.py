"""The record of a run, one line of JSON per epoch, and whoever wants to hear of each line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

from gdpd.training.atomic import plain, write_bytes


class Progress(Protocol):
    """Told of a stage's start, of every epoch's record, and of the end; see `gdpd.training.progress.RichProgress`."""

    def start(self, stage: str, epochs: int, done: int) -> None:
        """A stage of `epochs` epochs begins, `done` of which were trained before."""

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch has ended; `record` is its line of the history."""

    def stop(self) -> None:
        """The stage has ended, or was broken off."""


class History:
    """Records of epochs in memory, and in a file if one is given.

    A record holds `stage` ("teacher" or "student"), `candidate` (number of the teacher), `epoch` (from 0), `phase`
    ("warmup" or "main"), `train` (loss and its parts, means over the epoch), `val` (ce, accuracy, auc_prc), `lr`,
    `seconds`, and for parts that are distributions, such as `alpha`, their mean and quantiles.

    Args:
        path: file of one JSON line per record; None keeps records in memory only. Lines that are there are read.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        if path is not None and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    self.records.append(json.loads(line))
                except json.JSONDecodeError:
                    break  # the line that a killed process was writing; the epochs after a checkpoint are run again

    def rewind(self, stage: str, epoch: int) -> None:
        """Forget the records of `stage` from epoch `epoch` on, and with them those of later stages."""
        kept = []
        for record in self.records:
            if stage_name(record) == stage and record["epoch"] >= epoch:
                break
            kept.append(record)
        self.records = kept
        if self.path is not None:
            write_bytes(self.path, "".join(_line(record) for record in kept).encode())

    def append(self, record: dict[str, Any]) -> None:
        """Add a record.

        Raises:
            OSError: the line could not be written (a full disk); the file ends with the line before it.
        """
        self.records.append(record)
        if self.path is None:
            return
        line = _line(record).encode()
        with self.path.open("ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                if file.write(line) != len(line):
                    raise OSError(f"{self.path}: a line could be written in part only. Is the disk full?")
            except OSError:
                os.truncate(self.path, size)
                raise

    def of(self, stage: str) -> list[dict[str, Any]]:
        """Records of a stage, by its name in checkpoints ("teacher0", "student")."""
        return [record for record in self.records if stage_name(record) == stage]


def stage_name(record: dict[str, Any]) -> str:
    """Name of the stage that a record belongs to: "student", or "teacher" and the candidate's number."""
    return record["stage"] + (str(record["candidate"]) if "candidate" in record else "")


def _line(record: dict[str, Any]) -> str:
    return json.dumps(plain(record), allow_nan=False) + "\n"

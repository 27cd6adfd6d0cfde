"""Checkpoints of a training stage: one safetensors file of tensors and one JSON file that says what it is.

The JSON is written last and holds the tensors' checksum: a checkpoint without its JSON does not count, and one whose
checksum is wrong is reported and passed over for the one before it. Randomness needs no place in a checkpoint: every
draw is a function of (seed, stage, epoch, rank), see `gdpd.training.loop`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gdpd.config import RunConfig
from gdpd.training.atomic import read_json, read_tensors, remove_partial_files, write_json, write_tensors

KEPT = 2  # the newest checkpoint, and the one before it in case the newest is damaged


class CheckpointError(ValueError):
    """No checkpoint of a stage can be used; the message gives each one's reason and the ways out."""


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over for an older good one."""


@dataclass(frozen=True)
class Checkpoint:
    """State of a stage after `epoch` epochs: `tensors` by name, and `state`, plain values for JSON."""

    stage: str
    epoch: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run in one folder; the last two of every stage are kept.

    Args:
        folder: where the files are; made at the first save.
        config: the run's configuration, written into every checkpoint and compared when one is read.
        data_digest: checksum of the data, likewise.
    """

    def __init__(self, folder: Path, config: RunConfig, data_digest: str) -> None:
        self.folder = folder
        self.config = config
        self.data_digest = data_digest
        if folder.is_dir():
            remove_partial_files(folder)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, then delete the oldest ones of its stage.

        Raises:
            OSError: the disk is full or cannot be written; the checkpoints that were there are untouched.
        """
        description = self.folder / f"{checkpoint.stage}-{checkpoint.epoch:06d}.json"
        tensors = description.with_suffix(".safetensors")
        sha256 = write_tensors(tensors, checkpoint.tensors)
        try:
            write_json(
                description,
                {
                    "format": 1,
                    "stage": checkpoint.stage,
                    "epoch": checkpoint.epoch,
                    "sha256": sha256,
                    "data": self.data_digest,
                    "config": self.config.to_dict(),
                    "state": checkpoint.state,
                },
            )
        except OSError:
            tensors.unlink(missing_ok=True)
            raise
        for old in self._descriptions(checkpoint.stage)[KEPT:]:
            old.unlink(missing_ok=True)  # first the JSON: what is left without one does not count
            old.with_suffix(".safetensors").unlink(missing_ok=True)

    def load(self, stage: str) -> Checkpoint | None:
        """The newest good checkpoint of `stage`, or None if the stage has none.

        Raises:
            CheckpointError: there are checkpoints, and each is damaged.
            ValueError: a checkpoint of another configuration or of other data; the message names the differing
                options with both values.

        Warns:
            CheckpointWarning: a damaged checkpoint was passed over.
        """
        reasons: list[str] = []
        for description in self._descriptions(stage):
            try:
                found = read_json(description)
                if not {"sha256", "epoch", "state", "config", "data"} <= found.keys():
                    raise ValueError(f"{description.name} lacks entries that every checkpoint has")
                tensors = read_tensors(description.with_suffix(".safetensors"), found["sha256"])
            except (OSError, ValueError) as error:
                reasons.append(str(error))
                continue
            self._check_origin(description, found)
            if reasons:
                warnings.warn(
                    f"{'; '.join(reasons)}. Resuming from the last good checkpoint, {description.stem} "
                    f"(epoch {found['epoch']}).",
                    CheckpointWarning,
                    stacklevel=2,
                )
            return Checkpoint(stage, found["epoch"], tensors, found["state"])
        if reasons:
            raise CheckpointError(
                f"no checkpoint of stage {stage!r} in {self.folder} can be used: {'; '.join(reasons)}. Delete these "
                "files to train the stage again from its start, or put back a copy of them."
            )
        return None

    def clear(self) -> None:
        """Delete every checkpoint, and the folder if nothing else is in it."""
        if not self.folder.is_dir():
            return
        for path in [*self.folder.glob("*-??????.json"), *self.folder.glob("*-??????.safetensors")]:
            path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _descriptions(self, stage: str) -> list[Path]:
        return sorted(self.folder.glob(f"{stage}-??????.json"), reverse=True)

    def _check_origin(self, path: Path, found: dict[str, Any]) -> None:
        check_same_config(self.config, found["config"], str(path))
        if found["data"] != self.data_digest:
            raise ValueError(
                f"{path} was trained on other data than what {self.config.dataset!r} holds now. Restore the data, or "
                "start the run again in an empty folder."
            )


def check_same_config(config: RunConfig, written: dict[str, Any], where: str) -> None:
    """Raise ValueError, naming each option that differs with both values, unless `written` fits `config`."""
    differing = config.differences(RunConfig.from_dict(written))
    if differing:
        listed = "; ".join(f"{name} is {there!r} there and {here!r} now" for name, (here, there) in differing.items())
        raise ValueError(
            f"{where} belongs to another configuration: {listed}. Resume with the options of that run, or choose "
            "another folder."
        )

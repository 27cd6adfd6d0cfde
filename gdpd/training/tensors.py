"""A data set as tensors: checked, cut to prefixes, split, and put on the training device once, before training."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdpd.config import RunConfig
from gdpd.data import TimeSeriesData, stratified_split
from gdpd.distillers import Batch
from gdpd.models import Classifier


@dataclass(frozen=True)
class Series:
    """Series of one split: `x` [n, channels, time], `y` int64 [n], `lengths` int64 [n], None when all have `time`."""

    x: Tensor
    y: Tensor
    lengths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device, dtype: torch.dtype) -> Series:
        """The same series on `device`, with values of type `dtype`."""
        lengths = None if self.lengths is None else self.lengths.to(device)
        return Series(self.x.to(device, dtype), self.y.to(device), lengths)


@dataclass(frozen=True)
class TrainingSet:
    """What a stage trains on: series, and for each of them what the teacher made of its full length.

    Attributes:
        series: what the network under training reads.
        z_long: teacher features [n, teacher_dim], computed once; None for a teacher's own training.
        teacher_logits: [n, classes]; likewise.
        teacher_sequence: [n, full time, teacher_sequence_dim]; None where the method does not ask for it.
        teacher_lengths: int64 [n], steps of the full series; None when all have `full time`.
    """

    series: Series
    z_long: Tensor | None = None
    teacher_logits: Tensor | None = None
    teacher_sequence: Tensor | None = None
    teacher_lengths: Tensor | None = None

    @classmethod
    def taught(cls, prepared: Prepared, known: tuple[Tensor, ...]) -> TrainingSet:
        """The training prefixes, with what `outputs` made of the full series: features, logits, maybe sequences."""
        z_long, logits, *sequence = known
        lengths = prepared.full_train.lengths
        return cls(prepared.prefix_train, z_long, logits, *((sequence[0], lengths) if sequence else ()))

    def __len__(self) -> int:
        return len(self.series)

    def batch(self, index: Tensor) -> Batch:
        """The rows `index`, int64 [batch], collated on the device of the series."""
        series = self.series
        device = series.x.device
        placed = index.to(device)

        def rows(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            if values.device == device:
                return values.index_select(0, placed)
            return values.index_select(0, index.to(values.device)).to(device)  # large teacher outputs stay on the host

        return Batch(
            x_prefix=series.x.index_select(0, placed),
            y=series.y.index_select(0, placed),
            lengths=rows(series.lengths),
            index=placed,
            z_long=rows(self.z_long),
            teacher_logits=rows(self.teacher_logits),
            teacher_sequence=rows(self.teacher_sequence),
            teacher_lengths=rows(self.teacher_lengths),
        )


@dataclass(frozen=True)
class Prepared:
    """The splits of a data set, full (for the teacher) and as the student reads them; test splits may be empty."""

    full_train: Series
    full_validation: Series
    full_test: Series
    prefix_train: Series
    prefix_validation: Series
    prefix_test: Series
    num_classes: int
    name: str
    digest: str

    def to(self, device: torch.device, dtype: torch.dtype) -> Prepared:
        """The same on `device`, with values of type `dtype`."""
        moved: dict[str, Any] = {
            name: value.to(device, dtype) for name, value in vars(self).items() if isinstance(value, Series)
        }
        return dataclasses.replace(self, **moved)


def prepare(data: TimeSeriesData, config: RunConfig) -> Prepared:
    """Check a data set and cut it: validation split by class, full series and prefixes.

    Raises:
        ValueError: fewer than two classes, a class that no training series has, a value that is not finite, a
            prefix of zero steps, a channel that is not there, or too few series to hold some out.
    """
    check_data(data)
    train, validation = stratified_split(data.y_train, config.validation_fraction, config.seed)
    if len(np.unique(data.y_train[train])) < 2 or not len(validation):
        raise ValueError(
            f"{data.name}: of {len(data.y_train)} training series, {len(validation)} are held out for validation and "
            f"{len(train)} of {len(np.unique(data.y_train[train]))} class(es) are left to train on. Give more series."
        )
    splits: dict[str, Series] = {}
    channels = _student_channels(data, config)
    for kind, earliness, mode in (("full", 1.0, "raw"), ("prefix", config.earliness, config.prefix_mode)):
        for split in ("train", "test"):
            y = data.y_train if split == "train" else data.y_test
            part = "prefix" if kind == "full" else config.student_part
            x, lengths = data.prefixes(split, earliness, mode, part)
            if kind == "prefix":
                x = x[:, channels]
            equal = data.equal_length
            for name, index in (
                {"train": train, "validation": validation}.items()
                if split == "train"
                else [("test", np.arange(len(y)))]
            ):
                splits[f"{kind}_{name}"] = Series(
                    torch.from_numpy(np.ascontiguousarray(x[index])),
                    torch.from_numpy(y[index]),
                    None if equal else torch.from_numpy(lengths[index]),
                )
    return Prepared(**splits, num_classes=data.n_classes, name=data.name, digest=_digest(data))


def _student_channels(data: TimeSeriesData, config: RunConfig) -> list[int]:
    channels = list(config.student_channels) or list(range(data.n_channels))
    if max(channels) >= data.n_channels:
        raise ValueError(
            f"student_channels={config.student_channels}: {data.name} has {data.n_channels} channel(s). Give numbers "
            f"of 0..{data.n_channels - 1}, or none for all."
        )
    return channels


def check_data(data: TimeSeriesData) -> None:
    """Raise ValueError for a data set that nothing can be learned from, or that holds values that are not finite."""
    present = np.unique(data.y_train)
    if data.n_classes < 2 or len(present) < 2:
        raise ValueError(
            f"{data.name} has {len(present)} class(es) among its {len(data.y_train)} training series. A classifier "
            "needs at least two: add series of another class."
        )
    missing = [str(data.classes[c]) for c in range(data.n_classes) if c not in present]
    if missing:
        raise ValueError(
            f"{data.name} has no training series of class {', '.join(missing)}. Remove the class, or split the data "
            "so that every class is in the training part."
        )
    outside = np.setdiff1d(np.concatenate([data.y_train, data.y_test]), np.arange(data.n_classes))
    if len(outside):
        raise ValueError(f"{data.name} has the class number {outside[0]}, outside 0..{data.n_classes - 1}.")
    for split, values in (("training", data.X_train), ("test", data.X_test)):
        if not np.isfinite(values).all():
            series, channel, step = np.argwhere(~np.isfinite(values))[0]
            raise ValueError(
                f"{data.name}: {split} series {series} holds {values[series, channel, step]} in channel {channel} at "
                f"step {step}. Remove the series, or fill the gap (missing='interpolate' or 'forward')."
            )


def batches(n: int, batch_size: int, generator: torch.Generator, *, least: int = 2) -> Iterator[Tensor]:
    """Shuffled rows 0..n-1 in parts of `batch_size`; int64 [batch] each.

    A last part of fewer than `least` rows joins the one before it: BatchNorm cannot normalise a single row, and
    dropping the row would leave it out of the epoch.
    """
    order = torch.randperm(n, generator=generator)
    ends = list(range(batch_size, n, batch_size))
    if ends and n - ends[-1] < least:
        ends.pop()
    yield from order.tensor_split(ends)


@torch.no_grad()
def outputs(model: Classifier, series: Series, batch_size: int = 256, *, sequence: bool = False) -> tuple[Tensor, ...]:
    """Features [n, feature_dim] and logits [n, classes] of every series, in eval mode; the mode is put back.

    With `sequence`, the hidden sequences [n, time, sequence_dim] as well.
    """
    was_training = model.training
    model.eval()
    parts = []
    for rows in torch.arange(len(series), device=series.y.device).split(batch_size):
        lengths = None if series.lengths is None else series.lengths[rows]
        parts.append(model(series.x[rows], lengths, **({"sequence": True} if sequence else {})))
    model.train(was_training)
    return tuple(_at_least_float32(torch.cat(part)) for part in zip(*parts, strict=True))


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _digest(data: TimeSeriesData) -> str:
    """SHA-256 of the training part of a data set."""
    digest = hashlib.sha256()
    for array in (data.X_train, data.y_train, data.lengths_train):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()

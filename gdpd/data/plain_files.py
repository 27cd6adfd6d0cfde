"""Readers of formats that need numpy alone: columns of numbers (.txt), arrays of both splits (.npz), plain .ts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

_ARRAYS = ("X_train", "y_train", "X_test", "y_test")


def read_txt(path: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """Read a UCR file of one series a line: the label, then the values, separated by blanks or commas.

    Returns:
        (series, labels): arrays (1, length) float64, NaN where a value is missing; labels (n,) float64.

    Raises:
        ValueError: something that is no number, or lines of different lengths.
    """
    with path.open(encoding="utf-8") as file:
        delimiter = "," if "," in file.readline() else None
    table = np.loadtxt(path, delimiter=delimiter, ndmin=2)
    if table.shape[1] < 2:
        raise ValueError("no values beside the label")
    return [row[None, 1:] for row in table], table[:, 0]


def is_npz_set(path: Path) -> bool:
    """Whether an .npz file holds the arrays of a data set."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return set(_ARRAYS) <= set(arrays.files)
    except (OSError, ValueError):
        return False


def read_npz(path: Path, split: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Read one split, "train" or "test", of an .npz file as tslearn keeps them: X_train, y_train, X_test, y_test.

    X is (n, length) or (n, length, channels), NaN after the end of a shorter series.

    Returns:
        (series, labels): arrays (channels, length) float64; labels (n,).

    Raises:
        ValueError: an array is missing, or of the wrong shape.
    """
    with np.load(path, allow_pickle=False) as arrays:
        lacking = [name for name in _ARRAYS if name not in arrays.files]
        if lacking:
            raise ValueError(f"it lacks {', '.join(lacking)}")
        values, labels = arrays[f"X_{split}"], arrays[f"y_{split}"]
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim != 3 or labels.shape != (len(values),):
        raise ValueError(
            f"X_{split} has shape {values.shape} and y_{split} {labels.shape}; "
            "needed are (n, length, channels) and (n,)"
        )
    return [np.asarray(series.T, dtype=np.float64) for series in values], labels


_PLAIN = {"timestamps": "false", "missing": "false", "equallength": "true"}


def read_plain_ts(path: Path, header: dict[str, str]) -> tuple[np.ndarray, np.ndarray] | None:
    """A .ts file of labelled series of one length without gaps, as aeon reads it; None if it is any other.

    Most files are so, and importing aeon takes a hundred times as long as reading one. What is odd in any way is left
    to aeon, and with it what is wrong.

    Args:
        path: the file.
        header: of `gdpd.data.files.ts_header`.

    Returns:
        (series, labels): float64 (n, channels, length); labels (n,) as the file writes them, in lower case.
    """
    stated = {key: value.lower() for key, value in header.items()}
    if any(stated.get(key) != value for key, value in _PLAIN.items()) or len(stated.get("classlabel", "").split()) < 2:
        return None
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.strip() == "@data":
                    break
            cases = [line.strip().lower().split(":") for line in file]
        values = np.array([[list(map(float, channel.split(","))) for channel in case[:-1]] for case in cases])
    except ValueError:  # no number, or series of several lengths
        return None
    if values.ndim != 3 or not np.isfinite(values).all():
        return None
    if stated.get("univariate") != ("true" if values.shape[1] == 1 else "false"):
        return None
    return values, np.array([case[-1] for case in cases])

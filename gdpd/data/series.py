"""From lists of series to padded arrays with lengths; missing values found, named, or filled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MISSING = ("error", "interpolate", "forward")


def pad_series(
    series: np.ndarray | Sequence[np.ndarray], length: int | None = None, *, what: str = "series"
) -> tuple[np.ndarray, np.ndarray]:
    """Put series of different lengths in one array, padded at the end.

    Trailing steps at which every channel is NaN count as padding (the UCR archive writes variable lengths so)
    and shorten the series.

    Args:
        series: array ``(n, channels, time)`` or ``(n, time)`` (one channel), or a list of n arrays
            ``(channels, time_i)`` or ``(time_i,)``.
        length: width of the result; the longest series when None.
        what: what to call the data in error messages.

    Returns:
        ``(X, lengths)``: float64 ``(n, channels, length)``, zero after each series' end, NaN left where a
        value inside a series is missing; int64 ``(n,)`` true lengths, 1 or more.

    Raises:
        ValueError: no series, different numbers of channels, an infinite value, a series with no value at
            all, or a series longer than ``length``.
    """
    if isinstance(series, np.ndarray) and series.ndim == 2:
        series = series[:, None, :]
    items = [np.atleast_2d(np.asarray(item, dtype=np.float64)) for item in series]
    if not items:
        raise ValueError(f"{what}: no series at all")
    channels = items[0].shape[0]
    lengths = np.zeros(len(items), dtype=np.int64)
    for i, item in enumerate(items):
        if item.ndim != 2 or item.shape[0] != channels:
            raise ValueError(
                f"{what} {i} has shape {item.shape}; expected (channels={channels}, time) like the first series"
            )
        if np.isinf(item).any():
            channel, step = np.argwhere(np.isinf(item))[0]
            raise ValueError(f"{what} {i} has an infinite value in channel {channel} at step {step}")
        present = np.flatnonzero(~np.isnan(item).all(axis=0))
        if not len(present):
            raise ValueError(f"{what} {i} has no value at all ({item.shape[1]} steps, all NaN): remove it")
        lengths[i] = present[-1] + 1
    longest = int(lengths.max())
    if length is not None and longest > length:
        raise ValueError(f"{what} {int(lengths.argmax())} has {longest} steps, more than length={length}")
    X = np.zeros((len(items), channels, longest if length is None else length))
    for i, item in enumerate(items):
        X[i, :, : lengths[i]] = item[:, : lengths[i]]
    return X, lengths


def valid_steps(lengths: np.ndarray, length: int) -> np.ndarray:
    """Boolean ``(n, length)``: True at the steps inside each series, for int64 ``lengths`` ``(n,)``."""
    return np.arange(length)[None, :] < np.asarray(lengths)[:, None]


def fill_missing(
    X: np.ndarray,
    lengths: np.ndarray,
    missing: str = "error",
    *,
    channel_means: np.ndarray | None = None,
    what: str = "series",
) -> tuple[np.ndarray, int]:
    """Deal with NaN inside series.

    - ``"error"``: raise, naming the first series, channel and step.
    - ``"interpolate"``: linear between the neighbours in the same channel, constant before the first and after
      the last value. The value after a gap is used for the gap: a prefix that ends inside it has seen that
      one future value. Where this matters:
    - ``"forward"``: the last value before the gap is carried on; a gap at the start gets the channel mean of
      train. Uses no future value.

    A channel of a series with no value at all gets the channel mean of train either way.

    Args:
        X: ``(n, channels, time)`` from `pad_series`.
        lengths: int64 ``(n,)``.
        missing: one of the three above.
        channel_means: ``(channels,)`` means of the training split; of ``X`` itself when None.
        what: what to call the data in error messages.

    Returns:
        ``(X, filled)``: the array without NaN (the same one when nothing was missing) and the number of values
        that were filled.

    Raises:
        ValueError: NaN with ``missing="error"``, an unknown ``missing``, or a channel with no value anywhere.
    """
    if missing not in MISSING:
        raise ValueError(f"missing={missing!r} is not one of {', '.join(map(repr, MISSING))}")
    gaps = np.isnan(X) & valid_steps(lengths, X.shape[2])[:, None, :]
    count = int(gaps.sum())
    if not count:
        return X, 0
    if missing == "error":
        i, channel, step = np.argwhere(gaps)[0]
        raise ValueError(
            f"{what} {i} has a missing value (NaN) in channel {channel} at step {step} (all counted from 0); "
            f"{count} missing in {int(gaps.any(axis=(1, 2)).sum())} of {len(X)} series. Pass missing='interpolate' "
            "to fill by linear interpolation, or missing='forward' to carry the last value on"
        )
    means = channel_mean(X, lengths) if channel_means is None else np.asarray(channel_means)
    X = X.copy()
    for i, channel in np.argwhere(gaps.any(axis=2)):
        row = X[i, channel, : lengths[i]]  # a view: written through
        known = np.flatnonzero(~np.isnan(row))
        if not len(known):
            if np.isnan(means[channel]):
                raise ValueError(f"channel {channel} has no value in any training series: remove the channel")
            row[:] = means[channel]
        elif missing == "interpolate":
            row[:] = np.interp(np.arange(len(row)), known, row[known])
        else:
            last = np.maximum.accumulate(np.where(np.isnan(row), -1, np.arange(len(row))))
            start = means[channel]
            row[:] = np.where(last < 0, start, row[np.maximum(last, 0)])
    return X, count


def channel_mean(X: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Mean of each channel over the present values, ``(channels,)``; NaN for a channel that has none."""
    present = ~np.isnan(X) & valid_steps(lengths, X.shape[2])[:, None, :]
    counts = present.sum(axis=(0, 2))
    sums = np.where(present, X, 0.0).sum(axis=(0, 2))
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)

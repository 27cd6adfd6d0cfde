"""What happens to padded series before a model sees them: resampling, normalisation, the prefix."""

from __future__ import annotations

import math

import numpy as np

from gdpd.data.series import valid_steps

NORMALISATIONS = ("none", "prefix", "train")
PREFIX_MODES = ("raw", "stretch")
PARTS = ("prefix", "suffix")


class FutureLeakWarning(UserWarning):
    """The data as they come let a prefix know something of the steps after it."""


def resample(
    X: np.ndarray, lengths: np.ndarray, resample_to: int, *, longest: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Bring long series down to ``resample_to`` steps by linear interpolation (no low-pass filter).

    The longest series gets exactly ``resample_to`` steps, evenly spaced from its first to its last; shorter
    ones are read on the same grid, so a step means the same time in each, and a series of ``l`` of the
    ``longest`` steps keeps about ``resample_to * l / longest``. Without effect when ``longest <= resample_to``.
    A prefix of the resampled series reaches no more than one original step past the same prefix of the original.

    Args:
        X: ``(n, channels, time)``, no NaN.
        lengths: int64 ``(n,)``.
        resample_to: steps of the longest series after resampling, 2 or more.
        longest: length that maps to ``resample_to``; the longest of ``lengths`` when None. Give the training
            data's value for new data, so that both are read on the same grid.

    Returns:
        ``(X, lengths)``: ``(n, channels, m)`` and int64 ``(n,)``; m is ``resample_to``, or larger when new
        data exceed ``longest``.

    Raises:
        ValueError: ``resample_to`` below 2.
    """
    if resample_to < 2:
        raise ValueError(f"resample_to={resample_to} must be 2 or more (or None to leave the series as they are)")
    longest = int(lengths.max()) if longest is None else longest
    if longest <= resample_to:
        return X, lengths
    spacing = (longest - 1) / (resample_to - 1)
    # 1e-9: the last point of the longest series sits on its last step, whatever the rounding of the product
    new_lengths = np.floor((lengths - 1) / spacing + 1e-9).astype(np.int64) + 1
    width = max(resample_to, int(new_lengths.max()))
    positions = np.broadcast_to(np.arange(width) * spacing, (len(X), width))
    return _interpolate(X, positions, lengths, new_lengths), new_lengths


def prefix(
    X: np.ndarray, lengths: np.ndarray | None, earliness: float, mode: str = "raw", *, normalise: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Cut each series to its first ``int(earliness * length)`` steps.

    (The product is taken with 1e-9 to spare: 0.29 × 100 is 28.999…96 in floating point and means 29 steps.)

    Args:
        X: ``(n, channels, time)`` float.
        lengths: int ``(n,)`` true lengths; None when all are ``time``.
        earliness: share of each series that may be read, in (0, 1].
        mode: ``"raw"``: the steps as they are. ``"stretch"``: linear interpolation back to each series' own
            full length (as in the GDPD authors' release), so that a model sees inputs of one size.
        normalise: z-normalise each prefix, per channel, by its own mean and standard deviation, which sees no
            future. This also undoes a z-normalisation over the full series.

    Returns:
        ``(X_prefix, lengths_prefix)``, dtype of ``X`` and int64 ``(n,)``. Raw: ``(n, channels,
        int(earliness * time))`` and the prefix lengths. Stretch: ``(n, channels, time)`` and the full lengths.
        Zero after each series' end.

    Raises:
        ValueError: ``earliness`` outside (0, 1], a prefix of zero steps, an unknown mode, wrong shapes.
    """
    X = np.asarray(X)
    if X.ndim != 3:
        raise ValueError(f"X has shape {X.shape}; expected (n, channels, time)")
    earliness = check_earliness(earliness)
    if mode not in PREFIX_MODES:
        raise ValueError(f"mode={mode!r} is not one of {', '.join(map(repr, PREFIX_MODES))}")
    time = X.shape[2]
    full = np.full(len(X), time) if lengths is None else np.asarray(lengths, dtype=np.int64)
    if full.shape != (len(X),) or (len(X) and (full.min() < 1 or full.max() > time)):
        raise ValueError(f"lengths must be ({len(X)},) values in 1..{time}; got shape {full.shape}")
    cut = prefix_length(full, earliness)
    if len(X) and cut.min() < 1:
        i = int(cut.argmin())
        raise ValueError(
            f"earliness={earliness} of series {i} with {full[i]} steps is a prefix of zero steps; "
            f"earliness must be at least {math.ceil(1e4 / full.min()) / 1e4:g} for the shortest series "
            f"({full.min()} steps)"
        )
    width = int(prefix_length(np.asarray([time]), earliness)[0])
    # NaN-free by contract, so a product with the mask would do; where() also keeps stray padding out
    out = np.where(valid_steps(cut, width)[:, None, :], X[:, :, :width], 0).astype(X.dtype)
    if normalise:
        out = z_normalise(out, cut)
    if mode == "raw":
        return out, cut
    step = (cut - 1) / np.maximum(full - 1, 1)
    positions = np.arange(time)[None, :] * step[:, None]
    return _interpolate(out, positions, cut, full).astype(X.dtype), full


def suffix(
    X: np.ndarray, lengths: np.ndarray | None, earliness: float, mode: str = "raw", *, normalise: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Cut each series to its last ``int(earliness * length)`` steps, which stand first in the result.

    `prefix` of the series read backwards, read forwards again: arguments, result and errors are its own.
    """
    X = np.asarray(X)
    full = np.full(len(X), X.shape[-1]) if lengths is None else np.asarray(lengths, dtype=np.int64)
    if X.ndim != 3 or full.shape != (len(X),) or full.max(initial=0) > X.shape[2]:
        return prefix(X, lengths, earliness, mode, normalise=normalise)  # which says what is wrong
    cut, cut_lengths = prefix(_backwards(X, full), full, earliness, mode, normalise=normalise)
    return _backwards(cut, cut_lengths), cut_lengths


def _backwards(X: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Each series with its valid steps in reverse order, zero after its end; another array."""
    steps = np.arange(X.shape[2])
    places = np.clip(np.asarray(lengths)[:, None] - 1 - steps, 0, None)
    turned = np.take_along_axis(X, places[:, None, :], axis=2)
    return np.where(valid_steps(lengths, X.shape[2])[:, None, :], turned, 0).astype(X.dtype)


def prefix_length(lengths: np.ndarray, earliness: float) -> np.ndarray:
    """``int(earliness * length)`` for int ``lengths`` ``(n,)``, as int64 ``(n,)``, rounding noise forgiven."""
    return np.floor(np.asarray(lengths) * earliness + 1e-9).astype(np.int64)


def check_earliness(earliness: float) -> float:
    """``earliness`` as a float; ValueError unless it lies in (0, 1]."""
    try:
        value = float(earliness)
    except (TypeError, ValueError):
        raise ValueError(f"earliness={earliness!r} is not a number in (0, 1]") from None
    if not 0.0 < value <= 1.0:
        raise ValueError(
            f"earliness={value:g} lies outside (0, 1]: it is the share of each series that the student may read, "
            "e.g. 0.2 for the first fifth, 1 for all of it"
        )
    return value


def z_normalise(X: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Each series and channel to mean 0 and standard deviation 1 over its own ``lengths[i]`` steps.

    A constant channel becomes zero. Args and result as `standardise`.
    """
    valid = valid_steps(lengths, X.shape[2])[:, None, :]
    mean, std = _moments(X, valid, axes=(2,))
    return _scale(X, valid, mean, std)


def train_statistics(X: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel over all valid steps of all series.

    Args:
        X: ``(n, channels, time)`` of the training split only, no NaN.
        lengths: int64 ``(n,)``.

    Returns:
        ``(mean, std)``, float64 ``(channels,)`` each; std is 1 for a constant channel.
    """
    mean, std = _moments(X, valid_steps(lengths, X.shape[2])[:, None, :], axes=(0, 2))
    return mean[0, :, 0], std[0, :, 0]


def standardise(X: np.ndarray, lengths: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """``(X − mean) / std`` per channel, for ``(n, channels, time)``; zero after each series' end; dtype kept."""
    valid = valid_steps(lengths, X.shape[2])[:, None, :]
    return _scale(X, valid, np.asarray(mean)[None, :, None], np.asarray(std)[None, :, None])


def is_z_normalised(X: np.ndarray, lengths: np.ndarray, tolerance: float = 1e-2) -> bool:
    """Whether nearly every series already has mean 0 and standard deviation 1 over its full length.

    True when 95 % of the (series, channel) pairs that are not constant and have 3 steps or more have
    |mean| ≤ tolerance and |std − 1| ≤ tolerance, the deviation taken with n or with n − 1 (the UCR archive
    uses the latter).
    """
    valid = valid_steps(lengths, X.shape[2])[:, None, :]
    mean, std = _moments(X, valid, axes=(2,))
    n = np.asarray(lengths, dtype=np.float64)[:, None]
    mean, std = mean[..., 0], std[..., 0]
    constant = ~(np.where(valid, np.abs(X - mean[..., None]), 0).max(axis=2) > 1e-6)
    usable = ~constant & (n >= 3)
    sample_std = std * np.sqrt(n / np.maximum(n - 1, 1))
    unit = np.minimum(np.abs(std - 1), np.abs(sample_std - 1)) <= tolerance
    hits = (np.abs(mean) <= tolerance) & unit & usable
    return bool(usable.any() and hits.sum() >= 0.95 * usable.sum())


def _moments(X: np.ndarray, valid: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population deviation over valid steps, in float64; deviation 1 where the data are constant."""
    X64 = np.where(valid, X, 0.0).astype(np.float64)
    count = np.broadcast_to(valid, X.shape).sum(axis=axes, keepdims=True)
    mean = X64.sum(axis=axes, keepdims=True) / count
    std = np.sqrt((np.where(valid, X64 - mean, 0.0) ** 2).sum(axis=axes, keepdims=True) / count)
    # below the rounding of float32 input, a deviation is noise: dividing by it would blow the noise up
    return mean, np.where(std > 1e-6 * np.maximum(np.abs(mean), 1e-6), std, 1.0)


def _scale(X: np.ndarray, valid: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    return np.where(valid, (X - mean) / std, 0.0).astype(X.dtype)


def _interpolate(X: np.ndarray, positions: np.ndarray, lengths: np.ndarray, new_lengths: np.ndarray) -> np.ndarray:
    """Series read at fractional steps: X (n, c, L) at positions (n, m) -> (n, c, m), zero from new_lengths on."""
    last = (np.asarray(lengths) - 1)[:, None]
    position = np.minimum(positions, last)
    low = np.floor(position).astype(np.int64)
    high = np.minimum(low + 1, last)
    weight = (position - low)[:, None, :]
    left = np.take_along_axis(X, low[:, None, :], axis=2)
    right = np.take_along_axis(X, high[:, None, :], axis=2)
    mixed = left + weight * (right - left)
    return np.where(valid_steps(new_lengths, positions.shape[1])[:, None, :], mixed, 0.0)

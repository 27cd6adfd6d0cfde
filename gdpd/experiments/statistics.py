"""Statistics of methods compared over data sets: ranks, paired tests, and intervals by resampling.

`scores` is float [data sets, methods], higher is better, without gaps; every function works in float64. The tests are
those that Demšar (2006, "Statistical comparisons of classifiers over multiple data sets") recommends, with pairs
compared by Wilcoxon's test and Holm's correction (Benavoli et al. 2016) and not by Nemenyi's, whose answer for two
methods depends on which others happen to be in the comparison.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class WinTieLoss(NamedTuple):
    """On how many data sets one method scores higher than, the same as, lower than another."""

    win: int
    tie: int
    loss: int


class Interval(NamedTuple):
    """A mean and the bounds of its bootstrap interval, each float [...]."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class CriticalDifference:
    """What a critical-difference diagram draws.

    Attributes:
        average_ranks: [methods], 1 is best.
        friedman_p: that all methods are the same; None for two methods, where there is but the one pair.
        p_values: Holm-adjusted, two-sided Wilcoxon p-values of all pairs, symmetric [methods, methods], ones on the
            diagonal.
        groups: methods (columns of the scores, best first) that a bar joins: neighbours by rank among whom no pair
            differs at the level. Only the largest groups, each of two methods or more.
        level: the level of the tests.
        least_p: the smallest adjusted p-value that so many data sets and pairs can give; above the level, no pair can
            differ, whatever the scores are.
    """

    average_ranks: np.ndarray
    friedman_p: float | None
    p_values: np.ndarray
    groups: tuple[tuple[int, ...], ...]
    level: float
    least_p: float


def ranks(scores: Any) -> np.ndarray:
    """Rank of each method on each data set, [data sets, methods]: 1 is best, ties share the mean of their ranks.

    Raises:
        ValueError: not [data sets, methods], empty, or with a NaN.
    """
    from scipy.stats import rankdata

    return rankdata(-_checked(scores), axis=1)


def average_ranks(scores: Any) -> np.ndarray:
    """Mean over data sets of `ranks`, [methods]. Raises as `ranks`."""
    return ranks(scores).mean(axis=0)


def first_places(scores: Any) -> np.ndarray:
    """On how many data sets each method is the best, [methods]: k methods that tie get 1/k each, so it adds up.

    Raises as `ranks`.
    """
    scores = _checked(scores)
    best = scores == scores.max(axis=1, keepdims=True)
    return (best / best.sum(axis=1, keepdims=True)).sum(axis=0)


def win_tie_loss(mine: Any, theirs: Any) -> WinTieLoss:
    """Counts over data sets; both are [data sets].

    Raises:
        ValueError: different lengths, empty, or with a NaN.
    """
    difference = _paired(mine, theirs)
    return WinTieLoss(int((difference > 0).sum()), int((difference == 0).sum()), int((difference < 0).sum()))


def wilcoxon(mine: Any, theirs: Any) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test, paired over data sets; data sets that tie are left out.

    Exact up to 50 data sets without ties among the differences, else by the normal approximation, as
    `scipy.stats.wilcoxon` does. 1.0 where all data sets tie. With n data sets it cannot fall below 2^(1 - n): five
    data sets never reach 0.05.

    Raises as `win_tie_loss`.
    """
    from scipy.stats import wilcoxon as signed_rank

    difference = _paired(mine, theirs)
    difference = difference[difference != 0]
    return float(signed_rank(difference).pvalue) if len(difference) else 1.0


def holm(p_values: Any) -> np.ndarray:
    """Holm's (1979) step-down adjustment of a family of p-values, in the order given, [m].

    The i-th smallest becomes max over j <= i of (m - j + 1) p_(j), at most 1.

    Raises:
        ValueError: not one-dimensional, or outside 0..1.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p_values has shape {p.shape}, or an entry outside 0..1; expected [m] probabilities")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(np.arange(len(p), 0, -1) * p[order]), 1.0)
    return adjusted


def friedman(scores: Any) -> float:
    """p-value of Friedman's test, corrected for ties, that all methods (three or more) are the same; 1 if all tie.

    Raises as `ranks`, and
        ValueError: fewer than three methods, or fewer than two data sets.
    """
    from scipy.stats import friedmanchisquare

    scores = _checked(scores)
    if scores.shape[1] < 3 or scores.shape[0] < 2:
        raise ValueError(
            f"scores has {scores.shape[0]} data sets and {scores.shape[1]} methods; Friedman's test takes at least "
            "two and three. Compare two methods with wilcoxon."
        )
    if (scores == scores[:, :1]).all():
        return 1.0
    return float(friedmanchisquare(*scores.T).pvalue)


def critical_difference(scores: Any, level: float = 0.05) -> CriticalDifference:
    """Average ranks, all pairs tested, and the groups of methods that do not differ.

    Pairs count as different only where Friedman's test finds a difference at all. A group has no pair in it that
    differs (Wilcoxon's test, unlike Nemenyi's, may tell neighbours apart and not those farther away).

    Raises as `ranks`, and
        ValueError: one method only, or one data set only; a level outside (0, 1).
    """
    scores = _checked(scores)
    n_datasets, n_methods = scores.shape
    if n_datasets < 2 or n_methods < 2:
        raise ValueError(
            f"scores has {n_datasets} data sets and {n_methods} methods; tests over data sets take at least two of each"
        )
    if not 0 < level < 1:
        raise ValueError(f"level={level} is outside (0, 1); 0.05 is usual")
    pairs = list(itertools.combinations(range(n_methods), 2))
    p_values = np.ones((n_methods, n_methods))
    for (i, j), p in zip(pairs, holm([wilcoxon(scores[:, i], scores[:, j]) for i, j in pairs]), strict=True):
        p_values[i, j] = p_values[j, i] = p
    friedman_p = friedman(scores) if n_methods > 2 else None
    mean_ranks = average_ranks(scores)
    differs = p_values <= level if friedman_p is None or friedman_p <= level else np.zeros_like(p_values, dtype=bool)
    least_p = min(len(pairs) * 2.0 ** (1 - n_datasets), 1.0)
    return CriticalDifference(mean_ranks, friedman_p, p_values, _groups(mean_ranks, differs), level, least_p)


def bootstrap_mean(values: Any, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean over data sets of the mean over seeds, with an interval from resampling data sets and seeds within them.

    Each resample draws as many data sets as there are, with replacement, and for each of them as many of its seeds,
    with replacement; the same draw serves all columns, so an interval of differences is that of paired ones. One data
    set leaves only the seeds to vary; one data set with one seed has no interval (NaN).

    Plain percentiles are too narrow for few data sets, so those are taken that make the interval as wide as the t
    interval where scores are normal: the expanded percentile interval (Hesterberg 2015, "What teachers should know
    about the bootstrap"). It never leaves the range of the scores, which for five data sets or fewer is too narrow.

    Args:
        values: [data sets, seeds, ...]; NaN where a data set lacks a seed (in all columns).
        level: of the interval, such as 0.95.
        resamples: number of resamples.
        seed: of the draws; the same values and seed give the same interval.

    Raises:
        ValueError: fewer than two dimensions, a data set without any seed, or a seed missing in some columns only.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim < 2 or not values.size:
        raise ValueError(f"values has shape {values.shape}; expected [data sets, seeds, ...]")
    n_datasets, n_seeds = values.shape[:2]
    columns = values.reshape(n_datasets, n_seeds, -1)
    has = np.isfinite(columns).all(axis=2)
    if (has != np.isfinite(columns).any(axis=2)).any() or not has.any(axis=1).all():
        raise ValueError("values: each data set needs a seed, and each seed all columns; leave the others out")
    counts = has.sum(axis=1)
    # A resample is a row of weights over (data set, seed), so that all resamples are one product of matrices.
    random = np.random.default_rng(seed)
    drawn = random.integers(n_datasets, size=(resamples, n_datasets))
    weights = np.zeros((resamples, n_datasets, n_seeds))
    first_seeds = np.argsort(~has, axis=1, kind="stable")  # [data sets, seeds]: those that are there come first
    for column in range(n_datasets):
        dataset = drawn[:, column]
        for draw in range(n_seeds):
            place = np.floor(random.random(resamples) * counts[dataset]).astype(int)
            share = np.where(draw < counts[dataset], 1.0 / counts[dataset], 0.0) / n_datasets
            weights[np.arange(resamples), dataset, first_seeds[dataset, place]] += share
    filled = np.where(has[..., None], columns, 0.0)
    shape = values.shape[2:]
    mean = (filled.sum(axis=1) / counts[:, None]).mean(axis=0).reshape(shape)
    if n_datasets == 1 and counts[0] == 1:
        return Interval(mean, np.full(shape, np.nan), np.full(shape, np.nan))
    means = weights.reshape(resamples, -1) @ filled.reshape(n_datasets * n_seeds, -1)
    tail = _expanded_tail(level, n_datasets if n_datasets > 1 else int(counts[0]))
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return Interval(mean, low.reshape(shape), high.reshape(shape))


def _expanded_tail(level: float, n: int) -> float:
    """Share of the resamples beyond each bound, for a mean of n draws."""
    from scipy.stats import norm, t

    return float(norm.cdf(-np.sqrt(n / (n - 1)) * t.isf((1 - level) / 2, n - 1)))


def _groups(mean_ranks: np.ndarray, differs: np.ndarray) -> tuple[tuple[int, ...], ...]:
    order = np.argsort(mean_ranks, kind="stable")
    found: list[tuple[int, ...]] = []
    reached = 0
    for first in range(len(order)):
        last = first
        while last + 1 < len(order) and not differs[order[last + 1], order[first : last + 1]].any():
            last += 1
        if last > first and last + 1 > reached:  # not within the group before
            found.append(tuple(int(method) for method in order[first : last + 1]))
            reached = last + 1
    return tuple(found)


def _checked(scores: Any) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or not scores.size:
        raise ValueError(f"scores has shape {scores.shape}; expected [data sets, methods], at least one of each")
    if np.isnan(scores).any():
        dataset, method = np.argwhere(np.isnan(scores))[0]
        raise ValueError(
            f"scores is NaN for data set {dataset}, method {method} (counted from 0). A rank needs every method's "
            "score: leave such data sets out."
        )
    return scores


def _paired(mine: Any, theirs: Any) -> np.ndarray:
    a, b = np.asarray(mine, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"mine has shape {a.shape} and theirs {b.shape}; expected the same data sets, at least one")
    _checked(np.stack([a, b], axis=1))
    return a - b

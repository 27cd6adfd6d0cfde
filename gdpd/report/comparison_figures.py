"""From a comparison to what its charts draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gdpd.experiments.comparison import METRICS, SCORE, Comparison, Standing
from gdpd.experiments.statistics import Interval
from gdpd.methods import TEACHER, method_title
from gdpd.report import comparison_charts as charts
from gdpd.report.svg import method_colour, other_methods, repeats_colour

FOLLOWING = ("fidelity", "kl", "calibration_error")
_MOST_ROWS = 40  # data sets in a chart of gains; of more, the best and the worst
_MOST_GAINS = 3  # methods that the reference has a chart against
_MOST_BANDS = 7  # more lie over one another beyond telling apart; each gets bars


def figures(found: Comparison, standings: Sequence[Standing], reference: str) -> dict[str, Any]:
    """Every chart of the page as SVG, by name, with what its caption needs."""
    others = other_methods(found.methods)
    colours = [method_colour(method, others) for method in found.methods]
    titles = [method_title(method) for method in found.methods]
    baseline = found.methods[0]

    def lines(metric: str, relative_to: str | None = None) -> list[charts.Line]:
        intervals = [found.interval(share, metric, relative_to) for share in found.earliness]
        made = []
        for place, method in enumerate(found.methods):
            if method != relative_to:
                bounds = [_column(intervals, bound, place) for bound in Interval._fields]
                made.append(charts.Line(titles[place], colours[place], repeats_colour(method, others), *bounds))
        return made

    # The mean over earliness first: the others differ from it in detail.
    ordered = sorted(standings, key=lambda standing: standing.earliness is not None)
    tested = [(standing, standing.test) for standing in ordered if standing.test is not None]
    made: dict[str, Any] = {
        "scores": charts.over_earliness(
            "scores",
            found.earliness,
            lines(SCORE),
            "AUC-PRC %",
            bands=False,
            level=("Teacher", method_colour(TEACHER, others), _teacher_level(found)),
        ),
        "baseline": method_title(baseline),
        "over_baseline": charts.over_earliness(
            "over-baseline",
            found.earliness,
            lines(SCORE, baseline),
            "AUC-PRC, points gained",
            bands=len(found.methods) <= _MOST_BANDS,
            zero=method_title(baseline),
        ),
        "diagrams": [
            (standing, charts.critical_difference(f"cd-{number}", titles, colours, test))
            for number, (standing, test) in enumerate(tested)
        ],
        "following": [
            (metric, charts.over_earliness(metric, found.earliness, lines(metric), _axis(metric), bands=False))
            for metric in FOLLOWING
            if metric in found.values
        ],
        "gains": [],
        "gains_left_out": max(int(found.complete.any(axis=1).sum()) - _MOST_ROWS, 0),
    }
    for number, other in enumerate(_rivals(found, standings, reference)):
        named, points = gains(found, standings, reference, other)
        label = f"AUC-PRC of {method_title(reference)} minus {method_title(other)}, points"
        colour = method_colour(reference, others)
        svg = charts.gains(f"gains-{number}", named, found.earliness, points, label, colour)
        made["gains"].append((method_title(other), svg))
    return made


def _rivals(found: Comparison, standings: Sequence[Standing], reference: str) -> list[str]:
    """The methods that `reference` has a chart against: all, or of many the first one, and the best by average rank."""
    others = [method for method in found.methods if method != reference]
    ranks = dict(zip(found.methods, standings[-1].ranks, strict=True))
    best = sorted(others[1:], key=lambda method: ranks[method])[: _MOST_GAINS - 1]
    return [method for method in others if method in (others[0], *best)]


def gains(found: Comparison, standings: Sequence[Standing], reference: str, other: str) -> tuple[list[str], np.ndarray]:
    """Differences [data sets, earliness] of data sets that have any, largest mean first; at most `_MOST_ROWS`."""
    mine, theirs = found.methods.index(reference), found.methods.index(other)
    points = np.full(found.complete.shape, np.nan)
    for standing in standings:
        if standing.earliness is not None:
            rows = [found.datasets.index(name) for name in standing.datasets]
            place = found.earliness.index(standing.earliness)
            points[rows, place] = standing.scores[:, mine] - standing.scores[:, theirs]
    kept = np.flatnonzero(np.isfinite(points).any(axis=1))
    kept = kept[np.argsort(-np.nanmean(points[kept], axis=1), kind="stable")]
    if len(kept) > _MOST_ROWS:
        kept = np.concatenate([kept[: _MOST_ROWS // 2], kept[-_MOST_ROWS // 2 :]])
    return [found.datasets[row] for row in kept], points[kept]


def _teacher_level(found: Comparison) -> float:
    """Mean AUC-PRC of the teachers over the data sets that count anywhere; NaN where none was recorded."""
    known = found.teachers[found.complete.any(axis=1) & np.isfinite(found.teachers).any(axis=1)]
    return float(np.nanmean(known, axis=1).mean()) if len(known) else float("nan")


def _column(intervals: Sequence[Interval | None], bound: str, place: int) -> np.ndarray:
    return np.array([np.nan if found is None else getattr(found, bound)[place] for found in intervals])


def _axis(metric: str) -> str:
    told = METRICS[metric]
    return f"{told.title}, {told.unit}"

"""The report's charts. Each takes plain numbers and returns one <svg> element; what they show is decided in `page`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gdpd.experiments.summary import Difference, Row
from gdpd.methods import TEACHER, method_order, method_title
from gdpd.report.svg import CLASS_COLOURS, GRID, INK, METHOD_COLOURS, MUTED, PAPER, figure, method_colour, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PART_ORDER = (0, 1, 2, 6, 3, 7, 4, 5)  # of the class colours: neighbours in a legend should differ in hue


@dataclass(frozen=True)
class Curve:
    """One method's values per epoch: `values` [seeds, epochs], NaN where an epoch has none."""

    method: str
    epochs: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Trajectory:
    """Reverse processes among teacher features, in the prior's space of `width` dimensions.

    Attributes:
        features: teacher features, [n, width].
        labels: their classes, int [n].
        z_short: students' features, [m, width].
        z_k: the sampler's states from the fused start to z_hat, [K + 1, m, width].
        path_labels: classes of the m series, int [m].
    """

    features: np.ndarray
    labels: np.ndarray
    z_short: np.ndarray
    z_k: np.ndarray
    path_labels: np.ndarray


def scores_over_earliness(name: str, rows: Sequence[Row], others: list[str]) -> str:
    """Mean AUC-PRC of each method over earliness, one dot per seed; the teacher's level as a dashed line."""
    students = sorted({row.method for row in rows if row.method != TEACHER}, key=method_order)
    shares = sorted({row.earliness for row in rows if row.method != TEACHER})
    with figure() as (made, [axes]):
        for number, method in enumerate(students):
            mine = sorted((row for row in rows if row.method == method), key=lambda row: row.earliness)
            colour = method_colour(method, others)
            # Methods stand a little apart, so that equal scores do not hide each other.
            shift = (number - (len(students) - 1) / 2) * 0.012
            x = [row.earliness + shift for row in mine]
            axes.plot(x, [row.auc_prc.mean for row in mine], color=colour, marker="o", markersize=5, zorder=3)
            for at, row in zip(x, mine, strict=True):
                axes.plot([at] * len(row.seeds), row.auc_prc.values, ".", color=colour, alpha=0.45, markersize=4)
                if row.auc_prc.std is not None:
                    low, high = row.auc_prc.mean - row.auc_prc.std, row.auc_prc.mean + row.auc_prc.std
                    axes.plot([at, at], [low, high], color=colour, alpha=0.5, linewidth=1)
        for row in rows:
            if row.method == TEACHER:
                axes.axhline(row.auc_prc.mean, color=method_colour(TEACHER, others), linestyle=(0, (4, 3)), linewidth=1)
        axes.set_xticks(shares, [f"{100 * share:.0f} %" for share in shares])
        margin = 0.06 if len(shares) == 1 else 0.12 * (shares[-1] - shares[0])
        axes.set_xlim(shares[0] - margin, shares[-1] + margin)
        axes.set_xlabel("share of the series read")
        axes.set_ylabel("AUC-PRC %")
        return to_svg(made, name, f"AUC-PRC of {', '.join(students)} over the share of the series read")


def paired_points(name: str, differences: Sequence[Difference]) -> str:
    """Gains in AUC-PRC over each baseline, one dot per seed and a bar at the mean, around zero."""
    blocks = list(dict.fromkeys((d.dataset, d.earliness) for d in differences))
    baselines = list(dict.fromkeys(d.baseline for d in differences))
    with figure(width=5.2, height=0.7 + 0.45 * len(blocks)) as (made, [axes]):
        axes.axvline(0, color=MUTED, linewidth=0.9)
        for difference in differences:
            row = blocks.index((difference.dataset, difference.earliness))
            y = row + (baselines.index(difference.baseline) - (len(baselines) - 1) / 2) * 0.3
            colour, mean = METHOD_COLOURS[difference.baseline], difference.points.mean
            axes.plot([0, mean], [y, y], color=colour, linewidth=3.5, alpha=0.35, solid_capstyle="butt")
            axes.plot(difference.points.values, [y] * len(difference.seeds), "o", color=colour, markersize=4)
            axes.plot([mean, mean], [y - 0.13, y + 0.13], color=INK, linewidth=1.6)
        axes.set_yticks(range(len(blocks)), [f"{dataset}, {100 * share:g} %" for dataset, share in blocks])
        axes.invert_yaxis()
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.set_xlabel("AUC-PRC of GDPD minus that of the baseline, in points")
        named = " and ".join(map(method_title, baselines))
        return to_svg(made, name, f"AUC-PRC of GDPD minus {named}, one dot per seed")


def training_curves(name: str, curves: Sequence[Curve], label: str, warmup: int | None, others: list[str]) -> str:
    """A validation score over epochs: the mean over seeds, with each seed thin behind it."""
    with figure() as (made, [axes]):
        for curve in curves:
            colour = method_colour(curve.method, others)
            if len(curve.values) > 1:
                axes.plot(curve.epochs, curve.values.T, color=colour, alpha=0.25, linewidth=0.7)
            axes.plot(curve.epochs, curve.values.mean(axis=0), color=colour, zorder=3)
        if warmup:
            _mark_warmup(axes, warmup)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        return to_svg(made, name, f"{label} over epochs, one line per method")


def loss_parts(name: str, parts: Mapping[str, tuple[np.ndarray, np.ndarray]], warmup: int | None) -> str:
    """The parts of a loss over epochs on a logarithmic scale, each named at its end."""
    with figure() as (made, [axes]):
        for number, (part, (epochs, values)) in enumerate(parts.items()):
            colour = CLASS_COLOURS[_PART_ORDER[number % len(_PART_ORDER)]]
            axes.plot(epochs, values, color=colour, linewidth=1.2, label=part)
        axes.set_yscale("log")
        made.legend(
            frameon=False, fontsize=8.5, labelcolor=MUTED, ncols=3, loc="outside lower center", handlelength=1.2
        )
        if warmup:
            _mark_warmup(axes, warmup)
        axes.set_xlabel("epoch")
        axes.set_ylabel("training loss, by part")
        return to_svg(made, name, f"Training loss by part over epochs: {', '.join(parts)}")


def alpha_over_time(
    name: str, epochs: np.ndarray, mean: np.ndarray, bands: Sequence[tuple[np.ndarray, np.ndarray]]
) -> str:
    """alpha, the share of z_short in the sampler's start: its mean over epochs in bands of quantiles."""
    colour = METHOD_COLOURS["gdpd"]
    with figure() as (made, [axes]):
        for low, high in bands:
            axes.fill_between(epochs, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(epochs, mean, color=colour)
        axes.set_ylim(0, 1)
        axes.locator_params(axis="x", integer=True, nbins=6)
        axes.set_xlabel("epoch")
        axes.set_ylabel("alpha")
        return to_svg(made, name, "The mixing weight alpha over epochs, mean and quantiles")


def trajectory_plane(name: str, given: Trajectory) -> str:
    """Reverse processes in the plane of the teacher features' two principal components.

    Teacher features are dots in the colour of their class; a path leads from z_short (ring) over the sampler's
    states to z_hat (filled), in the colour of the series' class.
    """
    centre = given.features.mean(axis=0)
    _, _, axes_of = np.linalg.svd(given.features - centre, full_matrices=False)
    plane = axes_of[:2].T  # [width, 2]

    def project(z: np.ndarray) -> np.ndarray:
        return (z - centre) @ plane

    dots, rings, states = project(given.features), project(given.z_short), project(given.z_k)
    with figure(height=3.2) as (made, [axes]):
        for code in np.unique(given.labels):
            mine = dots[given.labels == code]
            axes.scatter(mine[:, 0], mine[:, 1], s=16, color=_class_colour(code), alpha=0.5, linewidths=0)
        for number, code in enumerate(given.path_labels):
            colour, path = _class_colour(code), states[:, number]
            axes.plot(*np.vstack([rings[number], path[0]]).T, color=colour, linewidth=0.8, linestyle=(0, (1, 2)))
            axes.plot(path[:, 0], path[:, 1], color=colour, linewidth=1.1, marker=".", markersize=3.5)
            axes.plot(*rings[number], "o", markerfacecolor=PAPER, markeredgecolor=colour, markersize=6, zorder=4)
            axes.plot(*path[-1], "o", color=colour, markeredgecolor=INK, markeredgewidth=0.8, markersize=6, zorder=5)
        axes.set_xlabel("first principal component")
        axes.set_ylabel("second")
        axes.grid(True, axis="both", color=GRID)
        return to_svg(made, name, "Paths of the reverse process from student features to z_hat among teacher features")


def _class_colour(code: int) -> str:
    return CLASS_COLOURS[int(code) % len(CLASS_COLOURS)]


def _mark_warmup(axes: Axes, epoch: int) -> None:
    axes.axvline(epoch, color=MUTED, linewidth=0.7, linestyle=(0, (2, 2)))
    axes.annotate(
        "warm-up ends",
        (epoch, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        fontsize=8.5,
        color=MUTED,
    )

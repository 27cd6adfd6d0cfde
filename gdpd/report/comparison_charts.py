"""The charts of a comparison over data sets. Each takes plain numbers and returns one <svg> element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gdpd.experiments.statistics import CriticalDifference
from gdpd.report.svg import INK, MUTED, PAPER, figure, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Line(NamedTuple):
    """A method's values over earliness: `mean`, `low` and `high` are [earliness], NaN where there is none."""

    title: str
    colour: str
    dashed: bool
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def critical_difference(name: str, titles: Sequence[str], colours: Sequence[str], tested: CriticalDifference) -> str:
    """Demšar's diagram: methods on the axis of average ranks, best at the left, a bar over those that do not differ."""
    n = len(titles)
    order = np.argsort(tested.average_ranks, kind="stable")
    left, right = order[: (n + 1) // 2], order[: (n + 1) // 2 - 1 : -1]  # each from the top row down
    row, bar, first_row = 15.0, 6.0, 20.0 + 6.0 * len(tested.groups)
    # Unit: points of the page, downwards from the axis; names stand left and right of it.
    width, beside = 270.0 + 10 * max(0, n - 8), 6.2 * max(map(len, titles)) + 30
    depth = first_row + row * max(len(left), 1)
    scale = (width - 2 * beside) / (n - 1)

    def place(rank: float) -> float:
        return beside + (rank - 1) * scale

    with figure(width / 72, (depth + 26) / 72) as (made, [axes]):
        axes.set_axis_off()
        axes.set_xlim(0, width)
        axes.set_ylim(-depth, 22)
        axes.plot([place(1), place(n)], [0, 0], color=MUTED, linewidth=0.9)
        step = next((step for step in (1, 2, 4, 5, 10, 20) if step * scale >= 15), 50)  # so that the numbers keep apart
        for rank in range(1, n + 1, step):
            axes.plot([place(rank)] * 2, [0, 4], color=MUTED, linewidth=0.9)
            axes.text(place(rank), 7, str(rank), ha="center", va="bottom", color=MUTED)
        for side, members in (("left", left), ("right", right)):
            for number, method in enumerate(members):
                x, y = place(tested.average_ranks[method]), -first_row - row * number
                end = beside - 4 if side == "left" else width - beside + 4
                axes.plot([x, x, end], [0, y, y], color=colours[method], linewidth=1.1)
                axes.plot(x, 0, "o", color=colours[method], markersize=5, zorder=4)
                score = f"{tested.average_ranks[method]:.2f}"
                named = f"{titles[method]}  {score}" if side == "left" else f"{score}  {titles[method]}"
                shift, align = (-4, "right") if side == "left" else (4, "left")
                axes.text(end + shift, y, named, ha=align, va="center", color=INK)
        for number, group in enumerate(tested.groups):
            y = -8 - bar * number
            ends = [place(tested.average_ranks[group[0]]) - 3, place(tested.average_ranks[group[-1]]) + 3]
            axes.plot(ends, [y, y], color=INK, linewidth=3, solid_capstyle="butt", zorder=5)
        told = "; ".join(f"{titles[method]} {tested.average_ranks[method]:.2f}" for method in order)
        return to_svg(made, name, f"Critical-difference diagram, average ranks: {told}")


def over_earliness(
    name: str,
    shares: Sequence[float],
    lines: Sequence[Line],
    label: str,
    *,
    bands: bool = True,
    zero: str = "",
    level: tuple[str, str, float] | None = None,
) -> str:
    """A score over earliness, one line per method with its band, named at its right end.

    Args:
        name: unique in the page.
        shares: earliness values, [earliness].
        lines: the methods.
        label: of the vertical axis.
        bands: shade between the bounds; False draws a bar at each point, for many bands that lie over one another.
        zero: says what the line at zero stands for; none is drawn for "".
        level: title, colour and value of a constant to draw dashed.
    """
    with figure(3.6, max(2.9, 0.9 + 0.16 * len(lines))) as (made, [axes]):
        ends: list[tuple[float, str, str]] = []
        span = shares[-1] - shares[0] or 1.0
        for number, line in enumerate(lines):
            x = np.asarray(shares)
            if bands and len(shares) > 1:
                axes.fill_between(x, line.low, line.high, color=line.colour, alpha=0.11, linewidth=0)
            else:  # a little apart, so that equal scores do not hide each other
                x = x + (number - (len(lines) - 1) / 2) * 0.36 * span / (max(len(shares), 4) * len(lines))
                axes.vlines(x, line.low, line.high, color=line.colour, alpha=0.6, linewidth=1)
            style = (0, (4, 2)) if line.dashed else "-"
            axes.plot(
                x, line.mean, color=line.colour, marker="o", markersize=4, linewidth=1.5, linestyle=style, zorder=3
            )
            last = line.mean[np.isfinite(line.mean)]
            if len(last):
                ends.append((float(last[-1]), line.title, line.colour))
        if zero:
            axes.axhline(0, color=MUTED, linewidth=0.9, zorder=2)
            ends.append((0.0, zero, MUTED))
        if level is not None and np.isfinite(level[2]):
            axes.axhline(level[2], color=level[1], linestyle=(0, (4, 3)), linewidth=1)
            ends.append((level[2], level[0], level[1]))
        axes.set_xticks(shares, [f"{100 * share:.0f} %" for share in shares])
        margin = 0.06 if len(shares) == 1 else 0.07 * span
        axes.set_xlim(shares[0] - margin, shares[-1] + margin)
        axes.set_xlabel("share of the series read")
        axes.set_ylabel(label)
        _name_ends(made, axes, ends)
        return to_svg(made, name, f"{label} over the share of the series read: {', '.join(end[1] for end in ends)}")


def gains(
    name: str, datasets: Sequence[str], shares: Sequence[float], points: np.ndarray, label: str, colour: str
) -> str:
    """Differences per data set around zero: a dot per earliness, fainter the less is read, and a tick at their mean.

    Args:
        name: unique in the page.
        datasets: from the top down.
        shares: earliness values.
        points: [data sets, earliness], NaN where a cell is not complete.
        label: of the horizontal axis.
        colour: of the dots.
    """
    with figure(4.2, 0.75 + 0.24 * len(datasets)) as (made, [axes]):
        axes.axvline(0, color=MUTED, linewidth=0.9)
        strength = np.linspace(0.35, 1.0, len(shares)) if len(shares) > 1 else np.ones(1)
        for row, values in enumerate(points):
            there = np.isfinite(values)
            mean = values[there].mean()
            axes.plot([0, mean], [row, row], color=colour, linewidth=4, alpha=0.25, solid_capstyle="butt")
            for value, alpha in zip(values[there], strength[there], strict=True):
                axes.plot(value, row, "o", color=colour, alpha=alpha, markersize=4.5, markeredgewidth=0)
            axes.plot([mean, mean], [row - 0.28, row + 0.28], color=INK, linewidth=1.5)
        axes.set_yticks(range(len(datasets)), datasets)
        axes.set_ylim(len(datasets) - 0.4, -0.6)
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.set_xlabel(label)
        return to_svg(made, name, f"{label}, by data set")


def _name_ends(made: Figure, axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write each line's name right of its end, moved apart as far as their heights ask for."""
    if not ends:
        return
    made.draw_without_rendering()
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    height = axes.get_window_extent().height / made.dpi * 72  # points
    order = sorted(ends)
    wanted = np.array([(end[0] - low) / (high - low) * height for end in order])
    placed = spread(wanted, 11.0)
    # Inside the axes, as far as there is room; the axis' own labels are below.
    placed = placed - max(placed[-1] - height, 0.0)
    placed = placed + max(-placed[0], 0.0)
    for (_, title, colour), y, at in zip(order, placed, wanted, strict=True):
        axes.annotate(
            title,
            (1.0, at / height),
            xycoords="axes fraction",
            xytext=(7, y - at),
            textcoords="offset points",
            va="center",
            color=INK if colour == PAPER else colour,
            annotation_clip=False,
        )


def spread(wanted: np.ndarray, apart: float) -> np.ndarray:
    """Positions closest to the ascending `wanted` in least squares with neighbours at least `apart` (pooled runs)."""
    blocks: list[list[float]] = []  # [sum of wanted less offsets, count]
    for number, value in enumerate(wanted):
        blocks.append([value - apart * number, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    level = np.concatenate([np.full(int(count), total / count) for total, count in blocks])
    return level + apart * np.arange(len(wanted))

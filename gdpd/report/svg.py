"""matplotlib figures as inline SVG: real text in the page's font, colours as CSS variables, ids that never clash."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours drawn with matplotlib and then replaced by the page's CSS variables, so that charts follow light and dark.
INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
METHOD_COLOURS = {"base": "#050501", "kd": "#050502", "gdpd": "#050503", "teacher": "#050504"}
OTHER_COLOURS = tuple(f"#0505{number:02x}" for number in range(0x11, 0x11 + 8))
CLASS_COLOURS = tuple(f"#0606{number:02x}" for number in range(1, 9))
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--rule",
    PAPER: "--paper",
    **{colour: f"--{method}" for method, colour in METHOD_COLOURS.items()},
    **{colour: f"--other{number}" for number, colour in enumerate(OTHER_COLOURS, 1)},
    **{colour: f"--class{number}" for number, colour in enumerate(CLASS_COLOURS, 1)},
}
_STYLE: Any = {
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.6,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.size": 9.5,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.major.size": 2.5,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
}


def other_methods(methods: Sequence[str]) -> list[str]:
    """The methods without a colour of their own, in order: they take turns."""
    return [method for method in methods if method not in METHOD_COLOURS]


def method_colour(method: str, others: Sequence[str]) -> str:
    """The colour of a method; `others` are those of `other_methods`."""
    if method in METHOD_COLOURS:
        return METHOD_COLOURS[method]
    return OTHER_COLOURS[others.index(method) % len(OTHER_COLOURS)]


def repeats_colour(method: str, others: Sequence[str]) -> bool:
    """Whether a method before it in `others` has its colour: its lines are dashed."""
    return method in others and others.index(method) >= len(OTHER_COLOURS)


def css_name(method: str, others: Sequence[str]) -> str:
    """The CSS variable of `method_colour`, without its dashes."""
    return _VARIABLES[method_colour(method, others)].removeprefix("--")


@contextmanager
def figure(width: float = 3.5, height: float = 2.6, rows: int = 1, **axes: Any) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure in the report's style with `rows` axes below each other, `width` × `height` inches, no global state."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Made

    with rc_context(_STYLE):
        made = Made(figsize=(width, height), layout="constrained")
        yield made, list(made.subplots(rows, 1, squeeze=False, **axes)[:, 0])


def to_svg(made: Figure, name: str, description: str) -> str:
    """The figure as an <svg> element that scales to its container.

    Args:
        made: a matplotlib figure.
        name: unique in the page; prefix of every id in the element.
        description: one sentence for readers who cannot see the chart.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        made.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # matplotlib's own <style> would hold for the whole page; the page's sheet says the same for its charts alone.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family:[^;\"]*;?\s*", "", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    opening = text.index(">")
    head = re.sub(r'\s(width|height|version|xmlns(:xlink)?)="[^"]*"', "", text[:opening])
    escaped = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return f'{head} role="img" aria-label="{escaped}"' + text[opening:].strip()

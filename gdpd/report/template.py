"""From a template and its values to a file, written in one piece: the pages in HTML and the tables in LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

_TEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: "\\" + character for character in "&%$#_"},
}


def check_installed() -> None:
    """Raises:
    ImportError: jinja2, matplotlib or scipy is not installed; they come with the extra "report".
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise ImportError(f'the report needs {error.name}: pip install "gdpd-kernels[report]"') from error


def write_page(output: Path, template: str, **values: Any) -> Path:
    """Render a template of this package into a file, which appears whole or not at all, and return its path.

    In HTML, text is escaped unless it goes through the filter `svg`; in LaTeX, through the filter `tex`.
    """
    from gdpd.training.atomic import write_bytes

    write_bytes(output, _environment().get_template(template).render(**values).encode())
    return output


def escape_tex(text: Any) -> str:
    """Text as LaTeX prints it."""
    return re.sub(r"[\\{}~^&%$#_]", lambda found: _TEX[found[0]], str(text))


def alike(values: Sequence[float]) -> list[str]:
    """Numbers of one column with as many decimals each: those that show three digits of the smallest."""
    least = min((abs(value) for value in values if value), default=1.0)
    decimals = max(0, 2 - math.floor(math.log10(least)))
    return [f"{value:.{decimals}f}" for value in values]


def breakable(name: str) -> Any:
    """A name as HTML that a narrow column may break between its words: before a capital or a digit, after a mark."""
    import markupsafe

    parts = re.split(r"(?<=[a-z])(?=[A-Z0-9])|(?<=[0-9])(?=[A-Z])|(?<=[_-])", name)
    return markupsafe.Markup("<wbr>").join(parts)


def told_p(p: float) -> str:
    """A p-value as it is printed after "p": `= 0.012`, `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"


@cache
def _environment() -> Environment:
    import jinja2
    import markupsafe

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("gdpd", "report"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters["svg"] = markupsafe.Markup
    made.filters["tex"] = escape_tex
    made.filters["p"] = told_p
    made.filters["alike"] = alike
    made.filters["breakable"] = breakable
    made.tests["known"] = math.isfinite
    return made

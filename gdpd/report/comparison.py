"""The page of a comparison: how many methods stand over many data sets, with tests, intervals, costs and all scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gdpd.experiments.comparison import METRICS, Comparison, Standing, compare
from gdpd.experiments.published import DATASETS, MODEL, SEEDS, SOURCE
from gdpd.experiments.records import RunRecord
from gdpd.methods import method_title
from gdpd.options import nearest
from gdpd.report.cells import write_cells
from gdpd.report.comparison_figures import FOLLOWING, figures
from gdpd.report.comparison_tables import (
    among_many,
    cost_rows,
    coverage,
    dataset_tables,
    metric_rows,
    published_rows,
    standing_rows,
)
from gdpd.report.settings import settings, versions
from gdpd.report.svg import css_name, other_methods
from gdpd.report.template import check_installed, write_page

_FORMATS = (".html", ".tex", ".csv")


def build_comparison(
    runs: Iterable[RunRecord], output: Path, title: str | None = None, reference: str | None = None
) -> Path:
    """Write one self-contained HTML page that compares the methods of some runs over their data sets.

    Args:
        runs: from `find_runs` or `result_records`; cells that lack a method are told and left out of ranks and means.
        output: the file to write; replaced if it is there. Its suffix chooses what is written: .html the page, .tex its
            tables for LaTeX with booktabs, to be `\\input`, .csv every cell (see `write_cells`).
        title: heading of the page; by default what is compared.
        reference: the method that the others are set against; by default GDPD, or without it the best by average rank.

    Returns:
        `output`.

    Raises:
        ValueError: no run, a run given twice, one method only, no cell that all methods have, or another suffix; a
            reference that is not among the methods.
        ImportError: jinja2, matplotlib or scipy is not installed; they come with the extra "report".
        OSError: the page cannot be written; nothing half-written is left.
    """
    check_installed()
    suffix = output.suffix.lower()
    if suffix not in _FORMATS:
        raise ValueError(f"output={output}: the suffix chooses the format; one of {', '.join(_FORMATS)}")
    runs = list(runs)
    found = compare(runs)
    standings = found.standings()
    reference = _reference(found, standings, reference)
    if suffix == ".csv":
        return write_cells(found, output)
    tables = _tables(found, runs, standings, reference)
    if suffix == ".tex":
        return write_page(output, "comparison.tex.j2", **tables)
    others = other_methods(found.methods)
    sets = len(found.datasets)
    return write_page(
        output,
        "comparison.html.j2",
        **tables,
        title=title or f"{len(found.methods)} methods on {sets} data set{'s' if sets != 1 else ''}",
        methods=[(method, tables["names"][method], css_name(method, others)) for method in found.methods],
        css={method: css_name(method, others) for method in found.methods},
        charts=figures(found, standings, reference),
        settings=settings(runs),
        versions=versions(runs),
    )


def _reference(found: Comparison, standings: Sequence[Standing], asked: str | None) -> str:
    if asked is None:
        return "gdpd" if "gdpd" in found.methods else found.methods[int(np.argmin(standings[-1].ranks))]
    if asked not in found.methods:
        known = ", ".join(found.methods)
        raise ValueError(f"reference={asked!r} is not compared{nearest(asked, found.methods)}. One of: {known}.")
    return asked


def _tables(
    found: Comparison, runs: Sequence[RunRecord], standings: Sequence[Standing], reference: str
) -> dict[str, Any]:
    """What the tables of the page and those in LaTeX are made from."""
    return {
        "found": found,
        "coverage": coverage(found),
        "names": {method: method_title(method) for method in found.methods},
        "reference": reference,
        "standings": standings,
        "standing_rows": standing_rows(found, standings),
        "pairs": [(standing, found.pairs(standing, reference)) for standing in standings],
        "tables": dataset_tables(found, standings),
        "following": metric_rows(found, FOLLOWING),
        "costs": cost_rows(found),
        "metrics": METRICS,
        "published": published_rows(found, runs, standings),
        "among_many": among_many(found, runs, standings),
        "paper": {"source": SOURCE, "datasets": DATASETS, "seeds": SEEDS, "model": MODEL},
    }

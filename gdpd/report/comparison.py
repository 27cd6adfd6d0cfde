"""The page of a comparison: how many methods stand over many data sets, with tests, intervals, costs and all scores."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gdpd.experiments.comparison import METRICS, SCORE, Comparison, Standing, compare
from gdpd.experiments.published import DATASETS, METHODS, MODEL, PUBLISHED, SEEDS, SOURCE, Published
from gdpd.experiments.records import RunRecord
from gdpd.experiments.statistics import Interval, average_ranks, first_places, ranks
from gdpd.methods import TEACHER, method_title
from gdpd.options import nearest
from gdpd.report import comparison_charts as charts
from gdpd.report.settings import settings, versions
from gdpd.report.svg import css_name, method_colour, other_methods, repeats_colour
from gdpd.report.template import check_installed, write_page

_FOLLOWING = ("fidelity", "kl", "calibration_error")
_MOST_ROWS = 40  # data sets in a chart of gains; of more, the best and the worst
_MOST_BANDS = 7  # more lie over one another beyond telling apart; each gets bars
_COSTS = ("seconds", "seconds_per_epoch", "cpu_seconds", "peak_memory", "peak_device_memory")


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
    runs = list(runs)
    found = compare(runs)
    suffix = output.suffix.lower()
    if suffix == ".csv":
        return write_cells(found, output)
    if suffix == ".tex":
        return write_page(output, "comparison.tex.j2", **_tables(found, runs, reference))
    if suffix not in (".html", ".htm"):
        raise ValueError(f"output={output}: the suffix chooses the format; one of .html, .csv and .tex")
    tables = _tables(found, runs, reference)
    others = other_methods(found.methods)
    return write_page(
        output,
        "comparison.html.j2",
        **tables,
        title=title or f"{len(found.methods)} methods on {_several(len(found.datasets), 'data set')}",
        methods=[(method, tables["names"][method], css_name(method, others)) for method in found.methods],
        css={method: css_name(method, others) for method in found.methods},
        charts=_charts(found, tables["standings"], tables["reference"], tables["names"], others),
        paper={"source": SOURCE, "datasets": DATASETS, "seeds": SEEDS, "model": MODEL},
        settings=settings(runs),
        versions=versions(runs),
    )


def _tables(found: Comparison, runs: Sequence[RunRecord], reference: str | None) -> dict[str, Any]:
    """What the tables of the page and those in LaTeX are made from."""
    standings = found.standings()
    if reference is None:
        reference = "gdpd" if "gdpd" in found.methods else found.methods[int(np.argmin(standings[-1].ranks))]
    elif reference not in found.methods:
        known = ", ".join(found.methods)
        raise ValueError(
            f"reference={reference!r} is not compared{nearest(reference, found.methods)}. One of: {known}."
        )
    return {
        "found": found,
        "coverage": coverage(found),
        "names": {method: method_title(method) for method in found.methods},
        "reference": reference,
        "standings": standings,
        "standing_rows": standing_rows(found, standings),
        "pairs": [(standing, found.pairs(standing, reference)) for standing in standings],
        "tables": dataset_tables(found),
        "following": metric_rows(found, _FOLLOWING),
        "costs": _cost_rows(found),
        "metrics": METRICS,
        "published": published_rows(found, runs, standings),
    }


def write_cells(found: Comparison, output: Path) -> Path:
    """Every cell as a row of a CSV file, so that averages are one `groupby` away, and return its path.

    Columns: dataset, earliness, method, seeds (how many), rank and first_place among the methods (empty where the cell
    is not complete), then mean and sample standard deviation (`_std`) over seeds of each metric in the units of
    `gdpd.experiments.comparison.METRICS`. A complete cell has the seeds that all methods have, others a method's own.
    """
    from gdpd.training.atomic import write_bytes

    columns = ["dataset", "earliness", "method", "seeds", "rank", "first_place"]
    columns += [name for metric in found.values for name in (metric, f"{metric}_std")]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for share in found.earliness:
        standing = found.standing(share)
        for dataset in found.datasets:
            row = standing.datasets.index(dataset) if standing and dataset in standing.datasets else None
            for place, method in enumerate(found.methods):
                cell: dict[str, Any] = {"dataset": dataset, "earliness": share, "method": method}
                if standing is not None and row is not None:
                    cell["rank"] = ranks(standing.scores)[row, place]
                    cell["first_place"] = first_places(standing.scores[[row]])[place]
                for metric in found.values:
                    values = found.seeds_of(dataset, share, metric)[:, place]
                    told = _mean_and_spread(values)
                    if metric == SCORE:
                        cell["seeds"] = int(np.isfinite(values).sum())
                    if told is not None:
                        cell[metric], cell[f"{metric}_std"] = told
                writer.writerow(cell)
    write_bytes(output, text.getvalue().encode())
    return output


def coverage(found: Comparison) -> dict[str, Any]:
    """How much of the grid there is: runs and cells, and which cells lack which methods."""
    lacking = []
    for dataset, share in np.argwhere(~found.complete):
        absent = [
            method for place, method in enumerate(found.methods) if not found.present[dataset, share, :, place].any()
        ]
        why = f"no run of {', '.join(absent)}" if absent else "no seed that all methods have"
        lacking.append((found.datasets[dataset], found.earliness[share], why))
    return {
        "runs": int(found.present.sum()),
        "of_runs": found.present.size,
        "unpaired": int(found.present.sum() - found.paired.sum() * len(found.methods)),
        "cells": int(found.complete.sum()),
        "of_cells": found.complete.size,
        "lacking": lacking,
    }


def standing_rows(found: Comparison, standings: Sequence[Standing]) -> list[dict[str, Any]]:
    """Per method and standing: average AUC-PRC, average rank and first places, the best of each marked."""
    rows = []
    for place, method in enumerate(found.methods):
        cells = [
            {
                "auc_prc": standing.mean[place],
                "rank": standing.ranks[place],
                "first_places": standing.first_places[place],
                "best": standing.mean[place] == standing.mean.max(),
                "best_rank": standing.ranks[place] == standing.ranks.min(),
            }
            for standing in standings
        ]
        rows.append({"method": method, "cells": cells})
    return rows


def dataset_tables(found: Comparison) -> list[dict[str, Any]]:
    """Per earliness, a row per data set: mean and standard deviation over seeds of each method, the best marked.

    Cells that are not complete show what there is, over a method's own seeds, and count in no average.
    """
    tables = []
    for place, share in enumerate(found.earliness):
        rows = []
        for number, dataset in enumerate(found.datasets):
            complete = bool(found.complete[number, place])
            cells = [_mean_and_spread(column) for column in found.seeds_of(dataset, share).T]
            means = [round(cell[0], 9) for cell in cells if cell is not None]
            best = max(means) if complete else None
            rows.append(
                {
                    "dataset": dataset,
                    "complete": complete,
                    "cells": [(cell, cell is not None and round(cell[0], 9) == best) for cell in cells],
                }
            )
        tables.append({"earliness": share, "rows": rows, "standing": found.standing(share)})
    return tables


def metric_rows(found: Comparison, metrics: Sequence[str]) -> dict[str, list[float]]:
    """Mean of each metric over the complete cells, by method; metrics that no cell has for all are left out."""
    means = {metric: found.cell_mean(metric) for metric in metrics}
    return {metric: mean.tolist() for metric, mean in means.items() if mean is not None}


def published_rows(
    found: Comparison, runs: Sequence[RunRecord], standings: Sequence[Standing]
) -> dict[str, Any] | None:
    """The paper's numbers beside these, where networks, methods and earliness are the paper's; else None.

    Ranks and first places are among the paper's four methods alone, and told only where all four are there.
    """
    models = {(run.config.get("teacher_model"), run.config.get("student_model")) for run in runs}
    beside = [standing for standing in standings if standing.earliness in PUBLISHED]
    methods = [method for method in METHODS if method in found.methods]
    if models != {(MODEL, MODEL)} or not beside or len(methods) < 2:
        return None
    places = [found.methods.index(method) for method in methods]
    scores = [standing.scores[:, places] for standing in beside]
    rows = []
    for number, method in enumerate(methods):
        cells = []
        for standing, among in zip(beside, scores, strict=True):
            ours = Published(float(among[:, number].mean()))
            if len(methods) == len(METHODS):
                ours = Published(ours.auc_prc, average_ranks(among)[number], first_places(among)[number])
            cells.append((ours, PUBLISHED[standing.earliness or 0][method]))
        rows.append({"method": method, "cells": cells})
    return {"standings": beside, "rows": rows, "seeds": len(found.seeds), "datasets": len(found.datasets)}


def _cost_rows(found: Comparison) -> dict[str, Any]:
    means = metric_rows(found, _COSTS)
    against = found.methods[0]
    ratios = {metric: found.cost_ratios(metric, against) for metric in means}
    return {"means": means, "ratios": ratios, "against": against}


def _charts(
    found: Comparison, standings: Sequence[Standing], reference: str, names: dict[str, str], others: Sequence[str]
) -> dict[str, Any]:
    colours = [method_colour(method, others) for method in found.methods]
    titles = [names[method] for method in found.methods]
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
        "baseline": names[baseline],
        "over_baseline": charts.over_earliness(
            "over-baseline",
            found.earliness,
            lines(SCORE, baseline),
            "AUC-PRC, points gained",
            bands=len(found.methods) <= _MOST_BANDS,
            zero=names[baseline],
        ),
        "diagrams": [
            (standing, charts.critical_difference(f"cd-{number}", titles, colours, test))
            for number, (standing, test) in enumerate(tested)
        ],
        "following": [
            (metric, charts.over_earliness(metric, found.earliness, lines(metric), _axis(metric), bands=False))
            for metric in _FOLLOWING
            if metric in found.values
        ],
        "gains": [],
        "gains_left_out": max(int(found.complete.any(axis=1).sum()) - _MOST_ROWS, 0),
    }
    rivals = [method for method in found.methods if method != reference]
    telling = [method for method in rivals if method in (baseline, "kd", "gdpd", "gendd")][:3]
    for number, other in enumerate(telling or rivals[:1]):
        named, points = _gains(found, reference, other)
        label = f"AUC-PRC of {names[reference]} minus {names[other]}, points"
        colour = method_colour(reference, others)
        svg = charts.gains(f"gains-{number}", named, found.earliness, points, label, colour)
        made["gains"].append((names[other], svg))
    return made


def _gains(found: Comparison, reference: str, other: str) -> tuple[list[str], np.ndarray]:
    """Differences [data sets, earliness] of data sets that have any, largest mean first; at most `_MOST_ROWS`."""
    mine, theirs = found.methods.index(reference), found.methods.index(other)
    points = np.full(found.complete.shape, np.nan)
    for place, share in enumerate(found.earliness):
        standing = found.standing(share)
        if standing is not None:
            rows = [found.datasets.index(name) for name in standing.datasets]
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


def _mean_and_spread(values: np.ndarray) -> tuple[float, float | None] | None:
    """Mean and sample standard deviation of what is there."""
    there = values[np.isfinite(values)]
    if not len(there):
        return None
    return float(there.mean()), float(there.std(ddof=1)) if len(there) > 1 else None


def _axis(metric: str) -> str:
    told = METRICS[metric]
    return f"{told.title}, {told.unit}"


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"

"""Puts the page together: sections per dataset, tables, charts, settings; written in one piece, atomically."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gdpd.config import RunConfig
from gdpd.experiments.records import RunRecord, find_runs
from gdpd.experiments.summary import (
    Row,
    best_methods,
    paired_differences,
    summarise,
)
from gdpd.methods import TEACHER, method_order, method_title
from gdpd.report import charts, gather
from gdpd.report.settings import settings, versions
from gdpd.report.svg import css_name, other_methods
from gdpd.report.template import check_installed, write_page


def build_report(folders: Iterable[Path], output: Path, title: str | None = None) -> Path:
    """Write one self-contained HTML page about every finished run in or below `folders`.

    Args:
        folders: run folders, or folders that hold run folders.
        output: the file to write; replaced if it is there.
        title: heading of the page; by default the datasets and methods found.

    Returns:
        `output`.

    Raises:
        FileNotFoundError: a folder is missing, or no finished run is in any of them.
        ImportError: jinja2 or matplotlib is not installed; they come with the extra "report".
        OSError: the page cannot be written; nothing half-written is left.
    """
    check_installed()
    runs = find_runs(folders)
    rows = summarise(runs)
    methods = sorted({run.method for run in runs}, key=method_order)
    others = other_methods(methods)
    return write_page(
        output,
        "page.html.j2",
        title=title or _title(runs, methods),
        runs=runs,
        blocks=_blocks(rows),
        css_names={method: css_name(method, others) for method in [*methods, TEACHER]},
        methods=[(method, method_title(method), css_name(method, others)) for method in methods],
        has_teacher=any(row.method == TEACHER for row in rows),
        seeds=sorted({run.seed for run in runs}),
        differences=_differences(rows),
        datasets=[_dataset(name, runs, rows, others) for name in dict.fromkeys(run.dataset for run in runs)],
        settings=settings(runs),
        versions=versions(runs),
    )


def _title(runs: Sequence[RunRecord], methods: Sequence[str]) -> str:
    datasets = list(dict.fromkeys(run.dataset for run in runs))
    named = " and ".join(datasets) if len(datasets) < 3 else f"{len(datasets)} data sets"
    return f"{named}: {', '.join(map(method_title, methods))}"


def _blocks(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows of the table, grouped by dataset and earliness, with the best student of each group marked."""
    best = best_methods(rows)
    blocks: dict[tuple[str, float, bool], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row.dataset, row.earliness, row.method == TEACHER)
        marked = {"row": row, "best": (row.dataset, row.earliness, row.method) in best}
        blocks.setdefault(key, []).append(marked)
    return [
        {"dataset": dataset, "earliness": earliness, "teacher": teacher, "rows": marked}
        for (dataset, earliness, teacher), marked in blocks.items()
    ]


def _differences(rows: Sequence[Row]) -> dict[str, Any] | None:
    """GDPD against its baselines, paired by seed: what the chart and its caption need. None without such pairs."""
    found = paired_differences(rows)
    if not found:
        return None
    baselines = []
    for name in dict.fromkeys(difference.baseline for difference in found):
        points = [point for difference in found if difference.baseline == name for point in difference.points.values]
        won, mean = sum(point > 0 for point in points), sum(points) / len(points)
        title = method_title(name)
        baselines.append({"name": name, "title": title, "won": won, "pairs": len(points), "mean": mean})
    return {"baselines": baselines, "chart": charts.paired_points("differences", found)}


def _dataset(name: str, runs: Sequence[RunRecord], rows: Sequence[Row], others: list[str]) -> dict[str, Any]:
    """One dataset: its chart over earliness for the overview, and a row of charts for each earliness."""
    mine = [run for run in runs if run.dataset == name]
    slug = re.sub(r"\W+", "-", name.lower())
    groups = []
    for share in sorted({run.earliness for run in mine}):
        here = [run for run in mine if run.earliness == share]
        made = (
            make(f"{slug}-{round(1000 * share)}", here, others)
            for make in (_path_figure, _curves_figure, _alpha_figure, _parts_figure)
        )
        figures = [figure for figure in made if figure is not None]
        if figures:
            groups.append({"share": f"{100 * share:g}", "figures": figures})
    over_earliness = charts.scores_over_earliness(
        f"{slug}-scores", [row for row in rows if row.dataset == name], others
    )
    return {"name": name, "over_earliness": over_earliness, "groups": groups}


Figure = dict[str, str]


def _path_figure(slug: str, runs: Sequence[RunRecord], others: list[str]) -> Figure | None:
    sampled = next((found for run in _gdpd(runs) if (found := gather.trajectory(run)) is not None), None)
    if sampled is None:
        return None
    return {
        "title": "From z_short to z_hat",
        "caption": f"Test series through the {len(sampled.z_k) - 1} steps of the reverse sampler, among the teacher's "
        "features (faint dots), in their plane of largest variance. Ring: the student's feature z_short; dotted: "
        "mixing with noise; filled: z_hat. Colours are classes.",
        "svg": charts.trajectory_plane(f"{slug}-path", sampled),
    }


def _curves_figure(slug: str, runs: Sequence[RunRecord], others: list[str]) -> Figure | None:
    curves = gather.validation_curves(runs, "auc_prc")
    if not curves:
        return None
    return {
        "title": "Training curves",
        "caption": "AUC-PRC on the validation split after each epoch; thin: single seeds. A small validation split "
        "makes coarse steps.",
        "svg": charts.training_curves(f"{slug}-val", curves, "validation AUC-PRC %", _warmup(runs), others),
    }


def _alpha_figure(slug: str, runs: Sequence[RunRecord], others: list[str]) -> Figure | None:
    epochs, mean, bands = gather.alpha_history(_gdpd(runs))
    if not len(epochs):
        return None
    return {
        "title": "alpha over time",
        "caption": "Share of the student's feature in the sampler's start (the rest is noise): mean and quantiles "
        "over the training series.",
        "svg": charts.alpha_over_time(f"{slug}-alpha", epochs, mean, bands),
    }


def _parts_figure(slug: str, runs: Sequence[RunRecord], others: list[str]) -> Figure | None:
    parts = gather.training_parts(_gdpd(runs))
    if not parts:
        return None
    return {
        "title": "GDPD's losses",
        "caption": "Before weighting, mean over seeds. ce: the student's cross-entropy, ce_hat: that of the sampled "
        "feature, kd: Hinton's loss; noise and autoencoder: the prior, learned in the warm-up.",
        "svg": charts.loss_parts(f"{slug}-parts", parts, _warmup(runs)),
    }


def _gdpd(runs: Sequence[RunRecord]) -> list[RunRecord]:
    return [run for run in runs if run.method == "gdpd"]


def _warmup(runs: Sequence[RunRecord]) -> int | None:
    gdpd = _gdpd(runs)
    return RunConfig.from_dict(gdpd[0].config).warmup if gdpd else None

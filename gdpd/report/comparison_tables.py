"""The tables of a comparison, as plain values that the page and the LaTeX file print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gdpd.experiments.comparison import Comparison, Standing
from gdpd.experiments.published import AMONG_MANY, METHODS, MODEL, PUBLISHED, Published
from gdpd.experiments.records import RunRecord
from gdpd.experiments.statistics import average_ranks, first_places

COSTS = ("seconds", "seconds_per_epoch", "cpu_seconds", "peak_memory", "peak_device_memory")


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


def dataset_tables(found: Comparison, standings: Sequence[Standing]) -> list[dict[str, Any]]:
    """Per earliness, a row per data set: mean and standard deviation over seeds of each method, the best marked.

    Cells that are not complete show what there is, over a method's own seeds, and count in no average.
    """
    by_share = {standing.earliness: standing for standing in standings}
    tables = []
    for place, share in enumerate(found.earliness):
        rows = []
        for number, dataset in enumerate(found.datasets):
            complete = bool(found.complete[number, place])
            cells = [mean_and_spread(column) for column in found.seeds_of(dataset, share).T]
            means = [round(cell[0], 9) for cell in cells if cell is not None]
            best = max(means) if complete else None
            rows.append(
                {
                    "dataset": dataset,
                    "complete": complete,
                    "cells": [(cell, cell is not None and round(cell[0], 9) == best) for cell in cells],
                }
            )
        tables.append({"earliness": share, "rows": rows, "standing": by_share.get(share)})
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
    beside = [standing for standing in standings if standing.earliness in PUBLISHED]
    methods = [method for method in METHODS if method in found.methods]
    if not _papers_networks(runs) or not beside or len(methods) < 2:
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


def among_many(found: Comparison, runs: Sequence[RunRecord], standings: Sequence[Standing]) -> dict[str, Any] | None:
    """GDPD's average rank and the best of the others at the earliness where the paper has many methods; else None."""
    at = [standing for standing in standings if standing.earliness == AMONG_MANY.earliness]
    if not _papers_networks(runs) or not at or "gdpd" not in found.methods or len(found.methods) < 5:
        return None
    ranks = dict(zip(found.methods, at[0].ranks, strict=True))
    rank = ranks.pop("gdpd")
    best = min(ranks, key=lambda method: ranks[method])
    return {"paper": AMONG_MANY, "others": len(ranks), "rank": rank, "best": best, "best_rank": ranks[best]}


def _papers_networks(runs: Sequence[RunRecord]) -> bool:
    return {(run.config.get("teacher_model"), run.config.get("student_model")) for run in runs} == {(MODEL, MODEL)}


def cost_rows(found: Comparison) -> dict[str, Any]:
    """Means of the costs there are, and their ratios to those of the first method."""
    means = metric_rows(found, COSTS)
    against = found.methods[0]
    ratios = {metric: found.cost_ratios(metric, against) for metric in means}
    return {"means": means, "ratios": ratios, "against": against}


def mean_and_spread(values: np.ndarray) -> tuple[float, float | None] | None:
    """Mean and sample standard deviation of what is there."""
    there = values[np.isfinite(values)]
    if not len(there):
        return None
    return float(there.mean()), float(there.std(ddof=1)) if len(there) > 1 else None

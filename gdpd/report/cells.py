"""Every cell of a comparison as a CSV file."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from gdpd.experiments.comparison import SCORE, Comparison
from gdpd.experiments.statistics import first_places, ranks
from gdpd.report.comparison_tables import mean_and_spread


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
                    told = mean_and_spread(values)
                    if metric == SCORE:
                        cell["seeds"] = int(np.isfinite(values).sum())
                    if told is not None:
                        cell[metric], cell[f"{metric}_std"] = told
                writer.writerow(cell)
    write_bytes(output, text.getvalue().encode())
    return output

"""`python -m bench.gdpd_variants`: the table of GDPD's variants in docs/method.md, from their committed results.

Nothing is trained. Run it after `gdpd grid results/gdpd_variants.yaml`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.tables import Rows, markdown, write_between_markers
from gdpd.experiments import read_grid, result_records
from gdpd.experiments.comparison import SCORE, Comparison, compare
from gdpd.methods import method_title

ROOT = Path(__file__).resolve().parents[1]
GRID, PAGE, MARKER = ROOT / "results" / "gdpd_variants.yaml", ROOT / "docs" / "method.md", "variants"


def rows(found: Comparison, labels: Sequence[str]) -> Rows:
    """Each method's AUC-PRC by data set and on their mean, its gain over GDPD, and processor time over GDPD's.

    Means over the seeds that all have; bounds of the gain resample data sets and seeds; of times, the geometric mean
    over data sets.
    """
    (standing,) = found.standings()
    gains = found.interval(standing.earliness, relative_to="gdpd")
    times = found.cost_ratios("cpu_seconds", "gdpd")
    assert gains is not None  # a standing has data sets
    made: Rows = [("", *standing.datasets, "mean", "gain over GDPD, points", "95 %", "processor time ÷ GDPD's")]
    for label in labels:
        at = found.methods.index(label)
        gain = ("", "") if label == "gdpd" else (
            f"{gains.mean[at]:+.1f}", f"{gains.low[at]:+.1f} to {gains.high[at]:+.1f}"
        )  # fmt: skip
        scores = (f"{score:.1f}" for score in standing.scores[:, at])
        time = "" if times is None else f"{times[at]:.2f}"
        made.append((method_title(label), *scores, f"{standing.mean[at]:.1f}", *gain, time))
    return made


def spread(found: Comparison) -> float:
    """Standard deviation of GDPD over its seeds, percent of AUC-PRC, mean over data sets with two seeds or more."""
    (scores,) = found.values[SCORE][..., found.methods.index("gdpd")].swapaxes(0, 1)  # of the one earliness
    several = np.isfinite(scores).sum(axis=1) > 1
    return float(np.nanstd(scores[several], axis=1, ddof=1).mean())


def table(file: Path) -> str:
    """The table of a grid's file, as Markdown."""
    found = compare(result_records(file.with_suffix("")))
    told = f"GDPD's own seeds differ by {spread(found):.1f} points (standard deviation, mean over data sets)."
    return "\n\n".join([markdown(rows(found, read_grid(file).methods)), told])


def main() -> None:
    """Write the table into docs/method.md."""
    write_between_markers(PAGE, MARKER, table(GRID))
    print(f"table written: {PAGE}")


if __name__ == "__main__":
    main()

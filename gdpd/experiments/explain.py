"""Where one method gains over another, and what goes with it: paired gains of a table's rows, and rank correlations.

Gains are paired by data set, earliness and seed. What goes with them is asked over data sets: the cells of one data
set share their series and, for a seed, their teacher, so each counts once, with its means over earliness and seeds. A
correlation of twelve points over half a dozen causes finds suspects, not culprits; the p-values are Holm-adjusted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gdpd.experiments.results import Result
from gdpd.experiments.statistics import holm


@dataclass(frozen=True)
class Gain:
    """AUC-PRC of `mine` minus that of `theirs`, in points, on one data set, earliness and seed."""

    mine: Result
    theirs: Result
    base: Result | None

    @property
    def points(self) -> float:
        """The gain."""
        return self.mine.auc_prc - self.theirs.auc_prc


def gains(results: Iterable[Result], method: str, baseline: str, base: str = "base") -> list[Gain]:
    """The paired gains of `method` over `baseline`, sorted by data set, earliness and seed.

    Args:
        results: chosen rows: one trial per data set, earliness, method and seed.
        method, baseline: names in the grid.
        base: the method without a teacher, by which the gap between teacher and student is measured.
    """
    found = {result.key[:4]: result for result in results}
    paired = []
    for (dataset, earliness, name, seed), mine in sorted(found.items()):
        theirs = found.get((dataset, earliness, baseline, seed))
        if name == method and theirs is not None:
            paired.append(Gain(mine, theirs, found.get((dataset, earliness, base, seed))))
    return paired


def _part(*names: str) -> Callable[[Gain], float | None]:
    return lambda gain: next((gain.mine.parts[name] for name in names if name in gain.mine.parts), None)


# What may go with a gain: name -> how it reads from a pair; None where the rows do not tell.
CAUSES: dict[str, Callable[[Gain], float | None]] = {
    "gap between teacher and Base, AUC-PRC": lambda g: (
        None if g.base is None else g.mine.teacher_auc_prc - g.base.auc_prc
    ),
    "teacher's AUC-PRC": lambda g: g.mine.teacher_auc_prc,
    "training series": lambda g: float(g.mine.n_train),
    "validation series": lambda g: float(g.mine.n_validation),
    "validation minus test AUC-PRC of the method": lambda g: g.mine.val_auc_prc - g.mine.auc_prc,
    "alpha after training": _part("main.alpha"),
    "prior's noise loss after the warm-up": _part("warmup.noise"),
    "autoencoder's loss after the warm-up": _part("warmup.autoencoder"),
}


class Association(NamedTuple):
    """Spearman's correlation of a cause with the gain over data sets; p is two-sided and Holm-adjusted."""

    cause: str
    datasets: int
    rho: float
    p: float


def associations(found: Iterable[Gain]) -> list[Association]:
    """How each of `CAUSES` goes with the gain, over data sets, strongest first.

    Causes that fewer than four data sets tell of, or that are the same on all, are left out.
    """
    from scipy.stats import spearmanr

    found = list(found)
    rows = []
    for cause, read in CAUSES.items():
        by_dataset: dict[str, list[tuple[float, float]]] = {}
        for gain in found:
            value = read(gain)
            if value is not None and np.isfinite(value):
                by_dataset.setdefault(gain.mine.dataset, []).append((value, gain.points))
        means = np.array([np.mean(values, axis=0) for values in by_dataset.values()])
        if len(means) < 4 or np.ptp(means[:, 0]) == 0 or np.ptp(means[:, 1]) == 0:
            continue
        tested = spearmanr(means[:, 0], means[:, 1])
        rows.append((cause, len(means), float(tested.statistic), float(tested.pvalue)))
    adjusted = holm([p for *_, p in rows])
    made = [Association(*row[:3], float(p)) for row, p in zip(rows, adjusted, strict=True)]
    return sorted(made, key=lambda association: -abs(association.rho))

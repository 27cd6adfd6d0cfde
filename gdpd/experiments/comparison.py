"""Many methods over many data sets: what of a grid can be compared, and how the methods stand.

A *cell* is one data set at one earliness. Methods are compared on the cells, and within them on the seeds, that all of
them have, so that a difference is never one of which runs happened to finish. A method's score of a cell is its mean
over those seeds; the mean over earliness weighs each earliness alike and takes data sets that have all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gdpd.experiments.records import RunRecord, find_runs
from gdpd.experiments.results import DATABASE, TABLE, result_records
from gdpd.experiments.statistics import (
    CriticalDifference,
    Interval,
    WinTieLoss,
    average_ranks,
    bootstrap_mean,
    critical_difference,
    first_places,
    win_tie_loss,
)
from gdpd.methods import method_order, method_title
from gdpd.options import nearest

if TYPE_CHECKING:
    from rich.table import Table

SCORE = "auc_prc"  # what ranks and tests are about


class Metric(NamedTuple):
    """How a number of metrics.json is told: its name, in short too, its unit, and the factor from the file's unit."""

    title: str
    short: str
    unit: str
    scale: float = 1.0


METRICS = {
    SCORE: Metric("AUC-PRC", "AUC-PRC", "%"),
    "accuracy": Metric("accuracy", "accuracy", "%", 100.0),
    "roc_auc": Metric("ROC-AUC", "ROC-AUC", "%", 100.0),
    "fidelity": Metric("agreement with the teacher", "agreement", "%", 100.0),
    "kl": Metric("KL from the teacher", "KL", "nats"),
    "calibration_error": Metric("calibration error (ECE)", "ECE", "%", 100.0),
    "seconds": Metric("training time of a run", "run", "s"),
    "seconds_per_epoch": Metric("training time of an epoch", "epoch", "s"),
    "cpu_seconds": Metric("processor time of a run", "processor", "s"),
    "peak_memory": Metric("peak memory", "memory", "MiB"),
    "peak_device_memory": Metric("peak memory on the device", "device", "MiB"),
}


@dataclass(frozen=True)
class Standing:
    """How the methods stand at one earliness, or on the mean over all.

    Attributes:
        earliness: in (0, 1]; None for the mean over all.
        datasets: those that all methods have.
        scores: mean AUC-PRC over seeds, percent, [data sets, methods].
        mean: of `scores` over data sets, [methods].
        ranks: average ranks, [methods]; 1 is best.
        first_places: numbers of data sets, [methods]; ties share one.
        teacher: mean AUC-PRC of the same data sets' and seeds' teachers on full series, percent; NaN where unknown.
        test: the tests behind a critical-difference diagram; None for fewer than two data sets or methods.
    """

    earliness: float | None
    datasets: tuple[str, ...]
    scores: np.ndarray
    mean: np.ndarray
    ranks: np.ndarray
    first_places: np.ndarray
    teacher: float
    test: CriticalDifference | None


class Pair(NamedTuple):
    """One method against another over data sets.

    `gain` is the mean difference of AUC-PRC in points with its 95 % bootstrap interval; `p` the Holm-adjusted p-value
    of Wilcoxon's test among all pairs of the standing, None where there is no test.
    """

    method: str
    other: str
    counts: WinTieLoss
    gain: Interval
    p: float | None

    @property
    def bounded(self) -> bool:
        """Whether the gain has an interval: one data set with one seed leaves nothing to resample."""
        return bool(np.isfinite(self.gain.low))


@dataclass(frozen=True)
class Comparison:
    """The runs of a grid as arrays, NaN where there is none.

    Attributes:
        datasets, earliness, methods, seeds: what the axes stand for, in order.
        values: [data sets, earliness, seeds, methods] for each metric that any run has, in the units of `METRICS`.
        teachers: AUC-PRC of the teachers on full series in percent, [data sets, seeds].
        weak_teachers: (data set, seed) of teachers that training called weak, in order.
        failed: runs that have no score, as text.
    """

    datasets: tuple[str, ...]
    earliness: tuple[float, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    values: Mapping[str, np.ndarray]
    teachers: np.ndarray
    weak_teachers: tuple[tuple[str, int], ...] = ()
    failed: tuple[str, ...] = ()

    @property
    def present(self) -> np.ndarray:
        """Which runs have a score: bool [data sets, earliness, seeds, methods]."""
        return np.isfinite(self.values[SCORE])

    @property
    def paired(self) -> np.ndarray:
        """Which seeds of a cell all methods have: bool [data sets, earliness, seeds]."""
        return np.asarray(self.present.all(axis=3))

    @property
    def complete(self) -> np.ndarray:
        """Which cells have such a seed: bool [data sets, earliness]."""
        return np.asarray(self.paired.any(axis=2))

    def at(self, earliness: float | None, metric: str = SCORE) -> tuple[tuple[str, ...], np.ndarray]:
        """The data sets that are complete at an earliness (None: at all, and the mean over them), and their values.

        Returns:
            names, and [data sets, seeds, methods] with NaN for seeds that some method lacks.

        Raises:
            ValueError: the earliness is not in the comparison.
        """
        values = self.values[metric]
        has = self.paired & np.isfinite(values).all(axis=3)
        if earliness is None:
            values, has = values.mean(axis=1), has.all(axis=1)
        elif earliness in self.earliness:
            place = self.earliness.index(earliness)
            values, has = values[:, place], has[:, place]
        else:
            raise ValueError(f"earliness={earliness} is not in the comparison, which has {self.earliness}")
        kept = has.any(axis=1)
        names = tuple(name for name, keep in zip(self.datasets, kept, strict=True) if keep)
        return names, np.where(has[kept][..., None], values[kept], np.nan)

    def seeds_of(self, dataset: str, earliness: float, metric: str = SCORE) -> np.ndarray:
        """A cell's values, [seeds, methods]: of the paired seeds where the cell is complete, else all there are."""
        place = self.datasets.index(dataset), self.earliness.index(earliness)
        values = self.values[metric][place]
        return np.where(self.paired[place][:, None], values, np.nan) if self.complete[place] else values

    def standing(self, earliness: float | None) -> Standing | None:
        """How the methods stand there; None where no data set is complete."""
        names, values = self.at(earliness)
        if not names:
            return None
        scores, counted = _over_seeds(values), np.isfinite(values).all(axis=2)
        rows = [self.datasets.index(name) for name in names]
        teachers = np.where(counted, self.teachers[rows], 0.0).sum(axis=1) / counted.sum(axis=1)
        tested = critical_difference(scores) if len(names) > 1 and len(self.methods) > 1 else None
        return Standing(
            earliness,
            names,
            scores,
            scores.mean(axis=0),
            average_ranks(scores),
            first_places(scores),
            float(teachers.mean()),
            tested,
        )

    def standings(self) -> list[Standing]:
        """One for each earliness with a complete data set, and the mean over all where there are several."""
        asked = [*self.earliness, *([None] if len(self.earliness) > 1 else [])]
        return [standing for value in asked if (standing := self.standing(value)) is not None]

    def interval(self, earliness: float | None, metric: str = SCORE, relative_to: str | None = None) -> Interval | None:
        """Means of a metric with bounds over data sets and seeds, each [methods]; None where there is none.

        Args:
            earliness: one of the comparison's; None for the mean over all.
            metric: a name in `METRICS`.
            relative_to: a method that is subtracted, run by run.
        """
        if metric not in self.values:
            return None
        names, values = self.at(earliness, metric)
        if not names:
            return None
        if relative_to is not None:
            values = values - values[..., self.methods.index(relative_to), None]
        return bootstrap_mean(values)

    def pairs(self, standing: Standing, method: str) -> list[Pair]:
        """`method` against each other method, on the data sets of the standing."""
        mine = self.methods.index(method)
        gains = self.interval(standing.earliness, relative_to=method)
        assert gains is not None  # a standing has data sets
        found = []
        for place, other in enumerate(self.methods):
            if place != mine:
                counts = win_tie_loss(standing.scores[:, mine], standing.scores[:, place])
                # Turned round: the interval is that of `other` minus `method`.
                gain = Interval(-gains.mean[place], -gains.high[place], -gains.low[place])
                p = None if standing.test is None else float(standing.test.p_values[mine, place])
                found.append(Pair(method, other, counts, gain, p))
        return found

    def cell_mean(self, metric: str) -> np.ndarray | None:
        """Mean of a metric over complete cells, each weighing alike, [methods]; None where no cell has it for all."""
        cells = self._cells(metric)
        return None if cells is None else cells.mean(axis=0)

    def cost_ratios(self, metric: str, relative_to: str) -> np.ndarray | None:
        """Geometric mean over complete cells of a positive metric relative to a method's, [methods], or None."""
        cells = self._cells(metric)
        if cells is None or (cells <= 0).any():
            return None
        logs = np.log(cells)
        return np.exp((logs - logs[:, [self.methods.index(relative_to)]]).mean(axis=0))

    def _cells(self, metric: str) -> np.ndarray | None:
        """Means over seeds of the cells that have a metric for all methods, [cells, methods]."""
        values = self.values.get(metric)
        if values is None:
            return None
        has = self.paired & np.isfinite(values).all(axis=3)
        kept = has.any(axis=2)
        return _over_seeds(np.where(has[..., None], values, np.nan)[kept]) if kept.any() else None

    def missing(self) -> dict[str, int]:
        """Number of runs without a score, of the product of all axes, by method; those without any are left out."""
        counts = (~self.present).sum(axis=(0, 1, 2))
        return {method: int(count) for method, count in zip(self.methods, counts, strict=True) if count}


def _over_seeds(values: np.ndarray) -> np.ndarray:
    # Rounded far below what is told, so that equal scores tie whatever the order of the sums was.
    return np.asarray(np.round(np.nanmean(values, axis=1), 9))


def find_records(paths: Iterable[Path]) -> tuple[bool, list[RunRecord]]:
    """The runs that some paths hold, and whether any of them is a grid's table.

    Args:
        paths: a grid's folder, or the table in it: the chosen rows of the table. Any other folder: the finished runs in
            or below it.

    Raises:
        FileNotFoundError, ValueError: as `find_runs` and `result_records`; a table without a row.
    """
    of_grid, runs, folders = False, [], []
    for path in paths:
        folder = path.parent if path.name in (DATABASE, TABLE) and path.is_file() else path
        if (folder / DATABASE).is_file() or (folder / TABLE).is_file():
            of_grid = True
            rows = result_records(folder)
            if not rows:
                raise ValueError(f"the table in {folder} has no row yet. `gdpd grid` adds one as each job ends.")
            runs += rows
        else:
            folders.append(folder)
    return of_grid, runs + (find_runs(folders) if folders else [])


def of_methods(runs: Iterable[RunRecord], methods: Sequence[str]) -> list[RunRecord]:
    """The runs of some methods, so that one with few runs does not keep a comparison to what it has.

    Raises:
        ValueError: a method without runs.
    """
    runs = list(runs)
    there = sorted({run.method for run in runs}, key=method_order)
    for name in methods:
        if name not in there:
            raise ValueError(f"method={name!r} has no runs here{nearest(name, there)}: {', '.join(there)} have.")
    return [run for run in runs if run.method in methods]


def table(found: Comparison) -> Table:
    """Average AUC-PRC, average rank and first places of each method, as a rich table for the terminal."""
    from rich import box
    from rich.table import Table

    standings = found.standings()
    made = Table(header_style="bold", box=box.SIMPLE, pad_edge=False)
    made.caption_justify = "left"
    made.caption = (
        f"Average AUC-PRC %, below it average rank (first places), by share of the series read. {found.complete.sum()} "
        f"of {found.complete.size} cells have all methods."
    )
    made.add_column("method", no_wrap=True)
    for standing in standings:
        named = "mean" if standing.earliness is None else f"{100 * standing.earliness:g} %"
        sets = len(standing.datasets)
        made.add_column(f"{named}\n{sets} set{'s' if sets > 1 else ''}", justify="right", no_wrap=True)
    for place, method in enumerate(found.methods):
        cells = []
        for standing in standings:
            score = f"{standing.mean[place]:.2f}"
            score = f"[bold]{score}[/]" if standing.mean[place] == standing.mean.max() else score
            cells.append(f"{score}\n{standing.ranks[place]:.2f} ({standing.first_places[place]:.3g})")
        made.add_row(method_title(method), *cells)
    return made


def compare(runs: Iterable[RunRecord]) -> Comparison:
    """The arrays of some finished runs, from `find_runs` or from a grid's table (`result_records`).

    A run without a finite AUC-PRC counts as missing and is listed in `failed`.

    Raises:
        ValueError: no run; two runs of the same data set, earliness, method and seed; a run with an AUC-PRC that is
            not a percentage; one method only; no cell that all methods have.
    """
    from gdpd.training.stages import CHANCE_LEVEL

    found: dict[tuple[str, float, str, int], RunRecord] = {}
    failed = []
    for run in runs:
        key = (run.dataset, run.earliness, run.method, run.seed)
        if key in found:
            raise ValueError(
                f"{found[key].folder} and {run.folder} are both {_name(key)}. A comparison takes each once: "
                "give one of the folders, or the variants names of their own in a grid."
            )
        found[key] = run
        score = _number(run.metrics.get(SCORE))
        if np.isnan(score):
            failed.append(_name(key))
        elif not 0 <= score <= 100:
            raise ValueError(f"{run.folder} has auc_prc {score:g}; it is a percentage, 0 to 100")
    if not found:
        raise ValueError("no run to compare. `gdpd distill` makes one, `gdpd grid` many.")
    datasets, earliness = sorted({key[0] for key in found}), sorted({key[1] for key in found})
    methods, seeds = sorted({key[2] for key in found}, key=method_order), sorted({key[3] for key in found})
    shape = (len(datasets), len(earliness), len(seeds), len(methods))
    values = {metric: np.full(shape, np.nan) for metric in METRICS}
    teachers = np.full((len(datasets), len(seeds)), np.nan)
    weak = set()
    for run in found.values():
        dataset, share = datasets.index(run.dataset), earliness.index(run.earliness)
        method, seed = methods.index(run.method), seeds.index(run.seed)
        for metric, told in METRICS.items():
            values[metric][dataset, share, seed, method] = told.scale * _number(run.metrics.get(metric))
        teachers[dataset, seed] = _number(run.teacher.get(SCORE))
        if run.teacher.get("weak", _number(run.teacher.get("p_chance")) > CHANCE_LEVEL):
            weak.add((run.dataset, run.seed))
    made = Comparison(
        tuple(datasets),
        tuple(earliness),
        tuple(methods),
        tuple(seeds),
        {metric: array for metric, array in values.items() if metric == SCORE or np.isfinite(array).any()},
        teachers,
        tuple(sorted(weak)),
        tuple(sorted(failed)),
    )
    if len(methods) < 2:
        raise ValueError(
            f"the runs are all of the method {methods[0]!r}; a comparison takes two or more. `gdpd report --runs` "
            "shows single runs."
        )
    if not made.complete.any():
        lacking = ", ".join(f"{method} {count}" for method, count in made.missing().items())
        raise ValueError(
            f"no data set at any earliness has a seed that all of {', '.join(methods)} have (runs missing: {lacking}). "
            "Finish the grid, or give the runs of fewer methods."
        )
    return made


def _number(value: Any) -> float:
    number = float("nan") if value is None else float(value)
    return number if np.isfinite(number) else float("nan")


def _name(key: tuple[str, float, str, int]) -> str:
    dataset, earliness, method, seed = key
    return f"{dataset}, {100 * earliness:g} % read, {method}, seed {seed}"

"""Tables over finished runs: mean and spread over seeds, and differences between methods paired by seed."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gdpd.experiments.records import RunRecord
from gdpd.methods import TEACHER, method_order, method_title

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of a score over seeds; `std` is None for one seed."""

    mean: float
    std: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of `values`, at least one."""
        kept = tuple(values)
        return cls(statistics.fmean(kept), statistics.stdev(kept) if len(kept) > 1 else None, kept)

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.std is None else f"{self.mean:.1f} ± {self.std:.1f}"


@dataclass(frozen=True)
class Row:
    """One method on one dataset at one earliness, over its seeds.

    Attributes:
        dataset, earliness, method: what was run; the teacher reads the full series, earliness 1.
        seeds: the seeds, in order; the values of each spread are in the same order.
        auc_prc, accuracy, fidelity: in percent; fidelity is the agreement with the teacher, None for the teacher.
        seconds: wall-clock training time of a run, None where it was not recorded.
    """

    dataset: str
    earliness: float
    method: str
    seeds: tuple[int, ...]
    auc_prc: Spread
    accuracy: Spread
    fidelity: Spread | None
    seconds: Spread | None

    @property
    def title(self) -> str:
        """The method's name as it is written in tables."""
        return method_title(self.method)


@dataclass(frozen=True)
class Difference:
    """AUC-PRC of `method` minus that of `baseline`, in points, paired by seed."""

    dataset: str
    earliness: float
    method: str
    baseline: str
    seeds: tuple[int, ...]
    points: Spread


def summarise(runs: Iterable[RunRecord]) -> list[Row]:
    """One row per (dataset, earliness, method), and one per dataset for the teachers that the runs share."""
    groups: dict[tuple[str, float, str], list[RunRecord]] = defaultdict(list)
    teachers: dict[str, dict[int, RunRecord]] = defaultdict(dict)
    for run in runs:
        groups[run.dataset, run.earliness, run.method].append(run)
        if run.teacher:
            teachers[run.dataset].setdefault(run.seed, run)
    rows = []
    for (dataset, earliness, method), members in groups.items():
        members.sort(key=lambda run: run.seed)
        rows.append(_row(dataset, earliness, method, members, [run.metrics for run in members]))
    for dataset, by_seed in teachers.items():
        members = [by_seed[seed] for seed in sorted(by_seed)]
        rows.append(_row(dataset, 1.0, TEACHER, members, [run.teacher for run in members]))
    return sorted(rows, key=lambda r: (r.dataset, r.method == TEACHER, r.earliness, method_order(r.method)))


def _row(dataset: str, earliness: float, method: str, runs: Sequence[RunRecord], scores: Sequence[dict]) -> Row:
    def spread(name: str, scale: float = 1.0) -> Spread | None:
        values = [scale * score[name] for score in scores if score.get(name) is not None]
        return Spread.of(values) if len(values) == len(scores) else None

    auc_prc, accuracy = spread("auc_prc"), spread("accuracy", 100.0)
    if auc_prc is None or accuracy is None:
        raise ValueError(f"metrics.json of {runs[0].folder} holds no auc_prc or accuracy; was it written by hand?")
    return Row(
        dataset,
        earliness,
        method,
        tuple(run.seed for run in runs),
        auc_prc,
        accuracy,
        None if method == TEACHER else spread("fidelity", 100.0),
        spread("seconds"),
    )


def paired_differences(
    rows: Iterable[Row], method: str = "gdpd", baselines: Sequence[str] = ("base", "kd")
) -> list[Difference]:
    """What `method` gains over each of `baselines` on the seeds that both have, dataset by dataset."""
    by_key = {(row.dataset, row.earliness, row.method): row for row in rows}
    found = []
    for (dataset, earliness, name), row in by_key.items():
        for baseline in baselines if name == method else ():
            other = by_key.get((dataset, earliness, baseline))
            theirs = dict(zip(other.seeds, other.auc_prc.values, strict=True)) if other else {}
            pairs = [
                (seed, value - theirs[seed])
                for seed, value in zip(row.seeds, row.auc_prc.values, strict=True)
                if seed in theirs
            ]
            if pairs:
                seeds, points = zip(*pairs, strict=True)
                found.append(Difference(dataset, earliness, method, baseline, seeds, Spread.of(points)))
    return found


def best_methods(rows: Iterable[Row]) -> set[tuple[str, float, str]]:
    """The (dataset, earliness, method) with the highest mean AUC-PRC among students, where there are several."""
    groups: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for row in rows:
        if row.method != TEACHER:
            groups[row.dataset, row.earliness].append(row)
    best = (max(group, key=lambda row: row.auc_prc.mean) for group in groups.values() if len(group) > 1)
    return {(row.dataset, row.earliness, row.method) for row in best}


def table(rows: Sequence[Row], title: str = "") -> Table:
    """The rows as a rich table for the terminal; the best student of each block is bold."""
    from rich import box
    from rich.table import Table

    made = Table(title=title or None, title_justify="left", header_style="bold", box=box.SIMPLE, pad_edge=False)
    made.caption_justify = "left"
    made.caption = f"{_seeds(rows)} Fidelity: same class as the teacher."
    made.add_column("data set", no_wrap=True)
    made.add_column("method", no_wrap=True)
    for name in ("AUC-PRC %", "accuracy %", "fidelity %", "seconds"):
        made.add_column(name, justify="right", no_wrap=True)
    best = best_methods(rows)
    dataset, share = "", -1.0
    for row in rows:
        if row.dataset != dataset:
            made.add_section()
            made.add_row(f"[bold]{row.dataset}[/]")
            dataset, share = row.dataset, -1.0
        elif row.earliness != share:
            made.add_row()
        score = str(row.auc_prc)
        made.add_row(
            f"  {100 * row.earliness:g} %" if row.earliness != share else "",
            row.title,
            f"[bold]{score}[/]" if (row.dataset, row.earliness, row.method) in best else score,
            str(row.accuracy),
            "" if row.fidelity is None else str(row.fidelity),
            "" if row.seconds is None else f"{row.seconds.mean:.1f}",
        )
        share = row.earliness
    return made


def _seeds(rows: Sequence[Row]) -> str:
    counts = {len(row.seeds) for row in rows}
    most, least = max(counts), min(counts)
    if most == 1:
        return "One seed."
    return f"Mean ± standard deviation over {most if most == least else f'{least} to {most}'} seeds."

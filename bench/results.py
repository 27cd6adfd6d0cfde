"""`python -m bench.results`: the tables of docs/results.md from the results tables of the comparison and of its search.

Nothing is trained. Run it after `gdpd grid results/comparison.yaml`, or on another grid's file to see its tables.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.tables import Rows, markdown, write_between_markers
from gdpd.experiments import Grid, choose, read_grid, read_results, result_records
from gdpd.experiments.comparison import Comparison, Pair, Standing, compare
from gdpd.experiments.explain import associations, gains
from gdpd.experiments.published import PUBLISHED
from gdpd.experiments.records import RunRecord
from gdpd.experiments.results import Result, read_recipe
from gdpd.experiments.statistics import wilcoxon
from gdpd.methods import method_order, method_title
from gdpd.training.stages import CHANCE_LEVEL

ROOT = Path(__file__).resolve().parents[1]
_GRIDS = ROOT / "results"
COMPARISON, SEARCH = _GRIDS / "comparison.yaml", _GRIDS / "loss_ratio.yaml"
RELEASE, BASELINES = _GRIDS / "release.yaml", _GRIDS / "baselines.yaml"
FULL = 0.75  # share of the best covered method's runs that a method of the main tables has


def progress(grid: Grid, results: Sequence[Result]) -> Rows:
    """How many jobs of each seed and earliness are done, by method; where none has begun, in one row."""
    jobs = list(grid.jobs())
    planned = Counter((job.key.seed, job.key.earliness, job.label) for job in jobs)
    keys = {job.key for job in jobs}
    done = Counter((row.seed, row.earliness, row.method) for row in results if row.key in keys)
    rows: Rows = [("seed", "share read", *(method_title(label) for label in grid.methods))]
    for seed, earliness in itertools.product(grid.seeds, grid.earliness):
        counts = [(seed, earliness, label) for label in grid.methods]
        if any(done[key] for key in counts):
            rows.append((str(seed), f"{earliness:.0%}", *(f"{done[key]}/{planned[key]}" for key in counts)))
            for key in counts:
                del planned[key]
    if planned:
        rest = Counter(label for _, _, label in planned.elements())
        rows.append(("the rest", "", *(f"0/{rest[label]}" for label in grid.methods)))
    return rows


def standings(found: Comparison) -> Rows:
    """Average AUC-PRC, average rank and first places by earliness, the published average beside them."""
    rows: Rows = [("share read", "sets", "method", "AUC-PRC", "rank", "first places", "published, other sets")]
    for standing in found.standings():
        share, best = _share(standing), standing.mean.max()
        for place, method in enumerate(found.methods):
            mean = f"{standing.mean[place]:.2f}"
            told = PUBLISHED.get(standing.earliness or 0, {}).get(method)
            rows.append(
                (
                    share if not place else "", str(len(standing.datasets)) if not place else "", method_title(method),
                    f"**{mean}**" if standing.mean[place] == best else mean, f"{standing.ranks[place]:.2f}",
                    f"{standing.first_places[place]:.3g}", "" if told is None else f"{told.auc_prc:.2f}",
                )
            )  # fmt: skip
    return rows


def pairs(found: Comparison, method: str = "gdpd") -> Rows:
    """What `method` gains over each other, with bounds over data sets and seeds, and Wilcoxon's test over data sets."""
    title = method_title(method)
    rows: Rows = [("share read", f"{title} against", "gain, points", "95 %", "better–same–worse", "p, Holm")]
    for standing in found.standings():
        for number, pair in enumerate(found.pairs(standing, method) if method in found.methods else ()):
            rows.append(("" if number else _share(standing), method_title(pair.other), *_gain(pair)))
    return rows


def _share(standing: Standing) -> str:
    return "mean" if standing.earliness is None else f"{standing.earliness:.0%}"


def _gain(pair: Pair) -> tuple[str, str, str, str]:
    """Gain, bounds, counts and p of a pair, as cells of a table."""
    bounds = f"{pair.gain.low:+.2f} to {pair.gain.high:+.2f}" if pair.bounded else ""
    return f"{pair.gain.mean:+.2f}", bounds, "–".join(map(str, pair.counts)), "" if pair.p is None else _p(pair.p)


def cells(found: Comparison) -> Rows:
    """AUC-PRC of every data set and earliness, mean over the seeds that all methods have, beside the teacher's."""
    rows: Rows = [("data set", "share read", "seeds", *(method_title(m) for m in found.methods), "Teacher")]
    for place, dataset in enumerate(found.datasets):
        for share, earliness in enumerate(found.earliness):
            if not found.complete[place, share]:
                continue
            paired = found.paired[place, share]
            means = found.values["auc_prc"][place, share][paired].mean(axis=0)
            told = [f"**{mean:.1f}**" if mean == means.max() else f"{mean:.1f}" for mean in means]
            teacher = f"{np.nanmean(found.teachers[place][paired]):.1f}"
            rows.append((dataset, f"{earliness:.0%}", str(paired.sum()), *told, teacher))
    return rows


def teachers(results: Sequence[Result]) -> Rows:
    """What there is to learn from and to select on, by data set: series, the teachers, full marks on validation."""
    rows: Rows = [
        (
            "data set",
            "training series",
            "validation series",
            "Teacher: test",
            "validation",
            "weak",
            "Base",
            "runs with 100 %",
        )
    ]
    for dataset in sorted({row.dataset for row in results}):
        mine = [row for row in results if row.dataset == dataset]
        by_seed = list({row.seed: row for row in mine}.values())
        weak = sum(row.teacher_p_chance > CHANCE_LEVEL for row in by_seed)
        full = sum(row.val_auc_prc >= 100 - 1e-9 for row in mine)
        base = [row.auc_prc for row in mine if row.method == "base"]
        rows.append(
            (
                dataset, str(mine[0].n_train), str(mine[0].n_validation),
                f"{np.mean([row.teacher_auc_prc for row in by_seed]):.1f}",
                f"{np.mean([row.teacher_val_auc_prc for row in by_seed]):.1f}", f"{weak} of {len(by_seed)}",
                f"{np.mean(base):.1f}" if base else "", f"{full} of {len(mine)}",
            )
        )  # fmt: skip
    return rows


def by_teacher(results: Sequence[Result], baselines: Sequence[str]) -> Rows:
    """GDPD's gains where the teacher scores above Base, which reads the prefix alone, and where it does not."""
    rows: Rows = [("GDPD against", "the teacher is", "paired runs", "median gain, points", "better–same–worse")]
    for baseline in baselines:
        found = [gain for gain in gains(results, "gdpd", baseline) if gain.base is not None]
        for above in (True, False):
            points = [g.points for g in found if (g.mine.teacher_auc_prc > (g.base or g.mine).auc_prc) == above]
            if points:
                where = "above Base" if above else "not above Base"
                rows.append(
                    (method_title(baseline), where, str(len(points)), f"{np.median(points):+.2f}", _counts(points))
                )
    return rows


def prior(results: Sequence[Result], baselines: Sequence[str], method: str = "gdpd") -> Rows:
    """How well the method's prior was learned, by data set, and its gains; a prior that predicts zero has loss 1."""
    parts = {"noise loss": "warmup.noise", "autoencoder's loss": "warmup.autoencoder", "alpha": "main.alpha"}
    gained = {name: gains(results, method, name) for name in baselines}
    rows: Rows = [("data set", *parts, *(f"gain over {method_title(name)}" for name in baselines))]
    mine = [row for row in results if row.method == method and set(parts.values()) <= set(row.parts)]
    for dataset in sorted({row.dataset for row in mine}):
        means = [np.mean([row.parts[part] for row in mine if row.dataset == dataset]) for part in parts.values()]
        points = [[gain.points for gain in found if gain.mine.dataset == dataset] for found in gained.values()]
        told = [f"{np.mean(values):+.1f}" if values else "" for values in points]
        rows.append((dataset, f"{means[0]:.2f}", f"{means[1]:.4f}", f"{means[2]:.2f}", *told))
    return rows[:1] + sorted(rows[1:], key=lambda row: float(row[1]))


def trials(grid: Grid, results: Sequence[Result]) -> Rows:
    """What each trial of each method's search scored on validation data, mean over the cells that all its trials have.

    In bold the best by AUC-PRC; ties go to the lower cross-entropy. Test scores are not asked.
    """
    rows: Rows = [("method", "trial", "cells", "validation AUC-PRC", "validation cross-entropy")]
    by_key = {row.key: row for row in results}
    found: dict[str, dict[str, dict[tuple[str, float, int], Result]]] = {label: {} for label in grid.methods}
    for job in grid.jobs():
        if job.key in by_key:
            row = by_key[job.key]
            told = ", ".join(f"{name} = {value}" for name, value in job.trial.items())
            found[job.label].setdefault(told, {})[row.dataset, row.earliness, row.seed] = row
    for label, by_trial in found.items():
        cells = set.intersection(*map(set, by_trial.values())) if by_trial else set()
        means = {
            told: tuple(np.mean([getattr(of[cell], score) for cell in cells]) for score in ("val_auc_prc", "val_ce"))
            for told, of in by_trial.items()
            if cells
        }
        best = min(means, key=lambda told: (-means[told][0], means[told][1]), default="")
        for number, (told, (auc_prc, ce)) in enumerate(means.items()):
            first, bold = "" if number else method_title(label), f"**{told}**" if told == best else told
            rows.append((first, bold, str(len(cells)), f"{auc_prc:.2f}", f"{ce:.3f}"))
    return rows


def _counts(points: Sequence[float]) -> str:
    values = np.asarray(points)
    return f"{(values > 0).sum()}–{(values == 0).sum()}–{(values < 0).sum()}"


def reasons(results: Sequence[Result], baselines: Sequence[str]) -> Rows:
    """What goes with GDPD's gain over each baseline, over data sets."""
    rows: Rows = [("GDPD against", "what may go with the gain", "data sets", "Spearman's rho", "p, Holm")]
    for baseline in baselines:
        for number, told in enumerate(associations(gains(results, "gdpd", baseline))):
            first = method_title(baseline) if not number else ""
            rows.append((first, told.cause, str(told.datasets), f"{told.rho:+.2f}", _p(told.p)))
    return rows


def runs_paired(results: Sequence[Result], baselines: Sequence[str]) -> Rows:
    """GDPD against each baseline run by run: gains over (data set, earliness, seed), and Wilcoxon's test over these."""
    rows: Rows = [("GDPD against", "paired runs", "median gain, points", "quartiles", "better–same–worse", "p")]
    for baseline in baselines:
        found = gains(results, "gdpd", baseline)
        if not found:
            continue
        points = np.array([gain.points for gain in found])
        low, middle, high = np.quantile(points, [0.25, 0.5, 0.75])
        counts = _counts(points)
        p = wilcoxon([g.mine.auc_prc for g in found], [g.theirs.auc_prc for g in found])
        quartiles = f"{low:+.2f} to {high:+.2f}"
        rows.append((method_title(baseline), str(len(found)), f"{middle:+.2f}", quartiles, counts, _p(p)))
    return rows


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def split(runs: Sequence[RunRecord]) -> tuple[list[str], list[str]]:
    """The methods that have (nearly) all the runs that any has, and those that lag behind, both in order.

    A comparison takes only what all its methods have: one that has just begun would leave little of the others.
    """
    counts = Counter(run.method for run in runs)
    most = max(counts.values())
    ordered = sorted(counts, key=method_order)
    full = [method for method in ordered if counts[method] >= FULL * most]
    return full, [method for method in ordered if method not in full]


def tables(file: Path, folder: Path) -> dict[str, str]:
    """Every table of the page, by the name of its markers.

    Raises:
        FileNotFoundError, ValueError: as `read_grid`, `read_results` and `compare`.
    """
    grid, results = read_grid(file), read_results(folder)
    chosen = choose(results, read_recipe(folder)["search_score"])
    runs = result_records(folder)
    varied = [label for label in grid.methods if grid.variant(label).method != label]
    full, late = split([run for run in runs if run.method not in varied])
    found = compare(run for run in runs if run.method in full)
    baselines = [method for method in full if method != "gdpd"]
    made = {
        "progress": progress(grid, results),
        "standings": standings(found),
        "pairs": pairs(found),
        "runs": runs_paired(chosen, [*baselines, *late]),
        "cells": cells(found),
        "teachers": teachers(chosen),
        "prior": prior(chosen, baselines),
        "by_teacher": by_teacher(chosen, baselines),
        "reasons": reasons(chosen, baselines[:2]),
    }
    told = {name: markdown(rows) for name, rows in made.items()}
    told["variants"] = _variants(varied, runs, full, chosen)
    behind = [_beside(runs, [*full, method], method_title(method), against=method) for method in late]
    told["late"] = "\n\n".join(behind) or "All methods are in the tables above."
    return told


def _variants(labels: Sequence[str], runs: Sequence[RunRecord], full: Sequence[str], chosen: Sequence[Result]) -> str:
    """The variants that have run: each against GDPD, the standings of what all have, and priors that were learned."""
    begun = [label for label in labels if any(run.method == label for run in runs)]
    if not begun:
        return "No variant has run."
    told = [markdown(variant_pairs(runs, begun)), _beside(runs, [*full, *begun], "All of them together")]
    for label in begun:
        learned = prior(chosen, [name for name in ("base", "kd", "gdpd") if name in full], label)
        told += [f"The prior of `{label}`:", markdown(learned)] if len(learned) > 1 else []
    return "\n\n".join(told)


def variant_pairs(runs: Sequence[RunRecord], variants: Sequence[str]) -> Rows:
    """GDPD against each variant, on all that the two have run; p of Wilcoxon's test over data sets, not adjusted."""
    rows: Rows = [
        ("variant", "share read", "runs", "AUC-PRC", "GDPD's", "GDPD's gain, points", "95 %", "better–same–worse", "p")
    ]
    for variant in variants:
        try:
            found = compare(run for run in runs if run.method in ("gdpd", variant))
        except ValueError:  # no cell that both have
            continue
        for number, standing in enumerate(found.standings() if len(found.methods) == 2 else ()):
            (pair,) = found.pairs(standing, "gdpd")
            mean = dict(zip(found.methods, standing.mean, strict=True))
            at = slice(None) if standing.earliness is None else found.earliness.index(standing.earliness)
            rows.append(
                (
                    "" if number else f"`{variant}`", _share(standing), str(found.paired[:, at].sum()),
                    f"{mean[variant]:.2f}", f"{mean['gdpd']:.2f}", *_gain(pair),
                )
            )  # fmt: skip
    return rows


def protocols(ours: Sequence[RunRecord], theirs: Sequence[RunRecord]) -> Rows:
    """The methods under two protocols, on the data sets, shares and seeds that all of them have under both."""
    rows: Rows = [("share read", "sets", "runs", "method", "this page's", "the release's", "published, other sets")]
    methods = {run.method for run in ours} & {run.method for run in theirs}
    have = Counter((run.dataset, run.earliness, run.seed) for run in (*ours, *theirs) if run.method in methods)
    common = {cell for cell, count in have.items() if count == 2 * len(methods)}
    if not common:
        return rows
    here, there = (
        compare(r for r in runs if r.method in methods and (r.dataset, r.earliness, r.seed) in common)
        for runs in (ours, theirs)
    )
    for ours_at, theirs_at in zip(here.standings(), there.standings(), strict=True):
        at = slice(None) if ours_at.earliness is None else here.earliness.index(ours_at.earliness)
        for place, method in enumerate(here.methods):
            told = PUBLISHED.get(ours_at.earliness or 0, {}).get(method)
            first = (_share(ours_at), str(len(ours_at.datasets)), str(here.paired[:, at].sum()))
            means = (f"**{s.mean[place]:.2f}**" if s.mean[place] == s.mean.max() else f"{s.mean[place]:.2f}"
                     for s in (ours_at, theirs_at))  # fmt: skip
            title = method_title(method)
            rows.append((*(("", "", "") if place else first), title, *means, f"{told.auc_prc:.2f}" if told else ""))
    return rows


def _beside(runs: Sequence[RunRecord], methods: Sequence[str], title: str, against: str = "") -> str:
    """How some methods stand where all of them ran, and one of them against each other."""
    try:
        found = compare(run for run in runs if run.method in methods)
    except ValueError:
        return f"{title}: no cell yet that all methods have."
    paired = [markdown(pairs(found, against))] if against else []
    return "\n\n".join([f"{title}, {_covered(found)}:", markdown(standings(found)), *paired])


def _covered(found: Comparison) -> str:
    """How many cells (data set, share read) and runs per method a comparison rests on."""
    return f"{found.complete.sum()} of {found.complete.size} cells, {found.paired.sum()} runs of each method"


def search(file: Path) -> str:
    """The table of the comparison's search, as Markdown; see `trials`."""
    return markdown(trials(read_grid(file), read_results(file.with_suffix(""))))


def release(file: Path, comparison: Path) -> str:
    """The comparison's runs beside those by the release's protocol, as Markdown; see `protocols` and `pairs`."""
    theirs = result_records(file.with_suffix(""))
    beside = protocols(result_records(comparison.with_suffix("")), theirs)
    told = "GDPD against the others, by the release's protocol:"
    return "\n\n".join([markdown(beside), told, markdown(pairs(compare(theirs)))])


def baselines(file: Path) -> str:
    """How all methods stand in the grid of `file`, as Markdown; see `standings` and `pairs`."""
    found = compare(result_records(file.with_suffix("")))
    return "\n\n".join([f"{_covered(found)}:", markdown(standings(found)), markdown(pairs(found))])


def all_tables() -> dict[str, str]:
    """Every table of docs/results.md, by the name of its markers."""
    return tables(COMPARISON, COMPARISON.with_suffix("")) | {
        "search": search(SEARCH),
        "release": release(RELEASE, COMPARISON),
        "baselines": baselines(BASELINES),
    }


def main() -> None:
    """Write the tables into docs/results.md."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=COMPARISON)
    parser.add_argument("--folder", type=Path, help="folder of the results table (default: beside the file)")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    asked = parser.parse_args()
    whole = asked.file == COMPARISON and asked.folder is None
    made = all_tables() if whole else tables(asked.file, asked.folder or asked.file.with_suffix(""))
    for name, table in made.items():
        write_between_markers(asked.page, name, table)
    print(f"tables written: {asked.page}")


if __name__ == "__main__":
    main()

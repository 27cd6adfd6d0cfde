"""The demo: Base, Base-KD and GDPD on GunPoint and ItalyPowerDemand, small enough for two cores and two minutes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from gdpd.experiments.grid import Grid
from gdpd.experiments.records import find_runs
from gdpd.experiments.runner import Outcome, run_grid
from gdpd.experiments.summary import summarise, table
from gdpd.methods import method_title

if TYPE_CHECKING:
    from rich.console import Console

SEEDS = (1, 24, 300, 49000, 1001)  # those of the paper's public release


def demo_grid(seeds: int) -> Grid:
    """The demo's grid with the first `seeds` of its seeds.

    Raises:
        ValueError: not between 1 and the number of seeds there are.
    """
    if not 1 <= seeds <= len(SEEDS):
        raise ValueError(f"seeds={seeds} is outside 1..{len(SEEDS)}. The demo pairs its methods on that many seeds.")
    return Grid(
        datasets=("GunPoint", "ItalyPowerDemand"),
        earliness=(0.2, 0.5),
        methods=("base", "kd", "gdpd"),
        seeds=SEEDS[:seeds],
        # The paper's small student for both networks, and half its epochs: two cores are done in about a minute.
        common={
            "teacher_model": "lstm2-32",
            "student_model": "lstm2-32",
            "epochs": 300,
            "teacher_epochs": 300,
            "checkpoint_every": 300,  # a run lasts seconds: one that was stopped begins anew
        },
    )


def run_demo(folder: Path, *, seeds: int, workers: int, threads: int, console: Console) -> bool:
    """Carry out the demo's grid in `folder`, print its table and write its report; True if no run failed.

    Raises:
        ValueError: an argument out of range, or a folder with runs of other settings.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    began = time.perf_counter()
    runs = demo_grid(seeds).runs(folder)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console)
    ended: list[Outcome] = []
    with bar:
        task = bar.add_task("training", total=len(runs))

        def on_outcome(outcome: Outcome) -> None:
            ended.append(outcome)
            bar.console.print(_line(outcome), highlight=False, markup=False, soft_wrap=True)
            bar.advance(task)

        run_grid(runs, folder, workers=workers, threads=threads, on_outcome=on_outcome)
    for warning in dict.fromkeys(text for outcome in ended for text in outcome.warnings):
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    failed = [outcome for outcome in ended if outcome.status == "failed"]
    if len(failed) == len(ended):
        return False
    from gdpd.report import build_report

    console.print(table(summarise(find_runs([folder])), title="Early classification of two bundled data sets"))
    page = build_report([folder], folder / "report.html")
    console.print(f"report: {page}   ({time.perf_counter() - began:.0f} s)", highlight=False, soft_wrap=True)
    return not failed


def _line(outcome: Outcome) -> str:
    config = outcome.run.config
    share, method = f"{100 * config.earliness:g} % read", method_title(config.method)
    told = f": {outcome.reason}" if outcome.reason else ""
    return f"{outcome.status:8} {config.dataset}, {share}, {method}, seed {config.seed}{told}"

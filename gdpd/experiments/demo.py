"""The demo: Base, Base-KD and GDPD on GunPoint and ItalyPowerDemand, small enough for two cores and two minutes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from gdpd.experiments.grid import Grid
from gdpd.experiments.progress import LiveProgress
from gdpd.experiments.records import find_runs
from gdpd.experiments.runner import run_grid
from gdpd.experiments.summary import summarise, table

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
    began = time.perf_counter()
    with LiveProgress(console) as progress:
        outcomes = run_grid(
            demo_grid(seeds), folder, workers=workers, threads=threads, keep_runs=True, listener=progress
        )
    for warning in dict.fromkeys(text for outcome in outcomes for text in outcome.warnings):
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if len(failed) == len(outcomes):
        return False
    from gdpd.report import build_report

    console.print(table(summarise(find_runs([folder])), title="Early classification of two bundled data sets"))
    page = build_report([folder], folder / "report.html")
    console.print(f"report: {page}   ({time.perf_counter() - began:.0f} s)", highlight=False, soft_wrap=True)
    return not failed

"""Grids of runs: which runs (`grid`), how they are carried out (`runner`), what came out (`records`, `summary`).

The demo (`demo`) is one such grid. A grid's folder holds one run folder per run, so a grid that was killed goes on
where it stopped, and `gdpd report` reads it like any other set of runs.
"""

from gdpd.experiments.grid import Grid, GridRun, run_name
from gdpd.experiments.records import RunRecord, find_runs, read_run
from gdpd.experiments.results import Result, ResultsTable, choose, read_results, result_records
from gdpd.experiments.runner import Outcome, run_grid
from gdpd.experiments.summary import Row, paired_differences, summarise

__all__ = [
    "Grid",
    "GridRun",
    "Outcome",
    "Result",
    "ResultsTable",
    "Row",
    "RunRecord",
    "choose",
    "find_runs",
    "paired_differences",
    "read_results",
    "read_run",
    "result_records",
    "run_grid",
    "run_name",
    "summarise",
]

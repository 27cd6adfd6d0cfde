"""Grids of runs: which jobs (`grid`, `grid_file`), how they are carried out (`runner`, on `workers`), what came out.

The demo (`demo`) is one such grid. Every finished job has a row in the table of the grid's folder (`results`), so a
grid that was stopped goes on where it stopped. Run folders, where they are kept, are read by `records`; `summary` makes
tables of both, and `comparison` sets methods against each other over data sets, with the tests of `statistics`.
"""

from gdpd.experiments.comparison import Comparison, compare
from gdpd.experiments.grid import Grid, Job, Variant, run_name
from gdpd.experiments.grid_file import read_grid
from gdpd.experiments.records import RunRecord, find_runs, read_run
from gdpd.experiments.results import Result, ResultsTable, choose, read_results, result_records
from gdpd.experiments.runner import Listener, Outcome, run_grid
from gdpd.experiments.summary import Row, paired_differences, summarise

__all__ = [
    "Comparison",
    "Grid",
    "Job",
    "Listener",
    "Outcome",
    "Result",
    "ResultsTable",
    "Row",
    "RunRecord",
    "Variant",
    "choose",
    "compare",
    "find_runs",
    "paired_differences",
    "read_grid",
    "read_results",
    "read_run",
    "result_records",
    "run_grid",
    "run_name",
    "summarise",
]

"""Before the first job of a grid: every data set is read, and every method's loss run once on each."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from gdpd.experiments.grid import Job

_MOST = 5  # problems listed; more make nobody wiser


def preflight(jobs: Sequence[Job]) -> None:
    """Find what cannot work before anything is trained: a missing or unusable data set, sizes that do not fit.

    One job of each (data set, method, trial) is tried, the one that reads least: its networks are built and the loss of
    every phase is run on a few series.

    Raises:
        ValueError: something does not work; names the first few problems.
        FileNotFoundError: a data set is not there; says which files were looked for where.
    """
    from gdpd.data.files import find_files

    firsts: dict[tuple[str, str, str], Job] = {}
    for job in sorted(jobs, key=lambda job: job.config.earliness):
        firsts.setdefault((job.config.dataset, job.label, job.key.options), job)
    for dataset, data_dir in {(job.config.dataset, job.config.data_dir): None for job in firsts.values()}:
        find_files(dataset, data_dir)
    problems: dict[str, None] = {}
    for (dataset, label, _), job in firsts.items():
        try:
            _rehearse(job)
        except (ValueError, TypeError, OSError, ImportError) as error:
            problems[f"{label} on {dataset}: {error}"] = None
    if problems:
        more = f" (and {len(problems) - _MOST} more)" if len(problems) > _MOST else ""
        raise ValueError("; ".join(list(problems)[:_MOST]) + more)


def _rehearse(job: Job) -> None:
    from gdpd.training.run_folder import load_data, prepare_on, training_context
    from gdpd.training.stages import Session, rehearse

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the jobs themselves will say it
        data = load_data(job.config)
        with training_context(job.config) as fabric:
            rehearse(Session(job.config, prepare_on(fabric, data, job.config), fabric))

"""Reads a grid from a YAML file, with every key checked, and checks an output folder against it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gdpd.config import RunConfig
from gdpd.experiments.grid import AXES, Grid, Job, Variant
from gdpd.experiments.results import RECIPE, Result, read_recipe
from gdpd.options import nearest

_KEYS = ("datasets", "earliness", "seeds", "methods", "options", "per_dataset", "search_score")
_METHOD_KEYS = ("method", "options", "search")


def read_grid(path: Path) -> Grid:
    """The grid that a YAML file describes::

        datasets: [GunPoint, ItalyPowerDemand]
        earliness: [0.2, 0.5]
        seeds: [1, 24, 300]
        methods:
          kd: {search: {loss_ratio: [0.1, 1, 10]}}
          gdpd: {search: {loss_ratio: [0.1, 1, 10]}}
          gdpd-paper: {method: gdpd, options: {hinton: false}, search: {loss_ratio: [0.1, 1, 10]}}
        options: {epochs: 300}                  # of every run; optional, as are the two below
        per_dataset: {GunPoint: {epochs: 600}}
        search_score: auc_prc                   # on validation data; or accuracy, ce

    `methods` may also be a list of names. All options of `gdpd distill` may stand under options, with underscores.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, or not of this form; an unknown key, method or option (the nearest is named).
    """
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file. Give the grid's YAML file; docs/grids.md shows one.")
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    try:
        return _grid(read)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _grid(read: Any) -> Grid:
    read = _mapping("the file", read, _KEYS)
    for name in ("datasets", "earliness", "seeds", "methods"):
        if name not in read:
            raise ValueError(f"{name} is missing. A grid lists datasets, earliness, seeds and methods.")
    methods = read["methods"]
    if not isinstance(methods, dict):
        methods = dict.fromkeys(_list("methods", methods, str))
    variants = {}
    for label, about in methods.items():
        about = _mapping(f"methods.{label}", {} if about is None else about, _METHOD_KEYS)
        options, search = (_mapping(f"methods.{label}.{key}", about.get(key) or {}) for key in ("options", "search"))
        variants[str(label)] = Variant(str(about.get("method", label)), options, search)
    per_dataset = _mapping("per_dataset", read.get("per_dataset") or {})
    grid = Grid(
        datasets=tuple(_list("datasets", read["datasets"], str)),
        earliness=tuple(map(float, _list("earliness", read["earliness"], (int, float)))),
        methods=tuple(variants),
        seeds=tuple(_list("seeds", read["seeds"], int)),
        common=_mapping("options", read.get("options") or {}),
        per_dataset={str(name): _mapping(f"per_dataset.{name}", about) for name, about in per_dataset.items()},
        variants=variants,
        search_score=str(read.get("search_score", "auc_prc")),
    )
    grid.jobs()  # every option of every job is read here
    return grid


def _mapping(place: str, value: Any, known: Iterable[str] = ()) -> dict[str, Any]:
    if not isinstance(value, dict):
        held = "nothing" if value is None else f"a {type(value).__name__}"
        raise ValueError(f"{place} holds {held}, not lines of the form 'key: value'.")
    names = list(known)
    for key in value if names else ():
        if key not in names:
            raise ValueError(f"{place} has an unknown key {key!r}{nearest(key, names)}. Known are: {', '.join(names)}.")
    return {str(key): item for key, item in value.items()}


def _list(place: str, value: Any, kind: Any) -> list[Any]:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, list) or any(isinstance(item, bool) or not isinstance(item, kinds) for item in value):
        raise ValueError(f"{place}={value!r} is not a list of {' or '.join(k.__name__ for k in kinds)} values.")
    return value


def check_folder(grid: Grid, folder: Path, jobs: Iterable[Job], results: Iterable[Result]) -> dict[str, Any]:
    """What `grid.json` of the folder has to say from now on, after checking that its rows are of this grid.

    A grid may grow (data sets, methods, seeds, trials), shrink, and change what it searches. What every row depends on
    may not change. An option that the library did not have when the rows were made counts as at its default.

    Raises:
        ValueError: the folder holds results of another grid; names the first difference.
    """
    results = list(results)
    names = [row["name"] for row in RunConfig.describe() if row["changes_result"] and row["name"] not in AXES]
    now = grid.recipe.to_dict()
    if (folder / RECIPE).is_file():
        there = read_recipe(folder)["options"]
        before = RunConfig.from_dict({name: value for name, value in there.items() if name in names})
        for name, (value, old) in grid.recipe.differences(before).items() if results else ():
            _refuse_folder(folder, name, old, value, "")
        _check_rows(grid, folder, list(jobs), results, before.to_dict())
    elif results:
        raise ValueError(f"{folder} holds results without {RECIPE}, so what they were made with is unknown.")
    return {"options": {name: now[name] for name in names}, "search_score": grid.search_score}


def _check_rows(grid: Grid, folder: Path, jobs: list[Job], results: list[Result], recipe: Mapping[str, Any]) -> None:
    known = {job.key for job in jobs}
    cells = {job.key[:4]: job for job in jobs}
    for result in results:
        job = cells.get(result.key[:4])
        if job is None or result.key in known:
            continue
        here = job.config.to_dict()
        for name in sorted({*result.options, *job.options} - set(grid.variant(job.label).search)):
            before = result.options.get(name, result.method if name == "method" else recipe.get(name))
            if before != here.get(name):
                where = f" for {job.label} on {result.dataset}"
                _refuse_folder(folder, name, before, here.get(name), where)


def check_unfinished(folder: Path, jobs: Iterable[Job]) -> None:
    """Check that what a stopped grid left in `runs/` of `folder` was begun with the options that the jobs have now.

    Raises:
        ValueError: it was not; names the first run and the first difference.
    """
    from gdpd.training.atomic import read_json

    for job in jobs:
        run = folder / "runs" / job.name
        if not (run / "config.json").is_file():
            continue
        try:
            there = RunConfig.from_dict(read_json(run / "config.json"))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{run} was begun by another version ({error}). Delete that folder.") from error
        for name, (now, before) in job.config.differences(there).items():
            raise ValueError(
                f"{run} was begun with other options: {name} is {before!r} there and {now!r} now. Delete that folder "
                "to run the job anew, give another --folder, or restore the option."
            )


def _refuse_folder(folder: Path, name: str, before: Any, now: Any, where: str) -> None:
    raise ValueError(
        f"{folder} holds the results of another grid: {name} is {before!r} there and {now!r} now{where}. Give another "
        "--folder, or restore the option."
    )

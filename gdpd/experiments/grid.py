"""What a grid consists of: every combination of data set, seed, earliness, method and trial, as jobs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gdpd.config import RunConfig
from gdpd.experiments.results import Key, canonical
from gdpd.options import nearest

AXES = ("dataset", "earliness", "method", "seed")


@dataclass(frozen=True)
class Variant:
    """A method as a grid compares it.

    Attributes:
        method: name of the method, as `RunConfig.method`.
        options: options of this method's jobs; they win over the grid's.
        search: option names to the values that are tried; every combination is a trial, and of the trials of a data
            set, earliness and seed the best on validation data counts.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def trials(self) -> list[dict[str, Any]]:
        """The combinations of searched values; one without any where nothing is searched."""
        return [dict(zip(self.search, values, strict=True)) for values in itertools.product(*self.search.values())]


@dataclass(frozen=True, eq=False)
class Job:
    """One run of a grid; equal to itself alone, as its options cannot be hashed.

    Attributes:
        config: its options.
        label: the method's name in the grid.
        options: the options that differ from those common to the grid.
        trial: those of them that the method's search sets.
        teacher: (data set, seed): one teacher serves every method, trial and earliness.
    """

    config: RunConfig
    label: str
    options: dict[str, Any]
    trial: dict[str, Any]
    teacher: tuple[str, int]

    @property
    def key(self) -> Key:
        """The job's key in the results table."""
        name = Path(self.config.dataset).stem
        return Key(name, self.config.earliness, self.label, self.config.seed, canonical(self.options))

    @property
    def name(self) -> str:
        """Name of the job's run folder, such as `GunPoint-e0.2-gdpd-s1`; the options of a trial follow."""
        told = "".join(f"-{key}={value}" for key, value in self.trial.items())
        kept = "".join(character if character.isalnum() or character in "-_=.," else "_" for character in told)
        return f"{run_name(self.config, self.label)}{kept}"


@dataclass(frozen=True)
class Grid:
    """Every combination of datasets, seeds, earliness values and methods, with common options.

    Args:
        datasets: names or paths, as `RunConfig.dataset`.
        earliness: fractions of the series, in (0, 1].
        methods: names, as `RunConfig.method`, or of `variants`.
        seeds: one teacher, one split and one run of each method per seed, so that methods are paired by seed.
        common: further options of every run.
        per_dataset: options of the runs of one dataset; they win over `common`.
        variants: what those of `methods` are that have options, a search or a name of their own.
        search_score: validation score by which a trial is chosen: "auc_prc", "accuracy" or "ce".

    Raises:
        ValueError: an axis without values or with one twice; an override that the teacher depends on, which all
            methods share; searches of different sizes.
    """

    datasets: tuple[str, ...]
    earliness: tuple[float, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    common: Mapping[str, Any] = field(default_factory=dict)
    per_dataset: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    variants: Mapping[str, Variant] = field(default_factory=dict)
    search_score: str = "auc_prc"

    def __post_init__(self) -> None:
        from gdpd.experiments.results import VALIDATION_SCORES

        for name in ("datasets", "earliness", "methods", "seeds"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name} is empty. A grid needs at least one of each.")
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={values} holds a value twice. Each makes one job: list it once.")
        for name in self.per_dataset:
            if name not in self.datasets:
                raise ValueError(f"per_dataset names {name!r}, not one of the data sets{nearest(name, self.datasets)}.")
        if self.search_score not in VALIDATION_SCORES:
            told = nearest(self.search_score, VALIDATION_SCORES)
            raise ValueError(
                f"search_score={self.search_score!r} is not known{told}. One of: {', '.join(VALIDATION_SCORES)}."
            )
        for place, options in {"options": self.common, **self.per_dataset}.items():
            _refuse(place, options, AXES, "the grid's own lists say it")
        self._check_variants()

    def _check_variants(self) -> None:
        from gdpd.training.teacher_cache import TEACHER_OPTIONS

        shared = (*TEACHER_OPTIONS, "resample_to", "missing", "data_dir")
        trials = {}
        for label in self.methods:
            variant = self.variant(label)
            names = [*variant.options, *variant.search]
            _refuse(f"method {label}", names, AXES, "the grid's own lists say it")
            why = "the teacher depends on it too, and all methods share one: set it for all, in options or per_dataset"
            _refuse(f"method {label}", names, shared, why)
            _refuse(f"method {label}", variant.search, tuple(variant.options), "it is searched as well as set")
            for name, values in variant.search.items():
                if not isinstance(values, (list, tuple)) or not values:
                    raise ValueError(f"method {label}: search of {name}={values!r} is not a list of values to try.")
            trials[label] = len(variant.trials())
        if len(set(trials.values())) > 1:
            told = ", ".join(f"{label} {count}" for label, count in trials.items())
            raise ValueError(
                f"the methods have searches of different sizes ({told} trials). A method that may try more often "
                "scores better by chance: give each as many trials."
            )

    def variant(self, label: str) -> Variant:
        """What the method called `label` in this grid is."""
        return self.variants.get(label, Variant(label))

    @property
    def recipe(self) -> RunConfig:
        """The options common to all jobs, beside which each job's own are named."""
        return RunConfig.from_dict(dict(self.common))

    def teacher_config(self, teacher: tuple[str, int]) -> RunConfig:
        """The configuration by which the teacher of a (data set, seed) is trained."""
        dataset, seed = teacher
        options = {**self.common, **self.per_dataset.get(dataset, {})}
        return RunConfig.from_dict({**options, "dataset": dataset, "seed": seed, "method": "base"})

    def jobs(self) -> list[Job]:
        """The jobs, seed by seed, and within a seed cell by cell with all methods of a cell together.

        So a grid that is stopped has compared all methods on the same cells, but for the last.

        Raises:
            ValueError, TypeError: an option that is unknown or outside its limits; found before any job starts.
        """
        recipe = self.recipe
        jobs = []
        for seed, earliness, dataset in itertools.product(self.seeds, self.earliness, self.datasets):
            by_label = [[(label, trial) for trial in self.variant(label).trials()] for label in self.methods]
            for label, trial in itertools.chain.from_iterable(zip(*by_label, strict=True)):
                variant = self.variant(label)
                config = RunConfig.from_dict(
                    {
                        **self.common,
                        **self.per_dataset.get(dataset, {}),
                        **variant.options,
                        **trial,
                        "dataset": dataset,
                        "seed": seed,
                        "earliness": earliness,
                        "method": variant.method,
                    }
                )
                jobs.append(Job(config, label, _own_options(config, recipe, label), trial, (dataset, seed)))
        return jobs


def _own_options(config: RunConfig, recipe: RunConfig, label: str) -> dict[str, Any]:
    own = {name: mine for name, (mine, _) in config.differences(recipe).items() if name not in AXES}
    return {**own, "method": config.method} if config.method != label else own


def _refuse(place: str, given: Any, names: tuple[str, ...], why: str) -> None:
    for name in given:
        if name in names:
            raise ValueError(f"{place} sets {name}: {why}.")


def run_name(config: RunConfig, label: str | None = None) -> str:
    """The name of the folder of a run: dataset, earliness, method and seed, such as `GunPoint-e0.2-gdpd-s1`."""
    method = (label or config.method).replace(":", ".")  # of package.module:Class; Windows has no colons in names
    return f"{Path(config.dataset).stem}-e{config.earliness:g}-{method}-s{config.seed}"

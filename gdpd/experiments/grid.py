"""What a grid of runs consists of: every combination of dataset, seed, earliness and method, as run configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gdpd.config import RunConfig


@dataclass(frozen=True)
class GridRun:
    """One run of a grid: its name (the run folder's), its configuration, and the teacher it shares with others."""

    name: str
    config: RunConfig
    teacher: tuple[str, int]  # (dataset, seed): one teacher serves every method and earliness


@dataclass(frozen=True)
class Grid:
    """Every combination of datasets, seeds, earliness values and methods, with common options.

    Args:
        datasets: names or paths, as `RunConfig.dataset`.
        earliness: fractions of the series, in (0, 1].
        methods: names, as `RunConfig.method`.
        seeds: one teacher, one split and one run of each method per seed, so that methods are paired by seed.
        common: further options of every run.
        per_dataset: options of the runs of one dataset; they win over `common`.
    """

    datasets: tuple[str, ...]
    earliness: tuple[float, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    common: Mapping[str, Any] = field(default_factory=dict)
    per_dataset: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("datasets", "earliness", "methods", "seeds"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name} is empty. A grid needs at least one of each.")
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={values} holds a value twice. Each makes one run folder: list it once.")

    def runs(self, folder: Path) -> list[GridRun]:
        """The runs of the grid, grouped by (dataset, seed), with teachers shared inside `folder`.

        Raises:
            ValueError: an option outside its limits; found before any run starts.
        """
        runs = []
        for dataset in self.datasets:
            for seed in self.seeds:
                for earliness in self.earliness:
                    for method in self.methods:
                        options = {**self.common, **self.per_dataset.get(dataset, {})}
                        config = RunConfig.from_dict(
                            {
                                "teacher_dir": str(folder / "teachers"),
                                **options,
                                "dataset": dataset,
                                "seed": seed,
                                "earliness": earliness,
                                "method": method,
                            }
                        )
                        runs.append(GridRun(run_name(config), config, (dataset, seed)))
        return runs


def run_name(config: RunConfig) -> str:
    """The name of the folder of a run: dataset, earliness, method and seed, such as `GunPoint-e0.2-gdpd-s1`."""
    method = config.method.replace(":", ".")  # of package.module:Class; Windows has no colons in names
    return f"{Path(config.dataset).stem}-e{config.earliness:g}-{method}-s{config.seed}"

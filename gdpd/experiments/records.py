"""Reads finished run folders back: configuration, metrics and history, for summaries and reports."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunRecord:
    """What one finished run left in its folder.

    Attributes:
        folder: the run's folder.
        config: the options of the run, by name.
        metrics: its metrics.json.
        versions: its versions.json.
        history: one dictionary per epoch, in order, as in history.jsonl.
    """

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    versions: dict[str, Any]
    history: list[dict[str, Any]]

    @property
    def dataset(self) -> str:
        """Name of the dataset, without folders."""
        return Path(str(self.config["dataset"])).stem

    @property
    def method(self) -> str:
        """Name of the training method."""
        return str(self.config["method"])

    @property
    def earliness(self) -> float:
        """Share of the series that the student reads, in (0, 1]."""
        return float(self.config["earliness"])

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.config["seed"])

    @property
    def teacher(self) -> dict[str, Any]:
        """Scores of the run's teacher on the full test series; empty where none was recorded."""
        return dict(self.metrics.get("teacher") or {})


def read_run(folder: Path) -> RunRecord:
    """Read the finished run in `folder`.

    Raises:
        FileNotFoundError: no finished run there; the message names the file that is missing.
        ValueError: a file of the run is not what a run writes.
    """
    for name in ("config.json", "metrics.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no finished run: {name} is missing. A run that was stopped ends with "
                f"`gdpd distill --resume --folder {folder}`."
            )
    history_file = folder / "history.jsonl"
    lines = history_file.read_text(encoding="utf-8").splitlines() if history_file.is_file() else []
    versions_file = folder / "versions.json"
    return RunRecord(
        folder=folder,
        config=_json(folder / "config.json"),
        metrics=_json(folder / "metrics.json"),
        versions=_json(versions_file) if versions_file.is_file() else {},
        history=[_parse(line, history_file) for line in lines if line.strip()],
    )


def find_runs(folders: Iterable[Path]) -> list[RunRecord]:
    """Every finished run in or below `folders`, each once, ordered by dataset, earliness, method and seed.

    Raises:
        FileNotFoundError: a folder is not there, or there is no finished run in any of them.
    """
    found: dict[Path, RunRecord] = {}
    folders = list(folders)
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder. Give a run's folder, or one that holds runs.")
        for metrics in sorted(folder.rglob("metrics.json")):
            if (metrics.parent / "config.json").is_file():
                found.setdefault(metrics.parent.resolve(), read_run(metrics.parent))
    if not found:
        looked = ", ".join(str(folder) for folder in folders)
        raise FileNotFoundError(
            f"no finished run in or below {looked}: looked for config.json and metrics.json side by side. "
            "`gdpd distill` makes one."
        )
    return sorted(found.values(), key=lambda run: (run.dataset, run.earliness, run.method, run.seed))


def _json(path: Path) -> dict[str, Any]:
    return _parse(path.read_text(encoding="utf-8"), path)


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Delete the run's folder and run it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object. Was it edited by hand?")
    return value

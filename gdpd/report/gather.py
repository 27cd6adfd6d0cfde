"""From run records to what the charts draw: curves over epochs, alpha, loss parts and sampled trajectories."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gdpd.experiments.records import RunRecord
from gdpd.methods import method_order
from gdpd.report.charts import Curve, Trajectory

_LARGEST = 400  # teacher features drawn; more make the page heavy and the cloud no clearer


def student_history(run: RunRecord) -> list[dict[str, Any]]:
    """The student's epochs in a run's history."""
    return [record for record in run.history if record.get("stage") == "student"]


def validation_curves(runs: Iterable[RunRecord], score: str) -> list[Curve]:
    """A validation score of the student over epochs, one curve per method with a row per seed."""
    found: dict[str, list[list[float]]] = defaultdict(list)
    for run in runs:
        values = [_number(record.get("val", {}).get(score)) for record in student_history(run)]
        if values and not np.isnan(values).all():
            found[run.method].append(values)
    return [_curve(method, found[method]) for method in sorted(found, key=method_order)]


def training_parts(runs: Sequence[RunRecord]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Parts of the training loss over epochs, mean over the runs; a part is NaN in epochs without it."""
    names: dict[str, None] = {}
    for run in runs:
        for record in student_history(run):
            names.update({name: None for name in record.get("train", {}) if name != "loss"})
    parts = {}
    for name in names:
        rows = [[_number(record.get("train", {}).get(name)) for record in student_history(run)] for run in runs]
        curve = _curve(name, rows)
        has = ~np.isnan(curve.values).all(axis=0)
        parts[name] = (curve.epochs[has], np.nanmean(curve.values[:, has], axis=0))
    return parts


def alpha_history(runs: Sequence[RunRecord]) -> tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Epochs, mean and quantile bands (outermost first) of alpha, averaged over the runs; empty where none has it."""
    rows: dict[int, list[dict[str, float]]] = defaultdict(list)
    for run in runs:
        for record in student_history(run):
            if isinstance(record.get("alpha"), dict):
                rows[record["epoch"] + 1].append(record["alpha"])
    epochs = np.array(sorted(rows))
    if not len(epochs):
        return epochs, epochs, []

    def over_epochs(key: str) -> np.ndarray:
        return np.array([np.mean([_number(row.get(key)) for row in rows[epoch]]) for epoch in epochs])

    quantiles = sorted(key for key in rows[int(epochs[0])][0] if key not in ("mean", "std"))
    pairs = zip(quantiles[: len(quantiles) // 2], reversed(quantiles), strict=False)
    return epochs, over_epochs("mean"), [(over_epochs(low), over_epochs(high)) for low, high in pairs]


def trajectory(run: RunRecord, most_paths: int = 8) -> Trajectory | None:
    """The sampled trajectories that a run left in trajectory.npz, at most `most_paths`; None where it left none."""
    path = run.folder / "trajectory.npz"
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        features, labels = arrays["teacher_features"], arrays["teacher_labels"]
        z_short, z_k, path_labels = arrays["z_short"], arrays["z_k"], arrays["labels"]
    if len(features) < 2 or features.shape[1] < 2:
        return None
    kept = np.linspace(0, len(features) - 1, min(len(features), _LARGEST)).astype(int)
    chosen = _spread_over_classes(path_labels, most_paths)
    return Trajectory(features[kept], labels[kept], z_short[chosen], z_k[:, chosen], path_labels[chosen])


def _spread_over_classes(labels: np.ndarray, most: int) -> np.ndarray:
    """Indices of at most `most` series, taking turns between the classes."""
    turn = np.zeros(len(labels), dtype=int)
    for code in np.unique(labels):
        mine = np.flatnonzero(labels == code)
        turn[mine] = np.arange(len(mine))
    return np.sort(np.lexsort((labels, turn))[:most])


def _curve(method: str, rows: Sequence[Sequence[float]]) -> Curve:
    longest = max(len(row) for row in rows)
    values = np.full((len(rows), longest), np.nan)
    for number, row in enumerate(rows):
        values[number, : len(row)] = row
    return Curve(method, np.arange(1, longest + 1), values)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)

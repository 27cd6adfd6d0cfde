"""A small made-up data set and the options that train tiny networks on it, shared by the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gdpd.config import RunConfig
from gdpd.data import TimeSeriesData


def series(n: int, *, length: int = 16, classes: int = 2, channels: int = 1, seed: int = 0) -> tuple[Any, Any]:
    """Sines whose frequency is their class, in noise: X [n, channels, length] float32, y [n] int64."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    time = np.arange(length) / length
    phase = rng.uniform(0, 0.5, (n, channels, 1))
    X = np.sin(2 * np.pi * ((1 + y)[:, None, None] * time + phase)) + 0.1 * rng.normal(size=(n, channels, length))
    return X.astype(np.float32), y.astype(np.int64)


def data(n_train: int = 30, n_test: int = 12, **shape: int) -> TimeSeriesData:
    """The set as arrays."""
    X, y = series(n_train + n_test, **shape)
    full = np.full(n_train + n_test, X.shape[2])
    return TimeSeriesData(
        "Toy", X[:n_train], y[:n_train], X[n_train:], y[n_train:], np.unique(y), full[:n_train], full[n_train:],
        {"normalisation": "none"},
    )  # fmt: skip


def folder(path: Path, n_train: int = 30, n_test: int = 12) -> Path:
    """The set as a UCR folder of .tsv files; returns the folder."""
    made = data(n_train, n_test)
    home = path / "Toy"
    home.mkdir(parents=True)
    for split, X, y in (("TRAIN", made.X_train, made.y_train), ("TEST", made.X_test, made.y_test)):
        rows = np.column_stack([y + 1, X[:, 0]])
        np.savetxt(home / f"Toy_{split}.tsv", rows, delimiter="\t", fmt=["%d", *["%.6f"] * X.shape[2]])
    return home


SMALL: dict[str, Any] = {
    "teacher_model": "lstm",
    "student_model": "lstm",
    "teacher_options": {"layers": 1, "hidden": 12},
    "student_options": {"layers": 1, "hidden": 8},
    "epochs": 6,
    "teacher_epochs": 4,
    "teacher_retries": 0,
    "batch_size": 8,
    "learning_rate": 0.01,
    "checkpoint_every": 2,
}


def config(dataset: Path | str = "Toy", **options: Any) -> RunConfig:
    """A configuration that trains in a second."""
    return RunConfig.from_dict({**SMALL, "dataset": str(dataset), **options})

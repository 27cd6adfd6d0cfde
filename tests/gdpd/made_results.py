"""Rows of a results table, made up, for the tests of grids, tables and reports."""

from __future__ import annotations

from typing import Any

from gdpd.experiments.results import Result


def made_result(**changes: Any) -> Result:
    """A row with plausible values; `changes` replace some."""
    values: dict[str, Any] = {
        "dataset": "GunPoint", "earliness": 0.2, "method": "gdpd", "seed": 1, "options": {}, "auc_prc": 81.25,
        "accuracy": 0.8, "roc_auc": 0.85, "calibration_error": 0.1, "fidelity": 0.7, "kl": 0.3, "val_ce": 0.5,
        "val_accuracy": 0.75, "val_auc_prc": 79.0, "selected_epoch": 3, "teacher_auc_prc": 95.0,
        "teacher_accuracy": 0.9, "teacher_val_ce": 0.2, "teacher_val_auc_prc": 93.0, "teacher_p_chance": 0.0005,
        "parameters": 1000, "n_train": 40, "n_validation": 10, "n_test": 150, "seconds": 2.5,
        "seconds_per_epoch": 0.01, "cpu_seconds": 2.0, "peak_memory": 300.5, "parts": {"main.ce": 0.1},
        "teacher_sha256": "a" * 64, "student_sha256": "b" * 64, "software": "torch 2.13.0",
    }  # fmt: skip
    return Result(**{**values, **changes})

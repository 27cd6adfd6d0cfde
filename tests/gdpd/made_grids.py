"""Stands in for training, so that grids run in milliseconds, for the tests of grids and of the demo."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import gdpd.training
from gdpd.config import RunConfig
from gdpd.experiments import runner
from made_runs import make_run


@dataclass
class MadeTraining:
    """What was carried out, in order, and which methods fail."""

    runs: list[tuple[str, float, str, int]] = field(default_factory=list)
    teachers: list[tuple[str, int]] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)

    def run(self, config: RunConfig, folder: Path, *, resume: bool = False, progress: Any = None) -> dict[str, Any]:
        """In place of `gdpd.training.run`."""
        assert resume
        teacher = json.loads((folder / "teacher.json").read_text())
        assert teacher == {"sha256": f"{config.dataset}-{config.seed}"}, "a job got another pair's teacher"
        self.runs.append((config.dataset, config.earliness, config.method, config.seed))
        if config.method in self.broken:
            raise ValueError("no such luck")
        made = make_run(folder.parent / "made", **config.to_dict())
        metrics = json.loads((made / "metrics.json").read_text())
        metrics.update(
            roc_auc=None, calibration_error=0.1, kl=0.2, selected_epoch=3, parameters=100, n_train=8, n_validation=2,
            n_test=9, seconds_per_epoch=0.01, student_sha256="b" * 64,
            validation={"ce": 1 / (1 + config.loss_ratio), "accuracy": 0.5, "auc_prc": 50 + config.loss_ratio},
        )  # fmt: skip
        metrics["teacher"].update(validation={"ce": 0.1, "auc_prc": 90.0}, p_chance=0.01)
        (made / "metrics.json").write_text(json.dumps(metrics))
        for path in made.iterdir():
            shutil.move(path, folder / path.name)
        shutil.rmtree(made.parent)
        return metrics

    def train_teacher_only(self, config: RunConfig, folder: str) -> None:
        """In place of `gdpd.training.train_teacher_only`."""
        self.teachers.append((config.dataset, config.seed))
        if "teacher" in self.broken:
            raise ValueError("nothing to learn")
        (Path(folder) / "teacher.safetensors").write_bytes(b"weights")
        (Path(folder) / "teacher.json").write_text(json.dumps({"sha256": f"{config.dataset}-{config.seed}"}))


@pytest.fixture
def made_training(monkeypatch: pytest.MonkeyPatch) -> MadeTraining:
    """Training is made up, and no data set is looked for."""
    made = MadeTraining()
    monkeypatch.setattr(gdpd.training, "run", made.run)
    monkeypatch.setattr(gdpd.training, "train_teacher_only", made.train_teacher_only)
    monkeypatch.setattr(runner, "preflight", lambda jobs: None)
    return made

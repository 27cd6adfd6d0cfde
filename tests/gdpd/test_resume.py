"""A run killed with SIGKILL in the middle of a stage, and resumed, ends with the bits of one that was never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import toy
from gdpd.training import CheckpointError, CheckpointWarning, run

pytestmark = pytest.mark.filterwarnings("ignore::gdpd.training.WeakTeacherWarning")

# Trains in a process of its own, slowly enough to be killed at a given epoch.
_SCRIPT = """
import json, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from gdpd.config import RunConfig
from gdpd.training import run

class Slow:
    def start(self, stage, epochs, done): pass
    def stop(self): pass
    def epoch(self, record): time.sleep(float(sys.argv[3]))

run(RunConfig.from_dict(json.loads(sys.argv[1])), Path(sys.argv[2]), progress=Slow())
"""
_FILES = ("teacher.safetensors", "student.safetensors")


def gdpd_config(tmp_path: Path, **options: Any) -> Any:
    home = toy.folder(tmp_path)
    return toy.config(home, **{"method": "gdpd", "epochs": 8, "warmup_epochs": 4, "checkpoint_every": 2, **options})


def lines(folder: Path) -> list[dict[str, Any]]:
    try:
        text = (folder / "history.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def start(config: Any, folder: Path, pause: float) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-c", _SCRIPT, json.dumps(config.to_dict()), str(folder), str(pause)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(arguments, env=environment, cwd=root, stderr=subprocess.PIPE)


def kill_at(process: subprocess.Popen[bytes], folder: Path, stage: str, epoch: int) -> None:
    """SIGKILL once the history shows that epoch of that stage."""
    deadline = time.monotonic() + 120
    while not any(line["stage"] == stage and line["epoch"] >= epoch for line in lines(folder)):
        if process.poll() is not None or time.monotonic() > deadline:
            _, told = process.communicate()
            raise AssertionError(f"the run ended before it could be killed: {told.decode()[-2000:]}")
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("stage", "epoch"), [("teacher", 1), ("teacher", 2), ("student", 2), ("student", 6)],
    ids=["teacher before its first checkpoint", "teacher", "warm-up", "after the warm-up"],
)  # fmt: skip
def test_killed_and_resumed_run_ends_with_the_same_weights(tmp_path: Path, stage: str, epoch: int) -> None:
    config = gdpd_config(tmp_path)
    whole = run(config, tmp_path / "whole")
    broken = tmp_path / "broken"
    kill_at(start(config, broken, 0.15), broken, stage, epoch)
    assert not (broken / "metrics.json").exists()
    before = len(lines(broken))
    resumed = run(config, broken, resume=True)
    for name in _FILES:
        assert (broken / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert before < len(lines(broken)) == config.epochs + config.teacher_epochs
    timeless = [
        [{name: value for name, value in line.items() if name != "seconds"} for line in lines(folder)]
        for folder in (broken, tmp_path / "whole")
    ]
    assert timeless[0] == timeless[1]
    assert resumed["auc_prc"] == whole["auc_prc"]
    assert not (broken / "checkpoints").exists()


class Stop(Exception):
    """Breaks a run off at an epoch, in this process."""


class StopAt:
    """A listener that breaks the run off."""

    def __init__(self, stage: str, epoch: int) -> None:
        self.stage, self.last = stage, epoch

    def start(self, stage: str, epochs: int, done: int) -> None:
        """Nothing to do."""

    def epoch(self, record: dict[str, Any]) -> None:
        """Break off."""
        if (record["stage"], record["epoch"]) == (self.stage, self.last):
            raise Stop

    def stop(self) -> None:
        """Nothing to do."""


@pytest.mark.parametrize(
    "options",
    [
        {"method": "base"},
        {"method": "kd", "lr_schedule": "cosine"},
        {"method": "gdpd", "freeze_prior": True, "num_samples": 2, "eta": 0.5},
        {"method": "gdpd", "selection": "average", "average_epochs": 4},
        {"method": "gdpd", "selection": "last", "student_options": {"layers": 2, "hidden": 6, "dropout": 0.3}},
        {"method": "gdpd", "denoiser": "mlp", "denoiser_options": {"hidden": [16]}, "alpha": "per_dimension"},
        {"method": "kd", "student_model": "fcn", "student_options": {}},
        {"method": "fits"},
        {"method": "lelp"},
        {"method": "taid"},
        {"method": "tekap", "class_weight": "balanced"},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items() if not isinstance(v, dict)),
)
def test_broken_off_and_resumed_run_ends_with_the_same_weights(tmp_path: Path, options: dict[str, Any]) -> None:
    if options["method"] != "gdpd":
        options = {**options, "warmup_epochs": None}
    config = gdpd_config(tmp_path, **options)
    run(config, tmp_path / "whole")
    for stage, epoch in (("teacher", 2), ("student", 4), ("student", 6)):  # the last two within an average's epochs
        with pytest.raises(Stop):
            run(config, tmp_path / "broken", resume=True, progress=StopAt(stage, epoch))
    run(config, tmp_path / "broken", resume=True)
    for name in _FILES:
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def broken_off(tmp_path: Path) -> tuple[Any, Path]:
    """A run that was broken off in epoch 6 of the student, with checkpoints of 4 and 6 epochs."""
    config, folder = gdpd_config(tmp_path), tmp_path / "broken"
    with pytest.raises(Stop):
        run(config, folder, progress=StopAt("student", 6))
    return config, folder


def test_resume_from_a_truncated_checkpoint_uses_the_one_before_and_ends_alike(tmp_path: Path) -> None:
    config, folder = broken_off(tmp_path)
    newest = max((folder / "checkpoints").glob("student-*.safetensors"))
    assert newest.name == "student-000006.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(CheckpointWarning, match=r"truncated or was changed.*student-000004"):
        run(config, folder, resume=True)
    run(config, tmp_path / "whole")
    assert (folder / _FILES[1]).read_bytes() == (tmp_path / "whole" / _FILES[1]).read_bytes()


def test_resume_with_only_damaged_checkpoints_is_an_error_that_changes_nothing(tmp_path: Path) -> None:
    config, folder = broken_off(tmp_path)
    for path in (folder / "checkpoints").glob("student-*.safetensors"):
        path.write_bytes(b"")
    before = (folder / "history.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="Delete these files"):
        run(config, folder, resume=True)
    assert (folder / "history.jsonl").read_bytes() == before


def test_resume_with_other_options_names_them(tmp_path: Path) -> None:
    config, folder = broken_off(tmp_path)
    with pytest.raises(ValueError, match=r"learning_rate is 0.01 there and 0.02 now.*choose another folder"):
        run(config.replace(learning_rate=0.02), folder, resume=True)


def test_resume_with_other_data_is_refused(tmp_path: Path) -> None:
    config, folder = broken_off(tmp_path)
    train = Path(config.dataset) / "Toy_TRAIN.tsv"
    train.write_text(train.read_text().replace("0.", "0.1", 1))
    with pytest.raises(ValueError, match="other data"):
        run(config, folder, resume=True)


def test_a_damaged_teacher_is_trained_again_to_the_same_weights(tmp_path: Path) -> None:
    config, folder = broken_off(tmp_path)
    teacher = folder / "teacher.safetensors"
    good = teacher.read_bytes()
    teacher.write_bytes(good[:-1])
    with pytest.warns(UserWarning, match=r"teacher in .* is damaged .*trained again"):
        run(config, folder, resume=True)
    assert teacher.read_bytes() == good


def test_a_finished_run_is_returned_as_it_is(tmp_path: Path) -> None:
    config = gdpd_config(tmp_path)
    first = run(config, tmp_path / "run")
    stamp = (tmp_path / "run" / "student.safetensors").stat().st_mtime_ns
    assert run(config, tmp_path / "run", resume=True) == first
    assert (tmp_path / "run" / "student.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(FileExistsError, match=r"holds a run already.*--resume"):
        run(config, tmp_path / "run")

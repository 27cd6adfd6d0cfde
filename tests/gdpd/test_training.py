"""The two stages: what they refuse before training, what they write, and that nothing of the test data leaks in."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gdpd_kernels as gk
import toy
from gdpd.config import RunConfig
from gdpd.data import TimeSeriesData
from gdpd.training import TrainingDiverged, WeakTeacherError, WeakTeacherWarning, atomic, evaluate, run, stages
from gdpd.training.run_folder import training_context
from gdpd.training.stages import Session
from gdpd.training.tensors import check_data, prepare

pytestmark = pytest.mark.filterwarnings("ignore::gdpd.training.WeakTeacherWarning")
ROOT = Path(__file__).parents[2]


# --- what is refused before any training --------------------------------------------------------------------------


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test as soon as a stage would train."""

    def trained(*_: Any, **__: Any) -> None:
        raise AssertionError("a stage was trained")

    monkeypatch.setattr(stages, "fit", trained)


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"earliness": 0.05}, r"earliness=0.05 .*prefix of zero steps.*at least 0.0625"),
        ({"target_space": "identity"}, "12 dimensions where the student's head reads 8"),
        ({"batch_size": 1}, r"batch_size=1 with 24 training series.*BatchNorm in the student or its method"),
        ({"batch_size": 1, "method": "kd", "teacher_model": "fcn", "teacher_options": {}}, "BatchNorm in the teacher"),
        ({"student_model": "lstn"}, "did you mean 'lstm'"),
        ({"teacher_options": {"hiden": 3}}, "did you mean 'hidden'"),
        ({"method": "kd", "method_options": {"temprature": 3}}, "did you mean 'temperature'"),
        ({"denoiser_options": {"hidden": [3]}}, "has no option 'hidden'"),
        ({"backend": "nativ"}, "nativ"),
        ({"eta": 7.0}, "eta"),
    ],
)
def test_what_cannot_work_is_refused_before_training_and_leaves_no_folder(
    tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    config = toy.config(toy.folder(tmp_path), **options)
    with pytest.raises(Exception, match=told) as caught:
        run(config, tmp_path / "run")
    assert not isinstance(caught.value, AssertionError)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_training")
def test_a_folder_without_the_files_lists_the_paths_tried(tmp_path: Path) -> None:
    (tmp_path / "Empty").mkdir()
    with pytest.raises(FileNotFoundError, match="Empty_TRAIN"):
        run(toy.config(tmp_path / "Empty"), tmp_path / "run")


def test_a_single_series_per_batch_is_fine_without_batchnorm(tmp_path: Path) -> None:
    config = toy.config(toy.folder(tmp_path), method="kd", batch_size=1, epochs=1, teacher_epochs=1)
    assert run(config, tmp_path / "run")["n_train"] == 24


def changed(**arrays: Any) -> TimeSeriesData:
    made = toy.data()
    for name, value in arrays.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"y_train": np.zeros(30, np.int64), "classes": np.array(["a"])}, r"1 class\(es\) among its 30"),
        ({"y_train": np.zeros(30, np.int64)}, r"1 class\(es\)"),
        ({"classes": np.array(["a", "b", "c"])}, "no training series of class c"),
        ({"y_test": np.full(12, 5)}, r"class number 5, outside 0\.\.1"),
    ],
)
def test_data_that_nothing_can_be_learned_from_is_refused(arrays: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_data(changed(**arrays))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("split", ["train", "test"])
def test_values_that_are_not_finite_are_named_by_series_channel_and_step(split: str, value: float) -> None:
    made = toy.data()
    (made.X_train if split == "train" else made.X_test)[3, 0, 7] = value
    with pytest.raises(ValueError, match=rf"{split}.* series 3 holds {value} in channel 0 at step 7.*interpolate"):
        prepare(made, toy.config())


def test_too_few_series_to_hold_some_out_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing can be held out"):
        prepare(toy.data(2, 2), toy.config())


@pytest.mark.usefixtures("no_training")
def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        run(toy.config(toy.folder(tmp_path)), tmp_path / "run")


# --- what a run does and writes -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path, dict[str, Any]]:
    """A finished GDPD run."""
    path = tmp_path_factory.mktemp("finished")
    config = toy.config(toy.folder(path), epochs=40, teacher_epochs=60, teacher_dir=str(path / "teachers"))
    return config, path / "run", run(config, path / "run")


def test_a_run_writes_its_files_and_learns(finished: tuple[RunConfig, Path, dict[str, Any]]) -> None:
    config, folder, metrics = finished
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json", "versions.json", "metrics.json", "history.jsonl", "teacher.json", "teacher.safetensors",
        "student.safetensors", "predictions.npz", "trajectory.npz",
    }  # fmt: skip
    assert metrics == json.loads((folder / "metrics.json").read_text())
    assert RunConfig.from_dict(json.loads((folder / "config.json").read_text())) == config
    assert json.loads((folder / "versions.json").read_text())["torch"] == torch.__version__
    assert metrics["accuracy"] > 0.8
    assert metrics["teacher"]["accuracy"] > 0.8
    assert 0 <= metrics["fidelity"] <= 1
    assert not metrics["teacher"]["weak"]
    assert (metrics["n_train"], metrics["n_validation"], metrics["n_test"]) == (24, 6, 12)
    assert metrics["selected_epoch"] >= config.warmup
    assert metrics["seconds"] > 0
    assert metrics["peak_memory"] > 30  # torch alone takes more


def test_history_has_a_line_per_epoch_with_parts_and_alpha(finished: tuple[RunConfig, Path, dict[str, Any]]) -> None:
    config, folder, _ = finished
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    teacher = [line for line in lines if line["stage"] == "teacher"]
    student = [line for line in lines if line["stage"] == "student"]
    assert [line["epoch"] for line in teacher] == list(range(config.teacher_epochs))
    assert [line["epoch"] for line in student] == list(range(config.epochs))
    assert [line["phase"] for line in student] == ["warmup"] * 20 + ["main"] * 20
    assert set(student[0]["train"]) == {"loss", "ce", "kd", "noise", "autoencoder"}
    assert set(student[-1]["train"]) == {"loss", "ce", "kd", "ce_hat"}
    assert "alpha" not in student[0]
    alpha = student[-1]["alpha"]
    assert 0 < alpha["q05"] <= alpha["q50"] <= alpha["q95"] < 1
    assert set(student[0]["val"]) == {"ce", "accuracy", "auc_prc"}
    assert all(line["lr"] == config.learning_rate and line["seconds"] > 0 for line in lines)


def test_predictions_and_trajectory_hold_what_the_report_draws(
    finished: tuple[RunConfig, Path, dict[str, Any]],
) -> None:
    _, folder, metrics = finished
    predictions = np.load(folder / "predictions.npz")
    assert predictions["proba_student"].shape == predictions["proba_teacher"].shape == (12, 2)
    np.testing.assert_allclose(predictions["proba_student"].sum(1), 1, atol=1e-5)
    assert (predictions["proba_student"].argmax(1) == predictions["y"]).mean() == pytest.approx(metrics["accuracy"])
    path = np.load(folder / "trajectory.npz")
    assert path["teacher_features"].shape == (24, 8)
    assert path["teacher_labels"].shape == (24,)
    assert path["z_short"].shape == path["z_hat"].shape == (12, 8)
    assert path["z_k"].shape == (6, 12, 8)
    assert path["labels"].shape == (12,)


def test_evaluate_gives_the_run_s_scores_without_running_the_sampler(
    finished: tuple[RunConfig, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder, metrics = finished

    def sampled(*_: Any, **__: Any) -> None:
        raise AssertionError("the sampler ran")

    monkeypatch.setattr(gk, "reverse_sample", sampled)
    scores = evaluate(folder)
    for name in ("auc_prc", "accuracy", "roc_auc", "fidelity", "kl"):
        assert scores[name] == pytest.approx(metrics[name])
    assert scores["teacher"]["auc_prc"] == pytest.approx(metrics["teacher"]["auc_prc"])


def test_evaluate_refuses_damaged_weights_and_unfinished_runs(
    finished: tuple[RunConfig, Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, folder, _ = finished
    weights = folder / "student.safetensors"
    good = weights.read_bytes()
    try:
        weights.write_bytes(good[:-1])
        with pytest.raises(ValueError, match=r"student.safetensors is truncated or was changed"):
            evaluate(folder)
    finally:
        weights.write_bytes(good)
    with pytest.raises(FileNotFoundError, match=r"holds no finished run: metrics.json is missing"):
        evaluate(tmp_path)


def test_methods_share_one_teacher_and_one_first_student(
    finished: tuple[RunConfig, Path, dict[str, Any]], tmp_path: Path
) -> None:
    config, folder, metrics = finished
    for method in ("base", "kd"):
        other = run(config.replace(method=method, earliness=0.8), tmp_path / method)
        assert (tmp_path / method / "teacher.safetensors").read_bytes() == (folder / "teacher.safetensors").read_bytes()
        assert other["teacher"] == metrics["teacher"]
        lines = [json.loads(line) for line in (tmp_path / method / "history.jsonl").read_text().splitlines()]
        assert {line["stage"] for line in lines} == {"student"}
        assert not (tmp_path / method / "trajectory.npz").exists()
    data = toy.data()
    first = {}
    for method in ("base", "kd", "gdpd"):
        with training_context(config) as fabric:
            session = Session(config.replace(method=method), prepare(data, config), fabric)
            first[method] = stages.build_student(session, stages.build_teacher(session)).student.state_dict()
    for method in ("kd", "gdpd"):
        assert all(torch.equal(value, first["base"][name]) for name, value in first[method].items())


def test_another_seed_or_other_teacher_options_make_another_teacher(
    finished: tuple[RunConfig, Path, dict[str, Any]],
) -> None:
    from gdpd.training.teacher_cache import teacher_key

    config = finished[0]
    key = teacher_key(config, "data")
    assert teacher_key(config.replace(method="base", earliness=0.1, epochs=3), "data") == key
    for change in ({"seed": 2}, {"teacher_epochs": 3}, {"teacher_options": {"layers": 2}}, {"normalisation": "train"}):
        assert teacher_key(config.replace(**change), "data") != key
    assert teacher_key(config, "other data") != key


def test_test_series_do_not_touch_the_weights(tmp_path: Path) -> None:
    home = toy.folder(tmp_path)
    config = toy.config(home)
    run(config, tmp_path / "one")
    rows = (home / "Toy_TEST.tsv").read_text().splitlines()
    (home / "Toy_TEST.tsv").write_text("\n".join(reversed(rows[: len(rows) // 2])) + "\n")
    run(config, tmp_path / "other")
    for name in ("teacher.safetensors", "student.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    home = toy.folder(tmp_path)
    weights = [
        (run(toy.config(home, seed=seed), tmp_path / str(i)), (tmp_path / str(i) / "student.safetensors").read_bytes())[
            1
        ]
        for i, seed in enumerate((1, 1, 2))
    ]
    assert weights[0] == weights[1] != weights[2]


def test_training_leaves_torch_s_generator_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    run(toy.config(toy.folder(tmp_path)), tmp_path / "run")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions_train(tmp_path: Path, precision: str) -> None:
    metrics = run(toy.config(toy.folder(tmp_path), precision=precision, epochs=20), tmp_path / "run")
    assert metrics["accuracy"] > 0.5
    assert math.isfinite(metrics["validation"]["ce"])


def test_series_of_different_lengths_train(tmp_path: Path) -> None:
    home = toy.folder(tmp_path)
    for split in ("TRAIN", "TEST"):
        path = home / f"Toy_{split}.tsv"
        rows = [line.split("\t") for line in path.read_text().splitlines()]
        for i, row in enumerate(rows):
            row[1 + 16 - i % 5 :] = ["NaN"] * (i % 5)
        path.write_text("\n".join("\t".join(row) for row in rows) + "\n")
    for mode in ("raw", "stretch"):
        metrics = run(toy.config(home, prefix_mode=mode, epochs=4), tmp_path / mode)
        assert 0 <= metrics["accuracy"] <= 1


def test_tensorboard_files_are_written_when_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(toy.config(toy.folder(tmp_path), tensorboard=True), tmp_path / "run")
    written = {path.parent.name for path in (tmp_path / "run" / "tensorboard").rglob("events.*")}
    assert written == {"teacher0", "student"}


def test_progress_bars_show_every_stage(tmp_path: Path) -> None:
    import io

    from rich.console import Console

    from gdpd.training import RichProgress

    out = io.StringIO()
    run(toy.config(toy.folder(tmp_path)), tmp_path / "run", progress=RichProgress(Console(file=out, width=100)))
    assert "teacher0" in out.getvalue()
    assert "student" in out.getvalue()
    assert "alpha" in out.getvalue()


def test_full_disk_while_training_leaves_nothing_half_written_and_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy.config(toy.folder(tmp_path), clean_checkpoints=False)
    real, calls = os.fsync, [0]

    def fsync(handle: int) -> None:
        calls[0] += 1
        if calls[0] == 15:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    with pytest.raises(OSError, match="the disk is full"):
        run(config, tmp_path / "run")
    assert calls[0] >= 15
    assert not list((tmp_path / "run").rglob("*.partial"))
    for path in (tmp_path / "run").rglob("*.safetensors"):
        assert path.with_suffix(".json").exists()
    monkeypatch.setattr(atomic.os, "fsync", real)
    run(config, tmp_path / "run", resume=True)
    run(config, tmp_path / "whole")
    whole = (tmp_path / "whole" / "student.safetensors").read_bytes()
    assert (tmp_path / "run" / "student.safetensors").read_bytes() == whole


def test_a_loss_that_is_no_longer_finite_stops_the_run_with_advice(tmp_path: Path) -> None:
    config = toy.config(toy.folder(tmp_path), learning_rate=1e38, gradient_clip=None)
    with pytest.raises(TrainingDiverged, match=r"stage 'teacher0', epoch \d+.*Lower learning_rate \(now 1e\+38\)"):
        run(config, tmp_path / "run")


# --- teachers -----------------------------------------------------------------------------------------------------


def test_a_teacher_at_chance_is_told_loudly_or_refused_after_its_retries(tmp_path: Path) -> None:
    home = toy.folder(tmp_path)
    # a learning rate so low that nothing is learned
    weak = {"learning_rate": 1e-9, "teacher_epochs": 1, "teacher_retries": 2, "method": "base", "epochs": 1}
    with pytest.warns(WeakTeacherWarning, match=r"Toy, seed 1: the best of 3 teacher.*not clearly better than chance"):
        metrics = run(toy.config(home, **weak), tmp_path / "run")
    assert metrics["teacher"]["weak"]
    assert metrics["teacher"]["trained"] == 3
    with pytest.raises(WeakTeacherError, match=r"more teacher_epochs"):
        run(toy.config(home, **weak, weak_teacher="error"), tmp_path / "other")


def test_a_teacher_below_its_student_is_told(tmp_path: Path) -> None:
    config = toy.config(toy.folder(tmp_path), teacher_epochs=1, method="base", epochs=40, earliness=0.9)
    with pytest.warns(WeakTeacherWarning, match=r"the student, which reads 90% of each series"):
        metrics = run(config, tmp_path / "run")
    assert metrics["validation"]["auc_prc"] > metrics["teacher"]["validation"]["auc_prc"]


def test_the_best_of_several_teachers_on_validation_data_is_kept(tmp_path: Path) -> None:
    config = toy.config(toy.folder(tmp_path), teacher_candidates=3, teacher_epochs=10, method="base", epochs=1)
    metrics = run(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    best = {number: min(line["val"]["ce"] for line in lines if line.get("candidate") == number) for number in range(3)}
    assert metrics["teacher"]["candidate"] == min(best, key=lambda number: best[number])
    assert metrics["teacher"]["validation"]["ce"] == pytest.approx(min(best.values()), rel=1e-4)


def test_several_batches_in_an_epoch_share_its_learning_rate(tmp_path: Path) -> None:
    options = {"lr_schedule": "multistep", "lr_milestones": [3], "batch_size": 4, "method": "base"}
    run(toy.config(toy.folder(tmp_path), **options), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines if line["stage"] == "student"] == [0.01] * 3 + [0.005] * 3


# --- processes of their own ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_together(tmp_path: Path) -> None:
    config = toy.config(toy.folder(tmp_path), devices=2, epochs=10, teacher_epochs=20)
    (tmp_path / "job.py").write_text(
        "import json, sys\nfrom gdpd import RunConfig, run\n"
        "run(RunConfig.from_dict(json.loads(sys.argv[1])), sys.argv[2])\n"
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "job.py"), json.dumps(config.to_dict()), str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["accuracy"] >= 0.5
    lines = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    assert len(lines) == 30


def test_no_warning_of_lightning_or_torch_in_an_ordinary_run(tmp_path: Path) -> None:
    config = toy.config(toy.folder(tmp_path), teacher_epochs=60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(config, tmp_path / "run")

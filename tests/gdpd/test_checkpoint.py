"""Files that appear whole or not at all, and checkpoints that are good or passed over."""

from __future__ import annotations

import errno
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import toy
from gdpd.training import atomic
from gdpd.training.checkpoint import Checkpoint, CheckpointError, CheckpointStore, CheckpointWarning
from gdpd.training.history import History


def store(path: Path, **options: Any) -> CheckpointStore:
    return CheckpointStore(path / "checkpoints", toy.config(**options), "digest")


def checkpoint(epoch: int, stage: str = "student") -> Checkpoint:
    return Checkpoint(stage, epoch, {"w": torch.full((3,), float(epoch)), "n": torch.tensor(epoch)}, {"best": epoch})


def filled(path: Path) -> CheckpointStore:
    made = store(path)
    for epoch in (2, 4, 6):
        made.save(checkpoint(epoch))
    return made


def test_the_newest_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    found = filled(tmp_path).load("student")
    assert found is not None
    assert (found.epoch, found.state) == (6, {"best": 6})
    assert torch.equal(found.tensors["w"], torch.full((3,), 6.0))
    assert found.tensors["n"].dtype == torch.int64


def test_two_of_each_stage_are_kept(tmp_path: Path) -> None:
    made = filled(tmp_path)
    made.save(checkpoint(1, "teacher0"))
    names = sorted(path.name for path in made.folder.iterdir())
    assert names == [
        f"{stem}.{suffix}"
        for stem in ("student-000004", "student-000006", "teacher0-000001")
        for suffix in ("json", "safetensors")
    ]


def test_a_stage_without_checkpoints_starts_at_its_start(tmp_path: Path) -> None:
    assert store(tmp_path).load("student") is None
    assert filled(tmp_path).load("teacher0") is None


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "truncated or was changed"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"), "truncated or was changed"),
        (lambda path: path.write_bytes(b""), "truncated or was changed"),
        (lambda path: path.unlink(), "No such file"),
    ],
)
def test_damaged_tensors_are_reported_and_the_last_good_checkpoint_is_used(
    tmp_path: Path, damage: Any, told: str
) -> None:
    made = filled(tmp_path)
    damage(made.folder / "student-000006.safetensors")
    with pytest.warns(CheckpointWarning, match=rf"{told}.*last good checkpoint, student-000004 \(epoch 4\)"):
        found = made.load("student")
    assert found is not None
    assert found.epoch == 4


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"epoch": 6}'])
def test_damaged_description_is_passed_over(tmp_path: Path, text: str) -> None:
    made = filled(tmp_path)
    (made.folder / "student-000006.json").write_text(text)
    with pytest.warns(CheckpointWarning, match=r"student-000006.json"):
        found = made.load("student")
    assert found is not None
    assert found.epoch == 4


def test_tensors_without_a_description_do_not_count(tmp_path: Path) -> None:
    made = filled(tmp_path)
    (made.folder / "student-000006.json").unlink()  # as a kill between the two writes leaves it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = made.load("student")
    assert found is not None
    assert found.epoch == 4


def test_only_damaged_checkpoints_are_an_error_with_the_ways_out(tmp_path: Path) -> None:
    made = filled(tmp_path)
    for path in made.folder.glob("*.safetensors"):
        path.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"student-000006.*student-000004.*Delete these files"):
        made.load("student")


def test_checkpoint_of_another_configuration_names_every_differing_option(tmp_path: Path) -> None:
    filled(tmp_path)
    other = CheckpointStore(tmp_path / "checkpoints", toy.config(learning_rate=0.5, batch_size=4), "digest")
    with pytest.raises(ValueError, match=r"batch_size is 8 there and 4 now; learning_rate is 0.01 there and 0.5 now"):
        other.load("student")


def test_options_that_change_no_result_may_differ(tmp_path: Path) -> None:
    filled(tmp_path)
    found = CheckpointStore(tmp_path / "checkpoints", toy.config(checkpoint_every=99), "digest").load("student")
    assert found is not None


def test_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(ValueError, match="trained on other data"):
        CheckpointStore(tmp_path / "checkpoints", toy.config(), "other").load("student")


def full_disk(monkeypatch: pytest.MonkeyPatch, *, after: int = 0) -> None:
    """Every flush to disk from the one after `after` on fails as on a full disk, the bytes written in part."""
    calls = [0]
    real = os.fsync

    def fsync(handle: int) -> None:
        calls[0] += 1
        if calls[0] > after:
            os.truncate(handle, 3)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(atomic.os, "fsync", fsync)


@pytest.mark.parametrize("after", [0, 2])
def test_full_disk_leaves_the_old_checkpoints_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    made = filled(tmp_path)
    before = {path.name: path.read_bytes() for path in made.folder.iterdir()}
    full_disk(monkeypatch, after=after)  # 2: the tensors are on disk, their description is not
    with pytest.raises(OSError, match=r"the disk is full.*Make room and resume") as caught:
        made.save(checkpoint(8))
    assert caught.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in made.folder.iterdir()} == before


def test_failed_write_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.json"
    atomic.write_json(path, {"a": 1})
    full_disk(monkeypatch)
    with pytest.raises(OSError, match="full"):
        atomic.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_interrupt_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic.write_bytes(tmp_path / "x", b"abc")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    made = filled(tmp_path)
    left = made.folder / ".student-000008.safetensors-0badc0de.partial"
    left.write_bytes(b"half")
    assert store(tmp_path).load("student") is not None
    assert not left.exists()


def test_clear_removes_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    made = filled(tmp_path)
    (made.folder / "notes.txt").write_text("mine")
    made.clear()
    assert [path.name for path in made.folder.iterdir()] == ["notes.txt"]
    (made.folder / "notes.txt").unlink()
    made.clear()
    assert not made.folder.exists()
    made.clear()


def test_json_is_plain_whatever_numpy_and_torch_put_in(tmp_path: Path) -> None:
    value = {1: np.float32(0.5), "t": torch.tensor(3), "a": np.arange(2), "nan": float("nan"), "nest": ({"x": np.inf},)}
    atomic.write_json(tmp_path / "v.json", value)
    assert atomic.read_json(tmp_path / "v.json") == {"1": 0.5, "t": 3, "a": [0, 1], "nan": None, "nest": [{"x": None}]}


def record(stage: str, epoch: int, **more: Any) -> dict[str, Any]:
    return {"stage": stage, "epoch": epoch, **more}


def test_history_rewinds_to_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path)
    for line in (record("teacher", 0, candidate=0), record("teacher", 1, candidate=0), *map_student(5)):
        history.append(line)
    read = History(path)
    read.rewind("student", 3)
    assert [(line["stage"], line["epoch"]) for line in History(path).records] == [
        ("teacher", 0),
        ("teacher", 1),
        ("student", 0),
        ("student", 1),
        ("student", 2),
    ]
    read.rewind("teacher0", 1)
    assert [line["stage"] for line in History(path).records] == ["teacher"]


def map_student(epochs: int) -> list[dict[str, Any]]:
    return [record("student", epoch) for epoch in range(epochs)]


def test_history_survives_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text('{"stage": "student", "epoch": 0}\n{"stage": "stu')
    assert History(path).records == [record("student", 0)]


def test_full_disk_leaves_no_part_of_a_history_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path)
    history.append(record("student", 0))
    before = path.read_bytes()

    class Full:
        """An opened file on a full disk: takes a few bytes and then no more."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def fileno(self) -> int:
            return int(self.file.fileno())

        def write(self, data: bytes) -> int:
            self.file.write(data[:4])
            raise OSError(errno.ENOSPC, "No space left on device")

    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: Full(real(self, *a, **k)))
    with pytest.raises(OSError, match="No space"):
        history.append(record("student", 1))
    monkeypatch.undo()
    assert path.read_bytes() == before

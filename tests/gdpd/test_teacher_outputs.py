"""What a teacher makes of a data set is computed once, found by content, and mapped from a file where it is large."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import toy
from gdpd.models import Classifier, build_model
from gdpd.training import run, teacher_outputs
from gdpd.training.tensors import Series, TrainingSet, outputs


class Counted:
    """Counts how often the outputs of a model are computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = 0
        monkeypatch.setattr(teacher_outputs, "outputs", self)
        teacher_outputs._kept.clear()

    def __call__(self, model: Classifier, series: Series, **asked: bool) -> tuple[torch.Tensor, ...]:
        self.times += 1
        return outputs(model, series, **asked)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def teacher(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return build_model("lstm", in_channels=1, num_classes=2, hidden=6, layers=1).eval()


def series(n: int = 20, seed: int = 0) -> Series:
    generator = torch.Generator().manual_seed(seed)
    return Series(torch.randn(n, 1, 9, generator=generator), torch.arange(n) % 2)


def known(model: Classifier, given: Series, **options: object) -> tuple[torch.Tensor, ...]:
    return teacher_outputs.teacher_outputs(model, given, **{"limit": 2**20, **options})  # type: ignore[arg-type]


def test_outputs_are_computed_once_for_one_content(counted: Counted) -> None:
    first = known(teacher(), series())
    again = known(teacher(), series())  # other objects, the same numbers
    assert counted.times == 1
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, outputs(teacher(), series()), strict=True))


def test_other_weights_data_or_lengths_are_computed_anew(counted: Counted) -> None:
    full = series()
    known(teacher(), full)
    changed = teacher()
    with torch.no_grad():
        changed.head.bias[0] += 1e-6
    lengths = torch.full((20,), 9)
    for model, given in (
        (changed, full),
        (teacher(1), full),
        (teacher(), series(seed=1)),
        (teacher(), Series(full.x, full.y, lengths)),
        (teacher(), Series(full.x, full.y, lengths - torch.arange(20) % 2)),
        (teacher(), Series(full.x[:19], full.y[:19])),
    ):
        before = counted.times
        known(model, given)
        assert counted.times == before + 1
    assert len(teacher_outputs._kept) == teacher_outputs._MOST_KEPT


@pytest.mark.parametrize("shared", [True, False])
def test_what_is_large_is_mapped_from_a_file_with_the_same_numbers(
    counted: Counted, tmp_path: Path, shared: bool
) -> None:
    home = tmp_path / "home" if shared else None
    large = series(5000)
    exact = outputs(teacher(), large)
    for _ in range(2):
        mapped = known(teacher(), large, limit=1000, home=home)
        assert all(torch.equal(a, b) for a, b in zip(mapped, exact, strict=True))
    assert counted.times == (2 if shared else 4)  # two parts of 4096 rows at most; a temporary file is not found again
    assert not teacher_outputs._kept
    batch = TrainingSet(large, *mapped).batch(torch.tensor([4999, 3]))
    assert batch.z_long is not None
    assert torch.equal(batch.z_long, exact[0][[4999, 3]])
    assert [path.suffix for path in tmp_path.rglob("*.*")] == ([".bin"] if shared else [])


@pytest.mark.parametrize("limit", [2**20, 0])
def test_hidden_sequences_are_kept_or_mapped_beside_features_that_others_asked_for(
    counted: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(teacher_outputs, "_PART", 1000)  # bytes: a row has (6 + 2 + 9 × 6) × 4 = 248
    given = series()
    exact = outputs(teacher(), given, sequence=True)
    assert exact[2].shape == (20, 9, 6)
    without = known(teacher(), given, limit=limit, home=tmp_path)
    assert len(without) == 2
    before = counted.times
    for _ in range(2):
        found = known(teacher(), given, limit=limit, home=tmp_path, sequence=True)
        assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
    assert counted.times == before + (1 if limit else 5)
    assert len(list(tmp_path.iterdir())) == (0 if limit else 2)
    batch = TrainingSet(given, *found).batch(torch.tensor([19, 3]))
    assert batch.teacher_sequence is not None
    assert torch.equal(batch.teacher_sequence, exact[2][[19, 3]])
    assert batch.teacher_lengths is None


def test_a_file_of_the_wrong_size_is_written_again(counted: Counted, tmp_path: Path) -> None:
    known(teacher(), series(), limit=0, home=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-4])
    mapped = known(teacher(), series(), limit=0, home=tmp_path)
    assert torch.equal(mapped[1], outputs(teacher(), series())[1])
    assert counted.times == 2


def test_a_file_that_cannot_be_written_leaves_nothing(
    counted: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(teacher_outputs.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        known(teacher(), series(), limit=0, home=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::gdpd.training.WeakTeacherWarning")
def test_a_run_learns_the_same_from_mapped_features(tmp_path: Path) -> None:
    home = toy.folder(tmp_path)
    common = {"epochs": 4, "teacher_epochs": 2, "teacher_dir": str(tmp_path / "teachers")}
    for memory in (0, 256):
        run(toy.config(home, **common, teacher_memory=memory), tmp_path / str(memory))
    weights = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("256", "0")]
    assert weights[0] == weights[1]
    assert len(list((tmp_path / "teachers").rglob("outputs-*.bin"))) == 1

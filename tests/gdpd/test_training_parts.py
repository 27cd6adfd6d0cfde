"""The parts of training: batches, learning rates, selection, the test against chance, subnormals."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_fabric import Fabric
from torch import nn

import toy
from gdpd.config import RunConfig
from gdpd.training import run
from gdpd.training.devices import OneCpu, launch
from gdpd.training.loop import derived_seed, learning_rate, scores_of, summary
from gdpd.training.selection import Selection
from gdpd.training.stages import p_chance
from gdpd.training.tensors import batches

ROOT = Path(__file__).parents[2]


@given(st.integers(2, 200), st.integers(2, 70), st.integers(0, 10))
def test_batches_hold_every_row_once_and_none_is_a_single_row(n: int, batch_size: int, seed: int) -> None:
    parts = list(batches(n, batch_size, torch.Generator().manual_seed(seed)))
    assert sorted(torch.cat(parts).tolist()) == list(range(n))
    assert min(len(part) for part in parts) >= 2
    assert max(len(part) for part in parts) <= batch_size + 1
    assert all(len(part) == batch_size for part in parts[:-1])


def test_batch_order_is_a_function_of_seed_and_epoch() -> None:
    def order(epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derived_seed(1, "student", epoch, "order"))
        return torch.cat(list(batches(20, 8, generator))).tolist()

    assert order(3) == order(3) != order(4)


def test_learning_rate_changes_by_epoch() -> None:
    steps = RunConfig(learning_rate=1.0, lr_schedule="multistep", lr_milestones=(2, 4), lr_gamma=0.5)
    assert [learning_rate(steps, epoch, 6) for epoch in range(6)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    cosine = RunConfig(learning_rate=1.0, lr_schedule="cosine")
    rates = [learning_rate(cosine, epoch, 10) for epoch in range(10)]
    assert rates[0] == 1
    assert rates == sorted(rates, reverse=True)
    assert rates[5] == pytest.approx(0.5)
    assert rates[-1] > 0


def scores(ce: float, accuracy: float = 0.5, auc_prc: float = 50.0) -> dict[str, float]:
    return {"ce": ce, "accuracy": accuracy, "auc_prc": auc_prc}


def followed(selection: Selection, values: list[dict[str, float]]) -> Selection:
    """The selection after as many epochs, in which the weight was 0, 1, 2, ..."""
    model = nn.Linear(1, 1, bias=False)
    for epoch, value in enumerate(values):
        nn.init.constant_(model.weight, float(epoch))
        selection.update(epoch, model, value)
    return selection


def test_best_on_validation_is_the_first_of_the_lowest_cross_entropy_after_the_warmup() -> None:
    values = [scores(0.1), scores(0.5), scores(0.4), scores(0.4), scores(math.nan), scores(0.6)]
    kept = followed(Selection("best_val", 6, first_epoch=1), values)
    assert kept.epoch == 2
    assert float(kept.weights["weight"]) == 2


def test_ties_of_accuracy_go_to_the_lower_cross_entropy() -> None:
    values = [scores(0.5, 0.9), scores(0.4, 0.9), scores(0.1, 0.8), scores(0.45, 0.9)]
    assert followed(Selection("best_val", 4, metric="accuracy"), values).epoch == 1
    areas = [scores(0.5, auc_prc=90), scores(0.9, auc_prc=95)]
    assert followed(Selection("best_val", 2, metric="auc_prc"), areas).epoch == 1


def test_last_and_average_do_not_look_at_validation_scores() -> None:
    values = [scores(float(5 - epoch % 3)) for epoch in range(10)]
    assert float(followed(Selection("last", 10), values).weights["weight"]) == 9
    average = followed(Selection("average", 10, average_epochs=4), values)
    assert float(average.weights["weight"]) == pytest.approx((6 + 7 + 8 + 9) / 4)
    short = followed(Selection("average", 10, average_epochs=40, first_epoch=8), values)
    assert float(short.weights["weight"]) == pytest.approx(8.5)


def test_unknown_selection_is_refused() -> None:
    with pytest.raises(ValueError, match=r"selection='bset_val' is not known \(did you mean 'best_val'\?\)"):
        Selection("bset_val", 3)
    with pytest.raises(ValueError, match="selection_metric='f1'"):
        Selection("best_val", 3, metric="f1")


def test_scores_of_logits_that_are_not_finite_are_the_worst() -> None:
    made = scores_of(torch.full((4, 2), math.nan), torch.arange(4) % 2)
    assert math.isnan(made["ce"])
    assert (made["accuracy"], made["auc_prc"]) == (0, 0)


def test_summary_is_mean_and_quantiles() -> None:
    assert summary(torch.arange(101.0)) == {"mean": 50, "q05": 5, "q25": 25, "q50": 50, "q75": 75, "q95": 95}


def test_chance_probability_is_small_for_good_and_large_for_useless_predictions() -> None:
    y = torch.arange(12) % 2
    good = torch.nn.functional.one_hot(y, 2) * 0.8 + 0.1
    assert p_chance(good, y, 0) < 0.01
    assert p_chance(torch.full((12, 2), 0.5), y, 0) == 1.0
    assert p_chance(good.flip(1), y, 0) > 0.9


def test_guessing_the_most_frequent_class_is_chance() -> None:
    y = torch.tensor([0] * 18 + [1] * 2)
    assert p_chance(torch.tensor([[0.95, 0.05]]).repeat(20, 1), y, 0) == 1.0


def in_process(code: str, *arguments: str, **environment: str) -> str:
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="other platforms cannot reach workers that run already")
@pytest.mark.parametrize("other", ["", "import sklearn.metrics"], ids=["torch alone", "scikit-learn's OpenMP too"])
@pytest.mark.parametrize("started", [True, False], ids=["pool runs already", "pool not started"])
def test_denormals_are_flushed_in_every_thread_and_put_back(started: bool, other: str) -> None:
    code = """
import torch
OTHER
torch.set_num_threads(3)
from gdpd.training.denormals import flush_denormals, threads_flushing
if STARTED: print(threads_flushing())
with flush_denormals():
    print(threads_flushing())
    with flush_denormals(): print(threads_flushing())
    print(threads_flushing())
print(threads_flushing())
with flush_denormals(False): print(threads_flushing())
""".replace("STARTED", str(started)).replace("OTHER", other)
    on, off = str([True] * 3), str([False] * 3)
    expected = [on, on, on, off, off]
    assert in_process(code).splitlines() == ([off] if started else []) + expected


def test_denormals_warn_where_the_workers_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    from gdpd.training import denormals

    monkeypatch.setattr(denormals, "threads_flushing", lambda: [True, False])
    with pytest.warns(RuntimeWarning, match="not flushed to zero in every compute thread"), denormals.flush_denormals():
        pass


def test_one_cpu_trains_as_fabric_does(tmp_path: Path) -> None:
    hashes = []
    for accelerator, launched in (("cpu", OneCpu), ("auto", Fabric)):
        config = toy.config(toy.folder(tmp_path / accelerator / "Toy"), method="gdpd", accelerator=accelerator)
        assert isinstance(launch(config), launched)
        hashes.append(run(config, tmp_path / accelerator / "run")["student_sha256"])
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("changes", [{"accelerator": "auto"}, {"precision": "64-true"}, {"precision": "bf16-mixed"}])
def test_anything_but_one_cpu_in_float32_is_fabrics(changes: dict[str, str]) -> None:
    assert isinstance(launch(RunConfig(**changes)), Fabric)


def test_a_run_on_one_cpu_waits_for_no_import_it_does_not_need(tmp_path: Path) -> None:
    """Seconds for every worker of a grid."""
    code = f"""
import sys
from gdpd.config import RunConfig
from gdpd.training import run
run(RunConfig(dataset="GunPoint", method="kd", epochs=2, teacher_epochs=1, student_model="lstm2-32",
              teacher_model="lstm2-32", weak_teacher="warn"), {str(tmp_path / "run")!r})
print([name for name in ("lightning_fabric", "sklearn", "aeon", "scipy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"

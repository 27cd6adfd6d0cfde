"""What holds for every method: who learns, how often the student runs, what is refused, how a run comes to it."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import toy
from gdpd import distillers
from gdpd.config import RunConfig
from gdpd.distillers import Base, Distiller, distiller_class, distiller_names
from gdpd.methods import METHODS, method_order, method_title
from gdpd.models import build_model
from gdpd.training import run
from gdpd.training.atomic import read_json
from lessons import CLASSES, batch, in_float64, method

EPOCHS = (0, 2)  # of the warm-up, and after it
LEARNED = [name for name in distiller_names() if distiller_class(name).uses_teacher]


def test_every_listed_method_is_a_public_class_with_a_title_and_an_order() -> None:
    for name, (title, where) in METHODS.items():
        found = distiller_class(name)
        assert getattr(distillers, found.__name__) is found
        assert found.__name__ in distillers.__all__
        assert f"{found.__module__}:{found.__qualname__}" == where
        assert method_title(name) == title
    order = sorted([*METHODS, "teacher", "own:B", "own:A"], key=method_order)
    assert order == ["teacher", *METHODS, "own:A", "own:B"]
    assert method_title("my.own:Idea") == "Idea"
    assert method_title("teacher") == "Teacher"


@pytest.mark.parametrize("epoch", EPOCHS)
@pytest.mark.parametrize("name", distiller_names())
def test_the_student_learns_once_a_step_and_the_teacher_not(name: str, epoch: int) -> None:
    made, data = method(name), in_float64(batch())
    given = [value for value in vars(data).values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    for value in given:
        value.requires_grad_()
    with torch.no_grad():
        for parameter in made.parameters():
            if not parameter.any():
                parameter.normal_()  # GenDD's modulation starts at zero and lets nothing through in the first step
    calls: list[int] = []
    made.student.register_forward_hook(lambda *_: calls.append(1))
    before = [value.detach().clone() for value in given]
    loss, parts = made.loss(data, epoch)
    loss.backward()
    assert len(calls) == 1
    assert loss.dim() == 0
    assert bool(torch.isfinite(loss))
    assert not any(part.requires_grad for part in parts.values())
    recurrent = [p.grad for key, p in made.student.named_parameters() if not key.startswith("head")]
    assert all(gradient is not None and bool(gradient.any()) for gradient in recurrent)
    for key in ("z_long", "teacher_logits", "teacher_sequence"):
        assert getattr(data, key).grad is None, key
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))


@pytest.mark.parametrize("epoch", EPOCHS)
@pytest.mark.parametrize("name", LEARNED)
def test_what_is_missing_or_misshapen_of_the_teacher_is_named(name: str, epoch: int) -> None:
    made = method(name)
    told = []
    for key in ("z_long", "teacher_logits", "teacher_sequence"):
        for change in (None, torch.zeros(6, 4, 7, 2), torch.zeros(5, 3)):
            data = in_float64(batch())
            setattr(data, key, change)
            try:
                made.loss(data, epoch)
            except ValueError as error:
                told.append((key, str(error)))
    keys = [key for key, _ in told]
    assert all(keys.count(key) == 3 for key in keys)  # what is read at all is looked at in each of the three ways
    assert all(key in message or "teacher's logits" in message for key, message in told)


@pytest.mark.parametrize("name", LEARNED)
def test_some_epoch_reads_the_teacher(name: str) -> None:
    made = method(name)
    refused = 0
    for epoch in EPOCHS:
        data = in_float64(batch())
        data.z_long = data.teacher_logits = data.teacher_sequence = None
        try:
            made.loss(data, epoch)
        except ValueError as error:
            refused += "None" in str(error)
    assert refused


@pytest.mark.parametrize("epoch", EPOCHS)
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("name", distiller_names())
def test_padding_after_a_series_end_changes_no_loss(name: str, lengths: bool, epoch: int) -> None:
    """Junk after the end of prefixes; for the teacher's sequence the contract says zeros, and it must not matter."""
    made, data = method(name), in_float64(batch(lengths=lengths))
    torch.manual_seed(3)
    expected = copy.deepcopy(made).loss(data, epoch)[0]
    longer = in_float64(batch(lengths=lengths))
    assert longer.teacher_sequence is not None
    if lengths:
        assert longer.lengths is not None
        steps = torch.arange(longer.x_prefix.shape[2])
        longer.x_prefix[(steps >= longer.lengths[:, None])[:, None, :]] = 7.0
    else:
        longer.lengths = torch.full((6,), longer.x_prefix.shape[2])
        longer.teacher_lengths = torch.full((6,), longer.teacher_sequence.shape[1])
    torch.manual_seed(3)
    torch.testing.assert_close(made.loss(longer, epoch)[0], expected)


@pytest.mark.parametrize("name", distiller_names())
def test_balanced_classes_weigh_every_cross_entropy(name: str) -> None:
    made, data = method(name), in_float64(batch())
    weights = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)
    torch.manual_seed(1)
    equal = copy.deepcopy(made).loss(data, 2)[1]
    made.class_weights = weights
    torch.manual_seed(1)
    weighed = made.loss(data, 2)[1]
    made.eval()
    logits = made.student(data.x_prefix)[1]
    expected = (weights[data.y] * F.cross_entropy(logits, data.y, reduction="none")).mean()
    if "ce" in weighed:
        torch.testing.assert_close(weighed["ce"], expected)
    changed = {key for key in equal if equal[key].dim() == 0 and not torch.equal(equal[key], weighed[key])}
    assert changed == {key for key in equal if key.startswith("ce") or key == "pld"}  # PLD holds a cross-entropy


@pytest.mark.filterwarnings("ignore::gdpd.training.WeakTeacherWarning")
def test_balanced_weights_are_those_of_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.utils.class_weight import compute_class_weight

    from gdpd.training import run_folder, stages

    made = toy.data(n_train=30)
    made.y_train[:] = [0] * 20 + [1] * 10
    seen: list[Any] = []
    fit = stages.fit

    def watched(distiller: Distiller, train: Any, *args: Any, **options: Any) -> None:
        seen.append((distiller.class_weights, train.series.y))
        fit(distiller, train, *args, **options)

    monkeypatch.setattr(stages, "fit", watched)
    config = toy.config(class_weight="balanced", method="kd", epochs=1, teacher_epochs=1)
    monkeypatch.setattr(run_folder, "load_data", lambda _: made)
    run(config, tmp_path / "run")
    assert len(seen) == 2  # the teacher's, the student's
    for weights, y in seen:
        expected = compute_class_weight("balanced", classes=torch.arange(2).numpy(), y=y.numpy())
        torch.testing.assert_close(weights.double(), torch.from_numpy(expected), rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore::gdpd.training.WeakTeacherWarning")
def test_a_method_of_one_s_own_is_named_by_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = '''
from gdpd.distillers import Distiller


class Pull(Distiller):
    """Features of equal widths, brought together."""

    def __init__(self, student, *, loss_ratio=1.0, power=2.0):
        super().__init__(student, loss_ratio=loss_ratio)
        self.power = power

    def terms(self, batch, student, epoch):
        return {"pull": (student.z_short - batch.z_long).abs().pow(self.power).mean()}


class Other:
    """No method."""
'''
    (tmp_path / "own_methods.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    options = {"teacher_options": {"layers": 1, "hidden": 8}, "method_options": {"power": 1.0}, "epochs": 2}
    home = toy.folder(tmp_path)
    run(toy.config(home, method="own_methods:Pull", **options), tmp_path / "run")
    assert read_json(tmp_path / "run" / "config.json")["method"] == "own_methods:Pull"
    assert set(sys.modules["own_methods"].Pull.__mro__) >= {Distiller}
    for name, told in (
        ("own_methods:Push", "'own_methods:Push' cannot be imported.*Push"),
        ("absent_module:Pull", "cannot be imported.*absent_module.*PYTHONPATH"),
        ("own_methods:Other", "not a class derived from"),
        ("fit", r"did you mean 'fits'.*package.module:Class"),
    ):
        with pytest.raises(ValueError, match=told):
            distiller_class(name)
    with pytest.raises(ValueError, match=r"method='fit' is not known \(did you mean 'fits'\?\)"):
        RunConfig(method="fit")


def test_a_method_writes_terms_or_loss() -> None:
    class Empty(Distiller):
        """Neither."""

    with pytest.raises(NotImplementedError, match=r"Empty has to write terms\(\) or loss\(\)"):
        Empty(build_model("lstm", in_channels=1, num_classes=CLASSES, layers=1, hidden=4)).loss(batch(), 0)


def test_a_term_of_weight_zero_is_shown_and_not_learned() -> None:
    class Shown(Base):
        """A term that would be infinite."""

        term_weights = {"far": 0.0}  # noqa: RUF012

        def terms(self, *_: Any) -> dict[str, torch.Tensor]:
            return {"far": torch.tensor(torch.inf)}

    made = Shown(build_model("lstm", in_channels=1, num_classes=CLASSES, layers=1, hidden=4))
    loss, parts = made.loss(batch(), 0)
    assert bool(torch.isfinite(loss))
    assert set(parts) == {"ce", "far"}


def test_help_and_configuration_take_every_method() -> None:
    for name in distiller_names():
        assert RunConfig(method=name).method == name
    assert importlib.import_module("gdpd.methods").METHODS is METHODS

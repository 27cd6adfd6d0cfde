"""Students that read something else than the first steps of every channel: the last steps, or some channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import toy
from gdpd import PrefixClassifier
from gdpd.config import RunConfig
from gdpd.training import evaluate, run, run_folder
from gdpd.training.atomic import read_json
from gdpd.training.tensors import prepare

pytestmark = pytest.mark.filterwarnings("ignore::gdpd.training.WeakTeacherWarning")


def test_the_student_gets_its_steps_and_channels_and_the_teacher_all() -> None:
    data = toy.data(channels=3)
    made = prepare(data, toy.config(earliness=0.25, student_part="suffix", student_channels=(2, 0)))
    assert made.full_train.x.shape[1:] == (3, 16)
    whole = prepare(data, toy.config(earliness=1.0))
    for split in ("train", "validation", "test"):
        series = getattr(made, f"prefix_{split}")
        assert torch.equal(series.x, getattr(whole, f"full_{split}").x[:, [2, 0], 12:])
        assert torch.equal(series.y, getattr(whole, f"full_{split}").y)


@pytest.mark.parametrize("method", ["fits", "gdpd"])
def test_a_run_on_a_suffix_of_one_channel_is_evaluated_as_it_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    data = toy.data(channels=3)
    monkeypatch.setattr(run_folder, "load_data", lambda _: data)
    options: dict[str, Any] = {"student_part": "suffix", "student_channels": [1], "method": method, "earliness": 0.5}
    found = run(toy.config(**options, epochs=2, teacher_epochs=2), tmp_path / "run")
    again = evaluate(tmp_path / "run")
    assert again["auc_prc"] == pytest.approx(found["auc_prc"])
    config = RunConfig.from_dict(read_json(tmp_path / "run" / "config.json"))
    assert (config.student_part, config.student_channels) == ("suffix", (1,))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"student_channels": [0, 0]}, "holds a channel below 0, or one twice"),
        ({"student_channels": [-1]}, "holds a channel below 0"),
        ({"student_part": "sufix"}, "did you mean 'suffix'"),
        ({"student_part": "suffix", "method": "fits", "method_options": {"align": "steps"}}, "Use align='stretch'"),
    ],
)
def test_what_cannot_be_read_is_refused_by_the_configuration(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        toy.config(**options)


def test_a_channel_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"student_channels=\(3,\): Toy has 3 channel\(s\).*0..2"):
        prepare(toy.data(channels=3), toy.config(student_channels=[3]))


def test_an_early_classifier_takes_no_suffix() -> None:
    X, y = toy.series(20)
    with pytest.raises(ValueError, match="'student_part' is not one of an early classifier, but of a run"):
        PrefixClassifier(options={"student_part": "suffix"}).fit(np.asarray(X), y)

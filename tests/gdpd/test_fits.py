"""Fits against its formula written out step by step, and how the steps of a prefix meet those of the full series."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gdpd.distillers import Batch
from gdpd.distillers.fits import Fits
from gdpd.distillers.sequences import aligned
from lessons import FULL, STEPS, TEACHER_DIM, WIDTH, batch, in_float64, method


def ends(data: Batch, i: int) -> tuple[int, int]:
    """Steps of prefix i and of its full series."""
    own = STEPS if data.lengths is None else int(data.lengths[i])
    return own, FULL if data.teacher_lengths is None else int(data.teacher_lengths[i])


def teachers_step(data: Batch, i: int, step: int, align: str) -> Tensor:
    """What the teacher's sequence of series i is at a step of the prefix."""
    assert data.teacher_sequence is not None
    rows = data.teacher_sequence[i]
    if align == "steps":
        return rows[step]
    own, full = ends(data, i)
    place = step * (full - 1) / max(own - 1, 1)
    columns = [np.interp(place, np.arange(full), rows[:full, c].numpy()) for c in range(rows.shape[1])]
    return torch.tensor(columns)


def hint_by_loops(made: Fits, data: Batch, align: str) -> Tensor:
    """Mean over every valid step and unit of the squared difference."""
    sequence = made.student(data.x_prefix, data.lengths, sequence=True)[2]
    weight, bias = made.regressor.weight, made.regressor.bias
    squares = []
    for i in range(len(data.y)):
        for step in range(ends(data, i)[0]):
            made_of_it = weight @ sequence[i, step] + bias
            squares.extend((made_of_it - teachers_step(data, i, step, align)).pow(2).unbind())
    return torch.stack(squares).mean()


@pytest.mark.parametrize("network", ["lstm", "fcn"])
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("align", ["stretch", "steps"])
def test_hint_is_the_mean_squared_difference_over_valid_steps(align: str, lengths: bool, network: str) -> None:
    made = method("fits", network=network, align=align, loss_ratio=3.0)
    assert isinstance(made, Fits)
    data = in_float64(batch(lengths=lengths))
    loss, parts = made.loss(data, 0)
    expected = hint_by_loops(made, data, align)
    torch.testing.assert_close(parts["hint"], expected.detach())
    torch.testing.assert_close(loss, 3.0 * expected)
    assert set(parts) == {"ce", "hint"}
    ours = torch.autograd.grad(loss, made.regressor.weight)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(3.0 * expected, made.regressor.weight)[0])


def test_after_the_hint_comes_cross_entropy_alone() -> None:
    made, data = method("fits"), in_float64(batch())
    loss, parts = made.loss(data, 2)
    torch.testing.assert_close(loss, F.cross_entropy(made.student(data.x_prefix)[1], data.y))
    assert set(parts) == {"ce"}
    made.zero_grad()
    made.loss(data, 0)[0].backward()
    assert made.student.head.weight.grad is None  # the first stage reaches no head


@pytest.mark.parametrize("epoch", [0, 2])
def test_joint_adds_the_hint_in_every_epoch(epoch: int) -> None:
    made, data = method("fits", schedule="joint", loss_ratio=100.0), in_float64(batch())
    assert made.warmup_epochs == 0
    assert made.phase(0) == "main"
    loss, parts = made.loss(data, epoch)
    torch.testing.assert_close(loss.detach(), parts["ce"] + 100.0 * parts["hint"])


def test_features_alone_can_be_the_hint() -> None:
    made, data = method("fits", hint="feature"), in_float64(batch())
    assert not made.uses_sequences
    data.teacher_sequence = None
    hint = made.loss(data, 0)[1]["hint"]
    z = made.student(data.x_prefix)[0]
    assert data.z_long is not None
    expected = sum(
        (made.regressor(z[i]) - data.z_long[i]).pow(2).sum()
        for i in range(6)  # type: ignore[operator, arg-type]
    ) / (6 * TEACHER_DIM)
    torch.testing.assert_close(hint, expected.detach())  # type: ignore[union-attr]


def test_stretching_meets_first_and_last_step_and_a_prefix_of_one_step_the_first() -> None:
    teacher = torch.randn(2, 7, 3, dtype=torch.float64)
    own = torch.zeros(2, 4, 1)
    met = aligned(teacher, None, own, None, "stretch")
    torch.testing.assert_close(met[:, 0], teacher[:, 0])
    torch.testing.assert_close(met[:, 3], teacher[:, 6])
    torch.testing.assert_close(met[:, 1], teacher[:, 2])
    one = aligned(teacher, None, own, torch.tensor([1, 4]), "stretch")
    torch.testing.assert_close(one[0, 0], teacher[0, 0])
    assert torch.equal(aligned(teacher, None, torch.zeros(2, 7, 1), None, "stretch"), teacher)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"hint": "logits"}, "hint='logits' is not one of 'sequence', 'feature'"),
        ({"align": "dtw"}, "align='dtw' is not one of"),
        ({"schedule": "always"}, "schedule='always' is not one of"),
        ({"warmup_epochs": -1}, "warmup_epochs=-1 is below 0"),
        ({"warmup_epochs": 0}, "warmup_epochs=0 leaves no epoch for the hint.*schedule='joint'"),
        ({"hnit": "feature"}, r"no option 'hnit' \(did you mean 'hint'\?\)"),
    ],
)
def test_options_outside_their_limits_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        method("fits", **options)


def test_a_teacher_that_read_less_is_refused() -> None:
    data = in_float64(batch())
    assert data.teacher_sequence is not None
    data.teacher_sequence = data.teacher_sequence[:, :3]
    with pytest.raises(ValueError, match=r"has 3 steps and the student's 5.*align='stretch'"):
        method("fits", align="steps").loss(data, 0)
    data.teacher_sequence = torch.zeros(6, 9, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"teacher_sequence is of shape \(6, 9, 8\); expected \[6, any, 12\]"):
        method("fits").loss(data, 0)

"""Every method trains every kind of pair: a student like its teacher, other families of networks, smaller students."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import toy
from gdpd.distillers import build_distiller, distiller_names
from gdpd.models import build_model
from gdpd.training.run_folder import training_context
from gdpd.training.step import TrainingStep
from gdpd.training.tensors import TrainingSet, outputs, prepare

Network = tuple[str, dict[str, Any]]
LSTM3: Network = ("lstm", {"layers": 3, "hidden": 10})
PAIRS: dict[str, tuple[Network, Network]] = {
    "self": (LSTM3, LSTM3),
    "compression": (LSTM3, ("lstm2-32", {})),
    "lstm-fcn": (LSTM3, ("fcn", {"widths": (6, 7), "kernel_sizes": (5, 3)})),
    "inception-lstm": (("inception", {"channels": 3, "blocks": 3, "kernel_sizes": (5, 3)}), ("lstm", {"hidden": 6})),
    "resnet-pooled": (("resnet", {"widths": (6,)}), ("lstm", {"hidden": 6, "layers": 1, "pooling": "mean"})),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("method", distiller_names())
def test_a_few_steps_move_the_student_and_leave_the_teacher(method: str, pair: str) -> None:
    config = toy.config(method=method, batch_size=12, earliness=0.5)
    prepared = prepare(toy.data(), config)
    torch.manual_seed(0)
    teacher, student = (build_model(name, in_channels=1, num_classes=2, **options) for name, options in PAIRS[pair])
    teacher.eval().requires_grad_(False)
    shared = {**config.to_dict(), "warmup_epochs": 1, "teacher_sequence_dim": teacher.sequence_dim}
    made = build_distiller(method, student, teacher.feature_dim, shared)
    known = outputs(teacher, prepared.full_train, sequence=made.uses_sequences)
    made.prepare(teacher, known[0], prepared.full_train.y)
    train = TrainingSet.taught(prepared, known)
    before = [
        {name: value.clone() for name, value in network.state_dict().items()} for network in (teacher, made.student)
    ]
    with training_context(config) as fabric:
        step = TrainingStep(made, config, fabric)
        losses = [step(train.batch(torch.arange(12)), epoch)["loss"] for epoch in (0, 0, 1, 1)]
        step.release()
    assert all(bool(loss.isfinite()) for loss in losses)
    assert all(torch.equal(value, before[0][name]) for name, value in teacher.state_dict().items())
    moved = {name for name, value in made.student.state_dict().items() if not torch.equal(value, before[1][name])}
    assert {name for name, _ in made.student.named_parameters()} <= moved

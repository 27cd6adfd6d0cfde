"""Losses against torchdistill, which `make` installs (`pip install --no-deps torchdistill`: no torchvision)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gdpd.distillers.vid import VID
from lessons import batch, in_float64, method

theirs = pytest.importorskip(
    "torchdistill.losses.mid_level", reason="optional: pip install --no-deps torchdistill compares losses with its own"
)
SAME = {"student_module_path": "net", "teacher_module_path": "net"}
OUTPUTS = {"student_module_io": "output", "teacher_module_io": "output"}
PAIR = {"one": {"student": {"io": "output", "path": "net"}, "teacher": {"io": "output", "path": "net"}}}
RKD = {"student_output_path": "net", "teacher_output_path": "net", "reduction": "mean"}


def of(module: torch.nn.Module, student: Any, teacher: Any) -> Tensor:
    return module({"net": {"output": student}}, {"net": {"output": teacher}})  # type: ignore[no-any-return]


def test_kd() -> None:
    made, data = method("kd"), in_float64(batch())
    module = theirs.KDLoss(**SAME, **OUTPUTS, temperature=2.0, beta=1.0)
    expected = 4 * of(module, made.student(data.x_prefix)[1], data.teacher_logits)
    torch.testing.assert_close(made.loss(data, 0)[1]["kd"], expected.detach())


@pytest.mark.parametrize(("part", "factors"), [("distance", (1.0, 0.0)), ("angle", (0.0, 1.0))])
def test_rkd(part: str, factors: tuple[float, float]) -> None:
    made, data = method("rkd"), in_float64(batch())
    module = theirs.RKDLoss(**RKD, dist_factor=factors[0], angle_factor=factors[1])
    expected = of(module, made.student(data.x_prefix)[0], data.z_long)
    torch.testing.assert_close(made.loss(data, 0)[1][part], expected.detach())


def test_pkt() -> None:
    made, data = method("pkt"), in_float64(batch())
    expected = of(theirs.PKTLoss(**SAME, **OUTPUTS), made.student(data.x_prefix)[0], data.z_long)
    # it adds 1e-7 to probabilities and norms where this one bounds them
    torch.testing.assert_close(made.loss(data, 0)[1]["pkt"], expected.detach(), rtol=1e-5, atol=0)


def test_at() -> None:
    made, data = method("at", align="steps"), in_float64(batch())
    assert data.teacher_sequence is not None
    maps = made.student(data.x_prefix, sequence=True)[2].transpose(1, 2), data.teacher_sequence[:, :5].transpose(1, 2)
    expected = of(theirs.ATLoss(PAIR, mode="code"), *maps)
    torch.testing.assert_close(made.loss(data, 0)[1]["at"], expected.detach())


def test_vid() -> None:
    made, data = method("vid"), in_float64(batch())
    assert isinstance(made, VID)
    gaussian = made.mean(made.student(data.x_prefix)[0]), F.softplus(made.scale) + 1e-5
    expected = of(theirs.VIDLoss(PAIR), gaussian, data.z_long)
    torch.testing.assert_close(made.loss(data, 0)[1]["vid"], expected.detach())

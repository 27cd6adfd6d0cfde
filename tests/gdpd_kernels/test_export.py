"""torch.export of models that call the sampler: the exported program is one operator, runs, is saved and loaded."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdpd_kernels import ddim_table, reverse_sample
from gdpd_kernels.backends import load
from gdpd_kernels.capture import COMPILES
from modules import FEATURES, PaperDenoiser, TimeMLP

pytestmark = pytest.mark.skipif(not COMPILES, reason="before torch 2.13 the module itself is exported")
_MISSING = load("native").unusable()
BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(bool(_MISSING), reason="; ".join(_MISSING))),
]
TABLE = ddim_table(num_inference_steps=2, window="lower")


class Student(nn.Module):
    def __init__(self, denoiser: nn.Module, backend: str) -> None:
        super().__init__()
        self.encoder, self.denoiser = nn.Linear(5, FEATURES), denoiser
        self.backend = backend

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        z_short = torch.tanh(self.encoder(x))
        return reverse_sample(self.denoiser, z_short, table=TABLE, alpha=0.6, noise=noise, backend=self.backend)


def student(kind: Any, backend: str) -> tuple[Student, Any]:
    torch.manual_seed(0)
    batch = {0: torch.export.Dim("batch")}
    return Student(kind(), backend).eval(), {"x": batch, "noise": batch}


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 5), torch.randn(batch, FEATURES)


def operators(program: Any) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if "gdpd_kernels" in str(node.target)]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_exported_program_is_the_operator_and_serves_every_batch(backend: str, strict: bool) -> None:
    model, shapes = student(PaperDenoiser if strict else TimeMLP, backend)
    with torch.no_grad():
        program = torch.export.export(model, inputs(4), dynamic_shapes=shapes, strict=strict)
    assert operators(program) == ["gdpd_kernels.reverse_sample.default"]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file)
    for batch in (4, 9):
        given = inputs(batch)
        for found in (program.module(), again.module()):
            torch.testing.assert_close(found(*given), model(*given), rtol=1e-5, atol=1e-6)

"""Denoisers given by their forward, and what it means that one is captured: for the tests of capture."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdpd_kernels import capture
from gdpd_kernels.backends import reference
from gdpd_kernels.capture import CapturedDenoiser

WIDTH, COND, BATCH = 12, 5, 7


def run_captured(captured: CapturedDenoiser, z: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
    """One denoising step through the program, each row at its own time step."""
    tables, rows, params = captured.tables(t), captured.rows(cond), captured.parameters_now()
    return reference.denoise(captured.program, z, rows, tables, params, z.dtype)


def inputs(cond: bool = False) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 3, 9, 3, 1, 2, 9])
    return (z, t, torch.randn(BATCH, COND, generator=generator, dtype=torch.float64)) if cond else (z, t)


def assert_captured(module: nn.Module, *, cond: bool = False, kinds: str | None = None) -> CapturedDenoiser:
    """The program of a module gives its values and gradients, in float64."""
    module = module.double()
    captured = capture(module, WIDTH, COND if cond else None)
    given = [x.requires_grad_() if x.is_floating_point() else x for x in inputs(cond)]
    twin = copy.deepcopy(module)
    theirs = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in given]
    ours, expected = run_captured(captured, *given), twin(*theirs)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    weight = torch.linspace(-1, 2, ours.numel(), dtype=ours.dtype).view_as(ours)
    (ours * weight).sum().backward()
    (expected * weight).sum().backward()
    for x, y in zip(given, theirs, strict=True):
        if x.is_floating_point():
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-11)
    for (name, p), q in zip(module.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    if kinds is not None:
        assert [op.kind for op in captured.program.ops] == kinds.split()
    return captured


class Net(nn.Module):
    """A denoiser given by its forward: `forward(self, z, t[, cond])` over named layers."""

    def __init__(self, forward: Callable[..., Tensor], **layers: object) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            if isinstance(layer, nn.Parameter):
                self.register_parameter(name, layer)
            else:
                setattr(self, name, layer)

    def forward(self, *arguments: Tensor) -> Tensor:
        return self.run(self, *arguments)


def linear(a: int = WIDTH, b: int = WIDTH, bias: bool = True) -> nn.Linear:
    return nn.Linear(a, b, bias=bias)


def adaln(s: Net, z: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    """GenDD's head: time and condition together modulate the blocks."""
    y = F.silu(s.time(t) + s.cond(cond))
    h = s.stem(z)
    shift, scale, gate = s.modulation(y).chunk(3, dim=-1)
    h = h + gate * s.mlp(torch.addcmul(shift, s.norm(h), 1 + scale))
    shift, scale = s.last(y).chunk(2, dim=1)
    return s.out(s.norm(h) * (scale + 1) + shift)


CONDITION = {
    "concatenated": Net(lambda s, z, t, c: s.a(torch.cat([z, c], 1)), a=linear(WIDTH + COND)),
    "added": Net(lambda s, z, t, c: s.a(z) + s.c(c).tanh(), a=linear(), c=linear(COND)),
    "with time": Net(adaln, **{
        "time": nn.Embedding(10, 16), "cond": linear(COND, 16), "stem": linear(WIDTH, 16),
        "modulation": linear(16, 48), "mlp": nn.Sequential(linear(16, 32), nn.SiLU(), linear(32, 16)),
        "last": linear(16, 32), "norm": nn.LayerNorm(16, elementwise_affine=False), "out": linear(16),
    }),
    "normalised over the batch": Net(
        lambda s, z, t, c: s.a(z) * s.n(s.c(c)), a=linear(), c=linear(COND), n=nn.BatchNorm1d(WIDTH)
    ),
}  # fmt: skip


def simple() -> Net:
    body = nn.Sequential(linear(), nn.BatchNorm1d(WIDTH), nn.ReLU(), linear())
    return Net(lambda s, z, t: s.body(z + s.e(t)) * s.factor, body=body, e=nn.Embedding(10, WIDTH), factor=2.0)

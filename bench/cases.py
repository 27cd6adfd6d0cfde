"""What the benchmarks measure: denoisers, inputs and the eager loop that the operator is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gdpd.denoisers import BottleneckDenoiser, MLPDenoiser
from gdpd_kernels import DDIMTable


def denoiser(name: str, width: int) -> nn.Module:
    """A denoiser on `width` features: "paper" (two bottlenecks, BatchNorm) or "mlp" (two SiLU layers of 256)."""
    torch.manual_seed(0)
    return BottleneckDenoiser(width) if name == "paper" else MLPDenoiser(width, hidden=(256, 256))


def start(batch: int, width: int) -> tuple[Tensor, Tensor]:
    """z_short that asks for a gradient, and the start's noise, both [batch, width]."""
    generator = torch.Generator().manual_seed(1)
    z_short = torch.randn(batch, width, generator=generator)
    return z_short.requires_grad_(), torch.randn(batch, width, generator=generator)


def eager_sample(module: nn.Module, z_short: Tensor, noise: Tensor, alpha: float, table: DDIMTable) -> Tensor:
    """The sampler as a trainer writes it by hand: one autograd node per operation, coefficients known beforehand."""
    z = alpha * z_short + (1 - alpha) * noise
    for t, (a, b, _) in zip(table.timesteps, table.coefficients, strict=True):
        z = a * z + b * module(z, torch.full((z.shape[0],), t))
    return z

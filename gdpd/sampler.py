"""The reverse process step by step, to look at; training runs it as one operation of `gdpd_kernels`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gdpd.pipeline import DDIMPipeline
from gdpd_kernels import DDIMTable

__all__ = ["DDIMPipeline", "noise_fused_init", "trajectory"]


def noise_fused_init(z_short: Tensor, alpha: Tensor | float, eps: Tensor) -> Tensor:
    """GDPD's start of the reverse process: alpha z_short + (1 - alpha) eps, a linear mix with no square roots.

    `z_short` and `eps` are [batch, features]; `alpha` a number or broadcastable to them.
    """
    return alpha * z_short + (1 - alpha) * eps


def trajectory(denoiser: nn.Module, z: Tensor, table: DDIMTable) -> Tensor:
    """Every state of the deterministic reverse process from the start `z` [batch, features].

    DDIM (Song et al., 2021, eq. 12) without clipping, as the linear update z' = a_k z + b_k pred.

    Args:
        denoiser: module (z [batch, features], t int64 [batch]) -> [batch, features]; runs in the mode it is in.
        z: the start, from `noise_fused_init`.
        table: the sampler's steps, from `gdpd_kernels.ddim_table`, with eta 0.

    Returns:
        [K + 1, batch, features]: the start, and the state after each of the K steps.

    Raises:
        ValueError: a table with eta above 0, whose steps draw noise.
    """
    if table.eta:
        raise ValueError(f"table has eta={table.eta}: its steps draw noise. Use gdpd_kernels.reverse_sample.")
    states = [z]
    for t, (a, b, _) in zip(table.timesteps, table.coefficients, strict=True):
        steps = torch.full((len(z),), t, dtype=torch.int64, device=z.device)
        z = a * z + b * denoiser(z, steps)
        states.append(z)
    return torch.stack(states)

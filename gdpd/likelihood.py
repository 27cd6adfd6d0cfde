"""Diffusion posterior sampling (DPS, Chung et al., 2023, arXiv 2209.14687): noise, guided at every step by evidence.

Here for an ablation of GDPD's noise fusion, which it stands against: written out in Python, with a gradient through the
denoiser at every step and, in training, gradients of that gradient. It is several times slower than the operator.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gdpd_kernels import DDIMTable


def guided_reverse(denoiser: nn.Module, evidence: Tensor, noise: Tensor, table: DDIMTable, scale: float) -> Tensor:
    """The DDIM walk from pure noise in which every step is drawn to the evidence.

    With x0_hat(z_t) the clean state that the denoiser's prediction stands for and r = evidence - x0_hat(z_t), a row
    each (algorithm 1, with the step size of its section 4: constant over the residual's norm):

        z' = a z_t + b prediction - scale / ||r|| · d ||r||² / d z_t = a z_t + b prediction - 2 scale d ||r|| / d z_t

    Differentiable in the evidence and in the denoiser's parameters.

    Args:
        denoiser: module (z [batch, features], t int64 [batch]) -> [batch, features]; runs in the mode it is in.
        evidence: where the clean state is to lie, [batch, features].
        noise: the start, likewise.
        table: the steps, with eta 0.
        scale: step size of the guidance, 0 or more.

    Raises:
        ValueError: a table with eta above 0; a scale below 0.
    """
    if table.eta:
        raise ValueError(f"eta={table.eta}: guided steps draw no noise. Use eta=0.")
    if not scale >= 0:
        raise ValueError(f"guidance_scale={scale} is not a number of at least 0.")
    learns = torch.is_grad_enabled()
    z = noise
    for t, (a, b, _), alpha_bar in zip(table.timesteps, table.coefficients, table.alpha_bar, strict=True):
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            predicted = denoiser(z, torch.full((len(z),), t, dtype=torch.int64, device=z.device))
            residual = evidence - clean_state(z, predicted, alpha_bar, table.prediction)
            distance = (residual.square().sum(dim=1) + 1e-24).sqrt()
            (slope,) = torch.autograd.grad(distance.sum(), z, create_graph=learns)
        z = a * z + b * predicted - 2 * scale * slope
    return z if learns else z.detach()


def clean_state(z: Tensor, predicted: Tensor, alpha_bar: float, prediction: str) -> Tensor:
    """x0_hat at the level alpha_bar, of a prediction of "eps", "x0" or "v"."""
    signal, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    if prediction == "eps":
        return (z - sigma * predicted) / signal
    return predicted if prediction == "x0" else signal * z - sigma * predicted

"""Consistency distillation (Song et al., 2023, arXiv 2303.01469): one step of a second denoiser for many of one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdpd_kernels import DDIMTable


class ConsistencyLoss(nn.Module):
    """Two neighbouring points of a DDIM path are to be denoised to one clean state (definition 1, algorithm 2).

    f(z, t) is the clean state that the second denoiser's prediction stands for, so f(z, t) = z where alpha_bar is 1,
    which the paper's c_skip and c_out are made for. Of a random step k of a fine grid,

        z_k = sqrt(ab_k) x + sqrt(1 - ab_k) eps,    z' = a_k z_k + b_k prior(z_k, t_k)
        loss = mean (f(z_k, t_k) - stop(f(z', t_(k+1))))^2,    f = z' after the last step

    The target is the network itself, without an average over its past (Song & Dhariwal, 2024, arXiv 2310.14189).

    Args:
        table: the fine grid, with eta 0.

    Raises:
        ValueError: a table with eta above 0.
    """

    steps: Tensor
    a: Tensor
    b: Tensor
    alpha_bar: Tensor

    def __init__(self, table: DDIMTable) -> None:
        super().__init__()
        if table.eta:
            raise ValueError(f"table has eta={table.eta}: a path with noise has no two points that belong together.")
        self.prediction = table.prediction
        a, b, _ = zip(*table.coefficients, strict=True)
        for name, values in (("a", a), ("b", b), ("alpha_bar", (*table.alpha_bar, 1.0))):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float64), persistent=False)
        # where the path ends there is no step; what the network says there is not used
        self.register_buffer("steps", torch.tensor((*table.timesteps, table.timesteps[-1])), persistent=False)

    def forward(self, prior: nn.Module, learner: nn.Module, x: Tensor) -> Tensor:
        """The loss, 0-d, of clean states `x` [batch, features]; no gradient reaches the prior.

        Args:
            prior: denoiser (z, t) whose paths are taken; runs in the mode it is in.
            learner: the denoiser that learns f, likewise.
            x: clean states.
        """
        k = torch.randint(len(self.a), (len(x),), device=x.device)
        eps = torch.randn_like(x)
        here = self.alpha_bar[k][:, None]
        z = here.sqrt().to(x.dtype) * x + (1 - here).sqrt().to(x.dtype) * eps
        found = self._clean(learner, z, k)
        with torch.no_grad():
            moved = self.a[k][:, None].to(x.dtype) * z + self.b[k][:, None].to(x.dtype) * prior(z, self.steps[k])
            target = torch.where((k + 1 == len(self.a))[:, None], moved, self._clean(learner, moved, k + 1))
        return F.mse_loss(found, target)

    def _clean(self, denoiser: nn.Module, z: Tensor, k: Tensor) -> Tensor:
        alpha_bar = self.alpha_bar[k][:, None]
        signal, sigma = alpha_bar.sqrt().to(z.dtype), (1 - alpha_bar).sqrt().to(z.dtype)
        predicted: Tensor = denoiser(z, self.steps[k])
        if self.prediction == "eps":
            return (z - sigma * predicted) / signal
        return predicted if self.prediction == "x0" else signal * z - sigma * predicted


def consistency_table(table: DDIMTable) -> DDIMTable:
    """The same steps as multistep consistency sampling (algorithm 1): the clean state, noised anew to the next level.

    z' = sqrt(ab') f(z, t) + sqrt(1 - ab') noise, linear in z, the prediction and the noise; one step draws none.
    Walked as DDIM, f would be taken for the mean of what z may come from, which it is not.
    """
    coefficients = []
    for alpha_bar, landing in zip(table.alpha_bar, table.alpha_bar_prev, strict=True):
        signal, sigma, scale = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar), math.sqrt(landing)
        if table.prediction == "eps":
            a, b = 1 / signal, -sigma / signal
        else:
            a, b = (0.0, 1.0) if table.prediction == "x0" else (signal, -sigma)
        coefficients.append((scale * a, scale * b, math.sqrt(max(1 - landing, 0.0))))
    eta = 1.0 if len(table) > 1 else 0.0
    return DDIMTable(table.timesteps, tuple(coefficients), table.prediction, eta, table.alpha_bar, table.alpha_bar_prev)

"""Ancestral sampling with the variance that the denoiser predicts, and the loss it learns that from.

Nichol & Dhariwal, 2021 (arXiv 2102.09672), section 3.1. The means are those of DDIM with eta = 1, so a
`gdpd_kernels.ddim_table` holds all that a step needs but the variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gdpd_kernels import DDIMTable


class LearnedRange(nn.Module):
    """The variance between its two bounds, beta_t and the posterior's, and the variational term that teaches it.

    A denoiser that puts out v beside the noise stands for N(z_{t-1}; mu(z_t, eps_hat), Sigma) with
    log Sigma = f log beta_t + (1 - f) log beta~_t, f = (v + 1) / 2, beta~_t = beta_t (1 - ab_{t-1}) / (1 - ab_t)
    (eq. 15). beta~_0 is zero and has no logarithm: beta~_1 stands for it.

    Args:
        alphas_cumprod: alpha_bar of every training step, [T].

    Raises:
        ValueError: fewer than two training steps.
    """

    mean_shift: Tensor
    log_beta: Tensor
    log_posterior: Tensor

    def __init__(self, alphas_cumprod: Tensor) -> None:
        super().__init__()
        if len(alphas_cumprod) < 2:
            raise ValueError(f"num_train_timesteps={len(alphas_cumprod)}: a learned variance needs two steps or more")
        ab = alphas_cumprod.double()
        before = torch.cat([ab.new_ones(1), ab[:-1]])
        beta = 1 - ab / before
        posterior = beta * (1 - before) / (1 - ab)
        posterior[0] = posterior[1]
        # mu(z_t, eps) = (z_t - beta_t eps / sqrt(1 - ab_t)) / sqrt(1 - beta_t), so two means differ by that of eps
        self.register_buffer("mean_shift", beta / ((1 - ab) * (1 - beta)).sqrt(), persistent=False)
        self.register_buffer("log_beta", beta.log(), persistent=False)
        self.register_buffer("log_posterior", posterior.log(), persistent=False)

    def variational_term(self, eps: Tensor, predicted: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """What one step adds to the variational bound, in bits per number, the mean over everything.

        KL(q(z_{t-1} | z_t, x0) ‖ p(z_{t-1} | z_t)) for t > 0 (eq. 6); at t = 0 the negative log density of x0. Images
        have 256 levels and take a probability there; features have none. No gradient reaches `predicted`: the mean
        learns from the noise alone, the variance from this.

        Args:
            eps: the noise in z_t, [rows, features].
            predicted: the predicted noise, likewise.
            v: the predicted interpolation of the log variance, likewise.
            t: int64 [rows].

        Returns:
            0-d.
        """
        tables = self.log_posterior, self.log_beta, self.mean_shift
        v = v.to(torch.promote_types(v.dtype, torch.float32))  # logarithms of -20 to 0 need more than bfloat16
        low, high, shift = (table[t][:, None].to(v.dtype) for table in tables)
        log_variance = low + 0.5 * (v + 1) * (high - low)
        apart = (shift * (predicted.detach() - eps)).square() * torch.exp(-log_variance)
        kl = log_variance - low + torch.exp(low - log_variance) + apart - 1
        density = math.log(2 * math.pi) + log_variance + apart
        return torch.where((t == 0)[:, None], density, kl).mean() * (0.5 / math.log(2))


def ancestral_sample(
    model: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    table: DDIMTable,
    noise: Callable[[int], Tensor],
) -> Tensor:
    """The ancestral reverse process on the grid of `table`, with the variance that the model predicts.

    z' = a z + b eps_hat + sqrt(Sigma) noise, where a and b are those of DDIM with eta = 1 (the mean of the ancestral
    step, Ho et al., 2020, eq. 11), and log Sigma lies between the bounds of the grid's own steps: beta = 1 - ab / ab'
    and beta (1 - ab') / (1 - ab). The last step adds no noise.

    Args:
        model: (z [rows, features], t int64 0-d) -> [rows, 2 · features]: the noise, then v.
        z: the start, [rows, features].
        table: from `gdpd_kernels.ddim_table` with eta=1 and prediction "eps".
        noise: the standard normal noise [rows, features] of step k.

    Returns:
        [rows, features].

    Raises:
        ValueError: a table of another eta or prediction.
    """
    if table.eta != 1 or table.prediction != "eps":
        found = f"eta={table.eta}, prediction={table.prediction!r}"
        raise ValueError(f"table has {found}; ancestral steps need eta=1 and prediction='eps'")
    steps = zip(table.timesteps, table.coefficients, table.alpha_bar, table.alpha_bar_prev, strict=True)
    for k, (t, (a, b, s), ab, ab_prev) in enumerate(steps):
        predicted, v = model(z, torch.tensor(t, device=z.device)).chunk(2, dim=1)
        z = a * z + b * predicted
        if k < len(table) - 1:
            low, high = 2 * math.log(s), math.log(1 - ab / ab_prev)
            z = z + torch.exp(0.5 * (low + 0.5 * (v + 1) * (high - low))) * noise(k)
    return z

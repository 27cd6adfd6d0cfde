"""asv benchmarks of the prior's loss with the gradients of every parameter."""

from __future__ import annotations

import torch

import gdpd_kernels as gk
from gdpd_kernels.benchmark import cases, rivals
from gdpd_kernels.benchmark.cases import Case


def eager_loss(module: torch.nn.Module, z_long: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """mean((module(z_t, t) - noise)^2) by hand (Ho et al., 2020, eq. 14)."""
    t = torch.randint(alpha_bar.shape[0], (z_long.shape[0],))
    noise, level = torch.randn_like(z_long), alpha_bar[t, None]
    return torch.nn.functional.mse_loss(module(level.sqrt() * z_long + (1 - level).sqrt() * noise, t), noise)


class PriorLoss:
    """Seconds per forward and backward pass."""

    param_names = ("network", "how", "batch", "width")
    params = (tuple(cases.NETWORKS), ("native", "reference", "eager"), (32, 64, 256, 1024, 4096), cases.WIDTHS)
    timeout = 600

    def setup(self, network: str, how: str, batch: int, width: int) -> None:
        reason = cases.unavailable(how)
        if reason:
            raise cases.Unavailable(reason)
        case = Case(network, batch, width, 1, "trainable")
        self.module, self.how = cases.denoiser(case), how
        self.params_now = list(self.module.parameters())
        self.z_long = cases.inputs(case).noise
        self.alpha_bar = gk.alphas_cumprod("linear", rivals.TRAIN_TIMESTEPS)
        self.alpha_bar32 = self.alpha_bar.float()

    def time_prior_loss(self, *_: object) -> None:
        if self.how == "eager":
            loss = eager_loss(self.module, self.z_long, self.alpha_bar32)
        else:
            loss = gk.prior_loss(self.module, self.z_long, alphas_cumprod=self.alpha_bar, backend=self.how)
        torch.autograd.grad(loss, self.params_now)

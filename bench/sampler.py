"""The reverse sampler: forward alone, and forward with backward into every gradient."""

from __future__ import annotations

import torch

import gdpd_kernels as gk
from bench import cases


class ReverseSample:
    """Seconds per call of the sampler, for every backend that is usable here and for the eager loop."""

    param_names = ("batch", "width", "steps", "denoiser", "how")
    params = ((1, 64, 1024), (32, 100, 256), (5,), ("paper", "mlp"), ("eager", "reference", "auto"))
    timeout = 120

    def setup(self, batch: int, width: int, steps: int, denoiser: str, how: str) -> None:
        if batch == 1 and denoiser == "paper":
            raise NotImplementedError  # BatchNorm in training mode has no statistics of one row
        self.module = cases.denoiser(denoiser, width).train()
        self.z_short, self.noise = cases.start(batch, width)
        self.table = gk.ddim_table(num_inference_steps=steps, window="lower")
        self.how = how

    def _sample(self) -> torch.Tensor:
        if self.how == "eager":
            return cases.eager_sample(self.module, self.z_short, self.noise, 0.5, self.table)
        return gk.reverse_sample(
            self.module, self.z_short, table=self.table, alpha=0.5, noise=self.noise, backend=self.how
        )

    def time_forward(self, *_: object) -> None:
        with torch.no_grad():
            self._sample()

    def time_forward_backward(self, *_: object) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None
        self.z_short.grad = None
        self._sample().sum().backward()

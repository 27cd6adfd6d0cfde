"""Classifier-free guidance around a conditional denoiser (Ho & Salimans, 2022, arXiv 2207.12598)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gdpd.denoisers import AdaLNDenoiser


class GuidedDenoiser(nn.Module):
    """eps = eps_u + w (eps_c - eps_u), with eps_c the head's prediction under the condition, eps_u under none.

    Both are computed in one call, so the guided step is one program to the sampler: two runs of the sampler could not
    do it, since the two predictions meet at every step. "No condition" is a vector that is learned: in training it
    stands in the place of some rows' conditions. With w = 1 the head runs once.

    Args:
        head: the conditional denoiser.
        guidance: w, 0 or more; 1 is the plain conditional prediction.

    Raises:
        ValueError: guidance below 0.
    """

    def __init__(self, head: AdaLNDenoiser, guidance: float = 2.0) -> None:
        super().__init__()
        if not guidance >= 0:
            raise ValueError(f"guidance={guidance} is not a number of at least 0. 1 samples without guidance.")
        self.head = head
        self.guidance = guidance
        self.features = head.features
        self.no_condition = nn.Parameter(torch.zeros(head.cond_features))

    def forward(self, z: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Guided noise [rows, features]; arguments as `AdaLNDenoiser.forward`."""
        return self.noise_and_variance(z, t, cond)[:, : self.features]

    def noise_and_variance(self, z: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """[rows, 2 · features]: the guided noise, and the variance's interpolation under the condition."""
        given = self.head.noise_and_variance(z, t, cond)
        if self.guidance == 1:
            return given
        c, token = cond.split([self.head.cond_features, self.head.tokens], dim=1)
        free = self.head(z, t, torch.cat([self.no_condition.expand_as(c), token], dim=1))
        noise, variance = given.chunk(2, dim=1)
        return torch.cat([free + self.guidance * (noise - free), variance], dim=1)

"""Noise fusion: how much of the student's feature, and how much noise, the reverse process starts from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gdpd.denoisers import Bottleneck
from gdpd.options import nearest

KINDS = ("per_sample", "per_dimension")


class NoiseFusion(nn.Module):
    """The mixing weight alpha of the start z = alpha z_short + (1 - alpha) eps (GDPD, arXiv 2605.11414).

    Learned kinds put z_short through a residual bottleneck and a linear layer with a logit for the signal and one for
    the noise; alpha is their softmax's first component. "per_sample" has one pair of logits a row (the authors'
    release), "per_dimension" one pair for every feature of every row (the paper's text). A number is a constant that
    is not learned.

    Args:
        features: latent width A.
        kind: "per_sample", "per_dimension" or a number in [0, 1].
        reduction: reduction of the bottleneck; lowered to A where A is smaller.

    Raises:
        ValueError: an unknown kind, or a number outside [0, 1].
    """

    def __init__(self, features: int, kind: str | float = "per_sample", reduction: int = 8) -> None:
        super().__init__()
        self.kind = kind
        self.features = features
        if isinstance(kind, str):
            if kind not in KINDS:
                known = "per_sample, per_dimension, or a number in [0, 1]"
                raise ValueError(f"alpha={kind!r} is not known{nearest(kind, KINDS)}. One of: {known}.")
            self.bottleneck = Bottleneck(features, min(reduction, features))
            self.logits = nn.Linear(features, 2 if kind == "per_sample" else 2 * features)
        elif not 0.0 <= kind <= 1.0:
            raise ValueError(f"alpha={kind} is outside [0, 1]. It is the share of z_short in the start.")

    def forward(self, z_short: Tensor) -> Tensor:
        """Mixing weights of `z_short` [batch, features]: [batch, 1], [batch, features], or [1, 1] for a constant."""
        if not isinstance(self.kind, str):
            return z_short.new_full((1, 1), self.kind)
        logits = self.logits(self.bottleneck(z_short)).view(len(z_short), 2, -1)
        return torch.softmax(logits, dim=1)[:, 0]

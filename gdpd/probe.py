"""A linear probe: what a feature says of the classes, learned beside whatever the feature itself learns from."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LinearProbe(nn.Linear):
    """A linear classifier of features standardised by running statistics, which an ordinary Linear can take over.

    A feature that is learned without labels has whatever scale it comes to have; on raw features of a small scale,
    Adam's steps of a fixed size take very long.

    Args:
        features: width of the feature.
        classes: number of classes.
    """

    mean: Tensor
    variance: Tensor
    weight_of_first: Tensor
    momentum = 0.1

    def __init__(self, features: int, classes: int) -> None:
        super().__init__(features, classes)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("variance", torch.ones(features))
        self.register_buffer("weight_of_first", torch.ones(()))

    def forward(self, feature: Tensor) -> Tensor:
        """Logits [batch, classes] of features [batch, features]; in training mode moves the statistics first."""
        if self.training:
            self._move(feature)
        return super().forward((feature - self.mean) / self._deviation())

    @torch.no_grad()
    def _move(self, feature: Tensor) -> None:
        """Exponential means; the first batch counts in full."""
        share = self.weight_of_first.clamp_min(self.momentum)
        self.mean.lerp_(feature.mean(dim=0).to(self.mean.dtype), share)
        self.variance.lerp_(feature.var(dim=0, unbiased=False).to(self.mean.dtype), share)
        self.weight_of_first.zero_()

    def _deviation(self) -> Tensor:
        # A number that hardly moves is not blown up to what moves.
        return (self.variance + 1e-4 * self.variance.mean() + 1e-12).sqrt()

    @torch.no_grad()
    def fold_into(self, head: nn.Linear) -> None:
        """Make `head` the same function of the raw feature."""
        weight = self.weight / self._deviation()
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.copy_(self.bias - weight @ self.mean)

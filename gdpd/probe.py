"""A linear probe: what a feature says of the classes, learned beside whatever the feature itself learns from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MEMORY = 64  # rows


class LinearProbe(nn.Linear):
    """A linear classifier of standardised features, which an ordinary Linear can take over.

    A feature that is learned without labels has whatever scale it comes to have; on raw features of a small scale,
    Adam's steps of a fixed size take very long. As in BatchNorm, training standardises by the batch, since a feature
    that drifts by many of its deviations in a few steps would leave any running mean behind; what is taken over uses
    running statistics.

    Args:
        features: width of the feature.
        classes: number of classes.
    """

    mean: Tensor
    variance: Tensor
    weight_of_first: Tensor

    def __init__(self, features: int, classes: int) -> None:
        super().__init__(features, classes)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("variance", torch.ones(features))
        self.register_buffer("weight_of_first", torch.ones(()))

    def forward(self, feature: Tensor) -> Tensor:
        """Logits [batch, classes] of features [batch, features]; in training mode moves the running statistics."""
        feature = feature.to(torch.promote_types(feature.dtype, torch.float32))
        mean, variance = self.mean, self.variance
        if self.training:
            mean, variance = feature.mean(dim=0), feature.var(dim=0, unbiased=False)
            self._move(mean, variance, len(feature))
        return super().forward((feature - mean) / _deviation(variance))

    @torch.no_grad()
    def _move(self, mean: Tensor, variance: Tensor, rows: int) -> None:
        """Exponential means; a batch of MEMORY rows counts as much as all before it, the first one in full."""
        share = self.weight_of_first.clamp_min(rows / (rows + MEMORY))
        self.mean.lerp_(mean.to(self.mean.dtype), share)
        self.variance.lerp_(variance.to(self.variance.dtype), share)
        self.weight_of_first.zero_()

    @torch.no_grad()
    def fold_into(self, head: nn.Linear) -> None:
        """Make `head` the same function of the raw feature, by the running statistics."""
        weight = self.weight / _deviation(self.variance)
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.copy_(self.bias - weight @ self.mean)


def _deviation(variance: Tensor) -> Tensor:
    # A number that hardly moves is not blown up to what moves.
    return (variance + 1e-4 * variance.mean() + 1e-12).sqrt()

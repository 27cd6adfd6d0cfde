"""Inception network for time series (Fawaz et al. 2020): 6 blocks × 32 channels, a residual link every third."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdpd.models.base import Classifier, valid_mask
from gdpd.models.conv import ConvBlock, MaskedBatchNorm, SameConv1d, global_average, zero_padding


class InceptionBlock(nn.Module):
    """1×1 bottleneck, parallel convolutions of several kernels, max-pool branch; concatenated, BatchNorm, ReLU.

    ``[batch, in, time]`` → ``[batch, channels × (kernels + 1), time]``. The bottleneck is left out for a single
    input channel, as in the paper.
    """

    def __init__(self, in_channels: int, channels: int, kernel_sizes: Sequence[int]) -> None:
        super().__init__()
        inner = in_channels if in_channels == 1 else channels
        self.bottleneck = nn.Identity() if in_channels == 1 else SameConv1d(in_channels, channels, 1, bias=False)
        self.branches = nn.ModuleList(SameConv1d(inner, channels, k, bias=False) for k in kernel_sizes)
        self.pool = nn.MaxPool1d(3, stride=1, padding=1)
        self.pool_branch = SameConv1d(in_channels, channels, 1, bias=False)
        self.norm = MaskedBatchNorm(channels * (len(kernel_sizes) + 1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``x`` must be zero where ``mask`` is False, and so is the result."""
        # the pool must not see the zeros past a series' end: −inf there, as beyond the edge of the array
        pooled = self.pool(x if mask is None else x.masked_fill(~mask, -torch.inf))
        narrow = self.bottleneck(x)
        branches = [branch(narrow) for branch in self.branches]
        h = torch.cat([*branches, self.pool_branch(zero_padding(pooled, mask))], dim=1)
        return F.relu(self.norm(h, mask))


class Inception(Classifier):
    """One network of InceptionTime (Fawaz et al. 2020, section 3.1); the paper's ensemble is five of them.

    Args:
        in_channels: channels of the input.
        num_classes: number of classes.
        channels: channels per branch; the feature's width is ``channels × (len(kernel_sizes) + 1)``.
        blocks: number of Inception blocks.
        kernel_sizes: kernels of the parallel convolutions in steps; the paper's 40, 20 and 10 made odd, so that
            the convolution is centred.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: int = 32,
        blocks: int = 6,
        kernel_sizes: Sequence[int] = (39, 19, 9),
    ) -> None:
        if channels < 1 or blocks < 1 or not kernel_sizes or min(kernel_sizes) < 1:
            raise ValueError(
                f"channels={channels}, blocks={blocks}, kernel_sizes={tuple(kernel_sizes)}: all must be 1 or more"
            )
        width = channels * (len(kernel_sizes) + 1)
        super().__init__(in_channels, num_classes, width)
        self.blocks = nn.ModuleList(
            InceptionBlock(in_channels if i == 0 else width, channels, kernel_sizes) for i in range(blocks)
        )
        # the i-th shortcut bridges blocks 3i .. 3i+2
        self.shortcuts = nn.ModuleList(
            ConvBlock(in_channels if i == 0 else width, width, 1, relu=False) for i in range(blocks // 3)
        )
        self.head = nn.Linear(width, num_classes)

    def features(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Feature ``[batch, feature_dim]`` of ``x`` ``[batch, in_channels, time]``."""
        return self.features_and_sequence(x, lengths)[0]

    def features_and_sequence(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """That feature and the last block's maps, ``[batch, time, feature_dim]``."""
        mask = valid_mask(x, lengths)
        h = start = zero_padding(x, mask)
        for i, block in enumerate(self.blocks):
            h = block(h, mask)
            if i % 3 == 2:
                h = start = F.relu(h + self.shortcuts[i // 3](start, mask))
        return global_average(h, mask), h.transpose(1, 2)

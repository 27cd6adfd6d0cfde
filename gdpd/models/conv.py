"""Convolution blocks for padded batches, shared by FCN, ResNet and Inception.

With a mask, steps past a series' end are zero before every convolution and left out of BatchNorm's statistics and
of the pooling, so a series' outputs do not depend on how far its batch was padded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SameConv1d(nn.Conv1d):
    """Conv1d with stride 1 whose output has the input's length, for even kernels too.

    An even kernel has one more step of padding at the end, as in the Keras code of Wang et al. (2017).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, in_channels, time]`` → ``[batch, out_channels, time]``."""
        k = self.kernel_size[0]
        return super().forward(F.pad(x, ((k - 1) // 2, k // 2)))


class MaskedBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d over ``[batch, channels, time]``, with statistics of valid steps only."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalised ``x`` ``[batch, channels, time]``, zero where ``mask`` (bool ``[batch, 1, time]``) is False."""
        if mask is None:
            return super().forward(x)
        rows = mask.squeeze(1)
        out = x.new_zeros(x.shape).transpose(1, 2)
        out[rows] = super().forward(x.transpose(1, 2)[rows]).to(out.dtype)  # [valid steps, channels]
        return out.transpose(1, 2)


class ConvBlock(nn.Module):
    """SameConv1d, BatchNorm, and ReLU when ``relu``: ``[batch, in, time]`` → ``[batch, out, time]``."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, relu: bool = True) -> None:
        super().__init__()
        self.conv = SameConv1d(in_channels, out_channels, kernel_size)
        self.norm = MaskedBatchNorm(out_channels)
        self.relu = relu

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``x`` must be zero where ``mask`` is False, and so is the result."""
        h = self.norm(self.conv(x), mask)
        return F.relu(h) if self.relu else h


def global_average(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over valid steps: ``[batch, channels, time]`` → ``[batch, channels]``."""
    if mask is None:
        return x.mean(dim=2)
    return x.where(mask, 0).sum(dim=2) / mask.sum(dim=2).to(x.dtype)


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` with zeros past each series' end, whatever stood there."""
    return x if mask is None else torch.where(mask, x, 0.0)

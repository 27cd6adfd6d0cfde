"""ResNet for time series (Wang, Yan and Oates 2017): three residual blocks of three convolutions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from gdpd.models.base import Classifier, valid_mask
from gdpd.models.conv import ConvBlock, MaskedBatchNorm, global_average, zero_padding


class ResidualBlock(nn.Module):
    """Three convolution blocks and a shortcut: ``[batch, in, time]`` → ``[batch, out, time]``.

    The shortcut is a 1×1 convolution with BatchNorm where the width changes, BatchNorm alone elsewhere.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_sizes: Sequence[int]) -> None:
        super().__init__()
        inputs = [in_channels, *[out_channels] * (len(kernel_sizes) - 1)]
        self.blocks = nn.ModuleList(
            ConvBlock(a, out_channels, k, relu=i < len(kernel_sizes) - 1)
            for i, (a, k) in enumerate(zip(inputs, kernel_sizes, strict=True))
        )
        self.shortcut = (
            MaskedBatchNorm(out_channels)
            if in_channels == out_channels
            else ConvBlock(in_channels, out_channels, 1, relu=False)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``x`` must be zero where ``mask`` is False, and so is the result."""
        h = x
        for block in self.blocks:
            h = block(h, mask)
        return F.relu(h + self.shortcut(x, mask))


class ResNet(Classifier):
    """Residual blocks, global average pooling, linear head (Wang et al. 2017, section II.C).

    Args:
        in_channels: channels of the input.
        num_classes: number of classes.
        widths: channels of the residual blocks; the last is the feature's width.
        kernel_sizes: kernels of the convolutions within each block, in steps.

    Raises:
        ValueError: no block or no kernel.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        widths: Sequence[int] = (64, 128, 128),
        kernel_sizes: Sequence[int] = (8, 5, 3),
    ) -> None:
        if not widths or not kernel_sizes or min(*widths, *kernel_sizes) < 1:
            raise ValueError(
                f"widths={tuple(widths)}, kernel_sizes={tuple(kernel_sizes)}: one or more of each, all 1 or more"
            )
        super().__init__(in_channels, num_classes, widths[-1])
        inputs = [in_channels, *widths[:-1]]
        self.blocks = nn.ModuleList(ResidualBlock(a, b, kernel_sizes) for a, b in zip(inputs, widths, strict=True))
        self.head = nn.Linear(widths[-1], num_classes)

    def features(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Feature ``[batch, widths[-1]]`` of ``x`` ``[batch, in_channels, time]``."""
        return self.features_and_sequence(x, lengths)[0]

    def features_and_sequence(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """That feature and the last block's maps, ``[batch, time, widths[-1]]``."""
        mask = valid_mask(x, lengths)
        h = zero_padding(x, mask)
        for block in self.blocks:
            h = block(h, mask)
        return global_average(h, mask), h.transpose(1, 2)

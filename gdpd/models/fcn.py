"""FCN for time series (Wang, Yan and Oates 2017): three convolution blocks and global average pooling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from gdpd.models.base import Classifier, valid_mask
from gdpd.models.conv import ConvBlock, global_average, zero_padding


class FCN(Classifier):
    """Conv–BatchNorm–ReLU three times, global average pooling, linear head (Wang et al. 2017, section II.B).

    Args:
        in_channels: channels of the input.
        num_classes: number of classes.
        widths: channels of the blocks; the last is the feature's width.
        kernel_sizes: kernel of each block, in steps.

    Raises:
        ValueError: no block, or as many kernels as blocks are not given.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        widths: Sequence[int] = (128, 256, 128),
        kernel_sizes: Sequence[int] = (8, 5, 3),
    ) -> None:
        if not widths or len(widths) != len(kernel_sizes) or min(*widths, *kernel_sizes) < 1:
            raise ValueError(
                f"widths={tuple(widths)}, kernel_sizes={tuple(kernel_sizes)}: one kernel per block, all 1 or more"
            )
        super().__init__(in_channels, num_classes, widths[-1])
        inputs = [in_channels, *widths[:-1]]
        self.blocks = nn.ModuleList(ConvBlock(a, b, k) for a, b, k in zip(inputs, widths, kernel_sizes, strict=True))
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

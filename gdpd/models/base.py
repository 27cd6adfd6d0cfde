"""`Classifier`: what a teacher and a student are, a feature extractor and a linear head."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """Time-series classifier in two parts: ``features`` (the penultimate vector) and ``head`` (one Linear).

    A subclass sets ``self.head`` and writes ``features(x, lengths)``; one whose feature is pooled over time also writes
    ``features_and_sequence(x, lengths)``, for methods that compare hidden sequences.

    Attributes:
        in_channels: channels of the input.
        num_classes: number of classes C.
        feature_dim: width of the feature, the head's input width.
        sequence_dim: width of the hidden sequence that the feature is pooled from.
        head: ``nn.Linear(feature_dim, num_classes)``.
    """

    head: nn.Linear

    def __init__(self, in_channels: int, num_classes: int, feature_dim: int) -> None:
        super().__init__()
        for name, value, least in (
            ("in_channels", in_channels, 1),
            ("num_classes", num_classes, 2),
            ("feature_dim", feature_dim, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be {least} or more")
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.feature_dim = feature_dim
        self.sequence_dim = feature_dim  # pooling over time keeps the width

    def features(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Feature ``[batch, feature_dim]`` of series ``x`` ``[batch, in_channels, time]``; checked input."""
        raise NotImplementedError

    def features_and_sequence(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The feature, and the hidden sequence ``[batch, time, sequence_dim]`` that it is pooled from, of one run.

        The sequence has a step for each of ``x`` and is zero past a series' end. Checked input.

        Raises:
            ValueError: the network has no such sequence.
        """
        raise ValueError(
            f"{type(self).__name__} has no hidden sequence: it writes features() and no features_and_sequence(). Use a "
            "method that compares features or logits, or give the network one."
        )

    def classify(self, feature: Tensor) -> Tensor:
        """Logits ``[batch, num_classes]`` of a feature ``[batch, feature_dim]``."""
        return self.head(feature)

    def forward(self, x: Tensor, lengths: Tensor | None = None, *, sequence: bool = False) -> tuple[Tensor, ...]:
        """Feature and logits of a batch of series, and with ``sequence`` the hidden sequence of the same run.

        Args:
            x: ``[batch, in_channels, time]`` float, zero-padded at the end where series are shorter.
            lengths: int ``[batch]``, valid steps of each series in 1..time; None when all have ``time``. The
                steps past a series' end do not change its outputs.
            sequence: return the hidden sequence as well, see `features_and_sequence`.

        Returns:
            ``(feature [batch, feature_dim], logits [batch, num_classes])``, with ``sequence`` followed by
            ``[batch, time, sequence_dim]``.

        Raises:
            ValueError: wrong shape; lengths outside 1..time (checked when ``lengths`` lies on the CPU); ``sequence``
                of a network that has none.
        """
        self._check_input(x, lengths)
        if sequence:
            feature, hidden = self.features_and_sequence(x, lengths)
            return feature, self.classify(feature), hidden
        feature = self.features(x, lengths)
        return feature, self.classify(feature)

    def _check_input(self, x: Tensor, lengths: Tensor | None) -> None:
        if x.ndim != 3 or x.shape[1] != self.in_channels or x.shape[2] < 1:
            raise ValueError(
                f"x has shape {list(x.shape)}; expected [batch, channels={self.in_channels}, time] with time ≥ 1"
            )
        if lengths is None:
            return
        if lengths.shape != x.shape[:1] or lengths.is_floating_point():
            raise ValueError(
                f"lengths has shape {list(lengths.shape)} and dtype {lengths.dtype}; expected integers "
                f"[{x.shape[0]}], one a series"
            )
        # on a GPU the check would wait for the device, under torch.compile it would break the graph
        if lengths.device.type == "cpu" and not torch.compiler.is_compiling() and lengths.numel():
            low, high = int(lengths.min()), int(lengths.max())
            if low < 1 or high > x.shape[2]:
                raise ValueError(f"lengths run from {low} to {high}; valid are 1..{x.shape[2]} (the steps of x)")


def valid_mask(x: Tensor, lengths: Tensor | None) -> Tensor | None:
    """Boolean ``[batch, 1, time]``, True inside each series of ``x`` ``[batch, channels, time]``; None without padding.

    One look at ``lengths`` per forward decides whether the masked (slower) path is needed at all; not on a GPU, where a
    look would wait for the device.
    """
    if lengths is None or (lengths.device.type == "cpu" and bool((lengths == x.shape[2]).all())):
        return None
    steps = torch.arange(x.shape[2], device=x.device)
    return (steps < lengths.to(x.device).unsqueeze(1)).unsqueeze(1)

"""LSTM classifiers of any size: LSTM3-100 (teacher and student of the GDPD paper) and LSTM2-32 among them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gdpd.models.base import Classifier

POOLINGS = ("last", "mean", "max")


class LSTM(nn.LSTM):
    """Same parameters, arguments and returns as :class:`torch.nn.LSTM` (state dicts load both ways)."""


class LSTMClassifier(Classifier):
    """Stacked LSTM, pooled over time, and a linear head.

    Early in training the first steps of a long series get exactly zero gradient through ``pooling="last"``: with
    torch's initialisation a forget gate is about 1/2, a gradient halves with each step back, and beyond some 230
    steps it underflows float32 (measured with three layers of 100 units). ``forget_bias`` of 1 or 2 (Jozefowicz et
    al. 2015) opens the gates; mean or max pooling gives every step a path of its own.

    Args:
        in_channels: channels of the input.
        num_classes: number of classes.
        hidden: units per layer; the feature's width.
        layers: number of stacked layers.
        dropout: probability of dropping units between layers, in [0, 1); needs two layers.
        forget_bias: value of the forget gates' total bias at the start of training (torch splits it over two
            vectors); None leaves torch's uniform draw.
        pooling: feature from the top layer's outputs: ``"last"`` valid step (the paper), ``"mean"`` or ``"max"``
            over the valid steps.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        hidden: int = 100,
        layers: int = 3,
        dropout: float = 0.0,
        forget_bias: float | None = None,
        pooling: str = "last",
    ) -> None:
        if hidden < 1 or layers < 1:
            raise ValueError(f"hidden={hidden}, layers={layers}: both must be 1 or more")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout} must lie in [0, 1)")
        if dropout and layers < 2:
            raise ValueError(f"dropout={dropout} acts between layers and layers={layers}: use two layers, or dropout 0")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r} is not one of {', '.join(map(repr, POOLINGS))}")
        super().__init__(in_channels, num_classes, hidden)
        self.pooling = pooling
        self.lstm = LSTM(in_channels, hidden, num_layers=layers, batch_first=True, dropout=dropout)
        self.head = nn.Linear(hidden, num_classes)
        if forget_bias is not None:
            set_forget_bias(self.lstm, forget_bias)

    def features(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Feature ``[batch, hidden]`` of ``x`` ``[batch, in_channels, time]``.

        A step's output depends on earlier steps only, so the padding after a series' end needs no packing: it is
        run through and not read.
        """
        outputs, _ = self.lstm(x.transpose(1, 2))  # [batch, time, hidden]
        if lengths is None:
            if self.pooling == "last":
                return outputs[:, -1]
            return outputs.mean(dim=1) if self.pooling == "mean" else outputs.amax(dim=1)
        lengths = lengths.to(x.device)
        if self.pooling == "last":
            return outputs[torch.arange(len(x), device=x.device), lengths - 1]
        valid = (torch.arange(x.shape[2], device=x.device) < lengths.unsqueeze(1)).unsqueeze(2)
        if self.pooling == "mean":
            return outputs.where(valid, 0).sum(dim=1) / lengths.unsqueeze(1).to(outputs.dtype)
        return outputs.where(valid, -torch.inf).amax(dim=1)


def set_forget_bias(lstm: nn.LSTM, value: float) -> None:
    """Set the forget gates' total bias b_if + b_hf of every layer of ``lstm`` to ``value``, in place.

    torch orders the gates i, f, g, o in bias vectors of 4 × hidden.

    Raises:
        ValueError: the LSTM has no biases.
    """
    if not lstm.bias:
        raise ValueError("forget_bias needs an LSTM with bias=True")
    gate = slice(lstm.hidden_size, 2 * lstm.hidden_size)
    with torch.no_grad():
        for name, parameter in lstm.named_parameters():
            if name.startswith("bias_ih"):
                parameter[gate] = value
            elif name.startswith("bias_hh"):
                parameter[gate] = 0.0

"""LSTM classifiers of any size: LSTM3-100 (teacher and student of the GDPD paper) and LSTM2-32 among them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import gdpd_kernels as gk
from gdpd.models.base import Classifier
from gdpd_kernels.lstm import runs_natively

POOLINGS = ("last", "mean", "max")
_State = tuple[Tensor, Tensor]


class LSTM(nn.LSTM):
    """`torch.nn.LSTM` on the native kernels: same parameters, arguments and returns, state dicts load both ways.

    Forward and backward are one call each of `gdpd_kernels.lstm`, on CPU tensors of float32 or float64 (under
    autocast with bfloat16 products). What those kernels do not do runs on torch's own, unchanged: other devices and
    dtypes, ``bidirectional``, ``proj_size``, a `torch.nn.utils.rnn.PackedSequence`, and tracing, export and
    functorch transforms. ``torch.compile`` breaks the graph at every ``nn.LSTM``, and this is one; with
    ``torch._dynamo.config.allow_rnn = True`` it is part of the graph.

    Dropped units (``dropout``, in training) are drawn from another stream than torch's, seeded by torch's generator.
    """

    def forward(  # type: ignore[override]
        self, input: Tensor | PackedSequence, hx: _State | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, _State]:
        """All steps of the top layer, and the last states.

        Args:
            input: [steps, batch, inputs] ([batch, steps, inputs] with ``batch_first``), or [steps, inputs], or packed.
            hx: h_0 and c_0, each [layers, batch, hidden], or [layers, hidden]; None for zeros.
            lengths: int [batch], steps of each row in 1..steps, of an input of three dimensions. Outputs past a row's
                length are zero and its state stays that of its last step, as after packing and padding.

        Returns:
            ``(output, (h_n, c_n))`` in the form of the input.

        Raises:
            ValueError: lengths that do not fit, or given beside a form of LSTM or input that takes none.
            RuntimeError: shapes that do not fit, as from torch.
        """
        if lengths is None and not self.native(input):
            found: tuple[Tensor | PackedSequence, _State] = super().forward(input, hx)
            return found
        return self._run(input, hx, lengths, "all")

    def last(self, input: Tensor, hx: _State | None = None, lengths: Tensor | None = None) -> Tensor:
        """The top layer's output at each row's last step, [batch, hidden]; no other step's is stored.

        Args and errors are those of `forward`, of an input of three dimensions.
        """
        return self._run(input, hx, lengths, "last")[0]

    def native(self, input: Tensor | PackedSequence) -> bool:
        """Whether the native kernels run this LSTM on such an input."""
        return (
            isinstance(input, Tensor)
            and not (self.bidirectional or self.proj_size)
            and input.dim() in (2, 3)
            and input.numel() > 0
            and not torch.jit.is_tracing()
            and not torch.compiler.is_exporting()
            and self.weight_hh_l0.dtype == input.dtype
            and self.weight_hh_l0.device == input.device
            and runs_natively(input)
        )

    def _run(
        self, input: Tensor | PackedSequence, hx: _State | None, lengths: Tensor | None, output: str
    ) -> tuple[Tensor, _State]:
        if not isinstance(input, Tensor) or self.bidirectional or self.proj_size:
            raise ValueError(
                "lengths and last() are for LSTMs of one direction without projection, on tensors; pack the input "
                "(torch.nn.utils.rnn.pack_padded_sequence) instead"
            )
        batched = input.dim() == 3
        if not batched:
            if lengths is not None or output == "last":
                raise ValueError(f"input has shape {list(input.shape)}; lengths and last() take three dimensions")
            input = input.unsqueeze(0 if self.batch_first else 1)
            hx = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        self._update_flat_weights()
        self.check_input(input, None)
        if hx is not None:
            self.check_forward_args(input, hx, None)
        found, (h_n, c_n) = gk.lstm(
            input,
            self._flat_weights,  # type: ignore[arg-type]
            hx,
            lengths=lengths,
            batch_first=self.batch_first,
            dropout=self.dropout if self.training else 0.0,
            output=output,
        )
        if not batched:
            return found.squeeze(0 if self.batch_first else 1), (h_n.squeeze(1), c_n.squeeze(1))
        return found, (h_n, c_n)


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

        The native kernels stop at a row's end. Elsewhere the padding after it is run through and not read: a step's
        output depends on earlier steps only.
        """
        steps = x.transpose(1, 2)
        if self.pooling == "last" and self.lstm.native(steps):
            return self.lstm.last(steps, lengths=lengths)
        return self.features_and_sequence(x, lengths)[0]

    def features_and_sequence(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """That feature and all outputs of the top layer, ``[batch, time, hidden]``."""
        outputs, _ = self.lstm(x.transpose(1, 2))
        if lengths is None:
            if self.pooling == "last":
                return outputs[:, -1], outputs
            return outputs.mean(dim=1) if self.pooling == "mean" else outputs.amax(dim=1), outputs
        lengths = lengths.to(x.device)
        valid = (torch.arange(x.shape[2], device=x.device) < lengths.unsqueeze(1)).unsqueeze(2)
        ended = outputs.where(valid, 0)
        if self.pooling == "last":
            return outputs[torch.arange(len(x), device=x.device), lengths - 1], ended
        if self.pooling == "mean":
            return ended.sum(dim=1) / lengths.unsqueeze(1).to(outputs.dtype), ended
        return outputs.where(valid, -torch.inf).amax(dim=1), ended


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

"""The LSTM on torch's own kernels: oneDNN on the CPU, cuDNN on GPUs; ordinary autograd."""

from __future__ import annotations

from collections.abc import Sequence

from torch import _VF, Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


def lstm(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    params: Sequence[Tensor],
    batch_first: bool,
    last: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """output, h_n and c_n; shapes as in `gdpd_kernels.lstm_ops`. The masks of the dropout are torch's own."""
    batch, steps = (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])
    bias = len(params) > 2 and params[2].dim() == 1
    layers, hidden = len(params) // (4 if bias else 2), params[1].shape[1]
    zeros = x.new_zeros(layers, batch, hidden)
    state = (zeros if h0 is None else h0, zeros if c0 is None else c0)
    options = (list(params), bias, layers, dropout, dropout > 0, False)
    if lengths is None:
        output, h_n, c_n = _VF.lstm(x, state, *options, batch_first)
        return (x.new_empty(0) if last else output), h_n, c_n
    packed = pack_padded_sequence(x, lengths.cpu(), batch_first, enforce_sorted=False)
    order, back = packed.sorted_indices, packed.unsorted_indices
    assert order is not None
    assert back is not None
    state = (state[0].index_select(1, order), state[1].index_select(1, order))
    data, h_n, c_n = _VF.lstm(packed.data, packed.batch_sizes, state, *options)
    h_n, c_n = (part.index_select(1, back) for part in (h_n, c_n))
    if last:
        return x.new_empty(0), h_n, c_n
    whole = PackedSequence(data, packed.batch_sizes, order, back)
    return pad_packed_sequence(whole, batch_first, total_length=steps)[0], h_n, c_n

"""The meaning of the LSTM in plain PyTorch: what fast backends are held to, and what is differentiated twice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gdpd_kernels.backends.reference_backend import _gradients, _instead, _leaves, _recording, without_autocast
from gdpd_kernels.philox import philox_words


def split_layers(params: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """(W_ih, W_hh, b_ih + b_hh or None) of every layer, from torch's flat list of weights."""
    if len(params) > 2 and params[2].dim() == 1:
        layers = zip(params[0::4], params[1::4], params[2::4], params[3::4], strict=True)
        return [(w_ih, w_hh, b_ih + b_hh) for w_ih, w_hh, b_ih, b_hh in layers]
    return [(w_ih, w_hh, None) for w_ih, w_hh in zip(params[0::2], params[1::2], strict=True)]


def dropout_mask(seed: Tensor, x: Tensor, layer: int, dropout: float) -> Tensor:
    """1 / (1 − p) where a unit is kept and 0 where it is dropped, [batch, steps, units] as x: a unit is kept if the
    word of Philox at (unit, row, step, layer) is at least p 2^32."""
    batch, steps, units = x.shape
    if dropout >= 1.0:
        return torch.zeros_like(x)
    words = [philox_words(seed, batch, units, t, layer, x.device).flatten(1)[:, :units] for t in range(steps)]
    return (torch.stack(words, dim=1) >= int(dropout * 2**32)).to(x.dtype) / (1 - dropout)


def lstm(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    params: Sequence[Tensor],
    batch_first: bool,
    last: bool,
    dropout: float,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """output, h_n and c_n; shapes as in `gdpd_kernels.lstm_ops`."""

    def product(x: Tensor, weight: Tensor) -> Tensor:
        if compute_dtype != x.dtype:  # rounded operands, exact products, sums in the state's precision
            x, weight = x.to(compute_dtype).to(x.dtype), weight.to(compute_dtype).to(weight.dtype)
        return F.linear(x, weight)

    if not batch_first:
        x = x.transpose(0, 1)  # [batch, steps, inputs]
    batch, steps, _ = x.shape
    layers = split_layers(params)
    if lengths is not None:
        running = torch.arange(steps, device=x.device) < lengths[:, None]  # [batch, steps]
        x = x.masked_fill(~running[..., None], 0)
    last_h, last_c = [], []
    for n, (w_ih, w_hh, bias) in enumerate(layers):
        zeros = x.new_zeros(batch, w_hh.shape[1])
        h = zeros if h0 is None else h0[n]
        c = zeros if c0 is None else c0[n]
        outputs = []
        for t in range(steps):
            gates = product(x[:, t], w_ih) + product(h, w_hh)
            if bias is not None:
                gates = gates + bias
            i, f, g, o = gates.chunk(4, dim=-1)
            c_next = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h_next = o.sigmoid() * c_next.tanh()
            if lengths is None:
                h, c = h_next, c_next
                outputs.append(h)
            else:
                here = running[:, t, None]
                h, c = h_next.where(here, h), c_next.where(here, c)
                outputs.append(h.where(here, 0))
        last_h.append(h)
        last_c.append(c)
        x = torch.stack(outputs, dim=1)
        if dropout > 0 and n < len(layers) - 1:
            assert seed is not None
            x = x * dropout_mask(seed, x, n, dropout)
    output = x.new_empty(0) if last else x if batch_first else x.transpose(0, 1)
    return output, torch.stack(last_h), torch.stack(last_c)


def forward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    params: Sequence[Tensor],
    batch_first: bool,
    last: bool,
    dropout: float,
    compute_dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The operator's forward: nothing is kept for backward."""
    with torch.no_grad(), without_autocast(x.device.type):
        found = lstm(x, h0, c0, lengths, seed, params, batch_first, last, dropout, compute_dtype)
    output, h_n, c_n = (tensor.contiguous() for tensor in found)
    return output, h_n, c_n, []


def backward(
    grad_output: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    params: Sequence[Tensor],
    saved: Sequence[Tensor],
    batch_first: bool,
    dropout: float,
    compute_dtype: torch.dtype,
    wanted: Sequence[int],
) -> list[Tensor]:
    """The operator's backward computes forward again under autograd."""
    inputs = [x, h0, c0, *params]
    leaves = _leaves([tensor if i in wanted else None for i, tensor in enumerate(inputs)])
    x, h0, c0, *params = _instead(inputs, leaves)
    with _recording(), without_autocast(x.device.type):
        found = lstm(x, h0, c0, lengths, seed, params, batch_first, grad_output is None, dropout, compute_dtype)
        total = inner_product(found, (grad_output, grad_h, grad_c))
        return _gradients(total, leaves, None)


def inner_product(results: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """The number whose gradients are those of `results` weighted by `gradients`."""
    return sum((y * g).sum() for y, g in zip(results, gradients, strict=True) if g is not None)  # type: ignore[return-value]

"""The LSTM on the native CPU kernels: hands addresses of checked tensors to the compiled module."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gdpd_kernels.backends.native_backend import _address, _dense, _load, _seed, _team, instruction_set, reused


def unusable() -> list[str]:
    """Why the native kernels cannot be used in this process at all."""
    native = _load()
    return [native] if isinstance(native, str) else []


def saved_numel(batch: int, steps: int, hidden: int) -> int:
    """Numbers that forward keeps of each layer for backward: the gates and the cell state of every step and row. As in
    csrc/lstm.h; sizes may be symbolic."""
    return steps * batch * ((5 * hidden + 15) // 16 * 16)


def _sequence(tensor: Tensor | None, batch_first: bool) -> tuple[int, int, int]:
    """Address and strides of batch and time."""
    if tensor is None:
        return 0, 0, 0
    row, step = (0, 1) if batch_first else (1, 0)
    return tensor.data_ptr(), tensor.stride(row), tensor.stride(step)


def _weights(
    params: Sequence[Tensor], inputs: int, hidden: int, each: int, dtype: torch.dtype
) -> tuple[list[int], Sequence[Tensor]]:
    """Addresses of the dense weights, and the tensors, to be held for as long as the addresses are used."""
    shapes = _shapes(inputs, hidden, each, len(params))
    addresses: list[int] | None = _load().dense_addresses(params, shapes, dtype)  # type: ignore[union-attr]
    if addresses is None:
        params = [_dense(f"params[{i}]", param, shapes[i], dtype) for i, param in enumerate(params)]
        addresses = [param.data_ptr() for param in params]
    return addresses, params


@lru_cache(maxsize=64)
def _shapes(inputs: int, hidden: int, each: int, count: int) -> tuple[tuple[int, ...], ...]:
    return tuple((4 * hidden,) if i % each > 1 else (4 * hidden, inputs if i == 0 else hidden) for i in range(count))


class _Inputs:
    """The arguments that forward and backward share, checked, in the order of csrc/bindings_lstm.cpp."""

    def __init__(
        self,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        seed: Tensor | None,
        params: Sequence[Tensor],
        batch_first: bool,
        dropout: float,
        compute_dtype: torch.dtype,
    ) -> None:
        self.dtype, self.batch_first = x.dtype, batch_first
        self.batch, self.steps = (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])
        bias = len(params) > 2 and params[2].dim() == 1
        each = 4 if bias else 2
        self.hidden, self.layers, self.inputs = params[1].shape[1], len(params) // each, x.shape[2]
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"x is {x.dtype}; the native LSTM takes float32 and float64")
        # Rows and steps may lie anywhere; only the features of a step must be neighbours.
        x = _dense("x", x, x.shape, self.dtype) if x.stride(2) != 1 and self.inputs > 1 else x
        state = (self.layers, self.batch, self.hidden)
        self.h0 = None if h0 is None else _dense("h0", h0, state, self.dtype)
        self.c0 = None if c0 is None else _dense("c0", c0, state, self.dtype)
        self.lengths = None if lengths is None else _dense("lengths", lengths, (self.batch,), torch.int64)
        addresses, self.params = _weights(params, self.inputs, self.hidden, each, self.dtype)
        if dropout > 0 and seed is None:
            raise ValueError("seed: units are to be dropped, but no seed is given")
        self.x, self.each = x, each
        macs = self.batch * self.steps * 4 * self.hidden * (self.inputs + self.hidden * (2 * self.layers - 1))
        self.arguments = (
            instruction_set(),
            self.dtype == torch.float64,
            [self.batch, self.steps, self.inputs, self.hidden, self.layers],
            _sequence(x, batch_first),
            _address(self.lengths),
            _address(self.h0),
            _address(self.c0),
            self.with_biases(addresses),
            dropout,
            _seed(seed if dropout > 0 else None),
            compute_dtype == torch.bfloat16,
            _team(macs),
        )

    def with_biases(self, addresses: list[int]) -> list[int]:
        """Four addresses per layer, 0 for absent biases."""
        if self.each == 4:
            return addresses
        return [address for i in range(0, len(addresses), 2) for address in (*addresses[i : i + 2], 0, 0)]


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
    """output, h_n, c_n, and what backward needs; shapes as in `gdpd_kernels.lstm_ops`."""
    given = _Inputs(x, h0, c0, lengths, seed, params, batch_first, dropout, compute_dtype)
    output = x.new_empty(0) if last else x.new_empty(*x.shape[:2], given.hidden)
    h_n = x.new_empty(given.layers, given.batch, given.hidden)
    c_n = x.new_empty(given.layers, given.batch, given.hidden)
    numel = saved_numel(given.batch, given.steps, given.hidden)
    saved = [reused(numel, x.dtype) for _ in range(given.layers if save else 0)]
    _load().lstm_forward(  # type: ignore[union-attr]
        *given.arguments,
        [tensor.data_ptr() for tensor in saved],
        _sequence(None if last else output, batch_first),
        h_n.data_ptr(),
        c_n.data_ptr(),
    )
    return output, h_n, c_n, saved


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
    """Gradients of [x, h0, c0, *params] at the positions `wanted`."""
    given = _Inputs(x, h0, c0, lengths, seed, params, batch_first, dropout, compute_dtype)
    state = (given.layers, given.batch, given.hidden)
    if grad_output is not None:
        grad_output = _dense("grad_output", grad_output, (*x.shape[:2], given.hidden), given.dtype)
    grad_h = None if grad_h is None else _dense("grad_h", grad_h, state, given.dtype)
    grad_c = None if grad_c is None else _dense("grad_c", grad_c, state, given.dtype)
    numel = saved_numel(given.batch, given.steps, given.hidden)
    saved = [_dense("saved", tensor, (numel,), given.dtype) for tensor in saved]
    inputs = [x, h0, c0, *params]
    # Dense whatever the layout of the input, since the kernels write row after row.
    gradients = {i: torch.empty_like(inputs[i], memory_format=torch.contiguous_format) for i in wanted}  # type: ignore[arg-type]
    _load().lstm_backward(  # type: ignore[union-attr]
        *given.arguments,
        [tensor.data_ptr() for tensor in saved],
        _sequence(grad_output, batch_first),
        _address(grad_h),
        _address(grad_c),
        _sequence(gradients.get(0), batch_first),
        _address(gradients.get(1)),
        _address(gradients.get(2)),
        given.with_biases([_address(gradients.get(3 + i)) for i in range(len(params))]),
    )
    return [gradients[i] for i in wanted]

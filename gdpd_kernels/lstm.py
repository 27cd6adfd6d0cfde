"""`lstm`: all layers and steps of an LSTM, forward and backward, as one operation each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gdpd_kernels import lstm_ops
from gdpd_kernels.arguments import check_range, check_tensor, philox_key
from gdpd_kernels.backends import BackendError, _warn_once, native_lstm, torch_lstm
from gdpd_kernels.library import transformed
from gdpd_kernels.ranges import ranged

BACKENDS = ("native", "torch", "reference")  # in the order in which "auto" tries them
OUTPUTS = ("all", "last")
State = tuple[Tensor, Tensor]


@ranged("lstm")
def lstm(
    x: Tensor,
    params: Sequence[Tensor],
    hx: State | None = None,
    *,
    lengths: Tensor | None = None,
    batch_first: bool = False,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    output: str = "all",
    backend: str = "auto",
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, State]:
    """Run a stacked LSTM (Hochreiter and Schmidhuber, 1997) as one differentiable operation.

    The equations, the order of the gates (i, f, g, o) and the layout of the weights are those of `torch.nn.LSTM`:

        i, f, g, o = (σ, σ, tanh, σ)(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
        c_t = f c_{t-1} + i g,    h_t = o tanh(c_t)

    Gradients reach `x`, `hx` and `params`; what nobody asks for is not computed. Results have the same bits for any
    number of threads. Subnormal numbers count as zero inside the native kernels, whatever
    `torch.set_flush_denormal` says: gradients that decay over hundreds of steps cost no time there.

    Args:
        x: [steps, batch, inputs], or [batch, steps, inputs] with `batch_first`; floating.
        params: weight_ih [4 hidden, inputs of the layer], weight_hh [4 hidden, hidden] and, unless there are no
            biases, bias_ih and bias_hh [4 hidden], of every layer: what ``torch.nn.LSTM`` keeps, in its order.
        hx: h_0 and c_0, each [layers, batch, hidden]; None for zeros.
        lengths: integers [batch], steps of each row in 1..steps; None when all rows have `steps`. Outputs past a row's
            length are zero, its state stays that of its last step, and what `x` holds there is not read: as after
            ``pack_padded_sequence(..., enforce_sorted=False)`` and ``pad_packed_sequence(...)``.
        batch_first: the layout of `x` and of the output. States are always [layers, batch, hidden].
        dropout: probability in [0, 1] with which outputs of all layers but the top one are dropped. Pass 0 outside
            training.
        seed: 64-bit Philox key of the dropout; taken from torch's generator if None. Torch's own kernels draw
            their masks themselves and take none.
        output: ``"all"`` steps of the top layer, or only the ``"last"`` one of each row, in which case the others are
            not stored.
        backend: ``"auto"``, ``"native"`` (compiled, CPU), ``"torch"`` (torch's own kernels on any device) or
            ``"reference"`` (the equations in plain PyTorch).
        compute_dtype: dtype to which the operands of matrix products are rounded, such as ``torch.bfloat16``; sums,
            gates and states keep the dtype of `x`. None: the autocast dtype where autocast is on, else no rounding.
            (On torch's own kernels autocast means what torch makes of it.)

    Returns:
        ``(output, (h_n, c_n))``: output [steps, batch, hidden] or [batch, steps, hidden], or with ``output="last"``
        [batch, hidden]; h_n and c_n [layers, batch, hidden], the states after each row's last step.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
        BackendError: the backend asked for by name cannot run the call.
    """
    check_tensor("x", x, "[steps, batch, inputs]")
    form = "[batch, steps, inputs]" if batch_first else "[steps, batch, inputs]"
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x has shape {list(x.shape)}, {x.dtype}; expected floating {form}")
    batch, steps = (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])
    if batch < 1 or steps < 1:
        raise ValueError(f"x has shape {list(x.shape)}, {form}; batch and steps must be at least 1")
    params = list(params)
    layers, hidden = _check_params(params, x)
    if output not in OUTPUTS:
        raise ValueError(f"output={output!r} is not one of {', '.join(map(repr, OUTPUTS))}")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout={dropout} must lie in [0, 1]")
    h0, c0 = _state(hx, x, (layers, batch, hidden))
    lengths = _lengths(lengths, batch, steps, x)
    compute = _compute_dtype(x, compute_dtype)
    dropout = dropout if layers > 1 else 0.0
    chosen = _choose(backend, x, compute, compute_dtype is None, seed is not None and dropout > 0)
    last = output == "last"
    if chosen == "torch":
        sequence, h_n, c_n = torch_lstm.lstm(x, h0, c0, lengths, params, batch_first, last, dropout)
    else:
        key = philox_key(seed, x.device) if dropout > 0 else None
        inputs = (x, h0, c0, lengths, key, params)
        precision = str(compute).removeprefix("torch.")
        if transformed():  # plain PyTorch, which functorch sees through
            sequence, h_n, c_n = lstm_ops.reference_lstm.lstm(*inputs, batch_first, last, dropout, compute)
        else:
            tensors = (x, h0, c0, *params)
            save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
            sequence, h_n, c_n, _ = lstm_ops.lstm(*inputs, batch_first, last, dropout, chosen, precision, save)
    return (h_n[-1] if last else sequence), (h_n, c_n)


def reasons(backend: str, x: Tensor, compute: torch.dtype, autocast: bool = False, seeded: bool = False) -> list[str]:
    """Why `backend` cannot run a call; empty if it can.

    Args:
        backend: one of `BACKENDS`.
        x: as in `lstm`.
        compute: dtype of the operands of matrix products.
        autocast: `compute` comes from autocast, which torch's kernels heed themselves.
        seeded: a seed of the dropout is given.
    """
    why: list[str] = []
    if backend == "native":
        why += _native_unusable()
        if x.device.type != "cpu":
            why.append(f"tensors are on {x.device.type}; it runs on cpu")
        if x.dtype not in (torch.float32, torch.float64):
            why.append(f"x is {x.dtype}; it takes torch.float32, torch.float64")
        if compute not in (x.dtype, torch.bfloat16):
            why.append(f"compute_dtype is {compute}; it takes torch.bfloat16")
        if x.layout != torch.strided:
            why.append(f"x is laid out as {x.layout}; it takes dense tensors")
        if transformed():
            why.append("a transform of torch.func (vmap, grad, jvp, ...) or forward mode is active")
    elif backend == "torch":
        if compute != x.dtype and not autocast:
            why.append(f"compute_dtype is {compute}; it computes in the dtype of x, {x.dtype}")
        if seeded:
            why.append("seed is given, but torch draws the dropout's masks itself")
    return why


def runs_natively(x: Tensor) -> bool:
    """Whether ``backend="auto"`` runs a call on the native kernels."""
    return not reasons("native", x, _compute_dtype(x, None))


def _choose(backend: str, x: Tensor, compute: torch.dtype, autocast: bool, seeded: bool) -> str:
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"backend: {backend!r} is not known; known are 'auto', {', '.join(map(repr, BACKENDS))}")
        why = reasons(backend, x, compute, autocast, seeded)
        if why:
            listed = "\n".join(f"  - {reason}" for reason in why)
            raise BackendError(
                f'backend {backend!r} cannot run this LSTM:\n{listed}\nUse backend="auto" to run it elsewhere.'
            )
        return backend
    native = reasons("native", x, compute)
    if not native:
        return "native"
    chosen = "reference" if reasons("torch", x, compute, autocast, seeded) or transformed() else "torch"
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        _warn_once(f"LSTM on backend {chosen!r}; 'native' cannot: {'; '.join(native)}")
    return chosen


def _native_unusable() -> list[str]:
    return native_lstm.unusable()


# Whether the compiled module is there does not change within a process: a constant to torch.compile, said as in
# `gdpd_kernels.functional`.
_native_unusable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _compute_dtype(x: Tensor, compute_dtype: torch.dtype | None) -> torch.dtype:
    device = x.device.type
    if compute_dtype is None:
        low = x.dtype == torch.float32 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if low else x.dtype
    if not compute_dtype.is_floating_point or compute_dtype.itemsize > x.dtype.itemsize:
        raise ValueError(f"compute_dtype is {compute_dtype}; it must be a floating dtype no wider than x's {x.dtype}")
    return compute_dtype


def _check_params(params: list[Tensor], x: Tensor) -> tuple[int, int]:
    """Layers and hidden units, from weights whose shapes fit each other and x."""
    for i, param in enumerate(params):
        check_tensor(f"params[{i}]", param, "of torch.nn.LSTM's weights")
    each = 4 if len(params) > 2 and params[2].dim() == 1 else 2
    if not params or len(params) % each or params[1].dim() != 2 or params[1].shape[1] < 1:
        raise ValueError(
            f"params: {len(params)} tensors of shapes {[list(p.shape) for p in params]}; expected weight_ih, weight_hh"
            " (, bias_ih, bias_hh) of every layer"
        )
    hidden, inputs = params[1].shape[1], x.shape[2]
    for i, param in enumerate(params):
        width = inputs if i == 0 else hidden
        expected = (4 * hidden, width) if i % each < 2 else (4 * hidden,)
        if tuple(param.shape) != expected:
            hint = f" (x has {inputs} inputs)" if i == 0 else ""
            raise ValueError(f"params[{i}] has shape {list(param.shape)}; expected {list(expected)}{hint}")
        if param.dtype != x.dtype or param.device != x.device:
            raise ValueError(
                f"params[{i}] is {param.dtype} on {param.device}, x {x.dtype} on {x.device}; move one with .to(...)"
            )
    return len(params) // each, hidden


def _state(hx: State | None, x: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor | None, Tensor | None]:
    if hx is None:
        return None, None
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        raise TypeError(f"hx: expected None or (h_0, c_0), got {type(hx).__name__}")
    for name, part in zip(("h_0", "c_0"), hx, strict=True):
        check_tensor(name, part, "[layers, batch, hidden]")
        if tuple(part.shape) != shape or part.dtype != x.dtype or part.device != x.device:
            raise ValueError(
                f"{name} has shape {list(part.shape)}, {part.dtype} on {part.device}; "
                f"expected {list(shape)} (layers, batch, hidden), {x.dtype} on {x.device}"
            )
    return hx[0], hx[1]


def _lengths(lengths: Tensor | None, batch: int, steps: int, x: Tensor) -> Tensor | None:
    if lengths is None:
        return None
    check_tensor("lengths", lengths, "[batch]")
    if lengths.shape != (batch,) or lengths.dtype.is_floating_point or lengths.dtype.is_complex:
        raise ValueError(
            f"lengths has shape {list(lengths.shape)}, {lengths.dtype}; expected integers [{batch}], one a row"
        )
    check_range("lengths", lengths, 1, steps, "the steps of x")
    return lengths.to(device=x.device, dtype=torch.int64)

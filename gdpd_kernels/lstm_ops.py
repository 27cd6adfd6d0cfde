"""The LSTM's operators: torch.library schemas, implementations, fake kernels and autograd, side by side.

``gdpd_kernels::lstm`` runs all layers and steps. Shapes, with sequences as [batch, steps, ...] where `batch_first`
and [steps, batch, ...] where not:

====================  =====================================================================================
x                     [batch, steps, inputs], float32 or float64
h0, c0                None (zeros) or [layers, batch, hidden]
lengths               None or int64 [batch], each in 1..steps
seed                  int64 [], the Philox key of the dropout; None without dropout
params                weight_ih, weight_hh (, bias_ih, bias_hh) of every layer, as torch lays them out
last                  the output is not wanted
dropout               probability, between layers
save                  keep what backward needs
-> output             [batch, steps, hidden], zero past a row's length; [0] with `last`
-> h_n, c_n           [layers, batch, hidden], after each row's last step
-> saved              the backend's own, a tensor per layer
====================  =====================================================================================

Autocast rule: as in `gdpd_kernels.ops`. The operators state their precision themselves (`compute_dtype`, to which the
operands of matrix products are rounded); sums, gates and states keep x's dtype.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gdpd_kernels.backends import native_lstm, reference_lstm
from gdpd_kernels.backends.reference_backend import without_autocast
from gdpd_kernels.library import DTYPES, LIBRARY, TAGS, differentiable_gradients, implement, is_plain, plain_apply

BACKENDS: dict[str, ModuleType] = {"native": native_lstm, "reference": reference_lstm}

_INPUTS = "Tensor x, Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? seed, Tensor[] params"
LIBRARY.define(
    f"lstm({_INPUTS}, bool batch_first, bool last, float dropout, str backend, str compute_dtype, bool save) "
    "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor[] saved)",
    tags=TAGS,
)
LIBRARY.define(
    f"lstm_backward(Tensor? grad_output, Tensor? grad_h, Tensor? grad_c, {_INPUTS}, Tensor[] saved, "
    "bool batch_first, float dropout, str backend, str compute_dtype, int[] wanted) -> Tensor[]",
    tags=TAGS,
)


@implement("lstm")
def _lstm(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    params: list[Tensor],
    batch_first: bool,
    last: bool,
    dropout: float,
    backend: str,
    compute_dtype: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    run: Any = BACKENDS[backend].forward
    found: tuple[Tensor, Tensor, Tensor, list[Tensor]] = run(
        x, h0, c0, lengths, seed, params, batch_first, last, dropout, DTYPES[compute_dtype], save
    )
    return found


@torch.library.register_fake("gdpd_kernels::lstm", lib=LIBRARY)
def _(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    params: list[Tensor],
    batch_first: bool,
    last: bool,
    dropout: float,
    backend: str,
    compute_dtype: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    batch, steps = (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])
    layers, hidden = len(reference_lstm.split_layers(params)), params[1].shape[1]
    output = x.new_empty(0) if last else x.new_empty(*x.shape[:2], hidden)
    states = [x.new_empty(layers, batch, hidden) for _ in range(2)]
    keeps = layers if save and backend == "native" else 0
    numel = native_lstm.saved_numel(batch, steps, hidden)
    return output, states[0], states[1], [x.new_empty(numel) for _ in range(keeps)]


@implement("lstm_backward")
def _lstm_backward(
    grad_output: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    params: list[Tensor],
    saved: list[Tensor],
    batch_first: bool,
    dropout: float,
    backend: str,
    compute_dtype: str,
    wanted: list[int],
) -> list[Tensor]:
    run: Any = BACKENDS[backend].backward
    given = grad_output, grad_h, grad_c, x, h0, c0, lengths, seed, params, saved
    found: list[Tensor] = run(*given, batch_first, dropout, DTYPES[compute_dtype], wanted)
    return found


@torch.library.register_fake("gdpd_kernels::lstm_backward", lib=LIBRARY)
def _(
    grad_output: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    params: list[Tensor],
    saved: list[Tensor],
    batch_first: bool,
    dropout: float,
    backend: str,
    compute_dtype: str,
    wanted: list[int],
) -> list[Tensor]:
    inputs = [x, h0, c0, *params]
    return [x.new_empty(tensor.shape) for tensor in (inputs[i] for i in wanted) if tensor is not None]


class _Lstm(torch.autograd.Function):
    """Autograd of lstm over a flat list of tensors, as in `gdpd_kernels.ops`."""

    @staticmethod
    def forward(ctx: Any, plain: bool, constants: tuple[Any, ...], *tensors: Any) -> Any:
        *inputs, params = (*tensors[:5], list(tensors[5:]))
        if plain:
            output, h_n, c_n, saved = _lstm(*inputs, params, *constants)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                output, h_n, c_n, saved = torch.ops.gdpd_kernels.lstm(*inputs, params, *constants)
        ctx.save_for_backward(*tensors, *saved)
        ctx.constants, ctx.kept = constants, len(saved)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*saved, *([output] if output.numel() == 0 else []))
        return output, h_n, c_n, *saved

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        tensors = ctx.saved_tensors
        end = len(tensors) - ctx.kept
        x, h0, c0, lengths, seed, *params = tensors[:end]
        saved = list(tensors[end:])
        batch_first, last, dropout, backend, compute_dtype, save = ctx.constants
        if not save:
            raise RuntimeError("save: the operator was called with save=False and cannot be differentiated")
        needs = ctx.needs_input_grad[2:]
        inputs = [x, h0, c0, *params]
        positions = [i for i, need in enumerate((*needs[:3], *needs[5:])) if need]
        given = [None if last else grads[0], *grads[1:3]]
        if all(grad is None for grad in given):
            found = [torch.zeros_like(inputs[i]) for i in positions]
        elif torch.is_grad_enabled():
            # create_graph=True: backward is to be differentiated itself, which plain PyTorch can do and a kernel cannot
            with without_autocast(x.device.type):
                dtype = DTYPES[compute_dtype]
                results = reference_lstm.lstm(
                    x, h0, c0, lengths, seed, params, batch_first, given[0] is None, dropout, dtype
                )
                total = reference_lstm.inner_product(results, given)
                found = differentiable_gradients(total, [inputs[i] for i in positions], None)
        else:
            plain = is_plain(next(grad for grad in given if grad is not None))
            run = _lstm_backward if plain else torch.ops.gdpd_kernels.lstm_backward
            found = run(
                *given, x, h0, c0, lengths, seed, params, saved, batch_first, dropout, backend, compute_dtype, positions
            )
        gradients: list[Tensor | None] = [None] * len(inputs)
        for i, grad in zip(positions, found, strict=True):
            gradients[i] = grad
        return None, None, *gradients[:3], None, None, *gradients[3:]


def _autograd_lstm(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    params: list[Tensor],
    *constants: Any,
    plain: bool = False,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    apply = _apply if plain else _Lstm.apply
    output, h_n, c_n, *saved = apply(plain, constants, x, h0, c0, lengths, seed, *params)
    return output, h_n, c_n, saved


LIBRARY.impl("lstm", _autograd_lstm, "Autograd")

_apply = plain_apply(_Lstm)


def lstm(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The operator, by the shortest way: ``torch.ops.gdpd_kernels.lstm`` and this give the same."""
    if not is_plain(arguments[0]):
        found: tuple[Tensor, Tensor, Tensor, list[Tensor]] = torch.ops.gdpd_kernels.lstm(*arguments)
        return found
    return _autograd_lstm(*arguments, plain=True) if torch.is_grad_enabled() else _lstm(*arguments)

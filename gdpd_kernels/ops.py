"""The operators: torch.library schemas, implementations, fake kernels and autograd, side by side.

``gdpd_kernels::reverse_sample`` runs the noise-fused start and K times (denoiser, DDIM update). Shapes:

====================  =====================================================================================
z_short               [batch, features], the state's dtype (float32 or float64)
alpha                 None (start at z_short) or 2-D, broadcastable to [batch, features]
noise                 None (drawn from `seed`) or [num_samples, batch, features]
seed                  int64 [], the Philox key
rows                  each [batch, width]: what depends on the condition alone
tables                each [K, width]: what depends on the time step alone
params                in the order of the program
coefficients          3 K numbers: a, b, s of every step
save                  what forward keeps for backward: one of the constants `SAVE_...` below
-> z_hat              [num_samples × batch, features]
-> stats              [K, stats_width]: mean and biased variance of each training-mode BatchNorm
-> saved              the backend's own
====================  =====================================================================================

``gdpd_kernels::prior_loss`` runs forward noising, one denoising step and the mean squared error, and computes the
gradients in the same call, if the backend fuses them: backward then only scales them.

Autocast rule: the operators state their precision themselves. They are not cast by autocast; the public functions turn
an active autocast dtype into ``compute_dtype``: operands of matrix products are rounded to it, sums and the state
keep the state's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gdpd_kernels.backends import load, reference, reference_backend, saved_numel
from gdpd_kernels.backends.reference_backend import steps_of, without_autocast
from gdpd_kernels.library import DTYPES, LIBRARY, TAGS, differentiable_gradients, implement, is_plain, plain_apply
from gdpd_kernels.program import DenoiserProgram
from gdpd_kernels.ranges import span

# As in csrc/plan.h: the values that all gradients need, the state of each step, or the values that gradients of inputs
# need when no parameter asks for one.
SAVE_NOTHING, SAVE_VALUES, SAVE_STATES, SAVE_VALUES_FOR_INPUTS = 0, 1, 2, 3

_parse = DenoiserProgram.parse

LIBRARY.define(
    "reverse_sample(Tensor z_short, Tensor? alpha, Tensor? noise, Tensor? seed, Tensor[] rows, Tensor[] tables, "
    "Tensor[] params, str program, float[] coefficients, int num_samples, str backend, str compute_dtype, int save) "
    "-> (Tensor z_hat, Tensor stats, Tensor saved)",
    tags=TAGS,
)
LIBRARY.define(
    "reverse_sample_backward(Tensor grad, Tensor z_short, Tensor? alpha, Tensor? noise, Tensor? seed, Tensor[] rows, "
    "Tensor[] tables, Tensor[] params, Tensor stats, Tensor saved, str program, float[] coefficients, "
    "int num_samples, str backend, str compute_dtype, int save, int[] wanted) -> Tensor[]",
    tags=TAGS,
)
LIBRARY.define(
    "prior_loss(Tensor z_long, Tensor? noise, Tensor? seed, Tensor signal, Tensor sigma, Tensor[] rows, "
    "Tensor[] tables, Tensor[] params, str program, str prediction, str backend, str compute_dtype, int[] wanted) "
    "-> (Tensor loss, Tensor stats, Tensor[] gradients)",
    tags=TAGS,
)
LIBRARY.define(
    "prior_loss_backward(Tensor grad, Tensor z_long, Tensor? noise, Tensor? seed, Tensor signal, Tensor sigma, "
    "Tensor[] rows, Tensor[] tables, Tensor[] params, str program, str prediction, str compute_dtype, int[] wanted) "
    "-> Tensor[]",
    tags=TAGS,
)
LIBRARY.define(
    "update_running_stats_(Tensor(a!)[] means, Tensor(b!)[] variances, Tensor(c!)[] counters, Tensor stats, "
    "int[] widths, float[] momenta, SymInt rows, str backend) -> ()",
    tags=TAGS,
)


@implement("reverse_sample")
def _reverse_sample(
    z_short: Tensor,
    alpha: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    rows: list[Tensor],
    tables: list[Tensor],
    params: list[Tensor],
    program: str,
    coefficients: list[float],
    num_samples: int,
    backend: str,
    compute_dtype: str,
    save: int,
) -> tuple[Tensor, Tensor, Tensor]:
    run = load(backend).reverse_sample
    steps, dtype = len(coefficients) // 3, DTYPES[compute_dtype]
    with span("sampler forward", batch=z_short.shape[0], steps=steps, samples=num_samples, backend=backend):
        return run(
            _parse(program), z_short, alpha, noise, seed, rows, tables, params, coefficients, num_samples, dtype, save
        )


@torch.library.register_fake("gdpd_kernels::reverse_sample", lib=LIBRARY)
def _(
    z_short: Tensor,
    alpha: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    rows: list[Tensor],
    tables: list[Tensor],
    params: list[Tensor],
    program: str,
    coefficients: list[float],
    num_samples: int,
    backend: str,
    compute_dtype: str,
    save: int,
) -> tuple[Tensor, Tensor, Tensor]:
    parsed, steps, total = _parse(program), len(coefficients) // 3, num_samples * z_short.shape[0]
    numel = saved_numel(load(backend).saved_shape(parsed, z_short.dtype, save), steps, total)
    return (
        z_short.new_empty(total, z_short.shape[1]),
        z_short.new_empty(steps, parsed.stats_width),
        z_short.new_empty(numel),
    )


@implement("reverse_sample_backward")
def _reverse_sample_backward(
    grad: Tensor,
    z_short: Tensor,
    alpha: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    rows: list[Tensor],
    tables: list[Tensor],
    params: list[Tensor],
    stats: Tensor,
    saved: Tensor,
    program: str,
    coefficients: list[float],
    num_samples: int,
    backend: str,
    compute_dtype: str,
    save: int,
    wanted: list[int],
) -> list[Tensor]:
    run = load(backend).reverse_sample_backward
    steps, dtype = len(coefficients) // 3, DTYPES[compute_dtype]
    with span("sampler backward", batch=z_short.shape[0], steps=steps, samples=num_samples, backend=backend):
        return run(
            grad, _parse(program), z_short, alpha, noise, seed, rows, tables, params, stats, saved, coefficients,
            num_samples, dtype, save, wanted,
        )  # fmt: skip


@torch.library.register_fake("gdpd_kernels::reverse_sample_backward", lib=LIBRARY)
def _(
    grad: Tensor,
    z_short: Tensor,
    alpha: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    rows: list[Tensor],
    tables: list[Tensor],
    params: list[Tensor],
    stats: Tensor,
    saved: Tensor,
    program: str,
    coefficients: list[float],
    num_samples: int,
    backend: str,
    compute_dtype: str,
    save: int,
    wanted: list[int],
) -> list[Tensor]:
    tensors = [z_short, alpha, *rows, *tables, *params]
    return [z_short.new_empty(x.shape) for x in (tensors[i] for i in wanted) if x is not None]


class _Sample(torch.autograd.Function):
    """Autograd of reverse_sample over a flat list of tensors: torch.library.register_autograd would do the same, but
    flattens its lists of tensors anew in Python at every call, which takes longer than the sampler."""

    @staticmethod
    def forward(ctx: Any, plain: bool, counts: tuple[int, int], constants: tuple[Any, ...], *tensors: Any) -> Any:
        rows, tables, params = _split(tensors[4:], counts)
        if plain:
            z_hat, stats, saved = _reverse_sample(*tensors[:4], rows, tables, params, *constants)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                op = torch.ops.gdpd_kernels.reverse_sample
                z_hat, stats, saved = op(*tensors[:4], rows, tables, params, *constants)
        ctx.save_for_backward(*tensors, stats, saved)
        ctx.counts, ctx.constants = counts, constants
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(stats, saved)
        return z_hat, stats, saved

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        *tensors, stats, saved = ctx.saved_tensors
        z_short, alpha, noise, seed, *rest = tensors
        needs = ctx.needs_input_grad[3:]
        if needs[2]:
            raise RuntimeError("noise: no gradient is computed for it; pass noise.detach()")
        inputs = [z_short, alpha, *rest]
        positions = [i for i, need in enumerate((*needs[:2], *needs[4:])) if need]
        rows, tables, params = _split(rest, ctx.counts)
        program, coefficients, num_samples, _backend, compute_dtype, _save = ctx.constants
        if grad is None:
            found = [torch.zeros_like(inputs[i]) for i in positions]
        elif torch.is_grad_enabled():
            # create_graph=True: backward is to be differentiated itself, which plain PyTorch can do and a kernel cannot
            with without_autocast(z_short.device.type):
                z_hat, _stats = reference.reverse_sample(
                    _parse(program),
                    z_short,
                    alpha,
                    noise,
                    seed,
                    rows,
                    tables,
                    params,
                    steps_of(coefficients),
                    num_samples,
                    DTYPES[compute_dtype],
                )
                found = differentiable_gradients(z_hat, [inputs[i] for i in positions], grad)
        else:
            op = torch.ops.gdpd_kernels.reverse_sample_backward
            run = _reverse_sample_backward if is_plain(grad) else op
            found = run(
                grad, z_short, alpha, noise, seed, rows, tables, params, stats, saved, *ctx.constants, positions
            )
        gradients: list[Tensor | None] = [None] * len(inputs)
        for i, g in zip(positions, found, strict=True):
            gradients[i] = g
        return None, None, None, *gradients[:2], None, None, *gradients[2:]


def _split(tensors: Sequence[Any], counts: tuple[int, int]) -> tuple[list[Any], list[Any], list[Any]]:
    """rows, tables, params from their concatenation."""
    ends = counts[0], counts[0] + counts[1]
    return list(tensors[: ends[0]]), list(tensors[ends[0] : ends[1]]), list(tensors[ends[1] :])


def _autograd_sample(
    z_short: Tensor,
    alpha: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    rows: list[Tensor],
    tables: list[Tensor],
    params: list[Tensor],
    *constants: Any,
    plain: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    counts, apply = (len(rows), len(tables)), _apply_sample if plain else _Sample.apply
    return apply(plain, counts, constants, z_short, alpha, noise, seed, *rows, *tables, *params)


LIBRARY.impl("reverse_sample", _autograd_sample, "Autograd")


_apply_sample = plain_apply(_Sample)


def reverse_sample(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The operator, by the shortest way: ``torch.ops.gdpd_kernels.reverse_sample`` and this give the same."""
    if not is_plain(arguments[0]):
        return torch.ops.gdpd_kernels.reverse_sample(*arguments)
    return _autograd_sample(*arguments, plain=True) if torch.is_grad_enabled() else _reverse_sample(*arguments)


@implement("prior_loss")
def _prior_loss(
    z_long: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    signal: Tensor,
    sigma: Tensor,
    rows: list[Tensor],
    tables: list[Tensor],
    params: list[Tensor],
    program: str,
    prediction: str,
    backend: str,
    compute_dtype: str,
    wanted: list[int],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return load(backend).prior_loss(
        _parse(program),
        z_long,
        noise,
        seed,
        signal,
        sigma,
        rows,
        tables,
        params,
        prediction,
        DTYPES[compute_dtype],
        wanted,
    )


@torch.library.register_fake("gdpd_kernels::prior_loss", lib=LIBRARY)
def _(
    z_long: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    signal: Tensor,
    sigma: Tensor,
    rows: list[Tensor],
    tables: list[Tensor],
    params: list[Tensor],
    program: str,
    prediction: str,
    backend: str,
    compute_dtype: str,
    wanted: list[int],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    tensors = [z_long, *rows, *tables, *params]
    gradients = [z_long.new_empty(tensors[i].shape) for i in wanted] if _fuses(backend) else []
    return z_long.new_empty(()), z_long.new_empty(1, _parse(program).stats_width), gradients


@implement("prior_loss_backward")
def _prior_loss_backward(grad: Tensor, *arguments: Any) -> list[Tensor]:
    *tensors, program, prediction, compute_dtype, wanted = arguments
    run: Any = reference_backend.prior_loss_backward
    found: list[Tensor] = run(grad, _parse(program), *tensors, prediction, DTYPES[compute_dtype], wanted)
    return found


@torch.library.register_fake("gdpd_kernels::prior_loss_backward", lib=LIBRARY)
def _(grad: Tensor, *arguments: Any) -> list[Tensor]:
    z_long, _noise, _seed, _signal, _sigma, rows, tables, params, *_, wanted = arguments
    tensors = [z_long, *rows, *tables, *params]
    return [z_long.new_empty(tensors[i].shape) for i in wanted]


def _fuses(backend: str) -> bool:
    return load(backend).CAPABILITIES.fuses_prior_gradient


class _Loss(torch.autograd.Function):
    """Autograd of prior_loss over a flat list of tensors."""

    @staticmethod
    def forward(ctx: Any, plain: bool, counts: tuple[int, int], constants: tuple[Any, ...], *tensors: Any) -> Any:
        rows, tables, params = _split(tensors[5:], counts)
        if plain:
            loss, stats, gradients = _prior_loss(*tensors[:5], rows, tables, params, *constants)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                op = torch.ops.gdpd_kernels.prior_loss
                loss, stats, gradients = op(*tensors[:5], rows, tables, params, *constants)
        ctx.save_for_backward(*tensors, *gradients)
        ctx.counts, ctx.constants, ctx.inputs = counts, constants, len(tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(stats, *gradients)
        return loss, stats, *gradients

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        tensors, unit = ctx.saved_tensors[: ctx.inputs], ctx.saved_tensors[ctx.inputs :]
        rows, tables, params = _split(tensors[5:], ctx.counts)
        program, prediction, backend, compute_dtype, wanted = ctx.constants
        inputs = [tensors[0], *tensors[5:]]
        if grad is None:
            found = [torch.zeros_like(inputs[i]) for i in wanted]
        elif torch.is_grad_enabled():
            z_long, noise, seed, signal, sigma = tensors[:5]
            with without_autocast(z_long.device.type):
                loss, _stats = reference.prior_loss(
                    _parse(program),
                    z_long,
                    noise,
                    seed,
                    signal,
                    sigma,
                    rows,
                    tables,
                    params,
                    prediction,
                    DTYPES[compute_dtype],
                )
                found = differentiable_gradients(loss, [inputs[i] for i in wanted], grad)
        elif _fuses(backend):
            found = list(torch._foreach_mul(unit, grad))
        else:
            found = torch.ops.gdpd_kernels.prior_loss_backward(
                grad, *tensors[:5], rows, tables, params, program, prediction, compute_dtype, wanted
            )
        gradients: list[Tensor | None] = [None] * len(inputs)
        for i, g in zip(wanted, found, strict=True):
            gradients[i] = g
        return None, None, None, gradients[0], None, None, None, None, *gradients[1:]


def _autograd_loss(
    z_long: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    signal: Tensor,
    sigma: Tensor,
    rows: list[Tensor],
    tables: list[Tensor],
    params: list[Tensor],
    *constants: Any,
    plain: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    counts, apply = (len(rows), len(tables)), _apply_loss if plain else _Loss.apply
    loss, stats, *gradients = apply(
        plain, counts, constants, z_long, noise, seed, signal, sigma, *rows, *tables, *params
    )
    return loss, stats, gradients


LIBRARY.impl("prior_loss", _autograd_loss, "Autograd")

_apply_loss = plain_apply(_Loss)


def prior_loss(*arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The operator, by the shortest way: ``torch.ops.gdpd_kernels.prior_loss`` and this give the same."""
    if not is_plain(arguments[0]):
        return torch.ops.gdpd_kernels.prior_loss(*arguments)
    return _autograd_loss(*arguments, plain=True) if torch.is_grad_enabled() else _prior_loss(*arguments)


@implement("update_running_stats_")
def _update_running_stats(*arguments: Any) -> None:
    *tensors_and_numbers, backend = arguments
    load(backend).update_running_stats(*tensors_and_numbers)


@torch.library.register_fake("gdpd_kernels::update_running_stats_", lib=LIBRARY)
def _(*arguments: Any) -> None:
    return None

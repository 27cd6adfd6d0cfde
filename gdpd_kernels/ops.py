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
save                  what forward keeps for backward: `SAVE_NOTHING`, `SAVE_VALUES` or `SAVE_STATES`
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

from gdpd_kernels.backends import load, reference, reference_backend
from gdpd_kernels.backends.reference_backend import steps_of
from gdpd_kernels.program import DenoiserProgram

SAVE_NOTHING, SAVE_VALUES, SAVE_STATES = 0, 1, 2

_parse = DenoiserProgram.parse
_dtype_of = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}

LIBRARY = torch.library.Library("gdpd_kernels", "DEF")
_TAGS = (torch.Tag.needs_fixed_stride_order,)

LIBRARY.define(
    "reverse_sample(Tensor z_short, Tensor? alpha, Tensor? noise, Tensor? seed, Tensor[] rows, Tensor[] tables, "
    "Tensor[] params, str program, float[] coefficients, int num_samples, str backend, str compute_dtype, int save) "
    "-> (Tensor z_hat, Tensor stats, Tensor saved)",
    tags=_TAGS,
)
LIBRARY.define(
    "reverse_sample_backward(Tensor grad, Tensor z_short, Tensor? alpha, Tensor? noise, Tensor? seed, Tensor[] rows, "
    "Tensor[] tables, Tensor[] params, Tensor stats, Tensor saved, str program, float[] coefficients, "
    "int num_samples, str backend, str compute_dtype, int save, int[] wanted) -> Tensor[]",
    tags=_TAGS,
)
LIBRARY.define(
    "prior_loss(Tensor z_long, Tensor? noise, Tensor? seed, Tensor signal, Tensor sigma, Tensor[] rows, "
    "Tensor[] tables, Tensor[] params, str program, str prediction, str backend, str compute_dtype, int[] wanted) "
    "-> (Tensor loss, Tensor stats, Tensor flat_gradient)",
    tags=_TAGS,
)
LIBRARY.define(
    "prior_loss_backward(Tensor grad, Tensor z_long, Tensor? noise, Tensor? seed, Tensor signal, Tensor sigma, "
    "Tensor[] rows, Tensor[] tables, Tensor[] params, str program, str prediction, str compute_dtype, int[] wanted) "
    "-> Tensor[]",
    tags=_TAGS,
)
LIBRARY.define(
    "update_running_stats_(Tensor(a!)[] means, Tensor(b!)[] variances, Tensor stats, int[] widths, float[] momenta, "
    "SymInt rows, str backend) -> ()",
    tags=_TAGS,
)


def _implement(name: str) -> Any:
    def register(function: Any) -> Any:
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return function

    return register


@_implement("reverse_sample")
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
    return load(backend).reverse_sample(
        _parse(program),
        z_short,
        alpha,
        noise,
        seed,
        rows,
        tables,
        params,
        coefficients,
        num_samples,
        _dtype_of[compute_dtype],
        save,
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
    numel = load(backend).saved_numel(parsed, steps, total, _dtype_of[compute_dtype], save)
    return (
        z_short.new_empty(total, z_short.shape[1]),
        z_short.new_empty(steps, parsed.stats_width),
        z_short.new_empty(numel),
    )


@_implement("reverse_sample_backward")
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
    return load(backend).reverse_sample_backward(
        grad,
        _parse(program),
        z_short,
        alpha,
        noise,
        seed,
        rows,
        tables,
        params,
        stats,
        saved,
        coefficients,
        num_samples,
        _dtype_of[compute_dtype],
        save,
        wanted,
    )


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


def _setup_sample(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    z_short, alpha, noise, seed, rows, tables, params, *constants = inputs
    _, stats, saved = output
    ctx.save_for_backward(z_short, alpha, noise, seed, stats, saved, *rows, *tables, *params)
    ctx.counts = len(rows), len(tables)
    ctx.constants = constants
    ctx.set_materialize_grads(False)


def _wanted(needs: Sequence[Any]) -> list[int]:
    """Positions, in the flattened list of differentiable inputs, of those that need a gradient."""
    flat: list[bool] = []
    for need in needs:
        flat += need if isinstance(need, list | tuple) else [need]
    return [i for i, need in enumerate(flat) if need]


def _backward_sample(ctx: Any, grad: Tensor | None, _stats: None, _saved: None) -> tuple[Any, ...]:
    z_short, alpha, noise, seed, stats, saved, *rest = ctx.saved_tensors
    ends = ctx.counts[0], sum(ctx.counts)
    rows, tables, params = rest[: ends[0]], rest[ends[0] : ends[1]], rest[ends[1] :]
    program, coefficients, num_samples, backend, compute_dtype, save = ctx.constants
    needs = ctx.needs_input_grad
    if needs[2]:
        raise RuntimeError("noise: no gradient is computed for it; pass noise.detach()")
    positions = _wanted([needs[0], needs[1], *needs[4:7]])
    inputs = [z_short, alpha, *rest]
    if grad is None:
        found = [torch.zeros_like(inputs[i]) for i in positions]
    elif torch.is_grad_enabled():
        # create_graph=True: backward itself is to be differentiated, which plain PyTorch can do and a kernel cannot.
        z_hat, _ = reference.reverse_sample(
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
            _dtype_of[compute_dtype],
        )
        found = _differentiable_gradients(z_hat, [inputs[i] for i in positions], grad)
    else:
        found = torch.ops.gdpd_kernels.reverse_sample_backward(
            grad, z_short, alpha, noise, seed, rows, tables, params, stats, saved, *ctx.constants, positions
        )
    gradients: list[Tensor | None] = [None] * len(inputs)
    for i, g in zip(positions, found, strict=True):
        gradients[i] = g
    split = 2 + ends[0], 2 + ends[1]
    lists = gradients[2 : split[0]], gradients[split[0] : split[1]], gradients[split[1] :]
    return gradients[0], gradients[1], None, None, *lists, *[None] * len(ctx.constants)


def _differentiable_gradients(output: Tensor, inputs: list[Tensor], grad: Tensor | None) -> list[Tensor]:
    found = torch.autograd.grad(output, inputs, grad, create_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


torch.library.register_autograd(
    "gdpd_kernels::reverse_sample", _backward_sample, setup_context=_setup_sample, lib=LIBRARY
)


@_implement("prior_loss")
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
) -> tuple[Tensor, Tensor, Tensor]:
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
        _dtype_of[compute_dtype],
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
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = [z_long, *rows, *tables, *params]
    fused = _fuses(backend)
    numel = sum((tensors[i].numel() for i in wanted), 0) if fused else 0
    return z_long.new_empty(()), z_long.new_empty(1, _parse(program).stats_width), z_long.new_empty(numel)


@_implement("prior_loss_backward")
def _prior_loss_backward(
    grad: Tensor,
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
    compute_dtype: str,
    wanted: list[int],
) -> list[Tensor]:
    return reference_backend.prior_loss_backward(
        grad,
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
        _dtype_of[compute_dtype],
        wanted,
    )


@torch.library.register_fake("gdpd_kernels::prior_loss_backward", lib=LIBRARY)
def _(
    grad: Tensor,
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
    compute_dtype: str,
    wanted: list[int],
) -> list[Tensor]:
    tensors = [z_long, *rows, *tables, *params]
    return [torch.empty_like(tensors[i]) for i in wanted]


def _fuses(backend: str) -> bool:
    return load(backend).CAPABILITIES.fuses_prior_gradient


def _setup_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    z_long, noise, seed, signal, sigma, rows, tables, params, *constants = inputs
    ctx.save_for_backward(z_long, noise, seed, signal, sigma, output[2], *rows, *tables, *params)
    ctx.counts = len(rows), len(tables)
    ctx.constants = constants
    ctx.set_materialize_grads(False)


def _backward_loss(ctx: Any, grad: Tensor | None, _stats: None, _flat: None) -> tuple[Any, ...]:
    z_long, noise, seed, signal, sigma, flat, *rest = ctx.saved_tensors
    program, prediction, backend, compute_dtype, wanted = ctx.constants
    ends = ctx.counts[0], sum(ctx.counts)
    inputs = [z_long, *rest]
    gradients: list[Tensor | None] = [None] * len(inputs)
    if grad is not None and torch.is_grad_enabled():
        loss, _ = reference.prior_loss(
            _parse(program),
            z_long,
            noise,
            seed,
            signal,
            sigma,
            rest[: ends[0]],
            rest[ends[0] : ends[1]],
            rest[ends[1] :],
            prediction,
            _dtype_of[compute_dtype],
        )
        found = _differentiable_gradients(loss, [inputs[i] for i in wanted], grad)
    elif grad is not None and not _fuses(backend):
        found = torch.ops.gdpd_kernels.prior_loss_backward(
            grad,
            z_long,
            noise,
            seed,
            signal,
            sigma,
            rest[: ends[0]],
            rest[ends[0] : ends[1]],
            rest[ends[1] :],
            program,
            prediction,
            compute_dtype,
            wanted,
        )
    elif grad is not None:
        # One product scales all of them; the parts share its memory.
        parts = (flat * grad).split([inputs[i].numel() for i in wanted])
        found = [part.view(inputs[i].shape) for i, part in zip(wanted, parts, strict=True)]
    else:
        found = [torch.zeros_like(inputs[i]) for i in wanted]
    for i, g in zip(wanted, found, strict=True):
        gradients[i] = g
    split = 1 + ends[0], 1 + ends[1]
    lists = gradients[1 : split[0]], gradients[split[0] : split[1]], gradients[split[1] :]
    return gradients[0], None, None, None, None, *lists, *[None] * len(ctx.constants)


torch.library.register_autograd("gdpd_kernels::prior_loss", _backward_loss, setup_context=_setup_loss, lib=LIBRARY)


@_implement("update_running_stats_")
def _update_running_stats(
    means: list[Tensor],
    variances: list[Tensor],
    stats: Tensor,
    widths: list[int],
    momenta: list[float],
    rows: int,
    backend: str,
) -> None:
    load(backend).update_running_stats(means, variances, stats, widths, momenta, rows)


@torch.library.register_fake("gdpd_kernels::update_running_stats_", lib=LIBRARY)
def _(
    means: list[Tensor],
    variances: list[Tensor],
    stats: Tensor,
    widths: list[int],
    momenta: list[float],
    rows: int,
    backend: str,
) -> None:
    return None

"""The public functions: check the arguments, capture the denoiser, choose a backend, call the operator."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial

import torch
from torch import Tensor, nn

from gdpd_kernels import ops, stepwise
from gdpd_kernels.arguments import (
    check_fit,
    check_parameters,
    check_range,
    check_tensor,
    check_timesteps,
    condition,
    mixing_weights,
    philox_key,
    precision,
    start_noise,
)
from gdpd_kernels.backends import BackendError, BackendFallback, Request, load, resolve, saved_numel
from gdpd_kernels.capture import CapturedDenoiser, CaptureError, capture
from gdpd_kernels.hidden_walk import HiddenWalk, hidden_walk
from gdpd_kernels.library import transformed
from gdpd_kernels.passes import Rewrite, fold_batch_norm_eval, fold_time_tables, tables_as_rows
from gdpd_kernels.philox import philox_words
from gdpd_kernels.program import DenoiserProgram
from gdpd_kernels.ranges import ranged
from gdpd_kernels.schedule import DDIMTable
from gdpd_kernels.stepwise import Denoiser

# Up to here forward keeps every intermediate value for backward; above, only the state of each step, and backward
# computes a step's values again. Measured in docs/performance.md.
SAVED_VALUES_LIMIT = 32 * 2**20  # bytes

# Batch rows × samples × steps from which a frozen denoiser's evaluation BatchNorms are folded into its linear layers.
# Seven of them cost 0.25 ms to fold and save 20 ns per row and step at width 100 (docs/performance.md).
FOLDING_PAYS_FROM = 16384

_TIMESTEP_DRAW = 2**32 - 1  # Philox step that no noise uses


@ranged("reverse_sample")
def reverse_sample(
    denoiser: Denoiser,
    z_short: Tensor,
    *,
    table: DDIMTable,
    alpha: Tensor | float | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    cond: Tensor | None = None,
    num_samples: int | None = None,
    backend: str = "auto",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Run the whole reverse sampler as one differentiable operation.

    Starts at ``z = alpha * z_short + (1 - alpha) * noise`` (GDPD's noise fusion) and walks `table` with unclipped DDIM
    steps ``z' = a z + b denoiser(z, t) + s noise`` (Song et al., 2021, eq. 12). Gradients reach `z_short`, `alpha`,
    `cond` and the denoiser's parameters. BatchNorms in training mode use the statistics of the current batch of
    trajectories at every step and update their running statistics, as if the module had been called K times.

    Args:
        denoiser: ``module(z, t)`` or ``module(z, t, cond)``, with z [batch, features] and t int64 [batch], that returns
            a prediction [batch, features]; or what `capture` made of one.
        z_short: start, [batch, features], floating.
        table: time steps and coefficients, from `ddim_table`.
        alpha: weight of `z_short` in the start: None (start at `z_short` itself), a number in [0, 1], or a tensor
            [features], [batch] or [batch, features] ([batch, 1] and [1, features] where the sizes are equal).
        noise: the start's noise, [batch, features], or [num_samples, batch, features]; drawn if None. It takes no
            gradient. Noise of the steps (eta > 0) is always drawn.
        seed: 64-bit Philox key for what is drawn; taken from torch's generator if None.
        cond: a condition per row, [batch, width], for denoisers that take one.
        num_samples: None, or the number J of samples drawn for every row, from the same `z_short` and `cond`. Their
            J × batch rows go through the denoiser as one batch.
        backend: "auto", or a name from `backends()`.
        compute_dtype: dtype to which the operands of matrix products are rounded, such as ``torch.bfloat16``; sums and
            the state keep the dtype of `z_short`. None: the autocast dtype where autocast is on, else no rounding.

    Returns:
        z_hat, [batch, features], or [num_samples, batch, features]; in the dtype of `z_short` (float32 under autocast).

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
        BackendError: the backend asked for by name cannot run the call.
    """
    z_short, compute = precision("z_short", z_short, compute_dtype)
    if not isinstance(table, DDIMTable):
        raise TypeError(f"table: expected a DDIMTable from ddim_table(...), got {type(table).__name__}")
    batch, features = z_short.shape
    if num_samples is not None and (
        isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1
    ):
        raise ValueError(f"num_samples is {num_samples!r}; it must be None or an integer of at least 1")
    samples = 1 if num_samples is None else num_samples
    mix = mixing_weights(alpha, z_short)
    noise = start_noise(noise, z_short, num_samples)
    cond = condition(cond, z_short)
    draws = table.stochastic or (mix is not None and noise is None)
    key = philox_key(seed, z_short.device) if draws else None

    captured = _captured(denoiser, features, cond, backend)
    if captured is None:
        steps = _timesteps(table.timesteps, z_short.device)
        z_hat = stepwise.reverse_sample(denoiser, z_short, table, steps, mix, noise, key, cond, samples, compute)
    else:
        program = captured.program
        check_fit(captured, z_short, cond, samples * batch)
        chosen = _choose(backend, program.text, z_short.device.type, z_short.dtype, compute)
        params = captured.parameters_now()
        check_parameters(program, params, z_short)
        rows = _of_state(captured.rows(cond), z_short)
        steps = _timesteps(table.timesteps, z_short.device)
        tables = _tables(lambda: captured.tables_of(table.timesteps, steps), steps, z_short)
        if _folding_pays(program, params, samples * batch * len(table)):
            rewrite = _folded(program)
            program = rewrite.program
            params, tables = rewrite.transform(params, tables)
        walk = partial(_walk, chosen, compute)
        arguments = z_short, mix, noise, key, rows, tables, params, table.flat, samples
        hidden = None
        if chosen == "native" and compute == z_short.dtype and not table.stochastic:
            inputs = z_short, mix, *rows, *tables
            hidden = _hidden_walk_that_pays(program, inputs, params, samples * batch, len(table))
        z_hat, stats = walk(program, *arguments) if hidden is None else hidden.run(walk, *arguments)
        _update_running_stats(captured.batch_norms, stats, samples * batch, chosen)
    return z_hat if num_samples is None else z_hat.view(samples, batch, features)


@ranged("prior_loss")
def prior_loss(
    denoiser: Denoiser,
    z_long: Tensor,
    *,
    alphas_cumprod: Tensor,
    timesteps: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    cond: Tensor | None = None,
    prediction: str = "eps",
    backend: str = "auto",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """The denoiser's training loss at one random time step per row, as one differentiable operation.

    ``mean((denoiser(z_t, t) - target)^2)`` with ``z_t = sqrt(alpha_bar_t) z_long + sqrt(1 - alpha_bar_t) noise``
    (Ho et al., 2020, eq. 14). Its gradients are computed in the same call as the loss.

    Args:
        denoiser: as in `reverse_sample`.
        z_long: clean states, [batch, features], floating.
        alphas_cumprod: alpha_bar of every training step, [T].
        timesteps: int64 [batch], in 0..T-1; drawn uniformly if None.
        noise: [batch, features]; drawn if None. It takes no gradient.
        seed: 64-bit Philox key for what is drawn; taken from torch's generator if None.
        cond: a condition per row, [batch, width], for denoisers that take one.
        prediction: what the denoiser predicts: "eps" (the noise), "x0" (z_long) or "v".
        backend, compute_dtype: as in `reverse_sample`.

    Returns:
        the loss, a 0-d tensor in the dtype of `z_long` (float32 under autocast).

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
        BackendError: the backend asked for by name cannot run the call.
    """
    z_long, compute = precision("z_long", z_long, compute_dtype)
    if prediction not in ("eps", "x0", "v"):
        raise ValueError(f"prediction is {prediction!r}; it must be 'eps', 'x0' or 'v'")
    check_tensor("alphas_cumprod", alphas_cumprod, "[T]")
    if alphas_cumprod.dim() != 1 or not alphas_cumprod.is_floating_point() or len(alphas_cumprod) < 1:
        raise ValueError(
            f"alphas_cumprod has shape {tuple(alphas_cumprod.shape)}, {alphas_cumprod.dtype}; expected floating [T]"
        )
    batch, features = z_long.shape
    noise = start_noise(noise, z_long, None)
    noise = None if noise is None else noise.view(batch, features)
    cond = condition(cond, z_long)
    key = philox_key(seed, z_long.device) if noise is None or timesteps is None else None
    if timesteps is None:
        assert key is not None
        words = philox_words(key, batch, 1, step=_TIMESTEP_DRAW, device=z_long.device)[:, 0, 0]
        timesteps = (words * alphas_cumprod.shape[0]) >> 32
    else:
        check_timesteps(timesteps, z_long)
        check_range("timesteps", timesteps, 0, len(alphas_cumprod) - 1, "alphas_cumprod has so many entries")
    alpha_bar = alphas_cumprod.to(device=z_long.device, dtype=torch.float64)[timesteps]
    check_range("alphas_cumprod", alpha_bar, 0, 1, "it is a product of variances' complements, see alphas_cumprod()")
    signal, sigma = alpha_bar.sqrt().to(z_long.dtype), (1 - alpha_bar).sqrt().to(z_long.dtype)

    captured = _captured(denoiser, features, cond, backend)
    if captured is None:
        return stepwise.prior_loss(denoiser, z_long, timesteps, noise, key, signal, sigma, cond, prediction, compute)
    program = captured.program
    check_fit(captured, z_long, cond, batch)
    chosen = _choose(backend, program.text, z_long.device.type, z_long.dtype, compute)
    params = captured.parameters_now()
    check_parameters(program, params, z_long)
    rows = _of_state(captured.rows(cond), z_long)
    tables = _tables(lambda: captured.tables(timesteps), timesteps, z_long)
    inputs = [z_long, *rows, *tables, *params]
    wanted = [i for i, x in enumerate(inputs) if x.requires_grad] if torch.is_grad_enabled() else []
    loss, stats, _ = ops.prior_loss(
        z_long,
        noise,
        key,
        signal,
        sigma,
        rows,
        tables,
        params,
        program.text,
        prediction,
        chosen,
        _name(compute),
        wanted,
    )
    _update_running_stats(captured.batch_norms, stats, batch, chosen)
    return loss


@ranged("denoise")
def denoise(
    denoiser: Denoiser,
    z: Tensor,
    timesteps: Tensor,
    *,
    cond: Tensor | None = None,
    backend: str = "auto",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """The denoiser's prediction at one time step per row, ``denoiser(z, t)``, as one differentiable operation.

    For losses of one's own on the prediction, which `prior_loss` does not know. Gradients reach `z`, `cond` and the
    denoiser's parameters; BatchNorms in training mode update their running statistics.

    Args:
        denoiser: as in `reverse_sample`.
        z: states, [batch, features], floating.
        timesteps: int64 [batch].
        cond: a condition per row, [batch, width], for denoisers that take one.
        backend, compute_dtype: as in `reverse_sample`.

    Returns:
        [batch, features], in the dtype of `z` (float32 under autocast).

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
        BackendError: the backend asked for by name cannot run the call.
    """
    z, compute = precision("z", z, compute_dtype)
    check_timesteps(timesteps, z)
    cond = condition(cond, z)
    captured = _captured(denoiser, z.shape[1], cond, backend)
    if captured is None:
        return stepwise.denoise(denoiser, z, timesteps, cond, compute)
    program = captured.program
    check_fit(captured, z, cond, z.shape[0])
    chosen = _choose(backend, program.text, z.device.type, z.dtype, compute)
    params = captured.parameters_now()
    check_parameters(program, params, z)
    # One step of the walk with z' = 0 z + 1 prediction. Every row has a table row of its own: to the walk, a condition.
    tables = _tables(lambda: captured.tables(timesteps), timesteps, z)
    rows = [*_of_state(captured.rows(cond), z), *tables]
    prediction, stats = _walk(
        chosen, compute, tables_as_rows(program), z, None, None, None, rows, [], params, (0.0, 1.0, 0.0), 1
    )
    _update_running_stats(captured.batch_norms, stats, z.shape[0], chosen)
    return prediction


def _of_state(tensors: list[Tensor], z: Tensor) -> list[Tensor]:
    """What is computed beforehand, in the state's dtype: autocast, or a float64 table, may have made it another."""
    return [x if x.dtype == z.dtype else x.to(z.dtype) for x in tensors]


def _tables(make: Callable[[], list[Tensor]], timesteps: Tensor, z: Tensor) -> list[Tensor]:
    if torch.compiler.is_compiling():
        return _of_state(make(), z)
    try:
        return _of_state(make(), z)
    except IndexError as error:
        raise ValueError(
            f"timesteps: the denoiser has no embedding of time step {int(timesteps.max())} ({error}); "
            "give it num_train_timesteps entries"
        ) from error


def _timesteps(steps: tuple[int, ...], device: torch.device) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.tensor(steps, dtype=torch.int64, device=device)
    return _kept_timesteps(steps, device)


@lru_cache(maxsize=64)
def _kept_timesteps(steps: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(steps, dtype=torch.int64, device=device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _folding_pays(program: DenoiserProgram, params: Sequence[Tensor], state_rows: int) -> bool:
    """Whether folding evaluation BatchNorms saves more than computing the folded weights costs."""
    if torch.compiler.is_compiling() or state_rows < FOLDING_PAYS_FROM:  # in this order: no guard on the batch size
        return False
    if not any(op.kind == "batch_norm_eval" for op in program.ops):
        return False
    return not (torch.is_grad_enabled() and any(param.requires_grad for param in params))


@lru_cache(maxsize=64)
def _folded(program: DenoiserProgram) -> Rewrite:
    return fold_batch_norm_eval(program).then(fold_time_tables)


def _choose(backend: str, program: str, device: str, dtype: torch.dtype, compute: torch.dtype) -> str:
    return resolve(backend, Request(DenoiserProgram.parse(program), device, dtype, compute))


def _saved_shape(backend: str, program: str, dtype: torch.dtype, save: int) -> tuple[int, int, int]:
    return load(backend).saved_shape(DenoiserProgram.parse(program), dtype, save)


# What depends on the program and the backend alone is a constant to torch.compile: this is what
# torch.compiler.assume_constant_result does, without importing the compiler where nothing is compiled.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
_saved_shape._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _hidden_walk_that_pays(
    program: DenoiserProgram, inputs: Sequence[Tensor | None], params: Sequence[Tensor], rows: int, steps: int
) -> HiddenWalk | None:
    """The walk in hidden space where it is less work, by its cost model."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return None
    hidden = hidden_walk(program)
    if hidden is None:
        return None
    computes = "forward"
    if torch.is_grad_enabled():
        if any(x.requires_grad for x in params):
            computes = "parameters"
        elif any(x is not None and x.requires_grad for x in inputs):
            computes = "inputs"
    return hidden if hidden.saved(rows, steps, computes) > 0 else None


def _walk(
    backend: str,
    compute: torch.dtype,
    program: DenoiserProgram,
    z_short: Tensor,
    mix: Tensor | None,
    noise: Tensor | None,
    key: Tensor | None,
    rows: list[Tensor],
    tables: list[Tensor],
    params: list[Tensor],
    coefficients: tuple[float, ...],
    samples: int,
) -> tuple[Tensor, Tensor]:
    """The operator, with what forward keeps decided: z_hat and the batch statistics."""
    inputs, total = [z_short, mix, *rows, *tables], samples * z_short.shape[0]
    save = _save_mode(backend, program, inputs, params, len(coefficients) // 3, total, z_short.dtype)
    arguments = z_short, mix, noise, key, rows, tables, params, program.text, coefficients, samples
    z_hat, stats, _ = ops.reverse_sample(*arguments, backend, _name(compute), save)
    return z_hat, stats


def _save_mode(
    backend: str,
    program: DenoiserProgram,
    inputs: Sequence[Tensor | None],
    params: Sequence[Tensor],
    steps: int,
    rows: int,
    dtype: torch.dtype,
) -> int:
    """What forward keeps for backward: everything it will read, if that stays within `SAVED_VALUES_LIMIT`."""
    trainable = any(x.requires_grad for x in params)
    if not torch.is_grad_enabled() or not (trainable or any(x is not None and x.requires_grad for x in inputs)):
        return ops.SAVE_NOTHING
    values = ops.SAVE_VALUES if trainable else ops.SAVE_VALUES_FOR_INPUTS
    shape = _saved_shape(backend, program.text, dtype, values)
    size = saved_numel(shape, steps, rows) * dtype.itemsize
    return values if size <= SAVED_VALUES_LIMIT else ops.SAVE_STATES


# --- the denoiser -------------------------------------------------------------------------------------------------


def _captured(denoiser: Denoiser, features: int, cond: Tensor | None, backend: str) -> CapturedDenoiser | None:
    """The captured denoiser, or None where the module itself runs: it cannot be captured, or a transform is active."""
    if not isinstance(denoiser, (nn.Module, CapturedDenoiser)):
        raise TypeError(f"denoiser: expected an nn.Module or what capture() returns, got {type(denoiser).__name__}")
    if transformed():
        stepwise.check_backend(backend)
        _note_stepwise("a transform of torch.func (vmap, grad, jvp, ...) or forward mode is active")
        return None
    if isinstance(denoiser, CapturedDenoiser):
        return denoiser.current()
    try:
        # index(), since widths are constants of a compiled graph even where all shapes are to be dynamic.
        cond_features = None if cond is None else operator.index(cond.shape[1])
        return capture(denoiser, features=operator.index(features), cond_features=cond_features)
    except CaptureError as error:
        if backend not in ("auto", "reference"):
            raise BackendError(f"backend {backend!r} cannot run this denoiser: {error}") from error
        if not torch.compiler.is_compiling():  # which no warning would get out of
            _note_stepwise(str(error))
        return None


@cache
def _note_stepwise(message: str) -> None:
    warnings.warn(f"running the module itself, step by step: {message}", BackendFallback, stacklevel=4)


def _update_running_stats(batch_norms: Sequence[nn.Module], stats: Tensor, rows: int, backend: str) -> None:
    """Update the live BatchNorms as if each had been called once per row of `stats`."""
    if not batch_norms:
        return
    buffers = [bn._buffers for bn in batch_norms]
    if all(kept["running_mean"] is None for kept in buffers):
        return

    def named(name: str) -> list[Tensor]:  # an empty tensor stands for a BatchNorm that keeps no running statistics
        found = [kept[name] for kept in buffers]
        return [stats.new_empty(0) if x is None else x for x in found]

    means, variances, counters = named("running_mean"), named("running_var"), named("num_batches_tracked")
    momenta: list[float] = [-1.0 if bn.momentum is None else bn.momentum for bn in batch_norms]  # type: ignore[misc]
    widths: list[int] = [bn.num_features for bn in batch_norms]  # type: ignore[misc]
    if torch.compiler.is_compiling():
        update = torch.ops.gdpd_kernels.update_running_stats_
        update(means, variances, counters, stats, widths, momenta, rows, backend)
        return
    # The operator, without the dispatcher's toll on forty tensors; what it would do besides is to note the mutation.
    load(backend).update_running_stats(means, variances, counters, stats, widths, momenta, rows)
    torch.autograd.graph.increment_version([*means, *variances, *counters])

"""The meaning of every operator in plain PyTorch: what fast backends are held to, and what runs when none can."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gdpd_kernels.philox import philox_normal
from gdpd_kernels.program import DenoiserProgram, Op

# prediction of the denoiser for the state [rows, features] at step k of the sampler
Model = Callable[[Tensor, int], Tensor]
Coefficients = Sequence[tuple[float, float, float]]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
}


def noise_fused_init(z_short: Tensor, alpha: Tensor | None, eps: Tensor | None) -> Tensor:
    """The start of the reverse process: z = alpha z_short + (1 − alpha) eps, without square roots (GDPD)."""
    if alpha is None or eps is None:
        return z_short
    return alpha * z_short + (1 - alpha) * eps


def ddim_update(z: Tensor, prediction: Tensor, a: float, b: float) -> Tensor:
    """z' = a z + b prediction: one unclipped DDIM step is linear (Song et al., 2021, eq. 12)."""
    return a * z + b * prediction


def reverse_loop(model: Model, z: Tensor, coefficients: Coefficients, step_noise: Callable[[int], Tensor]) -> Tensor:
    """The reverse sampler: K times a denoiser and a DDIM update, with fresh noise where eta > 0."""
    for k, (a, b, s) in enumerate(coefficients):
        z = ddim_update(z, model(z, k), a, b)
        if s != 0.0:
            z = z + s * step_noise(k)
    return z


def denoise(
    program: DenoiserProgram,
    z: Tensor,
    rows: Sequence[Tensor],
    tables: Sequence[Tensor],
    params: Sequence[Tensor],
    compute_dtype: torch.dtype,
    batch_stats: list[Tensor] | None = None,
) -> Tensor:
    """Run one denoising step.

    Args:
        program: the step.
        z: state [n, features].
        rows: each [n, width].
        tables: each [width] (one step for the whole batch) or [n, width].
        params: in the order of `program.params`.
        compute_dtype: operands of matrix products are rounded to it; sums and everything else stay in z's dtype.
        batch_stats: receives mean and biased variance of every training-mode BatchNorm, in order.
    """
    values: dict[str, Tensor] = {"z": z}
    values |= {f"r{i}": row for i, row in enumerate(rows)}
    values |= {f"t{i}": table.expand(z.shape[0], -1) for i, table in enumerate(tables)}
    for number, op in enumerate(program.ops, start=1):
        operands = [values[name] for name in op.inputs]
        weights = [None if index is None else params[index] for index in op.params]
        values[f"%{number}"] = _apply(op, operands, weights, compute_dtype, batch_stats)
    return values[program.output]


def _apply(
    op: Op,
    operands: list[Tensor],
    weights: list[Tensor | None],
    compute_dtype: torch.dtype,
    batch_stats: list[Tensor] | None,
) -> Tensor:
    x = operands[0]
    if op.kind == "linear":
        weight, bias = weights
        assert weight is not None
        if compute_dtype != x.dtype:  # rounded operands, exact products, sums in the state's precision
            product = F.linear(x.to(compute_dtype).to(x.dtype), weight.to(compute_dtype).to(x.dtype))
            return product if bias is None else product + bias
        return F.linear(x, weight, bias)
    if op.kind == "batch_norm":
        if batch_stats is not None:
            with torch.no_grad():
                variance, mean = torch.var_mean(x, dim=0, correction=0)
            batch_stats += [mean, variance]
        weight, bias = weights
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=op.attr("eps"))
    if op.kind == "batch_norm_eval":
        mean, var, weight, bias = weights  # type: ignore[assignment]
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=op.attr("eps"))
    if op.kind == "layer_norm":
        weight, bias = weights
        return F.layer_norm(x, x.shape[-1:], weight, bias, op.attr("eps"))
    if op.kind == "rms_norm":
        return F.rms_norm(x, x.shape[-1:], weights[0], eps=op.attr("eps"))
    if op.kind in _ACTIVATIONS:
        return _ACTIVATIONS[op.kind](x)
    if op.kind == "leaky_relu":
        return F.leaky_relu(x, op.attr("slope"))
    if op.kind == "elu":
        return F.elu(x, op.attr("alpha"))
    if op.kind == "add":
        return x + operands[1]
    if op.kind == "mul":
        return x * operands[1]
    if op.kind == "affine":
        return op.attr("scale") * x + op.attr("shift")
    if op.kind == "slice":
        return x[:, int(op.attr("start")) : int(op.attr("stop"))]
    if op.kind == "concat":
        return torch.cat(operands, dim=-1)
    raise NotImplementedError(f"operation {op.kind!r} has no reference")


def reverse_sample(
    program: DenoiserProgram,
    z_short: Tensor,
    alpha: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    rows: Sequence[Tensor],
    tables: Sequence[Tensor],
    params: Sequence[Tensor],
    coefficients: Coefficients,
    num_samples: int,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The whole sampler on a program; shapes as in `gdpd_kernels.ops`.

    Returns:
        z_hat [num_samples × batch, features] and the batch statistics [K, program.stats_width].
    """
    batch, features = z_short.shape

    def normals(step: int) -> Tensor:  # [num_samples × batch, features]
        if seed is None:
            raise ValueError("seed: noise must be drawn, but neither noise nor seed is given")
        draws = [
            philox_normal(seed, batch, features, step=step, sample=j, dtype=z_short.dtype, device=z_short.device)
            for j in range(num_samples)
        ]
        return torch.cat(draws)

    def repeat(x: Tensor) -> Tensor:
        return x if num_samples == 1 else x.repeat(num_samples, 1)

    if alpha is None:
        z = repeat(z_short)
    else:
        eps = normals(0) if noise is None else noise.reshape(num_samples * batch, features)
        z = noise_fused_init(repeat(z_short), repeat(alpha.expand(batch, -1)), eps)
    rows = [repeat(row) for row in rows]
    stats: list[Tensor] = []

    def model(z: Tensor, k: int) -> Tensor:
        return denoise(program, z, rows, [table[k] for table in tables], params, compute_dtype, stats)

    z_hat = reverse_loop(model, z, coefficients, lambda k: normals(k + 1))
    if not stats:
        return z_hat, z_short.new_empty(len(coefficients), 0)
    return z_hat, torch.cat(stats).reshape(len(coefficients), -1)


def prior_loss(
    program: DenoiserProgram,
    z_long: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    signal: Tensor,
    sigma: Tensor,
    rows: Sequence[Tensor],
    tables: Sequence[Tensor],
    params: Sequence[Tensor],
    prediction: str,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Mean squared error of the denoiser at one noised state per row (Ho et al., 2020, eq. 14).

    Args:
        signal, sigma: sqrt(alpha_bar_t) and sqrt(1 − alpha_bar_t) of each row, [batch].
        tables: each [batch, width], the row's own time step.

    Returns:
        the loss [] and the batch statistics [1, program.stats_width].
    """
    batch, features = z_long.shape
    if noise is None:
        if seed is None:
            raise ValueError("seed: noise must be drawn, but neither noise nor seed is given")
        noise = philox_normal(seed, batch, features, dtype=z_long.dtype, device=z_long.device)
    signal, sigma = signal[:, None], sigma[:, None]
    z_t = signal * z_long + sigma * noise
    stats: list[Tensor] = []
    predicted = denoise(program, z_t, rows, tables, params, compute_dtype, stats)
    target = {"eps": noise, "x0": z_long, "v": signal * noise - sigma * z_long}[prediction]
    loss = F.mse_loss(predicted, target)
    return loss, torch.cat(stats)[None] if stats else z_long.new_empty(1, 0)

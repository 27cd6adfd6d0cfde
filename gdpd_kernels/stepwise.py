"""The reference loop over a denoiser that no program stands for: the module itself runs, step by step.

So does any module under the transforms of `torch.func` (vmap, grad, jacrev, ...) and in forward mode, which see through
plain PyTorch only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gdpd_kernels.backends import BackendError, load, reference
from gdpd_kernels.capture import CapturedDenoiser
from gdpd_kernels.philox import philox_normal
from gdpd_kernels.schedule import DDIMTable
from gdpd_kernels.tracing import prediction_of

Denoiser = nn.Module | CapturedDenoiser


def check_backend(backend: str) -> None:
    """Under a transform: raises BackendError for a backend other than the reference, asked for by name."""
    if backend not in ("auto", "reference"):
        load(backend)  # an unknown name is another error
        raise BackendError(
            f"backend {backend!r} cannot run this call:\n  - a transform of torch.func (vmap, grad, jvp, ...) or "
            'forward-mode differentiation is active, and sees through plain PyTorch only\nUse backend="auto".'
        )


def _predictor(denoiser: Denoiser, cond: Tensor | None, compute: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """The module as a function of state and time steps, with products in `compute` as far as autocast can do that."""
    call = denoiser.call_module if isinstance(denoiser, CapturedDenoiser) else partial(_call, denoiser)

    def predict(z: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(z.device.type, dtype=compute, enabled=compute != z.dtype):
            predicted = call(z, t, cond)
        if not isinstance(predicted, Tensor) or predicted.shape != z.shape:
            got = tuple(predicted.shape) if isinstance(predicted, Tensor) else type(predicted).__name__
            raise ValueError(f"denoiser: returned {got}; expected a prediction of shape {tuple(z.shape)}")
        return predicted.to(z.dtype)

    return predict


def _call(module: nn.Module, z: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
    predicted: Tensor = prediction_of(module(z, t) if cond is None else module(z, t, cond))
    return predicted


def reverse_sample(
    denoiser: Denoiser,
    z_short: Tensor,
    table: DDIMTable,
    timesteps: Tensor,
    mix: Tensor | None,
    noise: Tensor | None,
    key: Tensor | None,
    cond: Tensor | None,
    samples: int,
    compute: torch.dtype,
) -> Tensor:
    """The reverse loop, [samples × batch, features]. `timesteps` are those of `table`, the rest as in the operator."""
    batch, features = z_short.shape

    def normals(step: int) -> Tensor:
        assert key is not None
        draws = [
            philox_normal(key, batch, features, step=step, sample=j, dtype=z_short.dtype, device=z_short.device)
            for j in range(samples)
        ]
        return torch.cat(draws)

    start = z_short.repeat(samples, 1)
    if mix is not None:
        eps = normals(0) if noise is None else noise.reshape(samples * batch, features)
        start = reference.noise_fused_init(start, mix.expand(batch, -1).repeat(samples, 1), eps)
    predict = _predictor(denoiser, None if cond is None else cond.repeat(samples, 1), compute)
    times = timesteps[:, None].expand(-1, samples * batch)
    return reference.reverse_loop(
        lambda z, k: predict(z, times[k]), start, table.coefficients, lambda k: normals(k + 1)
    )


def denoise(denoiser: Denoiser, z: Tensor, timesteps: Tensor, cond: Tensor | None, compute: torch.dtype) -> Tensor:
    """One prediction; arguments as in `gdpd_kernels.denoise`."""
    return _predictor(denoiser, cond, compute)(z, timesteps)


def prior_loss(
    denoiser: Denoiser,
    z_long: Tensor,
    timesteps: Tensor,
    noise: Tensor | None,
    key: Tensor | None,
    signal: Tensor,
    sigma: Tensor,
    cond: Tensor | None,
    prediction: str,
    compute: torch.dtype,
) -> Tensor:
    """The prior's loss; arguments as in the operator."""
    if noise is None:
        assert key is not None
        batch, features = z_long.shape
        noise = philox_normal(key, batch, features, dtype=z_long.dtype, device=z_long.device)
    signal, sigma = signal[:, None], sigma[:, None]
    predicted = _predictor(denoiser, cond, compute)(signal * z_long + sigma * noise, timesteps)
    target = {"eps": noise, "x0": z_long, "v": signal * noise - sigma * z_long}[prediction]
    return nn.functional.mse_loss(predicted, target)

"""The reference as a backend: it runs anything, on any device, in any floating dtype."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from gdpd_kernels.backends import Capabilities, reference
from gdpd_kernels.program import DenoiserProgram


def steps_of(coefficients: Sequence[float]) -> list[tuple[float, float, float]]:
    """[(a, b, s), ...] from the flat list that the operators carry."""
    return list(zip(coefficients[0::3], coefficients[1::3], coefficients[2::3], strict=True))


@contextmanager
def _recording() -> Iterator[None]:
    # An operator that was reached through the dispatcher, as under a profiler, has left autograd behind it: back to it.
    keys = torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView
    with ExitStack() as stack:
        for key in keys:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def without_autocast(device: str) -> Iterator[None]:
    """Autocast off for a device type, inside an operator."""
    # The operators state their precision themselves (compute_dtype); autocast inside would round the state as well.
    with torch.autocast(device, enabled=False):
        yield


def _leaves(tensors: Sequence[Tensor | None]) -> list[Any]:
    return [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]


def _instead(tensors: Sequence[Tensor | None], leaves: Sequence[Tensor | None]) -> list[Any]:
    """The tensors, with their leaves in place of those that have one."""
    return [tensor if leaf is None else leaf for tensor, leaf in zip(tensors, leaves, strict=True)]


def _gradients(output: Tensor, leaves: Sequence[Tensor | None], grad: Tensor | None) -> list[Tensor]:
    inputs = [leaf for leaf in leaves if leaf is not None]
    found = torch.autograd.grad(output, inputs, grad, allow_unused=True)
    # What an operator returns is dense, and no two of its results share memory: autograd promises neither.
    return [
        leaf.new_zeros(leaf.shape) if g is None else g.clone(memory_format=torch.contiguous_format)
        for leaf, g in zip(inputs, found, strict=True)
    ]


class ReferenceBackend:
    """Forward in plain PyTorch; backward computes forward again under autograd and keeps nothing in between."""

    CAPABILITIES = Capabilities()

    def unusable(self) -> list[str]:
        return []

    def saved_shape(self, program: DenoiserProgram, dtype: torch.dtype, save: int) -> tuple[int, int, int]:
        return 0, 1, 0

    def reverse_sample(
        self,
        program: DenoiserProgram,
        z_short: Tensor,
        alpha: Tensor | None,
        noise: Tensor | None,
        seed: Tensor | None,
        rows: Sequence[Tensor],
        tables: Sequence[Tensor],
        params: Sequence[Tensor],
        coefficients: Sequence[float],
        num_samples: int,
        compute_dtype: torch.dtype,
        save: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad(), without_autocast(z_short.device.type):
            z_hat, stats = reference.reverse_sample(
                program,
                z_short,
                alpha,
                noise,
                seed,
                rows,
                tables,
                params,
                steps_of(coefficients),
                num_samples,
                compute_dtype,
            )
        return z_hat.contiguous(), stats, z_short.new_empty(0)

    def reverse_sample_backward(
        self,
        grad: Tensor,
        program: DenoiserProgram,
        z_short: Tensor,
        alpha: Tensor | None,
        noise: Tensor | None,
        seed: Tensor | None,
        rows: Sequence[Tensor],
        tables: Sequence[Tensor],
        params: Sequence[Tensor],
        stats: Tensor,
        saved: Tensor,
        coefficients: Sequence[float],
        num_samples: int,
        compute_dtype: torch.dtype,
        save: int,
        wanted: Sequence[int],
    ) -> list[Tensor]:
        tensors = [z_short, alpha, *rows, *tables, *params]
        leaves = _leaves([tensor if i in wanted else None for i, tensor in enumerate(tensors)])
        z, mix, *rest = _instead(tensors, leaves)
        ends = len(rows), len(rows) + len(tables)
        with _recording(), without_autocast(z_short.device.type):
            z_hat, _ = reference.reverse_sample(
                program,
                z,
                mix,
                noise,
                seed,
                rest[: ends[0]],
                rest[ends[0] : ends[1]],
                rest[ends[1] :],
                steps_of(coefficients),
                num_samples,
                compute_dtype,
            )
            return _gradients(z_hat, leaves, grad)

    def prior_loss(
        self,
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
        wanted: Sequence[int],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        with torch.no_grad(), without_autocast(z_long.device.type):
            loss, stats = reference.prior_loss(
                program, z_long, noise, seed, signal, sigma, rows, tables, params, prediction, compute_dtype
            )
        return loss, stats, []

    def update_running_stats(
        self,
        means: Sequence[Tensor],
        variances: Sequence[Tensor],
        counters: Sequence[Tensor],
        stats: Tensor,
        widths: Sequence[int],
        momenta: Sequence[float],
        rows: int,
    ) -> None:
        unbiased = rows / (rows - 1)
        for step in stats:
            parts = iter(step.split([size for width in widths for size in (width, width)]))
            for mean, var, counter, momentum in zip(means, variances, counters, momenta, strict=True):
                batch_mean, batch_var = next(parts), next(parts)
                if mean.numel() == 0:
                    continue
                counter += 1
                share = momentum if momentum >= 0 else 1 / int(counter)
                mean.mul_(1 - share).add_(share * batch_mean.to(mean.dtype))
                var.mul_(1 - share).add_(share * (unbiased * batch_var).to(var.dtype))


def prior_loss_backward(
    grad: Tensor,
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
    wanted: Sequence[int],
) -> list[Tensor]:
    """Gradients of [z_long, *rows, *tables, *params] at `wanted`, for backends that do not fuse them with the loss."""
    tensors = [z_long, *rows, *tables, *params]
    leaves = _leaves([tensor if i in wanted else None for i, tensor in enumerate(tensors)])
    z, *rest = _instead(tensors, leaves)
    ends = len(rows), len(rows) + len(tables)
    with _recording(), without_autocast(z_long.device.type):
        loss, _ = reference.prior_loss(
            program,
            z,
            noise,
            seed,
            signal,
            sigma,
            rest[: ends[0]],
            rest[ends[0] : ends[1]],
            rest[ends[1] :],
            prediction,
            compute_dtype,
        )
        return _gradients(loss, leaves, grad)


BACKEND = ReferenceBackend()

"""The backends, what each can do, and the choice between them for a given call.

Each backend carries a frozen record of what it can do and answers, for a call, with the list of reasons why it cannot
take it (empty: it can). ``auto`` takes the first that can, in `ORDER`, and tells once per cause when it passes over a
faster one that might have been expected to serve. A backend asked for by name that cannot serve raises, with reasons.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gdpd_kernels.program import DenoiserProgram

# Fastest first.
ORDER = ("native", "triton", "reference")


class BackendError(RuntimeError):
    """A backend asked for by name cannot run the call: the message lists why."""


class BackendFallback(UserWarning):
    """``backend="auto"`` runs a call on a slower backend than the device has: the message says why."""


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do. An empty tuple means no limit.

    Args:
        devices: device types, such as ``"cpu"``.
        dtypes: dtypes of the state.
        compute_dtypes: dtypes of the operands of matrix products, beside the state's own.
        operations: kinds of program operations.
        max_width: the largest width of any value; None means no limit.
        fuses_prior_gradient: `prior_loss` computes its gradients in the forward call.
    """

    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    compute_dtypes: tuple[torch.dtype, ...] = ()
    operations: tuple[str, ...] = ()
    max_width: int | None = None
    fuses_prior_gradient: bool = False


class Request(NamedTuple):
    """What the choice of a backend depends on; the batch size is not part of it, so that shapes may stay dynamic."""

    program: DenoiserProgram
    device: str
    dtype: torch.dtype
    compute_dtype: torch.dtype


class Backend(Protocol):
    """What a backend module offers. Shapes as in `gdpd_kernels.ops`."""

    CAPABILITIES: Capabilities

    def unusable(self) -> list[str]:
        """Why the backend cannot be used in this process at all."""

    def saved_shape(self, program: DenoiserProgram, dtype: torch.dtype, save: int) -> tuple[int, int, int]:
        """What forward keeps for backward: numbers per step and row, the multiple that rows are rounded up to, and how
        many more at the end."""

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
        """z_hat, batch statistics and what backward needs."""

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
        """Gradients of [z_short, alpha, *rows, *tables, *params] at the positions `wanted`."""

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
        """Loss, batch statistics and, if the backend fuses them, the gradients of [z_long, *rows, *tables, *params]
        at the positions `wanted`; else no tensors."""

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
        """Update running statistics in place, as if the module had been called once per row of `stats`.

        All lists have one entry per BatchNorm; of one that keeps no statistics, mean, variance and counter
        (num_batches_tracked) are empty tensors. One that is called twice occurs twice. A negative momentum stands for
        a cumulative average.
        """


@cache
def load(name: str) -> Backend:
    """The backend's module; nothing of a backend is imported before it is asked for."""
    if name not in ORDER:
        raise ValueError(f"backend: {name!r} is not known; known are 'auto', {', '.join(map(repr, ORDER))}")
    return importlib.import_module(f"gdpd_kernels.backends.{name}_backend").BACKEND


def reasons(name: str, request: Request) -> list[str]:
    """Why backend `name` cannot run `request`; empty if it can."""
    backend = load(name)
    why = list(backend.unusable())
    can = backend.CAPABILITIES
    if can.devices and request.device not in can.devices:
        why.append(f"tensors are on {request.device}; it runs on {', '.join(can.devices)}")
    if can.dtypes and request.dtype not in can.dtypes:
        why.append(f"the state is {request.dtype}; it takes {', '.join(map(str, can.dtypes))}")
    compute = request.compute_dtype
    if can.compute_dtypes and compute != request.dtype and compute not in can.compute_dtypes:
        why.append(f"compute_dtype is {compute}; it takes {', '.join(map(str, can.compute_dtypes))}")
    if can.operations:
        missing = sorted({op.kind for op in request.program.ops} - set(can.operations))
        if missing:
            why.append(f"it has no operation {', '.join(missing)}")
    widest = max(request.program.widths.values())
    if can.max_width is not None and widest > can.max_width:
        why.append(f"the program is {widest} wide; its limit is {can.max_width}")
    return why


@lru_cache(maxsize=1024)
def resolve(name: str, request: Request) -> str:
    """The backend that runs `request`.

    Raises:
        BackendError: `name` is a backend's and it cannot.
        ValueError: `name` is unknown.
    """
    if name != "auto":
        why = reasons(name, request)
        if why:
            listed = "\n".join(f"  - {reason}" for reason in why)
            raise BackendError(
                f'backend {name!r} cannot run this call:\n{listed}\nUse backend="auto" to run it elsewhere.'
            )
        return name
    passed_over: dict[str, list[str]] = {}
    for candidate in ORDER:
        why = reasons(candidate, request)
        if not why:
            # Only a backend for this device counts as passed over: nobody expects a CPU kernel on a GPU.
            for faster, causes in passed_over.items():
                if request.device in load(faster).CAPABILITIES.devices:
                    _warn_once(f"running on backend {candidate!r}; {faster!r} cannot: {'; '.join(causes)}")
            return candidate
        passed_over[candidate] = why
    listed = "\n".join(f"  - {candidate}: {'; '.join(why)}" for candidate, why in passed_over.items())
    raise BackendError(f"no backend can run this call:\n{listed}")


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, BackendFallback, stacklevel=4)


def saved_numel(shape: tuple[int, int, int], steps: int, rows: int) -> int:
    """Numbers that forward keeps for backward, from `Backend.saved_shape`; `rows` may be symbolic."""
    per_row, multiple, more = shape
    return steps * per_row * ((rows + multiple - 1) // multiple * multiple) + more


def backends() -> list[dict[str, object]]:
    """Every backend with ``name``, ``usable`` and the ``reasons`` why it is not, fastest first."""
    found = []
    for name in ORDER:
        why = load(name).unusable()
        found.append({"name": name, "usable": not why, "reasons": why})
    return found

"""What a backend checks of the tensors that an operator hands it, before their addresses go to a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gdpd_kernels.program import DenoiserProgram


def dense(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor, row after row in memory. An address tells a kernel nothing of what lies there: it is checked here."""
    if tensor.shape != shape or tensor.dtype is not dtype or tensor.device != device:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, {tensor.dtype} on {tensor.device}; "
            f"expected {list(shape)}, {dtype} on {device}"
        )
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def dense_all(
    program: DenoiserProgram,
    rows: Sequence[Tensor],
    tables: Sequence[Tensor],
    params: Sequence[Tensor],
    batch: int,
    steps: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Rows [batch, width], tables [steps, width] and parameters, each as `dense`."""
    if len(rows) != len(program.rows) or len(tables) != len(program.tables) or len(params) != len(program.params):
        raise ValueError(
            f"rows, tables, params: {len(rows)}, {len(tables)} and {len(params)} tensors; the program takes "
            f"{len(program.rows)}, {len(program.tables)} and {len(program.params)}"
        )
    return (
        [dense("rows", x, (batch, width), dtype, device) for x, width in zip(rows, program.rows, strict=True)],
        [dense("tables", x, (steps, width), dtype, device) for x, width in zip(tables, program.tables, strict=True)],
        [dense("params", x, shape, dtype, device) for x, shape in zip(params, program.params, strict=True)],
    )


def check_alpha(alpha: Tensor | None, batch: int, features: int, dtype: torch.dtype, device: torch.device) -> None:
    """alpha is absent, or broadcasts to [batch, features]."""
    if alpha is None or (
        alpha.dim() == 2
        and alpha.shape[0] in (1, batch)
        and alpha.shape[1] in (1, features)
        and alpha.dtype is dtype
        and alpha.device == device
    ):
        return
    raise ValueError(
        f"alpha has shape {list(alpha.shape)}, {alpha.dtype} on {alpha.device}; "
        f"expected what broadcasts to {[batch, features]}, {dtype} on {device}"
    )


def check_seed(seed: Tensor | None, draws: bool, device: torch.device) -> None:
    """There is an int64 key where noise is drawn."""
    if not draws:
        return
    if seed is None:
        raise ValueError("seed: noise must be drawn, but neither noise nor seed is given")
    if seed.numel() != 1 or seed.dtype is not torch.int64 or seed.device != device:
        raise ValueError(
            f"seed has shape {list(seed.shape)}, {seed.dtype} on {seed.device}; expected int64 [] on {device}"
        )


def alpha_strides(alpha: Tensor | None) -> tuple[int, int]:
    """Strides of alpha in a walk over [batch, features]: zero where it is broadcast."""
    if alpha is None:
        return 0, 0
    row, col = alpha.stride()
    return (0 if alpha.shape[0] == 1 else row), (0 if alpha.shape[1] == 1 else col)

"""Soft-DTW between batches of sequences (Cuturi and Blondel, arXiv 1703.01541), forward and backward by anti-diagonals.

The cells of one anti-diagonal depend on the two before it and not on each other, so a table of n × m takes n + m - 1
steps of whole-batch operations, forward (algorithm 1) and backward (algorithm 2).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_dtw(
    x: Tensor, y: Tensor, gamma: float, x_lengths: Tensor | None = None, y_lengths: Tensor | None = None
) -> Tensor:
    """Soft-DTW of each pair of sequences, with squared Euclidean distances between steps.

    Args:
        x: [batch, n, width].
        y: [batch, m, width].
        gamma: smoothing, above 0; towards 0 the value goes to that of DTW. It may be negative.
        x_lengths, y_lengths: int64 [batch], valid steps of each sequence; None when all have n (m).

    Returns:
        [batch], differentiable once, in float32 or float64.

    Raises:
        ValueError: gamma not above 0; shapes that do not fit.
    """
    if not gamma > 0:
        raise ValueError(f"gamma={gamma} is not above 0.")
    if x.dim() != 3 or y.dim() != 3 or len(x) != len(y) or x.shape[2] != y.shape[2]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}; expected [batch, n, width] and [batch, m, width]."
        )
    with torch.autocast(x.device.type, enabled=False):
        exact = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        x, y = x.to(exact), y.to(exact)
        squares = x.square().sum(2).unsqueeze(2) + y.square().sum(2).unsqueeze(1)
        cost = torch.baddbmm(squares, x, y.transpose(1, 2), alpha=-2)
        ends = [
            torch.full((len(x),), steps, device=x.device) if lengths is None else lengths.to(x.device)
            for lengths, steps in ((x_lengths, x.shape[1]), (y_lengths, y.shape[1]))
        ]
        value: Tensor = _SoftDTW.apply(cost, gamma, ends[0] - 1, ends[1] - 1)
    return value


class _SoftDTW(torch.autograd.Function):
    """r[i, j] = cost[i, j] + softmin(r[i-1, j-1], r[i-1, j], r[i, j-1]); the value is r at each pair's last cell."""

    @staticmethod
    def forward(ctx: Any, cost: Tensor, gamma: float, last_row: Tensor, last_column: Tensor) -> Tensor:
        batch, n, m = cost.shape
        diagonals = _by_diagonals(cost)  # [n + m - 1, batch, n]: cell (i, j) at [i + j, :, i]
        shares = diagonals.new_empty(len(diagonals), 3, batch, n)  # of each predecessor in the softmin
        table = torch.empty_like(diagonals)
        # One place before row 0: infinite, but for the corner that the path starts from.
        before = cost.new_full((batch, n + 1), torch.inf)
        corner = before.clone()
        corner[:, 0] = 0
        two_before = corner
        for d, here in enumerate(diagonals):
            from_ = torch.stack((two_before[:, :-1], before[:, :-1], before[:, 1:])) / -gamma
            soft = from_.logsumexp(dim=0)
            shares[d] = (from_ - soft).exp().nan_to_num_(0.0)  # no predecessor: -inf + inf
            table[d] = here - gamma * soft
            two_before, before = before, F.pad(table[d], (1, 0), value=torch.inf)
        rows = torch.arange(batch, device=cost.device)
        ctx.save_for_backward(shares, last_row, last_column, rows)
        ctx.columns = m
        return table[last_row + last_column, rows, last_row]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        shares, last_row, last_column, rows = ctx.saved_tensors
        steps, _, batch, n = shares.shape
        # d value / d r by diagonals; the cost's gradient is the same, since r holds it with factor 1.
        flow = shares.new_zeros(steps, batch, n)
        flow[last_row + last_column, rows, last_row] = gradient
        for d in range(steps - 1, 0, -1):
            corner, above, left = shares[d] * flow[d]
            flow[d - 1] += left
            flow[d - 1, :, :-1] += above[:, 1:]
            if d > 1:
                flow[d - 2, :, :-1] += corner[:, 1:]
        return _from_diagonals(flow, ctx.columns), None, None, None


def _by_diagonals(cost: Tensor) -> Tensor:
    """[batch, n, m] with row i moved i places to the right, as [n + m - 1, batch, n]; infinite outside."""
    batch, n, m = cost.shape
    wide = F.pad(cost, (0, n), value=torch.inf).reshape(batch, -1)  # rows one longer than those read next
    return wide[:, : n * (n + m - 1)].view(batch, n, n + m - 1).permute(2, 0, 1).contiguous()


def _from_diagonals(diagonals: Tensor, m: int) -> Tensor:
    """The reverse of `_by_diagonals`: [n + m - 1, batch, n] to [batch, n, m]."""
    _, batch, n = diagonals.shape
    flat = F.pad(diagonals.permute(1, 2, 0).reshape(batch, -1), (0, n))
    return flat.view(batch, n, n + m)[:, :, :m]

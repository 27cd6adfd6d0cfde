"""Soft-DTW between batches of sequences (Cuturi and Blondel, arXiv 1703.01541), forward and backward by anti-diagonals.

The cells of one anti-diagonal depend on the two before it and not on each other, so a table of n × m takes n + m - 1
steps of whole-batch operations, forward (algorithm 1) and backward (algorithm 2).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_FAR = 1e30  # stands for infinity: some hundred of them still add up, and their differences are no NaN


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
    """r[i, j] = cost[i, j] + softmin(r[i-1, j-1], r[i-1, j], r[i, j-1]); the value is r at each pair's last cell.

    Kept is q = -r / gamma, q[i, j] = logsumexp(q[i-1, j-1], q[i-1, j], q[i, j-1]) - cost[i, j] / gamma. The batch comes
    last in memory, so that a diagonal and the one moved by a row are both contiguous.
    """

    @staticmethod
    def forward(ctx: Any, cost: Tensor, gamma: float, last_row: Tensor, last_column: Tensor) -> Tensor:
        batch, n, m = cost.shape
        costs = _by_diagonals(cost / gamma)
        # Before the first diagonal two more, and a place before row 0: out of reach, but for the corner paths start at.
        table = cost.new_full((n + m + 1, n + 1, batch), -_FAR)
        table[0, 0] = 0
        soft = torch.empty_like(costs)  # logsumexp of the predecessors
        above, here = table[:, :-1].unbind(0), table[:, 1:].unbind(0)
        for d, (costs_here, soft_here) in enumerate(zip(costs.unbind(0), soft.unbind(0), strict=True)):
            torch.logaddexp(torch.logaddexp(above[d], above[d + 1]), here[d + 1], out=soft_here)
            torch.sub(soft_here, costs_here, out=here[d + 2])
        pairs = torch.arange(batch, device=cost.device)
        ctx.save_for_backward(table, soft, last_row, last_column, pairs)
        return -gamma * table[last_row + last_column + 2, last_row + 1, pairs]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        table, soft, last_row, last_column, pairs = ctx.saved_tensors
        # The share of each predecessor in the softmin of each cell, by diagonals.
        corner, above, left = (
            (part - soft).exp_().unbind(0) for part in (table[:-2, :-1], table[1:-1, :-1], table[1:-1, 1:])
        )
        # d value / d r by diagonals; the cost's gradient is the same, since r holds it with factor 1.
        flow = torch.zeros_like(soft)
        flow[last_row + last_column, last_row, pairs] = gradient
        parts, but_last = flow.unbind(0), flow[:, :-1].unbind(0)
        for d in range(len(parts) - 1, 0, -1):
            parts[d - 1].addcmul_(left[d], parts[d])
            but_last[d - 1].addcmul_(above[d][1:], parts[d][1:])
            if d > 1:
                but_last[d - 2].addcmul_(corner[d][1:], parts[d][1:])
        return _from_diagonals(flow, len(parts) + 1 - flow.shape[1]), None, None, None


def _by_diagonals(cost: Tensor) -> Tensor:
    """Cell (i, j) of [batch, n, m] at [i + j, i] of [n + m - 1, n, batch]; out of reach elsewhere."""
    batch, n, m = cost.shape
    wide = F.pad(cost, (0, n), value=_FAR).reshape(batch, -1)  # rows one longer than those read next
    return wide[:, : n * (n + m - 1)].view(batch, n, n + m - 1).permute(2, 1, 0).contiguous()


def _from_diagonals(diagonals: Tensor, m: int) -> Tensor:
    """The reverse of `_by_diagonals`: [n + m - 1, n, batch] to [batch, n, m]."""
    _, n, batch = diagonals.shape
    flat = F.pad(diagonals.permute(2, 1, 0).reshape(batch, -1), (0, n))
    return flat.view(batch, n, n + m)[:, :, :m]

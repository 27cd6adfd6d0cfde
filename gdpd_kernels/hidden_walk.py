"""The sampler's walk in hidden space, for denoisers that begin and end in a linear layer.

An unclipped DDIM step is linear, z' = a z + b prediction. Let the only thing that reads z be u = W1 z, and let the
prediction be W3 h + b3, with h made of u. Then the walk needs no z: with q the weighted sum of the h so far,

    u' = a u + b (W1 W3 h + W1 b3),    q' = a q + b h,    q_0 = 0,

which is a DDIM walk of the state [u, q] under the same coefficients, of a denoiser whose prediction is
[W1 W3 h + W1 b3, h]. At its end z_K = A z_0 + W3 q_K + B b3, with A the product of all a and B the walk of 1 from 0.
It replaces F (h1 + h2) multiply-adds per row and step by h1 h2. The same in real arithmetic; the start and the end are
computed outside, under ordinary autograd, so that gradients reach W1 and W3 too.

A residual prediction z + W3 h + b3 is walked the same way, with a + b in place of a.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from gdpd_kernels.passes import Rewrite, fold_time_tables
from gdpd_kernels.program import DenoiserProgram, Op

# (program, z, alpha, noise, seed, rows, tables, params, coefficients, samples) -> z_hat and the batch statistics
Operator = Callable[..., tuple[Tensor, Tensor]]

# The cost model, in multiply-adds of the native backend, fitted to the measurements in docs/performance.md.
PASSES = {"forward": 1, "inputs": 2, "parameters": 3}  # products of a call in those of forward, by what it computes
STATE_MACS = {"forward": 30, "inputs": 100, "parameters": 150}  # per number of the state [u, q] and step, all passes
OUTSIDE_MACS = 150  # per number that start and end read or write, and pass
CALL_MACS = 50_000_000  # per pass: one more operator call, some ten more nodes of autograd


@dataclass(frozen=True)
class HiddenWalk:
    """How a program is walked in hidden space.

    Args:
        program: the denoiser of the state [u, q].
        tables_folded: the rewrite of the original program that `program` and the indices below start from.
        first: indices of W1 and b1; the second is None where the first layer has no bias.
        last: the same of W3 and b3.
        kept: indices of the parameters that `program` takes as they are, before W1 W3 (and W1 b3).
        residual: z itself is added to the prediction.
    """

    program: DenoiserProgram
    tables_folded: Rewrite
    first: tuple[int, int | None]
    last: tuple[int, int | None]
    kept: tuple[int, ...]
    residual: bool

    @property
    def widths(self) -> tuple[int, int, int]:
        """F, h1 and h2."""
        folded = self.tables_folded.program
        return folded.features, folded.params[self.first[0]][0], folded.params[self.last[0]][1]

    def saved(self, rows: int, steps: int, computes: str) -> int:
        """Multiply-adds that walking this way saves a call, by the cost model; below zero, it costs.

        Args:
            computes: ``"forward"`` alone, gradients of ``"inputs"`` too, or of ``"parameters"`` too.
        """
        (features, h1, h2), passes = self.widths, PASSES[computes]
        outer = features * (h1 + h2)
        per_step = passes * (outer - h1 * h2) - STATE_MACS[computes] * (h1 + h2)
        outside = passes * (outer + OUTSIDE_MACS * (features + h1 + h2))
        return rows * (steps * per_step - outside) - passes * (features * h1 * h2 + CALL_MACS)

    def run(
        self,
        operator: Operator,
        z_short: Tensor,
        alpha: Tensor | None,
        noise: Tensor | None,
        seed: Tensor | None,
        rows: Sequence[Tensor],
        tables: Sequence[Tensor],
        params: Sequence[Tensor],
        coefficients: Sequence[float],
        samples: int,
    ) -> tuple[Tensor, Tensor]:
        """z_hat [samples × batch, features] and the batch statistics; arguments as in `gdpd_kernels.ops`, eta = 0."""
        params, tables = self.tables_folded.transform(params, tables)
        (w1, b1), (w3, b3) = ([None if i is None else params[i] for i in pair] for pair in (self.first, self.last))
        assert w1 is not None
        assert w3 is not None
        walked = [params[i] for i in self.kept] + [w1 @ w3] + ([] if b3 is None else [w1 @ b3])
        steps = len(coefficients) // 3
        tables = [*tables, b1.expand(steps, -1)] if b1 is not None else tables
        flat, end_z, end_b3 = _coefficients(tuple(coefficients), self.residual)
        # The direct walk's own start, by a sampler of one step that changes nothing: noise is drawn as there.
        start = z_short
        if alpha is not None or samples > 1:
            start, _ = operator(_itself(z_short.shape[1]), z_short, alpha, noise, seed, [], [], [], _STAY, samples)
        u = start @ w1.t()
        state = torch.cat([u, u.new_zeros(len(u), w3.shape[1])], dim=1)
        repeated = [row if samples == 1 else row.repeat(samples, 1) for row in rows]
        state, stats = operator(self.program, state, None, None, None, repeated, tables, walked, flat, 1)
        z_hat = torch.addmm(start, state[:, w1.shape[0] :], w3.t(), beta=end_z)
        return z_hat if b3 is None else torch.add(z_hat, b3, alpha=end_b3), stats


_STAY = (1.0, 0.0, 0.0)


@lru_cache(maxsize=64)
def _itself(features: int) -> DenoiserProgram:
    return DenoiserProgram(features, (), (), (), (), "z")


@lru_cache(maxsize=64)
def _coefficients(flat: tuple[float, ...], residual: bool) -> tuple[tuple[float, ...], float, float]:
    """The walk's own coefficients, the product A of all a, and the walk B of 1 from 0."""
    end_z, end_b3 = 1.0, 0.0
    walked: list[float] = []
    for a, b, s in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
        a = a + b if residual else a
        end_z, end_b3 = a * end_z, a * end_b3 + b
        walked += [a, b, s]
    return tuple(walked), end_z, end_b3


@lru_cache(maxsize=256)
def hidden_walk(original: DenoiserProgram) -> HiddenWalk | None:
    """The walk in hidden space of a program; None where it does not begin and end in a linear layer."""
    tables_folded = fold_time_tables(original)
    program = tables_folded.program
    readers = [i for i, op in enumerate(program.ops) if "z" in op.inputs]
    last, ends = _operation(program, program.output, "linear"), [program.output]
    added = _operation(program, program.output, "add")
    if added is not None and "z" in program.ops[added].inputs:
        readers.remove(added)
        left, right = program.ops[added].inputs
        ends.append(right if left == "z" else left)
        last = _operation(program, ends[-1], "linear")
    if last is None or len(readers) != 1 or readers[0] == last or program.ops[readers[0]].kind != "linear":
        return None
    # What makes the prediction disappears, so nothing else may read it.
    if any(end in op.inputs for i, op in enumerate(program.ops) if i != added for end in ends):
        return None
    return _rewritten(tables_folded, readers[0], last, added)


def _operation(program: DenoiserProgram, operand: str, kind: str) -> int | None:
    """Position of the operation of this kind behind an operand."""
    at = int(operand[1:]) - 1 if operand.startswith("%") else -1
    return at if at >= 0 and program.ops[at].kind == kind else None


def _rewritten(tables_folded: Rewrite, first: int, last: int, added: int | None) -> HiddenWalk:
    program = tables_folded.program
    (w1, b1), (w3, b3) = program.ops[first].params, program.ops[last].params
    assert w1 is not None
    assert w3 is not None
    others = [op for i, op in enumerate(program.ops) if i not in (first, last, added)]
    kept = tuple(sorted({i for op in others for i in op.params if i is not None}))
    h1, h2 = program.params[w1][0], program.params[w3][1]
    shapes = [program.params[i] for i in kept] + [(h1, h2)] + ([] if b3 is None else [(h1,)])
    ops = [Op("slice", ("z",), attrs=(0.0, float(h1)))]
    if b1 is not None:  # u + b1: a table with the same row at every step
        ops.append(Op("add", ("%1", f"t{len(program.tables)}")))
    named = {f"%{first + 1}": f"%{len(ops)}"}
    for i, op in enumerate(program.ops):
        if i in (first, last, added):
            continue
        inputs = tuple(named.get(x, x) for x in op.inputs)
        ops.append(replace(op, inputs=inputs, params=tuple(None if p is None else kept.index(p) for p in op.params)))
        named[f"%{i + 1}"] = f"%{len(ops)}"
    (h,) = (named.get(x, x) for x in program.ops[last].inputs)
    ops.append(Op("linear", (h,), (len(kept), None if b3 is None else len(kept) + 1)))
    ops.append(Op("concat", (f"%{len(ops)}", h)))
    tables = program.tables if b1 is None else (*program.tables, h1)
    walked = DenoiserProgram(h1 + h2, tables, program.rows, tuple(shapes), tuple(ops), f"%{len(ops)}")
    return HiddenWalk(walked, tables_folded, (w1, b1), (w3, b3), kept, added is not None)

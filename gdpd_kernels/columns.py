"""How operations that move numbers within a row read in a program: slices, joins, permutations, repetitions.

Where every number goes is found by running the operation on numbered columns; a program says it by slices, put
together again by concat.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from gdpd_kernels.operations import Obstacle, Operand, check_pieces, handles, shape_text, width
from gdpd_kernels.tracing import Unexpected

if TYPE_CHECKING:
    from gdpd_kernels.lowering import Lowering

_FAR = 2**40  # between the numbers of two rows
_ROWS = 2  # numbered rows: as many as it takes to see that a row does not read another


@handles("detach")
def _detach(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    raise Obstacle("cuts the gradient (.detach()), which a captured denoiser would not")


@handles("slice", "select", "split", "split_with_sizes", "unbind")
@handles("expand", "repeat", "t", "transpose", "permute", "flip", "roll")
def _move(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Any:
    """Operations that move, leave out or repeat numbers of a row."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    found = _where_from(low, node)
    operand = low.operand(source)
    parts = [_gather(low, operand, columns, width(source.meta["val"])) for columns in found]
    return parts if isinstance(node.meta["val"], list | tuple) else parts[0]


@handles("cat", "stack")
def _cat(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    (columns,) = _where_from(low, node)
    joined = low.emit("concat", *(low.operand(part) for part in a["tensors"]))
    return _gather(low, joined, columns, len(columns))


@handles("view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze", "alias", "clone", "_to_copy")
@handles("lift_fresh", "mean", "sum", "amax", "_adaptive_avg_pool2d")
def _same_row(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    """Operations that at most rearrange memory; the reductions among them run over dimensions of size 1."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = source.meta["val"], node.meta["val"]
    if width(before) != width(after):
        raise Obstacle(f"turns {shape_text(before)} into {shape_text(after)}, which is not the same row of numbers")
    return low.operand(source)


def seen(low: Lowering, operand: Operand, value: Tensor, view: Callable[[Tensor], Tensor]) -> Operand:
    """The operand of `value` as the row of ``view(value)``, a view that keeps samples apart."""
    return _gather(low, operand, view(_numbered(value, 0)).flatten().tolist(), width(value))


def _numbered(value: Tensor, first: int) -> Tensor:
    """One row of the shape of `value`, its columns numbered from `first`."""
    return first + torch.arange(width(value)).view(1, *(int(size) for size in value.shape[1:]))


def _where_from(low: Lowering, node: fx.Node) -> list[list[int]]:
    """For each result of an operation, the columns of its operands, side by side, that its row is made of."""
    first = 0

    def numbered(argument: Any) -> Any:
        nonlocal first
        if argument is low.trace.batch:
            return _ROWS
        if isinstance(argument, fx.Node):
            value = argument.meta["val"]
            columns = _numbered(value, first)
            first += width(value)
            return torch.cat([columns, columns + _FAR])
        if isinstance(argument, Unexpected):
            raise Obstacle(f"uses {argument}")
        if isinstance(argument, list | tuple):
            return [numbered(part) for part in argument]
        return argument

    assert callable(node.target)
    arguments = numbered(node.args)
    keywords = {name: numbered(value) for name, value in node.kwargs.items()}
    results = node.target(*arguments, **keywords)
    found = []
    for result in results if isinstance(results, list | tuple) else [results]:
        rows = result.reshape(_ROWS, -1) if result.dim() and result.shape[0] == _ROWS else result.new_zeros(_ROWS, 1)
        if not torch.equal(rows[0] + _FAR, rows[1]) or rows[0].max() >= _FAR:
            raise Obstacle("its result does not hold one row per sample, made of that sample's numbers")
        found.append(rows[0].tolist())
    return found


def _gather(low: Lowering, operand: Operand, columns: list[int], size: int) -> Operand:
    """These columns of an operand of `size` columns."""
    # Runs of adjoining columns: within one, the column less its place stays the same.
    runs = [
        (found[0][1], found[-1][1] + 1)
        for _, group in itertools.groupby(enumerate(columns), lambda pair: pair[1] - pair[0])
        if (found := list(group))
    ]
    different = dict.fromkeys(runs)
    check_pieces(len(different))
    pieces = {
        run: operand if run == (0, size) else low.emit("slice", operand, attrs=(float(run[0]), float(run[1])))
        for run in different
    }
    return pieces[runs[0]] if len(runs) == 1 else low.emit("concat", *(pieces[run] for run in runs))

"""Rewrites of a program into a cheaper one that computes the same: exact in real arithmetic, each tested alone.

A pass maps a program to a `Rewrite`: the new program, and formulas for its parameters and tables in terms of the old
ones. The formulas are evaluated under autograd at every call, so parameters stay live and gradients reach them.
Passes know nothing of each other: ``Rewrite.then`` chains them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from gdpd_kernels.program import DenoiserProgram, Op

__all__ = ["Formula", "Rewrite", "fold_batch_norm_eval", "fold_time_tables", "tables_as_rows"]

_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "neg": torch.neg,
    "times_rows": lambda weight, scale: weight * scale[:, None],  # [out, in], [out]
    "mv": torch.mv,
    "linear": torch.nn.functional.linear,
    "rsqrt": lambda var, eps: torch.rsqrt(var + eps),
}


@dataclass(frozen=True)
class Formula:
    """How a tensor follows from the parameters and tables of the original program.

    Args:
        name: ``"param"`` or ``"table"`` with an index, ``"number"`` with a value, or a key of the known functions.
        of: the arguments of a function.
        value: the index or the number.
    """

    name: str
    of: tuple[Formula, ...] = ()
    value: float = 0

    def evaluate(
        self, params: Sequence[Tensor], tables: Sequence[Tensor], known: dict[Formula, Tensor]
    ) -> Tensor | float:
        """The tensor; `known` keeps what several formulas share."""
        if self.name == "param":
            return params[int(self.value)]
        if self.name == "table":
            return tables[int(self.value)]
        if self.name == "number":
            return self.value
        if self not in known:
            known[self] = _FUNCTIONS[self.name](*(part.evaluate(params, tables, known) for part in self.of))
        return known[self]

    def substitute(self, params: Sequence[Formula], tables: Sequence[Formula]) -> Formula:
        """This formula in terms of an earlier program, given how its parameters and tables follow from that one's."""
        if self.name in ("param", "table"):
            return (params if self.name == "param" else tables)[int(self.value)]
        return replace(self, of=tuple(part.substitute(params, tables) for part in self.of))

    def __str__(self) -> str:
        if self.name == "number":
            return repr(self.value)
        if self.name in ("param", "table"):
            return f"{self.name[0]}{int(self.value)}"
        return f"{self.name}({', '.join(map(str, self.of))})"


@dataclass(frozen=True)
class Rewrite:
    """A program and how its parameters and tables follow from those of the original; its rows are the same.

    Args:
        program: the new program.
        params: a formula for each of `program.params`.
        tables: a formula for each of `program.tables`.
    """

    program: DenoiserProgram
    params: tuple[Formula, ...]
    tables: tuple[Formula, ...]

    @property
    def changed(self) -> bool:
        """Whether the rewrite does anything."""
        return any(formula.of for formula in (*self.params, *self.tables))

    def transform(self, params: Sequence[Tensor], tables: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters and tables of the new program, as differentiable functions of the original's.

        Args:
            params: in the order of the original program.
            tables: each [steps, width], in the order of the original program.
        """
        known: dict[Formula, Tensor] = {}
        new_params = [formula.evaluate(params, tables, known) for formula in self.params]
        new_tables = [formula.evaluate(params, tables, known) for formula in self.tables]
        return new_params, new_tables  # type: ignore[return-value]  # numbers occur only inside of formulas

    def then(self, rewrite: Callable[[DenoiserProgram], Rewrite]) -> Rewrite:
        """This rewrite followed by another pass, as one."""
        following = rewrite(self.program)
        return Rewrite(
            following.program,
            tuple(formula.substitute(self.params, self.tables) for formula in following.params),
            tuple(formula.substitute(self.params, self.tables) for formula in following.tables),
        )


@lru_cache(maxsize=256)
def fold_batch_norm_eval(program: DenoiserProgram) -> Rewrite:
    """Fold every BatchNorm in evaluation mode into a linear layer beside it.

    With s = weight / sqrt(var + eps) and c = bias − mean s, BN(y) = s y + c. It disappears

    - into the linear layer before it, if nothing else reads that layer's result (also across the addition of a time
      table): W' = s W by rows, b' = s b + c, t' = s t;
    - else into the linear layers after it, if nothing else reads its own result: W' = W s by columns, b' = b + W c.

    Where neither holds it stays as it is.
    """
    draft = _Draft(program)
    # Of norms in a row, the last folds into the layer after them and leaves its place to the one before. Every fold
    # takes a norm away, so this comes to rest.
    before: list[Op] = []
    while before != draft.ops:
        before = list(draft.ops)
        for position in range(len(draft.ops)):
            if draft.ops[position].kind == "batch_norm_eval" and draft.alive(position):
                _fold_before(draft, position) or _fold_after(draft, position)
    return draft.finish()


@lru_cache(maxsize=256)
def fold_time_tables(program: DenoiserProgram) -> Rewrite:
    """Turn tables that are added around linear layers into per-step biases.

    - ``linear(x + t, W, b)`` becomes ``linear(x, W) + t'`` with t' = t W^T + b, if only linear layers read x + t;
    - ``linear(x, W, b) + t`` becomes ``linear(x, W) + t'`` with t' = t + b, if nothing else reads the layer's result;
    - ``(x + t) + u`` becomes ``x + t'`` with t' = t + u, if nothing else reads x + t.
    """
    draft = _Draft(program)
    # A table only ever moves down the program or merges with another, so this comes to rest.
    before: list[Op] = []
    while before != draft.ops:
        before = list(draft.ops)
        for position in range(len(draft.ops)):
            for rule in (_absorb, _push_through_linear):
                if draft.alive(position):
                    rule(draft, position)
    return draft.finish()


# --- BatchNorm --------------------------------------------------------------------------------------------------------


def _scale_and_shift(draft: _Draft, op: Op) -> tuple[Formula, Formula]:
    mean, var, weight, bias = (None if index is None else draft.params[index] for index in op.params)
    assert mean is not None
    assert var is not None
    scale = _f("rsqrt", var, Formula("number", value=op.attr("eps")))
    if weight is not None:
        scale = _f("mul", weight, scale)
    centre = _f("mul", mean, scale)
    return scale, _f("neg", centre) if bias is None else _f("sub", bias, centre)


def _fold_before(draft: _Draft, position: int) -> bool:
    norm = draft.ops[position]
    source = norm.inputs[0]
    added = draft.made_by(source, "add")
    table = None
    if added is not None and draft.readers(source) == [position]:
        table = next((operand for operand in added.inputs if operand.startswith("t")), None)
        if table is not None:
            source = added.inputs[1 - added.inputs.index(table)]
    linear = draft.made_by(source, "linear")
    if linear is None or len(draft.readers(source)) != 1 or draft.output == source:
        return False
    if draft.readers(norm.inputs[0]) != [position] or draft.output == norm.inputs[0]:
        return False
    scale, shift = _scale_and_shift(draft, norm)
    weight, bias = linear.params
    assert weight is not None
    new_weight = draft.add_param(_f("times_rows", draft.params[weight], scale), weight, norm)
    new_bias = shift if bias is None else _f("add", _f("mul", draft.params[bias], scale), shift)
    params = new_weight, draft.add_vector(new_bias, bias, norm, draft.width(source))
    draft.replace(source, replace(linear, params=params))
    if table is not None:
        scaled = draft.add_table(_f("mul", draft.tables[int(table[1:])], scale), draft.width(source))
        draft.replace(norm.inputs[0], Op("add", (source, scaled)))
    draft.forward(position, norm.inputs[0])
    return True


def _fold_after(draft: _Draft, position: int) -> bool:
    norm, result = draft.ops[position], f"%{position + 1}"
    readers = draft.readers(result)
    if not readers or draft.output == result or any(draft.ops[i].kind != "linear" for i in readers):
        return False
    scale, shift = _scale_and_shift(draft, norm)
    for reader in readers:
        linear = draft.ops[reader]
        weight, bias = linear.params
        assert weight is not None
        old = draft.params[weight]
        moved = _f("mv", old, shift)
        new_bias = moved if bias is None else _f("add", draft.params[bias], moved)
        params = (
            draft.add_param(_f("mul", old, scale), weight, norm),
            draft.add_vector(new_bias, bias, norm, draft.width(f"%{reader + 1}")),
        )
        draft.replace(f"%{reader + 1}", replace(linear, params=params))
    draft.forward(position, norm.inputs[0])
    return True


# --- time tables ------------------------------------------------------------------------------------------------------


def _push_through_linear(draft: _Draft, position: int) -> None:
    """linear(x + t, W, b) -> linear(x, W) + (t W^T + b), for all readers of x + t or for none."""
    added = draft.ops[position]
    table = _added_table(added)
    readers = draft.readers(f"%{position + 1}")
    if table is None or not readers or draft.output == f"%{position + 1}":
        return
    if any(draft.ops[reader].kind != "linear" for reader in readers):
        return
    other = added.inputs[1 - added.inputs.index(table)]
    for reader in readers:
        linear = draft.ops[reader]
        weight, bias = linear.params
        assert weight is not None
        arguments = [draft.tables[int(table[1:])], draft.params[weight]]
        arguments += [] if bias is None else [draft.params[bias]]
        biases = draft.add_table(_f("linear", *arguments), draft.width(f"%{reader + 1}"))
        product = draft.insert(Op("linear", (other,), (weight, None)))
        draft.replace(f"%{reader + 1}", Op("add", (product, biases)))


def _absorb(draft: _Draft, position: int) -> None:
    """linear(x, W, b) + t -> linear(x, W) + (t + b), and (x + t) + u -> x + (t + u)."""
    added = draft.ops[position]
    table = _added_table(added)
    if table is None:
        return
    other = added.inputs[1 - added.inputs.index(table)]
    if draft.readers(other) != [position] or draft.output == other:
        return
    formula, width = draft.tables[int(table[1:])], draft.width(f"%{position + 1}")
    linear, inner = draft.made_by(other, "linear"), draft.made_by(other, "add")
    if linear is not None and linear.params[1] is not None:
        bias = draft.params[linear.params[1]]
        draft.replace(other, replace(linear, params=(linear.params[0], None)))
        merged = draft.add_table(_f("add", formula, bias), width)
        draft.replace(f"%{position + 1}", Op("add", (other, merged)))
    elif inner is not None:
        earlier = _added_table(inner)
        if earlier is not None:
            merged = draft.add_table(_f("add", draft.tables[int(earlier[1:])], formula), width)
            rest = inner.inputs[1 - inner.inputs.index(earlier)]
            draft.replace(f"%{position + 1}", Op("add", (rest, merged)))


def _added_table(op: Op) -> str | None:
    """The table in an addition of one table to something that is none."""
    if op.kind != "add":
        return None
    tables = [operand for operand in op.inputs if operand.startswith("t")]
    return tables[0] if len(tables) == 1 else None


# --- drafts -----------------------------------------------------------------------------------------------------------


def _f(name: str, *of: Formula) -> Formula:
    return Formula(name, of)


class _Draft:
    """A program under change. Operations keep their names until `finish`, which drops what nothing reads any more."""

    def __init__(self, program: DenoiserProgram) -> None:
        self.program = program
        self.ops = list(program.ops)
        self.order = list(range(len(self.ops)))  # in which the operations run
        self.output = program.output
        self.params = [Formula("param", value=i) for i in range(len(program.params))]
        self.shapes = list(program.params)
        self.names = list(program.names or (f"p{i}" for i in range(len(program.params))))
        self.tables = [Formula("table", value=i) for i in range(len(program.tables))]
        self.table_widths = list(program.tables)
        self.widths = dict(program.widths)

    def width(self, operand: str) -> int:
        return self.widths[operand]

    def made_by(self, operand: str, kind: str) -> Op | None:
        """The operation behind an operand, if it is of this kind."""
        op = self.ops[int(operand[1:]) - 1] if operand.startswith("%") else None
        return op if op is not None and op.kind == kind else None

    def readers(self, operand: str) -> list[int]:
        """Positions of the operations that read an operand."""
        alive = self._reachable()
        return [i for i, op in enumerate(self.ops) if operand in op.inputs and i in alive]

    def alive(self, position: int) -> bool:
        """Whether the prediction depends on an operation."""
        return position in self._reachable()

    def _reachable(self) -> set[int]:
        alive: set[int] = set()
        waiting = [self.output]
        while waiting:
            operand = waiting.pop()
            if operand.startswith("%") and int(operand[1:]) - 1 not in alive:
                alive.add(int(operand[1:]) - 1)
                waiting += self.ops[int(operand[1:]) - 1].inputs
        return alive

    def replace(self, operand: str, op: Op) -> None:
        self.ops[int(operand[1:]) - 1] = op

    def forward(self, position: int, operand: str) -> None:
        """Let everything that reads an operation read `operand` instead."""
        name = f"%{position + 1}"
        self.ops = [
            replace(op, inputs=tuple(operand if x == name else x for x in op.inputs)) if name in op.inputs else op
            for op in self.ops
        ]
        self.output = operand if self.output == name else self.output

    def insert(self, op: Op) -> str:
        """A new operation; it runs as soon as what it reads is there."""
        self.ops.append(op)
        name = f"%{len(self.ops)}"
        weight = op.params[0]
        assert weight is not None
        self.widths[name] = self.shapes[weight][0]
        return name

    def add_param(self, formula: Formula, like: int, norm: Op) -> int:
        self.params.append(formula)
        self.shapes.append(self.shapes[like])
        self.names.append(f"{self.names[like]} with {self._norm_name(norm)}")
        return len(self.params) - 1

    def add_vector(self, formula: Formula, like: int | None, norm: Op, width: int) -> int:
        self.params.append(formula)
        self.shapes.append((width,))
        name = self._norm_name(norm)
        self.names.append(f"shift of {name}" if like is None else f"{self.names[like]} with {name}")
        return len(self.params) - 1

    def _norm_name(self, norm: Op) -> str:
        mean = norm.params[0]
        assert mean is not None
        return self.names[mean].removesuffix(".running_mean")

    def add_table(self, formula: Formula, width: int) -> str:
        self.tables.append(formula)
        self.table_widths.append(width)
        return f"t{len(self.tables) - 1}"

    def finish(self) -> Rewrite:
        """Sort, drop and renumber."""
        order: list[str] = []

        def visit(operand: str) -> None:
            if operand.startswith("%") and operand not in order:
                for source in self.ops[int(operand[1:]) - 1].inputs:
                    visit(source)
                order.append(operand)

        visit(self.output)
        if self.ops == list(self.program.ops):  # nothing was folded: the program as it is, unused parts included
            identity = tuple(self.params), tuple(self.tables)
            return Rewrite(self.program, *identity)
        ops = [self.ops[int(operand[1:]) - 1] for operand in order]
        params = list(dict.fromkeys(index for op in ops for index in op.params if index is not None))
        read = {operand for op in ops for operand in op.inputs} | {self.output}
        tables = [i for i in range(len(self.tables)) if f"t{i}" in read]
        renamed = {operand: f"%{i}" for i, operand in enumerate(order, start=1)}
        renamed |= {f"t{old}": f"t{new}" for new, old in enumerate(tables)}
        indices = {old: new for new, old in enumerate(params)}
        program = DenoiserProgram(
            self.program.features,
            tuple(self.table_widths[i] for i in tables),
            self.program.rows,
            tuple(self.shapes[i] for i in params),
            tuple(
                replace(
                    op,
                    inputs=tuple(renamed.get(operand, operand) for operand in op.inputs),
                    params=tuple(None if index is None else indices[index] for index in op.params),
                )
                for op in ops
            ),
            renamed.get(self.output, self.output),
            tuple(self.names[i] for i in params),
        )
        return Rewrite(program, tuple(self.params[i] for i in params), tuple(self.tables[i] for i in tables))


@lru_cache(maxsize=64)
def tables_as_rows(program: DenoiserProgram) -> DenoiserProgram:
    """The same program with every table ``t0..`` as a row after ``r0..``: for calls with a time step per batch row."""
    first = len(program.rows)

    def renamed(operand: str) -> str:
        return f"r{first + int(operand[1:])}" if operand.startswith("t") else operand

    ops = tuple(replace(op, inputs=tuple(map(renamed, op.inputs))) for op in program.ops)
    rows = (*program.rows, *program.tables)
    return replace(program, tables=(), rows=rows, ops=ops, output=renamed(program.output))

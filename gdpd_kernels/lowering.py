"""Turns the trace of a denoiser into a program and the prologues that feed it: the second half of `capture`.

Every value of the trace is sorted by what it depends on. What depends on parameters alone becomes a parameter, what
depends on the time step alone a table, on the condition alone a row; the three are computed once per call, under
ordinary autograd. What depends on the state, or on time and condition together, becomes the program.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import gdpd_kernels.activations  # noqa: F401  (it fills HANDLERS, as columns does)
from gdpd_kernels.columns import seen
from gdpd_kernels.operations import HANDLERS, HINTS, RANDOM, Obstacle, folded, name_of, shape_text, width
from gdpd_kernels.program import DenoiserProgram, Op, ProgramError
from gdpd_kernels.prologue import Prologue, PrologueBuilder
from gdpd_kernels.tracing import Trace, Unexpected
from gdpd_kernels.written_norms import Statistic, written_norm

aten = torch.ops.aten

# What a value depends on.
_TIME, _COND, _STATE = 1, 2, 4


class CaptureError(ValueError):
    """A denoiser that cannot be captured.

    Args:
        reasons: one line for every obstacle: module path, operation and why.
    """

    # No __init__: torch.compile could not follow it.

    @property
    def reasons(self) -> list[str]:
        """The obstacles, each once."""
        return list(dict.fromkeys(self.args[0]))

    def __str__(self) -> str:
        lines = "\n".join(f"  - {reason}" for reason in self.reasons)
        return f"the denoiser cannot be captured:\n{lines}"


@dataclass(frozen=True)
class Lowered:
    """A program, and where its parameters, tables, rows and BatchNorms come from.

    `batch_norms` holds, for every training-mode BatchNorm of the program, the path of its module, or its width where
    no module keeps its statistics.
    """

    program: DenoiserProgram
    params: Prologue
    tables: Prologue
    rows: Prologue
    batch_norms: tuple[str | int, ...]


def lower(trace: Trace, features: int) -> Lowered:
    """The program of a trace. Raises CaptureError with every obstacle found."""
    return Lowering(trace, features).run()


class Lowering:
    """One pass over a trace, operation by operation; `operations` says how each of them reads."""

    def __init__(self, trace: Trace, features: int) -> None:
        self.trace = trace
        self.features = features
        self.obstacles = list(trace.obstacles)
        self.ops: list[Op] = []
        self.values: dict[fx.Node, Any] = {}  # the operand of a node of the program
        self.batch_norms: list[str | int] = []
        self.names: list[str] = []
        self.depends, self.mutators = _dependencies(trace)
        self.params = PrologueBuilder(trace, None, self.mutators)
        self.tables = PrologueBuilder(trace, trace.t, self.mutators)
        self.rows = PrologueBuilder(trace, trace.cond, self.mutators)

    def run(self) -> Lowered:
        needed = self._needed()
        for node in self.trace.graph.nodes:
            if node.op == "call_function" and node in needed:
                if self._in_program(node):
                    self._lower_node(node)
                else:
                    self._check_prologue(node)
        output = self._output()
        if self.obstacles or output is None:
            raise CaptureError(self.obstacles)
        try:
            program = DenoiserProgram(
                self.features,
                self.tables.widths,
                self.rows.widths,
                self.params.shapes,
                *_without_unread(self.ops, output),
                tuple(self.names),
            )
        except ProgramError as error:
            raise CaptureError([f"the module: {error}"]) from error
        prologues = self.params.build(), self.tables.build(), self.rows.build()
        return Lowered(program, *prologues, tuple(self.batch_norms))

    # --- the walk -----------------------------------------------------------------------------------------------------

    def _needed(self) -> set[fx.Node]:
        """Nodes that the output depends on, in-place changes included; every node if the run broke off."""
        if self.trace.output is None:
            return set(self.trace.graph.nodes)
        needed: set[fx.Node] = set()
        waiting = [self.trace.output]
        while waiting:
            node = waiting.pop()
            if node not in needed:
                needed.add(node)
                waiting += node.all_input_nodes
                waiting += self.mutators.get(node.meta.get("storage", 0), ())
        return needed

    def _in_program(self, node: fx.Node) -> bool:
        return bool(self.depends[node] & _STATE) or self.depends[node] == _TIME | _COND

    def _lower_node(self, node: fx.Node) -> None:
        try:
            value = self._handle(node)
        except Obstacle as why:
            self._report(node, str(why))
            value = None
        self.values[node] = value
        if node in self.mutators.get(node.meta["storage"], ()):
            self._overwrite(node, value)

    def _handle(self, node: fx.Node) -> Any:
        if name_of(node) == "getitem":
            parts = self.values.get(node.args[0])  # type: ignore[arg-type]
            index = node.args[1]
            assert isinstance(index, int)
            return parts[index] if parts is not None and index < len(parts) else None
        name = name_of(node)
        if name.endswith("_") and not name.startswith("__"):
            name = name[:-1]
        if not node.meta["grad"]:
            raise Obstacle("runs under torch.no_grad(), while a captured denoiser is differentiated throughout")
        arguments = _arguments(node)
        norm = written_norm(self, node, arguments) if self._holds_rows(node) else None
        if norm is not None:
            return norm
        if name not in HANDLERS:
            known = [self.values.get(source) for source in node.all_input_nodes]
            statistic = next((value for value in known if isinstance(value, Statistic)), None)
            raise Obstacle(str(statistic or HINTS.get(name, "this operation has no counterpart in a program")))
        self._check_result(node)
        return HANDLERS[name](self, node, arguments)

    def _holds_rows(self, node: fx.Node) -> bool:
        values = _tensors(node.meta["val"])
        return all(x.dim() > 0 and self.trace.is_batch(x.shape[0]) and x.dtype == self.trace.dtype for x in values)

    def _check_result(self, node: fx.Node) -> None:
        """A value of the program holds one row per sample, in the dtype of the state."""
        results = _tensors(node.meta["val"])
        for value in results if name_of(node).startswith(("split", "unbind")) else results[:1]:
            if value.dim() == 0 or not self.trace.is_batch(value.shape[0]):
                raise Obstacle(f"its result {shape_text(value)} does not hold one row per sample")
            if any(isinstance(size, torch.SymInt) for size in value.shape[1:]):
                raise Obstacle(f"its result {shape_text(value)} mixes the rows of different samples")
            if value.dtype != self.trace.dtype:
                raise Obstacle(f"computes in {value.dtype}, while the state is {self.trace.dtype}")

    def _overwrite(self, node: fx.Node, value: Any) -> None:
        """After an in-place operation, whatever shares its memory reads the new value."""
        for other in self.trace.graph.nodes:
            if other is not node and other.meta.get("storage") == node.meta["storage"]:
                same = str(other.meta["val"].numel()) == str(node.meta["val"].numel())
                self.values[other] = value if same else Obstacle("reads memory that was changed in part, in place")

    def _check_prologue(self, node: fx.Node) -> None:
        """What feeds the program must treat every time step, or row of the condition, by itself."""
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return self._report(node, RANDOM)
        for argument in _flat([node.args, node.kwargs]):
            if isinstance(argument, Unexpected):
                self._report(node, f"uses {argument}")
        scalars = (*node.args, *node.kwargs.values())
        if self.trace.batch in scalars and name_of(node) != "native_group_norm":
            self._report(node, "computes with the batch size")
        per_row = self.depends[node] == _COND or (self.depends[node] == _TIME and self.trace.t_per_row)
        sizes = [size for value in _tensors(node.meta["val"]) for size in value.shape]
        if per_row and not any(isinstance(size, torch.SymInt) for size in sizes):
            self._report(node, "its result mixes the rows of different samples")
        storage = node.meta["storage"]
        if node in self.mutators.get(storage, ()):
            changed = [leaf.name for x, leaf in self.trace.leaves.items() if x.meta["storage"] == storage]
            if changed:
                self._report(node, f"changes {changed[0]} in place, which a fused sampler does not repeat")

    def _report(self, node: fx.Node, why: str) -> None:
        self.obstacles.append(f"{node.meta['where']}: {name_of(node)}: {why}")

    def _output(self) -> str | None:
        node = self.trace.output
        if node is None:
            return None
        value = node.meta["val"]
        rows = value.dim() > 1 and self.trace.is_batch(value.shape[0])
        if not rows or width(value) != self.features:
            self.obstacles.append(
                f"the module: returned {shape_text(value)}; expected a prediction [batch, {self.features}]"
            )
            return None
        try:
            return self.operand(node)
        except Obstacle as why:
            self.obstacles.append(f"the module: its result {why}")
            return None

    # --- for the handlers ---------------------------------------------------------------------------------------------

    def is_value(self, argument: Any) -> bool:
        """Whether an argument is a tensor, not a number (or the batch size)."""
        return isinstance(argument, fx.Node) and argument is not self.trace.batch

    def operand(self, node: fx.Node) -> str | None:
        """Operand of a node, in its own shape: a value of the program, or a table or row. None after an obstacle."""
        if not self._in_program(node):
            value = node.meta["val"]
            batched = value.dim() > 0 and self.trace.is_batch(value.shape[0])
            return self.external(node, value.shape[1 if batched or value.dim() > 1 else 0 :])
        if node is self.trace.z and node not in self.values:
            return "z"
        value = self.values.get(node)
        if isinstance(value, Obstacle):
            raise value
        if isinstance(value, Statistic):
            raise Obstacle(str(value))
        return value

    def operand_like(self, node: fx.Node, like: Tensor, scale: float = 1.0) -> str | None:
        """Operand of ``scale * node``, expanded to the shape of `like`: the result of an elementwise operation."""
        if not self._in_program(node):
            return self.external(node, like.shape[1:], scale)
        value, sizes = node.meta["val"], tuple(like.shape[1:])
        operand = self.operand(node)
        if folded(value) != folded(like):  # a value repeated within its row
            operand = seen(self, operand, value, lambda row: row.expand(1, *sizes))
        return operand if scale == 1.0 else self.emit("affine", operand, attrs=(scale, 0.0))

    def inverse(self, at: fx.Node, node: fx.Node) -> fx.Node:
        """A node that holds one over `node`, in the state's dtype, taken where `at` runs."""
        if self._in_program(node):
            raise Obstacle("divides by a value that is made of the state, which has no counterpart in a program")
        dtype = self.trace.dtype
        if node.meta["val"].dtype != dtype:
            node = self._before(at, node, aten._to_copy.default, dtype=dtype)
        return self._before(at, node, aten.reciprocal.default)

    def _before(self, at: fx.Node, node: fx.Node, operation: Any, **keywords: Any) -> fx.Node:
        """A new node ``operation(node)`` in the trace, before `at`."""
        with self.trace.graph.inserting_before(at):
            made = self.trace.graph.call_function(operation, (node,), keywords)
        value = operation(node.meta["val"], **keywords)
        made.meta = {**at.meta, "val": value, "storage": value.untyped_storage()._cdata}
        self.depends[made] = self.depends[node]
        return made

    def external(self, node: fx.Node, sizes: Any, scale: float = 1.0) -> str:
        """Operand of ``scale * node``, expanded to rows of these sizes, for what no state enters: a table or a row."""
        sizes = tuple(map(int, sizes))
        if self.depends[node] == _COND:
            return f"r{self.rows.rows(node, sizes, scale)}"
        return f"t{self.tables.rows(node, sizes, scale)}"

    def param(self, node: fx.Node | None, *views: tuple[Any, ...]) -> int | None:
        """Index of a parameter, seen through a chain of ``(operation, *arguments)``; None for None."""
        if node is None:
            return None
        if not isinstance(node, fx.Node) or self.depends[node]:
            raise Obstacle("its weights depend on its input; they must be parameters")
        # t(t(W)) is W, which saves building a graph for the weights of every plain Linear.
        while views and views[0] == (aten.t.default,) and name_of(node) == "t":
            (node,), views = node.all_input_nodes, views[1:]
        if node.meta["val"].dtype != self.trace.dtype:
            raise Obstacle(f"its weights are {node.meta['val'].dtype}, while the state is {self.trace.dtype}")
        index = self.params.tensor(node, views)
        if index == len(self.names):
            leaf = self.trace.leaves.get(node)
            name = f"{node.meta['where']}: {name_of(node)}" if leaf is None else leaf.name
            seen = "".join(f".{view[0]._schema.name.split('::')[1]}{view[1:]}" for view in views)
            self.names.append(name + seen)
        return index

    def emit(
        self,
        kind: str,
        *inputs: str | None,
        params: tuple[int | None, ...] = (),
        attrs: tuple[float, ...] = (),
    ) -> str | None:
        """Append an operation; None if one of its inputs has met an obstacle."""
        known = [operand for operand in inputs if operand is not None]
        if len(known) < len(inputs):
            return None
        self.ops.append(Op(kind, tuple(known), params, attrs))
        return f"%{len(self.ops)}"


def _without_unread(ops: list[Op], output: str) -> tuple[tuple[Op, ...], str]:
    """The operations and the output without what nobody reads, such as a half that a split leaves over.

    Those with parameters stay, so that these have a gradient; and BatchNorms, for their statistics.
    """
    read = {output}
    kept: list[int] = []
    for number in range(len(ops), 0, -1):
        op = ops[number - 1]
        if f"%{number}" in read or op.kind == "batch_norm" or any(index is not None for index in op.params):
            kept.insert(0, number)
            read.update(op.inputs)
    renamed = {f"%{old}": f"%{new}" for new, old in enumerate(kept, start=1)}
    found = (ops[number - 1] for number in kept)
    renumbered = tuple(replace(op, inputs=tuple(renamed.get(x, x) for x in op.inputs)) for op in found)
    return renumbered, renamed.get(output, output)


def _dependencies(trace: Trace) -> tuple[dict[fx.Node, int], dict[int, list[fx.Node]]]:
    """What every node depends on, and for every storage the operations that change it in place."""
    roots = {trace.z: _STATE, trace.t: _TIME, trace.cond: _COND}
    mutators: dict[int, list[fx.Node]] = {}
    for node in trace.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and schema is not None and schema.is_mutable:
            # The counter of a BatchNorm is looked after by the operators, with its running statistics.
            counter = isinstance(node.meta["owner"], nn.modules.batchnorm._BatchNorm) and node.args[0] in trace.leaves
            if not counter:
                mutators.setdefault(node.meta["storage"], []).append(node)
    depends: dict[fx.Node, int] = {}
    shared = dict.fromkeys(mutators, 0)
    for _ in range(3 if mutators else 1):  # memory depends on whatever it is changed with later
        for node in trace.graph.nodes:
            flags = roots.get(node, 0)
            for source in node.all_input_nodes:
                flags |= depends[source]
            if flags and node.target in (F.batch_norm, torch.batch_norm) and _arguments(node).get("training"):
                flags |= _STATE  # batch statistics couple the rows: they cannot be taken ahead of the loop
            storage = node.meta.get("storage")
            if storage in shared:
                shared[storage] |= flags
                flags = shared[storage]
            depends[node] = flags
    return depends, mutators


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a node by name."""
    if node.target is F.batch_norm:
        names = ["input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"]
    elif node.target is torch.batch_norm:
        names = ["input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"]
    elif node.target is F.rms_norm:
        names = ["input", "normalized_shape", "weight", "eps"]
    else:
        arguments = node.target._schema.arguments  # type: ignore[union-attr]
        defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
        named = dict(zip((argument.name for argument in arguments), node.args, strict=False))
        return defaults | named | dict(node.kwargs)
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    return [x for part in value for x in _flat(part)] if isinstance(value, list | tuple) else [value]


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in _flat(value) if isinstance(x, Tensor)]

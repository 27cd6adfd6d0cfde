"""What is computed once per call before the sampler runs: parameters, tables over time, rows over the condition.

A prologue is a piece of the traced forward pass, kept as ordinary differentiable PyTorch: all K time steps go through
it at once. `lowering` says what must come out of it, `capture` runs it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, fx

from gdpd_kernels.tracing import Leaf, Trace

aten = torch.ops.aten

View = tuple[Any, ...]  # an operation and its arguments after the first

# A lookup in an embedding is cheaper than comparing the embedding; a sinusoid and a linear layer are not.
_KEPT_FROM = 4  # operations


def _is_function(target: Any) -> bool:
    """Whether an operation writes into nothing. That it draws nothing, lowering has made sure of."""
    return isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable


@dataclass(frozen=True, eq=False)
class Prologue:
    """A piece of the forward pass that is ready to run.

    Args:
        leaves: the tensors that it reads, in the order in which it takes them.
        graph: takes ``(batch, source, *leaves)`` and returns a list of tensors; None where the outputs are the leaves
            themselves, as they are.
        keeps: same inputs, same outputs, by more work than comparing the leaves would be: worth keeping for frozen
            modules.
    """

    leaves: tuple[Leaf, ...]
    graph: fx.GraphModule | None
    keeps: bool = False

    def run(self, batch: int, source: Tensor | None, leaves: list[Tensor]) -> list[Tensor]:
        """The outputs for `source` (the time steps [batch], the condition [batch, C], or None)."""
        if self.graph is None:
            return leaves
        found: list[Tensor] = self.graph.forward(batch, source, *leaves)
        return found


class PrologueBuilder:
    """Collects what must come out, then copies the part of the trace that makes it."""

    def __init__(self, trace: Trace, source: fx.Node | None, mutators: Mapping[int, Sequence[fx.Node]]) -> None:
        self.trace = trace
        self.source = source
        self.mutators = mutators
        self.outputs: dict[Any, tuple[fx.Node, Any]] = {}
        self.shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of every output of `rows`."""
        return tuple(shape[-1] for shape in self.shapes)

    def tensor(self, node: fx.Node, views: Sequence[View] = ()) -> int:
        """Index of the output `node`, seen through `views`; made contiguous unless it is a leaf as it is."""
        shape = torch.empty(tuple(map(int, node.meta["val"].shape)), device="meta")
        for operation, *arguments in views:
            shape = operation(shape, *arguments)
        return self._index(("tensor", node, repr(views)), node, views, tuple(shape.shape))

    def rows(self, node: fx.Node, sizes: Sequence[int], scale: float = 1.0) -> int:
        """Index of the output ``scale * node``, expanded to [batch, *sizes] and folded to [batch, width]."""
        width = reduce(operator.mul, sizes, 1)
        same = list(node.meta["val"].shape[1:]) == list(sizes) and node.meta["val"].dim() > 0
        # Two layouts of the same row are one output, unless expanding makes them differ.
        key = ("rows", node, width if same else tuple(sizes), scale)
        return self._index(key, node, (tuple(sizes), scale), (width,))

    def _index(self, key: Any, node: fx.Node, form: Any, shape: tuple[int, ...]) -> int:
        if key not in self.outputs:
            self.outputs[key] = (node, form)
            self.shapes += (shape,)
        return list(self.outputs).index(key)

    def build(self) -> Prologue:
        """The prologue of all outputs asked for so far."""
        requests = list(self.outputs.items())
        leaves = self.trace.leaves
        if all(key[0] == "tensor" and not form and node in leaves for key, (node, form) in requests):
            return Prologue(tuple(leaves[node] for _, (node, _) in requests), None)
        needed = self._needed([node for node, _ in self.outputs.values()])
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {self.trace.batch: graph.placeholder("batch")}
        source = graph.placeholder("source")
        if self.source is not None:
            env[self.source] = source
        taken = [node for node in self.trace.graph.nodes if node in needed and node in leaves]
        for node in taken:
            env[node] = graph.placeholder(node.name)

        def read(node: fx.Node, grad: bool) -> fx.Node:
            # Gradients that the module cut with torch.no_grad stay cut.
            cut = grad and node.op == "call_function" and not node.meta["grad"]
            return graph.call_function(aten.detach.default, (env[node],)) if cut else env[node]

        for node in self.trace.graph.nodes:
            if node in needed and node not in env:
                env[node] = graph.node_copy(node, partial(read, grad=node.meta["grad"]))
        results = [
            self._shape_tensor(graph, read(node, True), form)
            if key[0] == "tensor"
            else self._shape_rows(graph, env[self.trace.batch], read(node, True), node.meta["val"], *form)
            for key, (node, form) in requests
        ]
        graph.output(results)
        calls = [node.target for node in graph.nodes if node.op == "call_function"]
        keeps = len(calls) >= _KEPT_FROM and all(map(_is_function, calls))
        for node in graph.nodes:
            node.meta = {}  # fake tensors have no business in what is kept
            if node.target is aten.embedding.default and len(node.args) == 2 and not node.kwargs:
                node.target = torch.embedding  # the same in half the time: no way through torch.ops from Python
        return Prologue(tuple(leaves[node] for node in taken), fx.GraphModule({}, graph), keeps)

    def _needed(self, roots: list[fx.Node]) -> set[fx.Node]:
        needed: set[fx.Node] = set()
        waiting = list(roots)
        while waiting:
            node = waiting.pop()
            if node not in needed:
                needed.add(node)
                waiting += node.all_input_nodes
                waiting += self.mutators.get(node.meta.get("storage", 0), ())
        return needed

    def _shape_tensor(self, graph: fx.Graph, value: fx.Node, views: Sequence[View]) -> fx.Node:
        for operation, *arguments in views:
            value = graph.call_function(operation, (value, *arguments))
        return graph.call_method("contiguous", (value,))

    def _shape_rows(
        self,
        graph: fx.Graph,
        batch: fx.Node,
        value: fx.Node,
        fake: Tensor,
        sizes: tuple[int, ...],
        scale: float,
    ) -> fx.Node:
        if fake.dtype != self.trace.dtype:
            value = graph.call_method("to", (value, self.trace.dtype))
        if scale != 1.0:
            value = graph.call_function(aten.mul.Tensor, (value, scale))
        whole = fake.dim() > 0 and self.trace.is_batch(fake.shape[0]) and tuple(fake.shape[1:]) == sizes
        if not whole:
            value = graph.call_function(aten.expand.default, (value, [batch, *sizes]))
        if len(sizes) != 1:
            value = graph.call_function(aten.reshape.default, (value, [batch, reduce(operator.mul, sizes, 1)]))
        return value

"""Runs a denoiser once on tensors without data and writes down what it computes: the first half of `capture`.

The module's forward is really executed, on fake tensors that carry a symbolic batch size, so it may branch in Python
on dtypes, widths and flags as it likes; branches on the batch size or on data are found and reported. A copy of the
module is run, never the module itself: no buffer, counter or random state of the original changes.
"""

from __future__ import annotations

import copy
import logging
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten

_BATCH_HINT = 1009  # stands for any batch size; no layer is that wide, so that nothing fits it by accident
_TORCH_FOLDER = os.path.dirname(torch.__file__)

# Kept whole: below, they turn into whatever the device and the gradient mode happen to want.
_KEPT_WHOLE: dict[Callable[..., Any], Callable[..., Any]] = {
    F.batch_norm: F.batch_norm,
    torch.batch_norm: torch.batch_norm,
    F.rms_norm: F.rms_norm,
    torch.rms_norm: F.rms_norm,
}

# They take a tensor only for its shape; written down as the constants that they are.
_FILLED_LIKE: dict[Any, float | None] = {
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
    aten.full_like.default: None,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
    aten.new_full.default: None,
}


@dataclass(frozen=True)
class Leaf:
    """Where a tensor that the forward pass reads lives in the module.

    Args:
        path: dotted path of the owning submodule, ``""`` for the module itself.
        store: ``"_parameters"``, ``"_buffers"``, ``"__dict__"``, or ``""`` for a tensor found nowhere in the module.
        key: name within the store.
        constant: the tensor itself, where `store` is empty.
    """

    path: str
    store: str
    key: str
    constant: Tensor | None = None

    @property
    def name(self) -> str:
        return f"{self.path}.{self.key}" if self.path else self.key

    def find(self, module: nn.Module) -> Any:
        """The tensor, as the module holds it now."""
        if not self.store:
            return self.constant
        owner = module.get_submodule(self.path) if self.path else module
        return getattr(owner, self.key)


@dataclass
class Trace:
    """One run of a denoiser as a graph of ATen operations.

    Every node's ``meta`` holds ``val`` (fake tensor, or a tuple of them), ``path`` and ``owner`` (the submodule that
    ran it), ``where`` (the same for people), ``grad`` (whether gradients were on) and ``storage`` (what it shares
    memory with). `shadow` is the copy that ran, `touched` the plain attributes ``(path, name)`` that it changed.
    """

    graph: fx.Graph
    batch: fx.Node
    z: fx.Node
    t: fx.Node
    cond: fx.Node | None
    batch_symbol: Any
    dtype: torch.dtype
    t_per_row: bool
    output: fx.Node | None = None
    leaves: dict[fx.Node, Leaf] = field(default_factory=dict)
    obstacles: list[str] = field(default_factory=list)
    shadow: nn.Module | None = None
    touched: set[tuple[str, str]] = field(default_factory=set)

    def is_batch(self, size: Any) -> bool:
        """Whether a size is the batch size itself."""
        return isinstance(size, torch.SymInt) and size.node.expr == self.batch_symbol


def trace(module: nn.Module, features: int, cond_features: int | None, map_input: bool, t_per_row: bool) -> Trace:
    """Run `module` on ``z`` [batch, features] (or [batch, features, 1, 1]), ``t`` and, where given, ``cond``.

    Args:
        module: the denoiser.
        features: width of z.
        cond_features: width of the condition; None to call ``module(z, t)``.
        map_input: z is a 1 × 1 map, [batch, features, 1, 1].
        t_per_row: t is int64 [batch]; if not, a 0-d tensor.

    Returns:
        the trace; `Trace.obstacles` is not empty if the run failed, and then `Trace.output` may be None.
    """
    # Imported here: they bring in sympy and the compiler, seconds that nobody who captures nothing should wait.
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    dtype, device = _dtype_and_device(module)
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    with ExitStack() as stack:
        # The caller may be anything: autocast, inference mode, a compiler. None of that belongs to the denoiser.
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(_unlogged("torch._subclasses.fake_tensor"))
        # Hooks of the caller's, such as those of checkpointing, would count what this run saves for no backward pass.
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_itself, _itself))
        with FakeCopyMode(mode):
            memo: dict[int, Any] = {}
            shadow = copy.deepcopy(module, memo)

        def fake(name: str, *sizes: int, of: torch.dtype) -> Tensor:
            dims = [DimDynamic.DUCK, *[DimDynamic.STATIC] * len(sizes[1:])] if sizes else []
            return mode.from_tensor(
                torch.empty(sizes, dtype=of, device=device),
                symbolic_context=StatelessSymbolicContext(dynamic_sizes=dims),
                source=ConstantSource(name),
            )

        state = (features, 1, 1) if map_input else (features,)
        z = fake("z", _BATCH_HINT, *state, of=dtype)
        inputs = {"z": z, "t": fake("t", *[_BATCH_HINT] * t_per_row, of=torch.int64)}
        if cond_features is not None:
            inputs["cond"] = fake("cond", _BATCH_HINT, cond_features, of=dtype)
        recorder = _Recorder(mode, inputs, z.shape[0].node.expr, dtype, t_per_row)  # type: ignore[attr-defined]
        recorder.adopt(module, shadow, memo)
        for name, submodule in shadow.named_modules():
            _prepare(submodule, name, recorder.stack)
        try:
            with mode, recorder, _KeepWhole(recorder):
                output = shadow(*inputs.values())
            recorder.finish(output)
        except Exception as error:
            recorder.trace.obstacles.append(_explain(error, recorder.where()))
    found = recorder.trace
    found.obstacles += _branches(env)
    found.shadow = shadow
    for (path, original), copied in zip(module.named_modules(), shadow.modules(), strict=False):
        for key, value in original.__dict__.items():
            if isinstance(value, bool | int | float | str) and copied.__dict__.get(key) != value:
                found.touched.add((path, key))
    return found


def prediction_of(output: Any) -> Any:
    """What a denoiser predicts: what it returns, or the ``sample`` of it, as models of diffusers have it."""
    sample = None if isinstance(output, Tensor) else getattr(output, "sample", None)
    return sample if isinstance(sample, Tensor) else output


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def _unlogged(name: str) -> Iterator[None]:
    """A run that fails is an answer here, of a width that was only guessed perhaps, and no event for anyone's log."""
    log = logging.getLogger(name)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _dtype_and_device(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype, tensor.device
    return torch.get_default_dtype(), torch.device("cpu")


def _prepare(submodule: nn.Module, name: str, stack: list[tuple[str, nn.Module]]) -> None:
    """Make a submodule of the copy tell when it runs."""
    if isinstance(submodule, nn.modules.batchnorm._BatchNorm) and submodule.momentum is None:
        # The cumulative average reads a counter, which has no value here; the momentum does not enter the result.
        submodule.momentum = 0.0
    entry = (name, submodule)
    submodule.register_forward_pre_hook(lambda *_: stack.append(entry), prepend=True)
    # No pop where forward raises: the top of the stack then says where.
    submodule.register_forward_hook(lambda *_: stack.pop() and None)


def _explain(error: Exception, where: str) -> str:
    kind = type(error).__name__
    if kind in ("DataDependentOutputException", "GuardOnDataDependentSymNode", "DynamicOutputShapeException"):
        return f"{where}: reads values out of a tensor (.item(), if, a data-dependent size): {_first_line(error)}"
    return f"{where}: raised {kind}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "(no message)"


def _branches(env: Any) -> list[str]:
    """Decisions that the module's own code took on the batch size."""
    found = []
    for guard in env.guards:
        frame: Any = guard.sloc.framework_loc
        filename = getattr(frame, "filename", "")
        # torch's own code asks too (which convolution algorithm ...), which does not change what is computed.
        if filename and not filename.startswith(_TORCH_FOLDER):
            place = f"{os.path.basename(filename)}, line {frame.lineno} ({frame.name})"
            found.append(f"{place}: branches on the batch size ({guard.expr})")
    return found


class _Recorder(TorchDispatchMode):
    """Writes every operation on tensors into a graph, in the order in which they ran."""

    def __init__(
        self,
        mode: FakeTensorMode,
        inputs: Mapping[str, Tensor],
        batch_symbol: Any,
        dtype: torch.dtype,
        t_per_row: bool,
    ) -> None:
        super().__init__()
        self.mode = mode
        self.paused = False
        self.stack: list[tuple[str, nn.Module]] = []
        self.nodes: dict[int, fx.Node] = {}
        self.kept: list[Any] = []  # ids stay valid only while their objects live
        self.leaves: dict[int, Leaf] = {}
        graph = fx.Graph()
        batch = graph.placeholder("batch")
        placed = {name: graph.placeholder(name) for name in inputs}
        self.trace = Trace(graph, batch, placed["z"], placed["t"], placed.get("cond"), batch_symbol, dtype, t_per_row)
        for name, tensor in inputs.items():
            self._bind(tensor, placed[name])

    def adopt(self, module: nn.Module, shadow: nn.Module, memo: dict[int, Any]) -> None:
        """Note which tensor of the copy stands for which of the module, by where the module keeps it."""
        for (path, original), copied in zip(module.named_modules(), shadow.modules(), strict=True):
            for store in ("_parameters", "_buffers", "__dict__"):
                for key in original.__dict__ if store == "__dict__" else original.__dict__[store]:
                    fake = (copied.__dict__ if store == "__dict__" else copied.__dict__[store]).get(key)
                    if isinstance(fake, Tensor):
                        self.leaves.setdefault(id(fake), Leaf(path, store, key))
        # Tensors deeper inside, in a list or a dictionary: kept by reference. deepcopy holds on to the originals.
        for original in memo.get(id(memo), ()):
            fake = memo.get(id(original))
            if isinstance(original, Tensor) and isinstance(fake, Tensor):
                self.leaves.setdefault(id(fake), Leaf("", "", "constant", original))
        self.kept += [shadow, memo]

    def finish(self, output: Any) -> None:
        output = prediction_of(output)
        if isinstance(output, Tensor):
            self.trace.output = self._node(output)
        else:
            self.trace.obstacles.append(
                f"the module: returned {type(output).__name__}; expected one tensor [batch, features]"
            )

    def where(self) -> str:
        """The submodule that is running, for people."""
        path, owner = self.stack[-1] if self.stack else ("", None)
        return f"{path or 'the module'} ({type(owner).__name__})" if owner is not None else "the module"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # asked dozens of times a layer
        out = func(*args, **(kwargs or {}))
        if not self.paused and any(isinstance(x, Tensor) for x in (out if _is_list(out) else (out,))):
            self.record(func, args, kwargs or {}, out)
        return out

    def record(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Append one operation; its inputs and outputs are recognised by identity."""
        if func in _FILLED_LIKE:
            func, args, kwargs = self._as_full(func, args, kwargs, out)
        elif func is aten.lift_fresh.default:
            func = aten.clone.default  # a constant of the forward's own, fresh at every call
        node = self.trace.graph.call_function(func, self._argument(tuple(args)), self._argument(dict(kwargs)))
        self._bind(out, node)
        if _is_list(out):
            for index, part in enumerate(out):
                if isinstance(part, Tensor):
                    item = self.trace.graph.call_function(operator.getitem, (node, index))
                    self._bind(part, item)

    def _as_full(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> Any:
        value = _FILLED_LIKE[func]
        if value is None:
            value = kwargs.get("fill_value", args[-1])
        return aten.full.default, (list(out.shape), value), {"dtype": out.dtype, "device": out.device}

    def _bind(self, value: Any, node: fx.Node) -> None:
        path, owner = self.stack[-1] if self.stack else ("", None)
        node.meta.update(
            val=value,
            path=path,
            owner=owner,
            where=self.where(),
            grad=torch.is_grad_enabled(),
            storage=value.untyped_storage()._cdata if isinstance(value, Tensor) else None,
        )
        self.kept.append(value)
        if isinstance(value, Tensor):
            self.nodes[id(value)] = node

    def _node(self, tensor: Tensor) -> fx.Node:
        """The node that made a tensor; a placeholder for a tensor that was there before."""
        node = self.nodes.get(id(tensor))
        if node is None:
            leaf = self.leaves.get(id(tensor)) or Leaf("", "", "constant", tensor)
            with self.trace.graph.inserting_after(self.trace.batch):
                node = self.trace.graph.placeholder(leaf.name.replace(".", "_") or "constant")
            fake = tensor if isinstance(tensor, FakeTensor) else self.mode.from_tensor(tensor, static_shapes=True)
            self._bind(fake, node)
            self.kept.append(tensor)
            self.nodes[id(tensor)] = node
            self.trace.leaves[node] = leaf
        return node

    def _argument(self, value: Any) -> Any:
        """An argument with nodes in place of tensors and of the batch size."""
        if isinstance(value, Tensor):
            return self._node(value)
        if isinstance(value, torch.SymInt):
            if self.trace.is_batch(value):
                return self.trace.batch
            known = value.node.maybe_as_int()
            return self._symbolic(value) if known is None else known
        if isinstance(value, torch.SymFloat | torch.SymBool):
            return self._symbolic(value)
        if isinstance(value, list | tuple):
            return type(value)(map(self._argument, value)) if type(value) in (list, tuple) else value
        if isinstance(value, dict):
            return {key: self._argument(item) for key, item in value.items()}
        return value

    def _symbolic(self, value: Any) -> Unexpected:
        if value.node.expr.free_symbols <= {self.trace.batch_symbol}:
            return Unexpected(f"a number computed from the batch size ({value})")
        return Unexpected("a number read out of a tensor")


class Unexpected(str):
    """Stands in a graph for an argument that no graph can carry; it reads as the reason why."""


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


class _KeepWhole(TorchFunctionMode):
    """Records the functions of `_KEPT_WHOLE` as one operation each."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _KEPT_WHOLE:
            return func(*args, **kwargs)
        recorder = self.recorder
        recorder.paused = True
        try:
            # Shape, dtype and gradient of the result are those of the input; no need to work out the rest.
            x = kwargs["input"] if "input" in kwargs else args[0]
            out = x * 1
        finally:
            recorder.paused = False
        recorder.record(_KEPT_WHOLE[func], args, kwargs, out)
        return out

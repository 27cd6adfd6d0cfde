"""How each ATen operation of a traced denoiser reads in a program.

`HANDLERS` maps the name of an operation (without the trailing underscore of in-place forms) to a function
``(lowering, node, arguments by name) -> operand``; it appends operations to the program and raises `Obstacle` with the
reason where there is no counterpart. A value [batch, d1, d2, ...] is the row of its numbers: views that keep their
order change nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from gdpd_kernels.tracing import Unexpected

if TYPE_CHECKING:
    from gdpd_kernels.lowering import Lowering

aten = torch.ops.aten

Operand = str | None  # None: its operation has met an obstacle, which is reported once, where it arises
Handler = Callable[["Lowering", fx.Node, dict[str, Any]], Any]

HANDLERS: dict[str, Handler] = {}

RANDOM = "it draws random numbers; call .eval() or set p = 0 (a fused sampler draws none)"
HINTS = {
    "bernoulli": RANDOM,
    "native_dropout": RANDOM,
    "bmm": "a product of two activations (attention) has no counterpart in a program",
    "_softmax": "a softmax over features has no counterpart in a program",
}


class Obstacle(Exception):
    """Why one operation has no counterpart in a program."""


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register a function as what lowers the ATen operations of these names."""
    def register(function: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, function))
        return function

    return register


# --- elementwise ------------------------------------------------------------------------------------------------------


@handles("add")
def _add(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    return _sum(low, node, a["self"], 1.0, a["other"], number(a.get("alpha", 1)))


@handles("sub")
def _sub(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    return _sum(low, node, a["self"], 1.0, a["other"], -number(a.get("alpha", 1)))


@handles("rsub")
def _rsub(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    return _sum(low, node, a["self"], -number(a.get("alpha", 1)), a["other"], 1.0)


def _sum(low: Lowering, node: fx.Node, x: Any, x_scale: float, y: Any, y_scale: float) -> Operand:
    """x_scale x + y_scale y, either of them a number."""
    if not low.is_value(x):
        x, x_scale, y, y_scale = y, y_scale, x, x_scale
    like = node.meta["val"]
    if not low.is_value(y):
        return low.emit("affine", low.operand_like(x, like), attrs=(x_scale, y_scale * number(y)))
    return low.emit("add", low.operand_like(x, like, x_scale), low.operand_like(y, like, y_scale))


@handles("mul")
def _mul(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    x, y, like = a["self"], a["other"], node.meta["val"]
    if not low.is_value(x):
        x, y = y, x
    if not low.is_value(y):
        return low.emit("affine", low.operand_like(x, like), attrs=(number(y), 0.0))
    return low.emit("mul", low.operand_like(x, like), low.operand_like(y, like))


@handles("div")
def _div(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    if a.get("rounding_mode") is not None:
        raise Obstacle("rounds its quotient")
    if low.is_value(a["other"]):
        raise Obstacle("divides by a tensor; multiply by its inverse, taken where it is made, instead")
    return low.emit("affine", low.operand_like(a["self"], node.meta["val"]), attrs=(1.0 / number(a["other"]), 0.0))


@handles("neg")
def _neg(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    return low.emit("affine", low.operand(a["self"]), attrs=(-1.0, 0.0))


@handles("pow", "square")
def _square(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    if a.get("exponent", 2) != 2:
        raise Obstacle(f"the exponent is {a['exponent']}; only squares have a counterpart in a program")
    return low.emit("mul", low.operand(a["self"]), low.operand(a["self"]))


@handles("addcmul")
def _addcmul(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    like = node.meta["val"]
    left = low.operand_like(a["tensor1"], like, number(a.get("value", 1)))
    product = low.emit("mul", left, low.operand_like(a["tensor2"], like))
    return low.emit("add", low.operand_like(a["self"], like), product)


# --- activations ------------------------------------------------------------------------------------------------------


@handles("relu", "silu", "tanh", "sigmoid")
def _activation(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    return low.emit(name_of(node).removesuffix("_"), low.operand(a["self"]))


@handles("gelu")
def _gelu(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    return low.emit("gelu_tanh" if a.get("approximate") == "tanh" else "gelu", low.operand(a["self"]))


@handles("leaky_relu")
def _leaky_relu(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    return low.emit("leaky_relu", low.operand(a["self"]), attrs=(number(a.get("negative_slope", 0.01)),))


@handles("clamp", "clamp_min")
def _clamp(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    if a.get("min") != 0 or a.get("max") is not None:
        raise Obstacle("clamping has no counterpart in a program, but for clamp(min=0)")
    return low.emit("relu", low.operand(a["self"]))


# --- products ---------------------------------------------------------------------------------------------------------


@handles("addmm")
def _addmm(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    if number(a.get("beta", 1)) != 1 or number(a.get("alpha", 1)) != 1:
        raise Obstacle("scales its operands (alpha, beta)")
    bias, weight = a["self"], _matrix(low, a["mat2"])
    if not low.depends[bias] and bias.meta["val"].dim() == 1:
        return _linear(low, a["mat1"], weight, low.param(bias))
    return low.emit("add", _linear(low, a["mat1"], weight, None), low.operand_like(bias, node.meta["val"]))


@handles("mm")
def _mm(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    return _linear(low, a["self"], _matrix(low, a["mat2"]), None)


@handles("mv")
def _mv(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    return _linear(low, a["self"], low.param(a["vec"], (aten.unsqueeze.default, 0)), None)


@handles("linear")
def _on_linear(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    return _linear(low, a["input"], low.param(a["weight"]), low.param(a.get("bias")))


def _matrix(low: Lowering, node: fx.Node) -> int | None:
    if low.depends[node]:
        raise Obstacle(HINTS["bmm"])
    return low.param(node, (aten.t.default,))


def _linear(low: Lowering, x: fx.Node, weight: int | None, bias: int | None) -> Operand:
    return low.emit("linear", low.operand(x), params=(weight, bias))


@handles("convolution")
def _convolution(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    """A convolution on a map of one point: of the kernel, only the tap above that point ever meets data."""
    x, weight = a["input"].meta["val"], a["weight"]
    if a["transposed"] or a["groups"] != 1:
        raise Obstacle("grouped and transposed convolutions have no counterpart in a program")
    if any(size != 1 for size in (*x.shape[2:], *node.meta["val"].shape[2:])):
        raise Obstacle(f"convolves {shape_text(x)}; only maps of one point are vectors")
    views = []
    for size, padding, dilation in zip(weight.meta["val"].shape[2:], a["padding"], a["dilation"], strict=True):
        tap, rest = divmod(padding, dilation)
        if rest or tap >= size:
            raise Obstacle(f"padding {padding} keeps its kernel of {size} off the only point of the map")
        views.append((aten.select.int, 2, tap))
    return _linear(low, a["input"], low.param(weight, *views), low.param(a["bias"]))


# --- norms ------------------------------------------------------------------------------------------------------------


@handles("batch_norm")
def _batch_norm(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    x = a["input"].meta["val"]
    if x.dim() < 2 or x.shape[1] != width(x):
        raise Obstacle(f"normalises {shape_text(x)}; only [batch, features] (or a map of one point) is supported")
    weight, bias = low.param(a.get("weight")), low.param(a.get("bias"))
    eps = (number(a.get("eps", 1e-5)),)
    mean, var = a.get("running_mean"), a.get("running_var")
    if not a.get("training", False):
        params = low.param(mean), low.param(var), weight, bias
        return low.emit("batch_norm_eval", low.operand(a["input"]), params=params, attrs=eps)
    if mean is None:
        low.batch_norms.append(int(x.shape[1]))
    elif isinstance(node.meta["owner"], nn.modules.batchnorm._BatchNorm):
        low.batch_norms.append(node.meta["path"])
    else:
        raise Obstacle("updates running statistics of its own; use nn.BatchNorm1d")
    return low.emit("batch_norm", low.operand(a["input"]), params=(weight, bias), attrs=eps)


@handles("native_layer_norm")
def _layer_norm(low: Lowering, node: fx.Node, a: dict[str, Any]) -> list[Operand]:
    _check_whole_row(a["input"].meta["val"], a["normalized_shape"])
    params = low.param(a["weight"], *_as_vector(a["weight"])), low.param(a["bias"], *_as_vector(a["bias"]))
    return [low.emit("layer_norm", low.operand(a["input"]), params=params, attrs=(number(a["eps"]),))]


@handles("native_group_norm")
def _group_norm(low: Lowering, node: fx.Node, a: dict[str, Any]) -> list[Operand]:
    if a["group"] != 1 or a["HxW"] != 1:
        raise Obstacle("only one group over a vector (which is LayerNorm) is supported")
    params = low.param(a["weight"]), low.param(a["bias"])
    return [low.emit("layer_norm", low.operand(a["input"]), params=params, attrs=(number(a["eps"]),))]


@handles("rms_norm")
def _rms_norm(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    x, weight = a["input"].meta["val"], a.get("weight")
    _check_whole_row(x, a["normalized_shape"])
    eps = torch.finfo(x.dtype).eps if a.get("eps") is None else number(a["eps"])
    params = (low.param(weight, *_as_vector(weight)),)
    return low.emit("rms_norm", low.operand(a["input"]), params=params, attrs=(eps,))


def _check_whole_row(x: Tensor, normalized_shape: Iterable[int]) -> None:
    if reduce(operator.mul, normalized_shape, 1) != width(x):
        raise Obstacle(f"normalises {tuple(normalized_shape)} of {shape_text(x)}; only whole rows are supported")


def _as_vector(param: fx.Node | None) -> list[tuple[Any, ...]]:
    return [] if param is None or param.meta["val"].dim() == 1 else [(aten.reshape.default, [-1])]


# --- shapes -----------------------------------------------------------------------------------------------------------


@handles("detach")
def _detach(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    raise Obstacle("cuts the gradient (.detach()), which a captured denoiser would not")


@handles("slice")
def _slice(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    # As text: comparing symbols would decide them.
    if str(a["self"].meta["val"].shape) == str(node.meta["val"].shape):
        return low.operand(a["self"])
    return _columns(low, a["self"], a["dim"], a.get("start"), a.get("end"), a.get("step", 1))


@handles("select")
def _select(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    dim = a["dim"] % a["self"].meta["val"].dim()
    index = a["index"] % a["self"].meta["val"].shape[dim] if dim else 0
    return _columns(low, a["self"], dim, index, index + 1)


@handles("split", "split_with_sizes", "unbind")
def _split(low: Lowering, node: fx.Node, a: dict[str, Any]) -> list[Operand]:
    source = a["self"].meta["val"]
    dim, first, parts = a.get("dim", 0) % source.dim(), 0, []
    for part in node.meta["val"]:
        size = part.shape[dim] if part.dim() == source.dim() else 1
        parts.append(_columns(low, a["self"], dim, first, first + size))
        first += size
    return parts


def _columns(low: Lowering, source: fx.Node, dim: int, start: Any, stop: Any, step: int = 1) -> Operand:
    """The columns start:stop of dimension `dim`, as columns of the row."""
    x = source.meta["val"]
    dim %= x.dim()
    first, last, _ = slice(start, stop).indices(x.shape[dim]) if dim else (0, 0, 1)
    if dim and step == 1 and (first, last) == (0, x.shape[dim]):
        return low.operand(source)
    if dim == 0 or step != 1 or any(size != 1 for size in x.shape[1:dim]):
        raise Obstacle(f"takes a part of dimension {dim} of {shape_text(x)}, which is not adjoining columns")
    inner = reduce(operator.mul, x.shape[dim + 1 :], 1)
    return low.emit("slice", low.operand(source), attrs=(first * inner, last * inner))


@handles("cat", "stack")
def _cat(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    x = node.meta["val"]
    dim = a.get("dim", 0) % x.dim()
    if dim == 0 or any(size != 1 for size in x.shape[1:dim]):
        raise Obstacle(f"joins to {shape_text(x)} along dimension {dim}, which does not append columns")
    return low.emit("concat", *(low.operand(part) for part in a["tensors"]))


@handles("view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze", "alias", "clone", "_to_copy")
@handles("lift_fresh", "expand", "t", "transpose", "permute", "mean", "sum", "amax", "_adaptive_avg_pool2d")
def _same_row(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    """Operations that at most rearrange memory; the reductions among them run over dimensions of size 1."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = source.meta["val"], node.meta["val"]
    keeps_order = name_of(node) not in ("expand", "t", "transpose", "permute") or folded(before) == folded(after)
    if width(before) != width(after) or not keeps_order:
        raise Obstacle(f"turns {shape_text(before)} into {shape_text(after)}, which is not the same row of numbers")
    return low.operand(source)


# --- reading nodes ----------------------------------------------------------------------------------------------------


def name_of(node: fx.Node) -> str:
    """Name of the operation that a node calls, without its namespace: ``aten.add.Tensor`` is ``add``."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[1] if schema is not None else getattr(node.target, "__name__", str(node.target))


def number(value: Any) -> float:
    """`value` as a float.

    Raises:
        Obstacle: it is no number that is known when the module is captured.
    """
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, Unexpected):
        raise Obstacle(f"uses {value}")
    raise Obstacle("computes with the batch size" if isinstance(value, fx.Node) else f"uses the number {value!r}")


def width(value: Tensor) -> Any:
    """Number of values in one row, the product of all dimensions but the first."""
    return reduce(operator.mul, value.shape[1:], 1)


def folded(value: Tensor) -> tuple[Any, ...]:
    """The shape of one row without dimensions of size 1."""
    return tuple(size for size in value.shape[1:] if size != 1)


def shape_text(value: Tensor) -> str:
    """The shape as messages write it: ``[batch, 100]``."""
    return "[" + ", ".join("batch" if isinstance(n, torch.SymInt) else str(n) for n in value.shape) + "]"

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

MOST_PIECES = 256  # of one row, by slices; with more, a program would be slower than the module

RANDOM = "it draws random numbers; call .eval() or set p = 0 (a fused sampler draws none)"
HINTS = {
    "bernoulli": RANDOM,
    "native_dropout": RANDOM,
    "rrelu_with_noise": RANDOM,
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
    x, y, like = a["self"], a["other"], node.meta["val"]
    if low.is_value(y):
        y = low.inverse(node, y)
    if not low.is_value(y):
        return low.emit("affine", low.operand_like(x, like), attrs=(1.0 / number(y), 0.0))
    return low.emit("mul", low.operand_like(x, like), low.operand_like(y, like))


@handles("neg")
def _neg(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    return low.emit("affine", low.operand(a["self"]), attrs=(-1.0, 0.0))


@handles("pow", "square")
def _power(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    exponent = a.get("exponent", 2)
    if low.is_value(exponent) or number(exponent) not in (1, 2, 3, 4):
        raise Obstacle(f"the exponent is {exponent}; only 1, 2, 3 and 4 have a counterpart in a program")
    x = power = low.operand(a["self"])
    for _ in range(int(number(exponent)) - 1):
        power = low.emit("mul", power, x)
    return power


@handles("addcmul")
def _addcmul(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    like = node.meta["val"]
    left = low.operand_like(a["tensor1"], like, number(a.get("value", 1)))
    product = low.emit("mul", left, low.operand_like(a["tensor2"], like))
    return low.emit("add", low.operand_like(a["self"], like), product)


@handles("addcdiv")
def _addcdiv(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    like = node.meta["val"]
    left = low.operand_like(a["tensor1"], like, number(a.get("value", 1)))
    product = low.emit("mul", left, low.operand_like(low.inverse(node, a["tensor2"]), like))
    return low.emit("add", low.operand_like(a["self"], like), product)


@handles("lerp")
def _lerp(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    """x + w (y − x)"""
    like, weight = node.meta["val"], a["weight"]
    start, end = low.operand_like(a["self"], like), low.operand_like(a["end"], like)
    way = low.emit("add", end, low.emit("affine", start, attrs=(-1.0, 0.0)))
    if low.is_value(weight):
        return low.emit("add", start, low.emit("mul", way, low.operand_like(weight, like)))
    return low.emit("add", start, low.emit("affine", way, attrs=(number(weight), 0.0)))


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
    if a["transposed"]:
        raise Obstacle("transposed convolutions have no counterpart in a program")
    if any(size != 1 for size in (*x.shape[2:], *node.meta["val"].shape[2:])):
        raise Obstacle(f"convolves {shape_text(x)}; only maps of one point are vectors")
    views = []
    for size, padding, dilation in zip(weight.meta["val"].shape[2:], a["padding"], a["dilation"], strict=True):
        tap, rest = divmod(padding, dilation)
        if rest or tap >= size:
            raise Obstacle(f"padding {padding} keeps its kernel of {size} off the only point of the map")
        views.append((aten.select.int, 2, tap))
    groups, operand = a["groups"], low.operand(a["input"])
    if groups == 1:
        return low.emit("linear", operand, params=(low.param(weight, *views), low.param(a["bias"])))
    check_pieces(groups)
    taken, made = x.shape[1] // groups, weight.meta["val"].shape[0] // groups
    parts = []
    for g in range(groups):
        rows = (aten.slice.Tensor, 0, g * made, (g + 1) * made)
        part = low.emit("slice", operand, attrs=(g * taken, (g + 1) * taken))
        parts.append(low.emit("linear", part, params=(low.param(weight, rows, *views), low.param(a["bias"], rows))))
    return low.emit("concat", *parts)


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
    groups = _groups(a["input"].meta["val"], a["normalized_shape"])
    return [_row_norm(low, "layer_norm", a["input"], [a["weight"], a["bias"]], number(a["eps"]), groups)]


@handles("native_group_norm")
def _group_norm(low: Lowering, node: fx.Node, a: dict[str, Any]) -> list[Operand]:
    if a["HxW"] != 1:
        raise Obstacle(f"normalises {shape_text(a['input'].meta['val'])}; only vectors [batch, features] are supported")
    return [_row_norm(low, "layer_norm", a["input"], [a["weight"], a["bias"]], number(a["eps"]), a["group"])]


@handles("rms_norm")
def _rms_norm(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    x = a["input"].meta["val"]
    groups = _groups(x, a["normalized_shape"])
    eps = torch.finfo(x.dtype).eps if a.get("eps") is None else number(a["eps"])
    return _row_norm(low, "rms_norm", a["input"], [a.get("weight")], eps, groups)


def _groups(x: Tensor, normalized_shape: Iterable[int]) -> int:
    """Into how many parts, each normalised by itself, a row falls."""
    size: int = reduce(operator.mul, normalized_shape, 1)
    return int(width(x)) // size


def _row_norm(low: Lowering, kind: str, x: fx.Node, affine: list[fx.Node | None], eps: float, groups: int) -> Operand:
    """A norm of whole rows; or of groups of adjoining columns, each alone, with the weights after that."""
    operand, value = low.operand(x), x.meta["val"]
    if groups == 1:
        params = tuple(low.param(param, *_as_vector(param)) for param in affine)
        return low.emit(kind, operand, params=params, attrs=(eps,))
    check_pieces(groups)
    size, nothing = width(value) // groups, (None,) * len(affine)
    parts = [low.emit("slice", operand, attrs=(g * size, (g + 1) * size)) for g in range(groups)]
    operand = low.emit("concat", *(low.emit(kind, part, params=nothing, attrs=(eps,)) for part in parts))
    channels = affine[0] is not None and affine[0].meta["val"].numel() == width(value)
    sizes = (width(value),) if channels else value.shape[1:]
    for param, step in zip(affine, ("mul", "add"), strict=False):
        if param is not None:
            operand = low.emit(step, operand, low.external(param, sizes))
    return operand


def _as_vector(param: fx.Node | None) -> list[tuple[Any, ...]]:
    return [] if param is None or param.meta["val"].dim() == 1 else [(aten.reshape.default, [-1])]


@handles("empty_like")
def _memory(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    if any(HINTS.get(name_of(user).removesuffix("_")) == RANDOM for user in node.users):
        return None  # dropout's mask: the obstacle is that it is drawn, and is reported there
    raise Obstacle("makes memory without values, to be written in place later")


# --- reading nodes ----------------------------------------------------------------------------------------------------


def name_of(node: fx.Node) -> str:
    """Name of the operation that a node calls, without its namespace: ``aten.add.Tensor`` is ``add``."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[1] if schema is not None else getattr(node.target, "__name__", str(node.target))


def check_pieces(count: int) -> None:
    """Raises Obstacle where a row would have to be taken apart into more pieces than a program is good for."""
    if count > MOST_PIECES:
        raise Obstacle(f"takes a row apart into {count} pieces; at most {MOST_PIECES} are supported")


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

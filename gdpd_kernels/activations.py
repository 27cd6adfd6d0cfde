"""How activation functions read in a program: the operations of `operations` for everything that bends.

What a program has no operation for is put together from what it has, with the values and derivatives of the original,
at the kinks too: max(x, 0) has derivative 0 at 0, in PyTorch as in a program.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from gdpd_kernels.columns import seen
from gdpd_kernels.operations import Obstacle, Operand, handles, name_of, number

if TYPE_CHECKING:
    from gdpd_kernels.lowering import Lowering


@handles("relu", "silu", "tanh", "sigmoid")
def _activation(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    return low.emit(name_of(node).removesuffix("_"), low.operand(a["self"]))


@handles("gelu")
def _gelu(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    return low.emit("gelu_tanh" if a.get("approximate") == "tanh" else "gelu", low.operand(a["self"]))


@handles("leaky_relu")
def _leaky_relu(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    return low.emit("leaky_relu", low.operand(a["self"]), attrs=(number(a.get("negative_slope", 0.01)),))


@handles("_prelu_kernel", "prelu")
def _prelu(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    """max(x, 0) + slope min(x, 0), the slope learned: min(x, 0) = x − max(x, 0)."""
    x = low.operand(a["self"])
    positive = low.emit("relu", x)
    negative = low.emit("add", x, _scaled(low, positive, -1.0))
    slope = low.operand_like(a["weight"], node.meta["val"])
    return low.emit("add", positive, low.emit("mul", negative, slope))


@handles("elu", "celu")
def _elu(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    """ELU, CELU and SELU: s x where x > 0, else s alpha (e^(i x) − 1), with input scale i and scale s."""
    alpha, scale, inner = (number(a.get(name, 1)) for name in ("alpha", "scale", "input_scale"))
    if name_of(node).startswith("celu"):
        inner, alpha = 1.0 / alpha, alpha
    if inner <= 0:
        raise Obstacle(f"its input scale is {inner:g}, which turns the line over; it must be positive")
    bent = low.emit("elu", _scaled(low, low.operand(a["self"]), inner), attrs=(alpha * inner,))
    return _scaled(low, bent, scale / inner)


@handles("softplus")
def _softplus(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    beta, threshold = number(a.get("beta", 1)), number(a.get("threshold", 20))
    if threshold != 20 or beta <= 0:
        raise Obstacle(f"has threshold {threshold:g} and beta {beta:g}; only threshold 20 and beta > 0 are supported")
    return _scaled(low, low.emit("softplus", _scaled(low, low.operand(a["self"]), beta)), 1.0 / beta)


@handles("log_sigmoid_forward")
def _log_sigmoid(low: Lowering, node: fx.Node, a: dict[str, Any]) -> list[Operand]:
    """−softplus(−x)"""
    return [_scaled(low, low.emit("softplus", _scaled(low, low.operand(a["self"]), -1.0)), -1.0)]


@handles("mish")
def _mish(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    """x tanh(softplus(x))"""
    x = low.operand(a["self"])
    return low.emit("mul", x, low.emit("tanh", low.emit("softplus", x)))


@handles("glu")
def _glu(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    """The first half times the sigmoid of the second."""
    x, value, dim = low.operand(a["self"]), a["self"].meta["val"], a.get("dim", -1)
    first, second = (seen(low, x, value, lambda row, i=i: row.chunk(2, dim)[i]) for i in range(2))  # type: ignore[misc]
    return low.emit("mul", first, low.emit("sigmoid", second))


@handles("clamp", "clamp_min", "clamp_max", "hardtanh")
def _clamp(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    names = ("min_val", "max_val") if name_of(node).startswith("hardtanh") else ("min", "max")
    defaults = (-1.0, 1.0) if name_of(node).startswith("hardtanh") else (None, None)
    low_end, high_end = (a.get(name, default) for name, default in zip(names, defaults, strict=True))
    if low.is_value(low_end) or low.is_value(high_end):
        raise Obstacle("clamps to a tensor; only numbers have a counterpart in a program")
    return _clamped(low, low.operand(a["self"]), low_end, high_end)


def _clamped(low: Lowering, x: Operand, low_end: Any, high_end: Any) -> Operand:
    """low + max(x − low, 0), and high − max(high − x, 0) of that: infinite numbers end at the ends too."""
    if low_end is not None:
        x = _shifted(low, low.emit("relu", _shifted(low, x, -number(low_end))), number(low_end))
    if high_end is not None:
        high = number(high_end)
        x = _shifted(low, low.emit("relu", _shifted(low, x, high, -1.0)), high, -1.0)
    return x


@handles("hardsigmoid")
def _hardsigmoid(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    return _hard_gate(low, low.operand(a["self"]))


@handles("hardswish")
def _hardswish(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    x = low.operand(a["self"])
    return low.emit("mul", x, _hard_gate(low, x))


def _hard_gate(low: Lowering, x: Operand) -> Operand:
    """(x + 3) / 6 between 0 and 1."""
    return _clamped(low, _shifted(low, x, 0.5, 1.0 / 6.0), 0.0, 1.0)


@handles("threshold")
def _threshold(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    if number(a["threshold"]) != number(a["value"]):
        raise Obstacle("jumps at its threshold; only the same number as value has a counterpart in a program")
    return _clamped(low, low.operand(a["self"]), a["value"], None)


@handles("abs")
def _abs(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Operand:
    x = low.operand(a["self"])
    return low.emit("add", low.emit("relu", x), low.emit("relu", _scaled(low, x, -1.0)))


def _scaled(low: Lowering, x: Operand, scale: float) -> Operand:
    return x if scale == 1.0 else low.emit("affine", x, attrs=(scale, 0.0))


def _shifted(low: Lowering, x: Operand, shift: float, scale: float = 1.0) -> Operand:
    return x if (scale, shift) == (1.0, 0.0) else low.emit("affine", x, attrs=(scale, shift))

"""Norms written out by hand: LayerNorm, RMSNorm and F.normalize spelled in means, squares and roots.

A statistic of a row, such as its mean, has no counterpart in a program. It is kept here for what it says, and becomes
an operation where it ends in x / sqrt(mean(x²) + eps) or in (x − mean(x)) / sqrt(var(x) + eps).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import fx

from gdpd_kernels.operations import Obstacle, Operand, name_of, number, width

if TYPE_CHECKING:
    from gdpd_kernels.lowering import Lowering

# Up to here F.normalize's floor under the norm acts on rows of zeros alone, for all that a state can tell.
_SMALLEST_FLOOR = 1e-6


@dataclass(frozen=True)
class Statistic:
    """Something about the row `of`, an operand."""

    of: str

    def __str__(self) -> str:
        return "takes the mean or norm of a row, which only has a counterpart within LayerNorm, RMSNorm and F.normalize"


@dataclass(frozen=True)
class Mean(Statistic):
    """mean(x)"""


@dataclass(frozen=True)
class Centred(Statistic):
    """(x − mean(x))^power, number by number"""

    power: int = 1


@dataclass(frozen=True)
class Spread(Statistic):
    """(factor mean((x − c)²) + eps)^exponent, with c = mean(x) if `centred`, else 0"""

    centred: bool
    factor: float = 1.0
    eps: float = 0.0
    exponent: float = 1.0

    def times(self, scale: float) -> Spread | None:
        if scale <= 0:
            return None
        inside = scale ** (1.0 / self.exponent)
        return replace(self, factor=self.factor * inside, eps=self.eps * inside)

    def to_the(self, power: float) -> Spread | None:
        exponent = self.exponent * power
        return replace(self, exponent=exponent) if abs(exponent) in (0.5, 1.0) else None


Found = Statistic | list[Any] | str | None


def written_norm(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Found:
    """What an operation on statistics gives: another one, or the operand of a norm; None where it is none of these."""
    name = name_of(node).removesuffix("_")
    return _READ[name](low, node, a) if name in _READ else None


def _reduction(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Found:
    """mean and sum over the row"""
    source, n = a["self"], width(a["self"].meta["val"])
    if width(node.meta["val"]) != 1 or n == 1:
        return _passed_on(low, node, a)
    of = _known(low, source)
    factor = 1.0 if name_of(node) == "mean" else float(n)
    if isinstance(of, Centred) and of.power == 2:
        return Spread(of.of, True, factor)
    if not isinstance(of, str):
        return None
    squared = _squared(low, of)
    if squared is not None:
        return Spread(squared, False, factor)
    return Mean(of) if factor == 1 else None


def _squared(low: Lowering, operand: str) -> str | None:
    """x, of an operand x²."""
    op = low.ops[int(operand[1:]) - 1] if operand.startswith("%") else None
    return op.inputs[0] if op is not None and op.kind == "mul" and op.inputs[0] == op.inputs[1] else None


def _variance(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Found:
    results = node.meta["val"]
    result = results[0] if isinstance(results, list | tuple) else results
    of, n = _known(low, a["self"]), width(a["self"].meta["val"])
    correction = a.get("correction", float(a.get("unbiased", True)))
    freedom = n - (1.0 if correction is None else number(correction))
    if not isinstance(of, str) or width(result) != 1 or n == 1 or freedom <= 0:
        return None
    variance = Spread(of, True, n / freedom)
    if name_of(node).startswith("std"):
        return replace(variance, exponent=0.5)
    return [variance, Mean(of)] if name_of(node) == "var_mean" else variance


def _norm(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Found:
    order = a.get("ord", a.get("p", 2))
    of, n = _known(low, a["self"]), width(a["self"].meta["val"])
    if not isinstance(of, str) or width(node.meta["val"]) != 1 or number(order) != 2:
        return None
    return Spread(of, False, factor=float(n), exponent=0.5)


def _floor(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Found:
    """max(norm, floor) as sqrt(norm² + floor²): 0 for a row of zeros, and otherwise the same to the last digit."""
    spread, floor = _known(low, a["self"]), a.get("min")
    if not isinstance(spread, Spread) or spread.exponent != 0.5 or spread.eps or a.get("max") is not None:
        return None
    if low.is_value(floor) or not 0 <= number(floor) <= _SMALLEST_FLOOR:
        raise Obstacle(f"holds a norm above {floor}; only up to {_SMALLEST_FLOOR:g} has a counterpart in a program")
    return replace(spread, eps=number(floor) ** 2)


def _sum(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Found:
    x, y = _known(low, a["self"]), _known(low, a["other"])
    if a.get("alpha", 1) != 1:
        return None
    if name_of(node).startswith("sub"):
        return Centred(y.of) if isinstance(y, Mean) and x == y.of else None
    spread, eps = (x, a["other"]) if isinstance(x, Spread) else (y, a["self"])
    if not isinstance(spread, Spread) or spread.exponent != 1 or low.is_value(eps):
        return None
    return replace(spread, eps=spread.eps + number(eps))


def _product(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Found:
    x, y = _known(low, a["self"]), _known(low, a["other"])
    if isinstance(x, Centred) and x == y:
        return _to_the(low, node, {"self": a["self"], "exponent": 2})
    if isinstance(x, Spread):
        return _product(low, node, {"self": a["other"], "other": a["self"]}) if not isinstance(y, Spread) else None
    if not isinstance(y, Spread):
        return None
    return _scaled_row(low, x, y) if low.is_value(a["self"]) else y.times(number(a["self"]))


def _quotient(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Found:
    x, y = _known(low, a["self"]), _known(low, a["other"])
    if isinstance(x, Spread) and not low.is_value(a["other"]):
        return x.times(1.0 / number(a["other"]))
    inverse = y.to_the(-1) if isinstance(y, Spread) else None
    return _scaled_row(low, x, inverse) if inverse is not None and low.is_value(a["self"]) else None


def _scaled_row(low: Lowering, x: Any, spread: Spread) -> Operand:
    """x (factor mean((x − c)²) + eps)^(−1/2), which is a norm times factor^(−1/2)."""
    row = Centred(spread.of) if spread.centred else spread.of
    if x != row or spread.exponent != -0.5:
        return None
    eps = (spread.eps / spread.factor,)
    if spread.centred:
        out = low.emit("layer_norm", spread.of, params=(None, None), attrs=eps)
    else:
        out = low.emit("rms_norm", spread.of, params=(None,), attrs=eps)
    return out if spread.factor == 1 else low.emit("affine", out, attrs=(spread.factor**-0.5, 0.0))


def _to_the(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Found:
    known, exponent = _known(low, a["self"]), a.get("exponent", 2)
    if isinstance(known, Centred) and known.power == 1 and exponent == 2:
        return replace(known, power=2)
    return known.to_the(number(exponent)) if isinstance(known, Spread) and not low.is_value(exponent) else None


def _root(power: float) -> Callable[[Lowering, fx.Node, dict[str, Any]], Found]:
    return lambda low, node, a: _to_the(low, node, {"self": a["self"], "exponent": power})


def _passed_on(low: Lowering, node: fx.Node, a: dict[str, Any]) -> Found:
    """Views of one number per row, and its repetition within the row."""
    known = _known(low, node.args[0])
    return known if isinstance(known, Mean | Spread) else None


def _known(low: Lowering, argument: Any) -> Any:
    """What is known of an argument: its operand, a statistic, or None."""
    if not isinstance(argument, fx.Node):
        return None
    return "z" if argument is low.trace.z and argument not in low.values else low.values.get(argument)


_READ: dict[str, Callable[[Lowering, fx.Node, dict[str, Any]], Found]] = {
    "mean": _reduction,
    "sum": _reduction,
    **dict.fromkeys(("var", "std", "var_mean"), _variance),
    **dict.fromkeys(("linalg_vector_norm", "norm"), _norm),
    **dict.fromkeys(("clamp", "clamp_min"), _floor),
    **dict.fromkeys(("add", "sub"), _sum),
    "mul": _product,
    "div": _quotient,
    **dict.fromkeys(("pow", "square"), _to_the),
    "sqrt": _root(0.5),
    "rsqrt": _root(-0.5),
    "reciprocal": _root(-1),
    **dict.fromkeys(("expand", "slice", "unsqueeze", "squeeze", "view", "reshape", "alias", "clone"), _passed_on),
}

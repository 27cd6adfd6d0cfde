"""Denoiser programs that the tests share: the families that people use, oddly wired ones, a strategy for any other."""

from __future__ import annotations

import random
from collections.abc import Callable

from hypothesis import strategies as st

from gdpd_kernels.program import KINDS, DenoiserProgram, Op

SIZES = (1, 2, 31, 33, 100, 257)
ACTIVATIONS = ("relu", "leaky_relu", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "elu", "softplus")
# Two numbers normalised are −1 and 1, and a gradient through that is mostly rounding, however it is computed: programs
# that normalise one or two numbers are tested with an eps that keeps them away from there.
USUAL_EPS, NARROW_EPS = 1e-5, 0.1


class Builder:
    """Writes a program line by line; every method returns the operand that holds the result."""

    def __init__(
        self, features: int, tables: tuple[int, ...] = (), rows: tuple[int, ...] = (), eps: float = USUAL_EPS
    ) -> None:
        self.features, self.tables, self.rows, self.eps = features, tables, rows, eps
        self.params: list[tuple[int, ...]] = []
        self.ops: list[Op] = []
        self.width = {"z": features}
        self.width |= {f"t{i}": width for i, width in enumerate(tables)}
        self.width |= {f"r{i}": width for i, width in enumerate(rows)}

    def param(self, *shape: int) -> int:
        self.params.append(shape)
        return len(self.params) - 1

    def op(
        self,
        kind: str,
        *inputs: str,
        params: tuple[int | None, ...] = (),
        attrs: tuple[float, ...] = (),
        width: int | None = None,
    ) -> str:
        self.ops.append(Op(kind, inputs, params, attrs))
        name = f"%{len(self.ops)}"
        self.width[name] = self.width[inputs[0]] if width is None else width
        return name

    def linear(self, x: str, out: int, bias: bool = True) -> str:
        params = self.param(out, self.width[x]), self.param(out) if bias else None
        return self.op("linear", x, params=params, width=out)

    def norm(self, kind: str, x: str, weight: bool = True, bias: bool = True) -> str:
        n = self.width[x]
        names = KINDS[kind].params
        given = {"weight": weight, "bias": bias, "mean": True, "var": True}
        params = tuple(self.param(n) if given[name] else None for name in names)
        return self.op(kind, x, params=params, attrs=(self.eps,))

    def activation(self, kind: str, x: str) -> str:
        return self.op(kind, x, attrs={"leaky_relu": (0.1,), "elu": (0.7,)}.get(kind, ()))

    def slice(self, x: str, start: int, stop: int) -> str:
        return self.op("slice", x, attrs=(start, stop), width=stop - start)

    def concat(self, *xs: str) -> str:
        return self.op("concat", *xs, width=sum(self.width[x] for x in xs))

    def done(self, output: str) -> DenoiserProgram:
        return DenoiserProgram(self.features, self.tables, self.rows, tuple(self.params), tuple(self.ops), output)


def bottleneck(
    features: int, reduction: int = 4, blocks: int = 2, norm: str = "batch_norm", eps: float = USUAL_EPS
) -> DenoiserProgram:
    """The paper's network: a table added to z, two residual bottlenecks, Linear, and a norm after every Linear."""
    b, low = Builder(features, tables=(features,), eps=eps), max(1, features // reduction)
    x = b.op("add", "z", "t0")
    for _ in range(blocks):
        h = b.op("relu", b.norm(norm, b.linear(x, low)))
        h = b.op("relu", b.norm(norm, b.linear(h, low)))
        x = b.op("add", x, b.norm(norm, b.linear(h, features)))
    return b.done(b.norm(norm, b.linear(x, features)))


def mlp(features: int, hidden: int = 64, activation: str = "silu") -> DenoiserProgram:
    """Two hidden layers, the time table added in the first."""
    b = Builder(features, tables=(hidden,))
    h = b.activation(activation, b.op("add", b.linear("z", hidden), "t0"))
    return b.done(b.linear(b.activation(activation, b.linear(h, hidden)), features))


def normed(
    features: int, kind: str = "layer_norm", weight: bool = True, bias: bool = True, eps: float = USUAL_EPS
) -> DenoiserProgram:
    """A residual block with a norm before it, as in transformers."""
    b = Builder(features, tables=(features,), eps=eps)
    x = b.op("add", "z", "t0")
    h = b.linear(b.norm(kind, x, weight, bias), features + 3)
    return b.done(b.op("add", x, b.linear(b.activation("gelu", h), features)))


def gendd_head(features: int, hidden: int = 40, eps: float = USUAL_EPS) -> DenoiserProgram:
    """GenDD's head in small: shift, scale and gate from time and condition, a gated residual, a modulated last norm."""
    b = Builder(features, tables=(hidden,), rows=(hidden,), eps=eps)
    y = b.op("silu", b.op("add", "t0", "r0"))
    x = b.linear("z", hidden)
    modulation = b.linear(y, 3 * hidden)
    shift, scale, gate = (b.slice(modulation, i * hidden, (i + 1) * hidden) for i in range(3))
    h = b.norm("layer_norm", x, weight=False, bias=False)
    h = b.op("add", b.op("mul", h, b.op("affine", scale, attrs=(1.0, 1.0))), shift)
    h = b.linear(b.activation("silu", b.linear(h, hidden)), hidden)
    x = b.op("add", x, b.op("mul", gate, h))
    last = b.linear(y, 2 * hidden, bias=False)
    h = b.op("mul", b.norm("rms_norm", x), b.slice(last, 0, hidden))
    return b.done(b.linear(b.op("add", h, b.slice(last, hidden, 2 * hidden)), features))


def film(features: int, eps: float = USUAL_EPS) -> DenoiserProgram:
    """Scale by a row, shift by a table, and a BatchNorm between."""
    b = Builder(features, tables=(features, 5), rows=(features, 7), eps=eps)
    x = b.op("mul", b.op("add", "z", "t0"), "r0")
    x = b.concat(b.norm("batch_norm", b.linear(x, 12)), "t1", "r1", "z")
    return b.done(b.linear(b.activation("tanh", x), features))


def every_operation(features: int, eps: float = USUAL_EPS) -> DenoiserProgram:
    """Each kind of operation at least once, and some results used twice or not at all."""
    b = Builder(features, tables=(features, 20), rows=(20,), eps=eps)
    x = b.op("add", "z", "t0")
    h = b.norm("layer_norm", b.linear(x, 40))
    skip = b.linear(b.activation("gelu", h), features)
    both = b.linear(b.activation("silu", b.op("add", "t1", "r0")), 80, bias=False)
    h = b.op("mul", h, b.op("affine", b.slice(both, 0, 40), attrs=(1.5, 0.5)))
    h = b.norm("rms_norm", b.op("add", h, b.slice(both, 40, 80)))
    b.op("tanh", h)  # read by nobody
    h = b.activation("leaky_relu", b.activation("tanh", h))
    h = b.activation("softplus", b.activation("elu", h))
    h = b.concat(b.activation("sigmoid", b.activation("gelu_tanh", h)), skip)
    h = b.norm("batch_norm_eval", b.activation("relu", b.slice(h, 10, 38)))
    h = b.norm("batch_norm", b.linear(h, 30), weight=False, bias=False)
    return b.done(b.op("add", x, b.linear(h, features)))


# Small programs with wiring that a planner may get wrong.
WIRED: dict[str, Callable[[Builder], str]] = {
    "the state itself": lambda b: "z",
    "a table": lambda b: "t0",
    "a row": lambda b: "r0",
    "sum with itself": lambda b: b.op("add", h := b.linear("z", b.features), h),
    "product with itself": lambda b: b.op("mul", h := b.linear("z", b.features), h),
    "state plus itself": lambda b: b.op("add", "z", "z"),
    "state times itself": lambda b: b.op("mul", b.op("sigmoid", "z"), b.op("sigmoid", "z")),
    "table times row": lambda b: b.op("mul", "t0", "r0"),
    "concat of one thing twice": lambda b: b.linear(b.concat(h := b.linear("z", 3), "z", h), b.features),
    "overlapping slices": lambda b: b.concat(
        b.slice(h := b.linear("z", b.features + 2), 0, b.features), b.slice(h, 2, b.features + 2), "z"
    ),
    "parts of the state": lambda b: b.concat(
        b.op("mul", b.op("silu", part := b.slice("z", 0, b.features - 1)), part), b.slice("z", 2, b.features)
    ),
    "part of the state as the prediction": lambda b: b.slice("z", 0, b.features),
    "part of a part of the state": lambda b: b.linear(b.slice(b.slice("z", 1, b.features), 1, 3), b.features),
    "a join within a join": lambda b: b.linear(
        b.concat(b.op("tanh", b.concat(b.linear("z", 3), h := b.linear("z", 4))), b.op("relu", h)), b.features
    ),
    "a join that is joined and read": lambda b: b.linear(
        b.concat(h := b.concat(b.linear("z", 3), b.op("silu", b.linear("z", 4))), b.op("silu", h)), b.features
    ),
    "a join as the prediction": lambda b: b.concat(b.op("silu", b.linear("z", b.features - 2)), b.linear("t0", 2)),
    "one weight twice": lambda b: (
        b.op("linear", h := b.linear("z", b.features), params=b.ops[-1].params) and b.op("add", "%2", h)
    ),
    "one norm's weight in two norms": lambda b: b.op(
        "rms_norm", b.norm("layer_norm", b.linear("z", b.features)), params=(2,), attrs=(1e-5,)
    ),
    "skip over everything": lambda b: b.op("add", b.op("tanh", b.op("relu", b.linear("z", b.features))), "z"),
    "activation read before and after": lambda b: b.op(
        "add", b.op("silu", h := b.linear("z", b.features)), b.op("tanh", h)
    ),
    "result that nobody reads": lambda b: (b.linear(b.op("tanh", "z"), 9), b.linear("z", b.features))[1],
    "parameter that nobody reads": lambda b: (b.param(3, 4), b.linear("z", b.features))[1],
    "batch norm of the state": lambda b: b.norm("batch_norm", "z"),
    "batch norms in a row": lambda b: b.norm("batch_norm", b.norm("batch_norm", b.linear("z", b.features))),
    "batch norm of table and row": lambda b: b.norm("batch_norm", b.op("add", "t0", "r0")),
    "batch norm as last and first": lambda b: b.norm("batch_norm", b.linear(b.norm("batch_norm", "z"), b.features)),
    "batch norm that nobody reads": lambda b: (b.norm("batch_norm", b.linear("z", 3)), b.linear("z", b.features))[1],
    "affine of affine": lambda b: b.op("affine", b.op("affine", "z", attrs=(2.0, -1.0)), attrs=(-0.5, 0.25)),
}


def wired(name: str, features: int = 5) -> DenoiserProgram:
    b = Builder(features, tables=(features,), rows=(features,))
    output = WIRED[name](b)
    if b.width[output] != features:
        output = b.linear(output, features)
    return b.done(output)


# Of a width and an eps.
FAMILIES: dict[str, Callable[[int, float], DenoiserProgram]] = {
    "bottleneck": lambda n, eps: bottleneck(n, eps=eps),
    "bottleneck with layer norm": lambda n, eps: bottleneck(n, norm="layer_norm", eps=eps),
    "bottleneck in eval mode": lambda n, eps: bottleneck(n, norm="batch_norm_eval", eps=eps),
    "gendd head": lambda n, eps: gendd_head(n, eps=eps),
    "film": lambda n, eps: film(n, eps),
    "every operation": every_operation,
    "layer norm": lambda n, eps: normed(n, eps=eps),
    "layer norm without weights": lambda n, eps: normed(n, weight=False, bias=False, eps=eps),
    "rms norm": lambda n, eps: normed(n, "rms_norm", eps=eps),
    "batch norm without weights": lambda n, eps: normed(n, "batch_norm", weight=False, bias=False, eps=eps),
    **{f"mlp with {kind}": lambda n, eps, kind=kind: mlp(n, 33, kind) for kind in ACTIVATIONS},  # type: ignore[misc]
}


@st.composite
def families(draw: st.DrawFn, sizes: tuple[int, ...] = SIZES, eps: float = USUAL_EPS) -> DenoiserProgram:
    family, width = draw(st.sampled_from(sorted(FAMILIES))), draw(st.sampled_from(sizes))
    narrow = width // 4 <= 2 if "layer" in family else width <= 2
    return FAMILIES[family](width, NARROW_EPS if narrow else eps)


def programs() -> st.SearchStrategy[DenoiserProgram]:
    return st.integers(0, 2**32).map(random_program)


def random_program(seed: int) -> DenoiserProgram:
    """Any well-formed program of up to ten operations over narrow widths."""
    choose = random.Random(seed)
    features = choose.choice((1, 2, 3, 8, 17))
    widths = [features, features, 4, 16]
    b = Builder(
        features,
        tables=tuple(choose.choice(widths) for _ in range(choose.randrange(3))),
        rows=tuple(choose.choice(widths) for _ in range(choose.randrange(3))),
        eps=NARROW_EPS,
    )
    kinds = [*KINDS, "linear", "add"]
    for _ in range(choose.randrange(1, 10)):
        # Late results are taken more often than early ones, so that programs are deep as well as wide.
        names = list(b.width)
        x = choose.choice([*names, *names[-3:], *names[-1:] * 3])
        kind = choose.choice(kinds)
        if kind == "linear":
            b.linear(x, choose.choice([*widths, 1, 5]), bias=choose.random() < 0.7)
        elif "eps" in KINDS[kind].attrs:
            b.norm(kind, x, choose.random() < 0.7, choose.random() < 0.7)
        elif kind in ("add", "mul"):
            b.op(kind, x, choose.choice([name for name in names if b.width[name] == b.width[x]]))
        elif kind == "slice":
            start = choose.randrange(b.width[x])
            b.slice(x, start, choose.randrange(start + 1, b.width[x] + 1))
        elif kind == "concat":
            b.concat(x, *choose.choices(names, k=choose.randrange(3)))
        elif kind == "affine":
            b.op(kind, x, attrs=(choose.uniform(-1, 1), choose.uniform(-1, 1)))
        else:
            b.activation(kind, x)
    last = list(b.width)[-1]
    return b.done(last if b.width[last] == features else b.linear(last, features))

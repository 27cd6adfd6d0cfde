"""DenoiserProgram: one denoising step as a short straight-line list of layers, which every backend can run.

A program is what `capture` makes of a `torch.nn.Module` and what the operators carry across the dispatcher, as text.
It names values, never tensors, so the same program serves every call with the same architecture::

    denoiser z:100 tables:100 rows:- params:25x100,25,100x25,100
      %1 = add(z, t0)
      %2 = linear(%1, p0, p1)
      %3 = relu(%2)
      %4 = linear(%3, p2, p3)
      %5 = add(%1, %4)
      return %5

Operands: ``z`` the state [batch, features]; ``t0..`` tables, one row per sampler step (or per batch row, in
`prior_loss`); ``r0..`` rows, one per batch row and the same at every step (the condition); ``%1..`` results.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

__all__ = ["DenoiserProgram", "Op", "ProgramError"]


class ProgramError(ValueError):
    """A program that is not well formed: the message names the line and what is wrong with it."""


@dataclass(frozen=True)
class _Kind:
    """What an operation takes: value operands (None: one or more), parameters, attributes."""

    inputs: int | None
    params: tuple[str, ...] = ()
    required: int = 0  # the first so many parameters may not be left out
    attrs: tuple[str, ...] = ()


KINDS: dict[str, _Kind] = {
    # y = x W^T + b
    "linear": _Kind(1, ("weight", "bias"), 1),
    # training mode: the statistics are those of the batch, at every step anew (Ioffe & Szegedy, 2015)
    "batch_norm": _Kind(1, ("weight", "bias"), 0, ("eps",)),
    # evaluation mode: the statistics are the running ones, which take no gradient
    "batch_norm_eval": _Kind(1, ("mean", "var", "weight", "bias"), 2, ("eps",)),
    "layer_norm": _Kind(1, ("weight", "bias"), 0, ("eps",)),
    "rms_norm": _Kind(1, ("weight",), 0, ("eps",)),
    "relu": _Kind(1),
    "leaky_relu": _Kind(1, attrs=("slope",)),
    "silu": _Kind(1),
    "gelu": _Kind(1),
    "gelu_tanh": _Kind(1),
    "tanh": _Kind(1),
    "sigmoid": _Kind(1),
    # x where x > 0, else alpha (e^x − 1) (Clevert et al., 2016)
    "elu": _Kind(1, attrs=("alpha",)),
    # ln(1 + e^x), and x itself above 20, as torch has it
    "softplus": _Kind(1),
    "add": _Kind(2),
    "mul": _Kind(2),
    # y = scale x + shift, both numbers
    "affine": _Kind(1, attrs=("scale", "shift")),
    "slice": _Kind(1, attrs=("start", "stop")),
    "concat": _Kind(None),
}

_INTEGER_ATTRS = {"start", "stop"}


@dataclass(frozen=True)
class Op:
    """One line of a program.

    Args:
        kind: a key of `KINDS`.
        inputs: operands, such as ``("z", "t0")``.
        params: parameter indices in the order of `KINDS[kind].params`; None where one is left out.
        attrs: numbers in the order of `KINDS[kind].attrs`.
    """

    kind: str
    inputs: tuple[str, ...]
    params: tuple[int | None, ...] = ()
    attrs: tuple[float, ...] = ()

    def attr(self, name: str) -> float:
        return self.attrs[KINDS[self.kind].attrs.index(name)]

    def param(self, name: str) -> int | None:
        return self.params[KINDS[self.kind].params.index(name)]

    def text(self) -> str:
        arguments = list(self.inputs)
        arguments += ["-" if index is None else f"p{index}" for index in self.params]
        for name, value in zip(KINDS[self.kind].attrs, self.attrs, strict=True):
            arguments.append(f"{name}={int(value) if name in _INTEGER_ATTRS else repr(float(value))}")
        return f"{self.kind}({', '.join(arguments)})"


@dataclass(frozen=True)
class DenoiserProgram:
    """One denoising step, validated when it is made.

    Args:
        features: width of the state ``z`` and of the prediction.
        tables: widths of the tables ``t0..``.
        rows: widths of the rows ``r0..``.
        params: shapes of the parameters ``p0..``: 1-D or 2-D.
        ops: the operations; ``%i`` is the result of ``ops[i - 1]``.
        output: the operand that is the prediction, of width `features`.
        names: a name for each parameter, for printing only (not part of the program's identity).

    Raises:
        ProgramError: an unknown operation, an operand used before it is made, widths or shapes that do not fit.
    """

    features: int
    tables: tuple[int, ...]
    rows: tuple[int, ...]
    params: tuple[tuple[int, ...], ...]
    ops: tuple[Op, ...]
    output: str
    names: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        self.widths  # noqa: B018  (computing the widths is the validation)
        if self.names and len(self.names) != len(self.params):
            raise ProgramError(f"names: {len(self.names)} names for {len(self.params)} parameters")

    @cached_property
    def widths(self) -> dict[str, int]:
        """Width of every operand."""
        widths = {"z": self.features}
        widths |= {f"t{i}": width for i, width in enumerate(self.tables)}
        widths |= {f"r{i}": width for i, width in enumerate(self.rows)}
        for name, width in widths.items():
            if width < 1:
                raise ProgramError(f"{name} has width {width}; a width is at least 1")
        for index, shape in enumerate(self.params):
            if not 1 <= len(shape) <= 2 or min(shape) < 1:
                raise ProgramError(f"p{index} has shape {shape}; parameters have one or two dimensions, all >= 1")
        for number, op in enumerate(self.ops, start=1):
            try:
                widths[f"%{number}"] = self._infer(op, widths)
            except ProgramError as error:
                raise ProgramError(f"%{number} = {op.kind}: {error}") from None
        if self.output not in widths:
            raise ProgramError(f"return {self.output}: no such operand")
        if widths[self.output] != self.features:
            raise ProgramError(
                f"return {self.output}: the prediction has width {widths[self.output]}, the state {self.features}"
            )
        return widths

    def _infer(self, op: Op, widths: dict[str, int]) -> int:
        """The width of an operation's result; raises if the operation is not well formed."""
        if op.kind not in KINDS:
            raise ProgramError(f"unknown operation; known are {', '.join(KINDS)}")
        kind = KINDS[op.kind]
        if (kind.inputs is None and not op.inputs) or (kind.inputs is not None and len(op.inputs) != kind.inputs):
            raise ProgramError(f"takes {kind.inputs or 'one or more'} operand(s), got {len(op.inputs)}")
        if len(op.params) != len(kind.params) or len(op.attrs) != len(kind.attrs):
            raise ProgramError(
                f"takes parameters ({', '.join(kind.params)}) and attributes ({', '.join(kind.attrs)}), "
                f"got {len(op.params)} and {len(op.attrs)}"
            )
        for operand in op.inputs:
            if operand not in widths:
                raise ProgramError(f"operand {operand} is not made before it is used")
        for name, index in zip(kind.params[: kind.required], op.params, strict=False):
            if index is None:
                raise ProgramError(f"needs its {name}")
        for index in op.params:
            if index is not None and not 0 <= index < len(self.params):
                raise ProgramError(f"p{index} does not exist: there are {len(self.params)} parameters")
        for name, value in zip(kind.attrs, op.attrs, strict=True):
            if value != value or value in (float("inf"), float("-inf")):
                raise ProgramError(f"{name} is {value}; it must be finite")

        width = widths[op.inputs[0]]
        shapes = [None if index is None else self.params[index] for index in op.params]
        if op.kind == "linear":
            weight, bias = shapes
            if weight is None or len(weight) != 2 or weight[1] != width:
                raise ProgramError(f"weight has shape {weight}, expected [out, {width}]")
            if bias is not None and bias != (weight[0],):
                raise ProgramError(f"bias has shape {bias}, expected [{weight[0]}]")
            return weight[0]
        for name, shape in zip(kind.params, shapes, strict=True):
            if shape is not None and shape != (width,):
                raise ProgramError(f"{name} has shape {shape}, expected [{width}]")
        if "eps" in kind.attrs and op.attr("eps") < 0:
            raise ProgramError(f"eps is {op.attr('eps')}; it must not be negative")
        if op.kind in ("add", "mul") and widths[op.inputs[1]] != width:
            raise ProgramError(f"operands have widths {width} and {widths[op.inputs[1]]}")
        if op.kind == "slice":
            start, stop = int(op.attr("start")), int(op.attr("stop"))
            if (start, stop) != op.attrs or not 0 <= start < stop <= width:
                raise ProgramError(f"slice {op.attr('start'):g}:{op.attr('stop'):g} of width {width}")
            return stop - start
        if op.kind == "concat":
            return sum(widths[operand] for operand in op.inputs)
        return width

    def __hash__(self) -> int:
        return self._hash  # programs are keys of caches on the hot path

    @cached_property
    def _hash(self) -> int:
        return hash(self.text)

    @cached_property
    def batch_norms(self) -> tuple[int, ...]:
        """Positions in `ops` of the training-mode BatchNorms, which couple the rows of a batch."""
        return tuple(i for i, op in enumerate(self.ops) if op.kind == "batch_norm")

    @cached_property
    def stats_width(self) -> int:
        """Numbers of batch statistics per step: mean and biased variance of each training-mode BatchNorm."""
        return sum(2 * self.widths[f"%{i + 1}"] for i in self.batch_norms)

    @cached_property
    def buffer_params(self) -> frozenset[int]:
        """Indices of parameters that take no gradient: the running statistics."""
        return frozenset(
            index
            for op in self.ops
            if op.kind == "batch_norm_eval"
            for index in (op.param("mean"), op.param("var"))
            if index is not None
        )

    @cached_property
    def macs(self) -> int:
        """Multiply-adds of the matrix products, per row and step."""
        weights = (self.params[op.params[0]] for op in self.ops if op.kind == "linear" and op.params[0] is not None)
        return sum(shape[0] * shape[1] for shape in weights)

    @cached_property
    def text(self) -> str:
        """The program as text that `parse` reads back: the form the operators carry."""

        def join(widths: Sequence[int]) -> str:
            return ",".join(map(str, widths)) or "-"

        shapes = ",".join("x".join(map(str, shape)) for shape in self.params) or "-"
        lines = [f"denoiser z:{self.features} tables:{join(self.tables)} rows:{join(self.rows)} params:{shapes}"]
        lines += [f"  %{i} = {op.text()}" for i, op in enumerate(self.ops, start=1)]
        return "\n".join([*lines, f"  return {self.output}"])

    def __str__(self) -> str:
        """The text with widths and parameter names as comments, for people."""
        lines = self.text.splitlines()
        for i, op in enumerate(self.ops, start=1):
            notes = [f"[{self.widths[f'%{i}']}]"]
            if self.names:
                notes += [self.names[index] for index in op.params if index is not None]
            lines[i] = f"{lines[i]:<56} # {' '.join(notes)}"
        return "\n".join(lines)

    @staticmethod
    def parse(text: str) -> DenoiserProgram:
        """Read a program's `text`. Raises ProgramError naming the line that cannot be read."""
        return _parse(text)


_LIST = r"(-|[0-9]+(?:,[0-9]+)*)"
_SHAPES = r"(-|[0-9]+(?:x[0-9]+)*(?:,[0-9]+(?:x[0-9]+)*)*)"
_HEADER = re.compile(rf"denoiser z:([0-9]+) tables:{_LIST} rows:{_LIST} params:{_SHAPES}")
_LINE = re.compile(r"%([0-9]+) = (\w+)\((.*)\)")


@lru_cache(maxsize=512)
def _parse(text: str) -> DenoiserProgram:
    # Comments are allowed so that what `print` shows can be read back too.
    lines = [line.split("#")[0].strip() for line in text.strip().splitlines()]
    header = _HEADER.fullmatch(lines[0]) if lines else None
    if header is None:
        raise ProgramError("line 1: expected 'denoiser z:F tables:.. rows:.. params:..'")

    def split(part: str) -> list[str]:
        return [] if part == "-" else part.split(",")

    params = tuple(tuple(int(n) for n in shape.split("x")) for shape in split(header[4]))
    ops = []
    for number, line in enumerate(lines[1:-1], start=1):
        match = _LINE.fullmatch(line)
        if match is None or int(match[1]) != number:
            raise ProgramError(f"line {number + 1}: expected '%{number} = operation(...)', got {line!r}")
        ops.append(_parse_op(match[2], [part.strip() for part in match[3].split(",")], number + 1))
    if not lines[-1].startswith("return "):
        raise ProgramError(f"line {len(lines)}: expected 'return OPERAND', got {lines[-1]!r}")
    return DenoiserProgram(
        features=int(header[1]),
        tables=tuple(map(int, split(header[2]))),
        rows=tuple(map(int, split(header[3]))),
        params=params,
        ops=tuple(ops),
        output=lines[-1].removeprefix("return ").strip(),
    )


def _parse_op(kind: str, arguments: list[str], line: int) -> Op:
    if kind not in KINDS:
        raise ProgramError(f"line {line}: unknown operation {kind!r}; known are {', '.join(KINDS)}")

    operands = tuple(a for a in arguments if re.fullmatch(r"z|[tr%][0-9]+", a))
    params = tuple(a for a in arguments if re.fullmatch(r"-|p[0-9]+", a))
    named = [a.partition("=") for a in arguments if "=" in a]
    expected = KINDS[kind].attrs
    if [*operands, *params, *map("".join, named)] != arguments or tuple(name for name, _, _ in named) != expected:
        raise ProgramError(
            f"line {line}: cannot read the arguments ({', '.join(arguments)}); "
            f"expected {', '.join(['operands', 'parameters', *(f'{name}=number' for name in expected)])}"
        )
    try:
        attrs = tuple(float(number) for _, _, number in named)
    except ValueError as error:
        raise ProgramError(f"line {line}: {error}") from None
    return Op(kind, operands, tuple(None if a == "-" else int(a[1:]) for a in params), attrs)

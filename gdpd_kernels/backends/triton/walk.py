"""Writes the source of a walk forward through a program, on one tile of rows.

The text names what every kernel defines before a walk: ``rows`` (trajectories of the tile), ``valid``, ``sources`` (the
batch row of each), ``slots`` (the row of each in the buffer of kept values), the step ``k``, and pointers. A value is
in registers under the names of its pieces, or is loaded from where it lies when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gdpd_kernels.backends.triton.layout import Layout, Partition, Piece, Rows, is_outer
from gdpd_kernels.program import Op

# Of a number alone, and of a number and an attribute.
_ACTIVATIONS = {"relu", "silu", "softplus", "gelu", "gelu_tanh", "tanh", "sigmoid"}
SHAPED = {"leaky_relu": "slope", "elu": "alpha"}


def identifier(name: str) -> str:
    """A value's name as Python allows it."""
    return "v" + name[1:] if name[0] == "%" else name


@dataclass
class Text:
    """Lines of source under way, with their indentation."""

    lines: list[str] = field(default_factory=list)
    depth: int = 1

    def __call__(self, line: str) -> None:
        self.lines.append("    " * self.depth + line)

    def block(self, head: str, body: Callable[[], None]) -> None:
        self(head)
        self.depth += 1
        body()
        self.depth -= 1


class Walk:
    """One walk.

    Args:
        layout: of the program.
        text: where the source goes.
        precision: of the matrix products, as `tiles.dot` names it.
        kept: buffer of the values that backward reads: forward writes to it, backward reads it.
        per_row_tables: tables have one row per trajectory, as in `prior_loss`, not one per step.
    """

    def __init__(
        self,
        layout: Layout,
        text: Text,
        precision: str,
        kept: Rows | None,
        per_row_tables: bool = False,
    ) -> None:
        self.layout, self.text, self.precision = layout, text, precision
        self.program, self.widths, self.partitions = layout.program, layout.program.widths, layout.partitions
        self.kept, self.per_row_tables = kept, per_row_tables
        self.registers: dict[str, list[str]] = {}
        self._fresh = 0

    # --- values -----------------------------------------------------------------------------------------------------

    def define(self, name: str, expressions: Sequence[str]) -> None:
        """A value's pieces, from one expression each; written to memory if backward reads it."""
        found = [f"{identifier(name)}_{i}" for i in range(len(expressions))]
        for variable, expression in zip(found, expressions, strict=True):
            if variable != expression:
                self.text(f"{variable} = {expression}")
        self.registers[name] = found
        if self.kept is not None and name in self.kept.at:
            for piece, x in zip(self.partitions[name], found, strict=True):
                start = self.kept.at[name] + piece.start
                self.text(f"store_rows(kept, slots, valid, {x}, {self.kept.width}, {start}, {piece.width})")

    def fetch(self, name: str, partition: Partition | None = None) -> list[str]:
        """Names of the pieces of a value, cut as it is or as asked for."""
        partition = partition or self.partitions[name]
        if name in self.registers:
            return self.recut(self.registers[name], self.partitions[name], partition)
        if is_outer(name):
            made = [self._outer(name, piece) for piece in partition]
            if partition == self.partitions[name]:
                self.registers[name] = made
            return made
        assert self.kept is not None
        places = [f"{self.kept.width}, {self.kept.at[name] + p.start}, {p.width}, {p.size}" for p in partition]
        return [self.new(identifier(name), f"load_rows(kept, slots, valid, {place})") for place in places]

    def forget(self) -> None:
        """From here on, values are read from memory, which all threads see."""
        self.registers.clear()

    def new(self, stem: str, expression: str) -> str:
        self._fresh += 1
        variable = f"{stem}_x{self._fresh}"
        self.text(f"{variable} = {expression}")
        return variable

    def _outer(self, name: str, p: Piece) -> str:
        width = self.widths[name]
        if name[0] == "t" and not self.per_row_tables:
            row = f"load_row({name} + k * {width}, {p.start}, {p.width}, {p.size})"
            return self.new(name, f"tl.broadcast_to({row}, [BLOCK, {p.size}])")
        at = "rows" if self.per_row_tables else "sources"
        return self.new(name, f"load_rows({name}, {at}, valid, {width}, {p.start}, {p.width}, {p.size})")

    def recut(self, names: Sequence[str], old: Partition, new: Partition) -> list[str]:
        """The pieces of a value in another partition, which may cover more or less than the old one."""
        known = dict(zip(old, names, strict=True))
        found = []
        for piece in new:
            if piece in known:
                found.append(known[piece])
                continue
            parts = [
                f"moved({x}, {piece.start - p.start}, {p.width}, {piece.width}, {piece.size})"
                for p, x in known.items()
                if p.start < piece.stop and piece.start < p.stop
            ]
            found.append(self.new("cut", " + ".join(parts) or f"tl.zeros([BLOCK, {piece.size}], tl.float32)"))
        return found

    def parameter(self, index: int | None, p: Piece) -> str | None:
        """A vector parameter's piece, as a row."""
        return None if index is None else f"load_row(p{index}, {p.start}, {p.width}, {p.size})"

    # --- forward ----------------------------------------------------------------------------------------------------

    def forward(self, number: int) -> None:
        """One operation."""
        op, name = self.program.ops[number - 1], f"%{number}"
        self.text(f"# {name} = {op.text()}")
        pieces = self.partitions[name]
        if op.kind == "linear":
            self.define(name, self._linear(op, pieces))
        elif op.kind == "batch_norm_eval":
            hats = [f"({x} - {mean}) * {inverse}" for x, mean, inverse in self._eval_moments(op, pieces)]
            self.define(name, self._scaled(op, hats, pieces))
        elif op.kind in ("layer_norm", "rms_norm"):
            mean, inverse, xs = self._row_moments(op, pieces)
            hats = [f"({x} - {mean}) * {inverse}" if mean else f"{x} * {inverse}" for x in xs]
            self.define(name, self._scaled(op, hats, pieces))
        elif op.kind in ("add", "mul"):
            a, b = (self.fetch(x, pieces) for x in op.inputs)
            sign = "+" if op.kind == "add" else "*"
            self.define(name, [f"{x} {sign} {y}" for x, y in zip(a, b, strict=True)])
        elif op.kind == "slice":
            self.define(name, self._slice(op, pieces))
        elif op.kind == "concat":
            self.define(name, [x for operand in op.inputs for x in self.fetch(operand)])
        else:
            self.define(name, [self._elementwise(op, x) for x in self.fetch(op.inputs[0])])

    def _elementwise(self, op: Op, x: str) -> str:
        if op.kind in _ACTIVATIONS:
            return f"{op.kind}({x})"
        if op.kind in SHAPED:
            return f"{op.kind}({x}, {op.attr(SHAPED[op.kind])!r})"
        return f"{op.attr('scale')!r} * {x} + {op.attr('shift')!r}"

    def _linear(self, op: Op, pieces: Partition) -> list[str]:
        weight, bias = op.params
        columns = self.partitions[op.inputs[0]]
        # The operand outside: as a matrix unit wants it, each of its pieces takes several times the registers of a
        # sum, since every warp holds all of it; this way one piece is held at a time.
        accs = [self.new("acc", f"tl.zeros([BLOCK, {out.size}], tl.float32)") for out in pieces]
        for x, p in zip(self.fetch(op.inputs[0]), columns, strict=True):
            for acc, out in zip(accs, pieces, strict=True):
                self.text(f"{acc} = linear({x}, {self.block(weight, out, p, acc)})")
        rows = [self.parameter(bias, out) for out in pieces]
        return [acc if row is None else f"{acc} + {row}" for acc, row in zip(accs, rows, strict=True)]

    def block(self, weight: int | None, out: Piece, p: Piece, acc: str) -> str:
        """Arguments of a product with a block of a weight."""
        assert weight is not None
        return f'packed + {self.layout.packed[weight, out, p]}, {acc}, "{self.precision}", {out.size}, {p.size}'

    def _scaled(self, op: Op, hats: Sequence[str], pieces: Partition) -> list[str]:
        found = []
        for hat, p in zip(hats, pieces, strict=True):
            scale = self.parameter(op.param("weight"), p)
            shift = self.parameter(op.param("bias"), p) if op.kind != "rms_norm" else None
            found.append(hat + (f" * {scale}" if scale else "") + (f" + {shift}" if shift else ""))
        return found

    def _eval_moments(self, op: Op, pieces: Partition) -> list[tuple[str, str, str]]:
        """x, mean and 1 / deviation of each piece."""
        found = []
        for x, p in zip(self.fetch(op.inputs[0]), pieces, strict=True):
            mean = self.parameter(op.param("mean"), p)
            variance = self.parameter(op.param("var"), p)
            inverse = self.new("inverse", f"inverse_deviation({variance}, {op.attr('eps')!r}, {p.width})")
            found.append((x, self.new("mean", str(mean)), inverse))
        return found

    def _row_moments(self, op: Op, pieces: Partition) -> tuple[str, str, list[str]]:
        """Mean ('' for RMSNorm, which has none) and 1 / deviation of every row, and the pieces of x."""
        xs, width = self.fetch(op.inputs[0]), self.widths[op.inputs[0]]
        mean = ""
        if op.kind == "layer_norm":
            sums = " + ".join(f"row_sum({x}, {p.width})" for x, p in zip(xs, pieces, strict=True))
            mean = self.new("mean", f"({sums}) / {width}")
        off = [f"({x} - {mean})" if mean else x for x in xs]
        squares = " + ".join(f"row_sum({x} * {x}, {p.width})" for x, p in zip(off, pieces, strict=True))
        deviation = f"tl.sqrt(tl.where(valid[:, None], ({squares}) / {width} + {op.attr('eps')!r}, 1.0))"
        return mean, self.new("inverse", f"tl.where(valid[:, None], 1.0 / {deviation}, 0.0)"), xs

    def _slice(self, op: Op, pieces: Partition) -> list[str]:
        source, start = op.inputs[0], int(op.attr("start"))
        return self.fetch(source, tuple(Piece(p.start + start, p.width) for p in pieces))

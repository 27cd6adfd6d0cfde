"""Writes the source of a walk backward through a program: gradients of values, of outer values and of parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gdpd_kernels.backends.triton.layout import Layout, Partition, Piece, Rows
from gdpd_kernels.backends.triton.walk import SHAPED, Text, Walk, identifier
from gdpd_kernels.program import Op

_GRAD_OF_RESULT = {"relu", "tanh", "sigmoid"}


class Later:
    """An expression that is written when it is first read, so that it is held in registers no sooner than that.

    It may name variables that are final only: gradients that were taken, values, and what the step began with.
    """

    def __init__(self, write: Callable[[], str]) -> None:
        self.write, self.written = write, ""

    def __call__(self) -> str:
        self.written = self.written or self.write()
        return self.written


Gradient = str | Later  # of a piece


def now(gradient: Gradient) -> str:
    """The gradient's expression, written."""
    return gradient() if isinstance(gradient, Later) else gradient


class BackwardWalk(Walk):
    """One walk backward; it may walk forward before, to compute again what it reads.

    Beside what `Walk` takes of the text around it, ``later_step`` and ``later_tile`` are zero at the first step and
    tile that this program meets: gradients are stored the first time and added to from then on.

    Args:
        need: values through which gradients flow.
        wanted: outer values and parameters whose gradient is asked for.
        shares: where each parameter's gradient begins in a program's share of the gradients; "tables" where those
            of the tables begin, one after the other.
    """

    def __init__(
        self,
        layout: Layout,
        text: Text,
        precision: str,
        kept: Rows,
        need: frozenset[str],
        wanted: frozenset[str],
        shares: dict[str, int],
        per_row_tables: bool = False,
    ) -> None:
        super().__init__(layout, text, precision, kept, per_row_tables)
        self.need, self.wanted, self.shares = need, wanted, shares
        self.gradients: dict[str, list[Gradient | None]] = {}
        self.written: set[str] = set()  # parameters and outer values whose gradient this step has stored before

    # --- gradients under way ----------------------------------------------------------------------------------------

    def add(self, name: str, index: int, expression: Gradient) -> None:
        """Add to the gradient of a value's piece; what is added is not written before the sum is read."""
        if name not in self.need:
            return
        pieces = self.gradients.setdefault(name, [None] * len(self.partitions[name]))
        before, variable = pieces[index], f"d_{identifier(name)}_{index}"

        def write() -> str:
            expressions = [now(before)] if before is not None else []
            self.text(f"{variable} = {' + '.join([*expressions, now(expression)])}")
            return variable

        pieces[index] = Later(write)
        if before is not None:
            now(pieces[index])  # type: ignore[arg-type]

    def take(self, name: str) -> list[Gradient] | None:
        """The finished gradient of a value, None if there is none."""
        pieces = self.gradients.pop(name, None)
        if pieces is None or not any(pieces):
            return None
        return [
            x or self.new("zero", f"tl.zeros([BLOCK, {p.size}], tl.float32)")
            for x, p in zip(pieces, self.partitions[name], strict=True)
        ]

    def take_now(self, name: str) -> list[str] | None:
        """As `take`, all of it written."""
        pieces = self.take(name)
        return None if pieces is None else [now(x) for x in pieces]

    def flush_outer(self) -> None:
        """Write the gradients of tables and rows that this walk has found."""
        for letter, widths in (("r", self.program.rows), ("t", self.program.tables)):
            for i in range(len(widths)):
                self.flush(f"{letter}{i}")

    def flush(self, name: str) -> None:
        """Write the gradient of one of them."""
        width, pieces = self.widths[name], self.take_now(name)
        if pieces is None:
            return
        per_row = name[0] == "r" or self.per_row_tables
        again = self._again(name, "later_step" if per_row else "later_tile")
        if per_row:
            for p, x in zip(self.partitions[name], pieces, strict=True):
                self.text(f"add_rows(grad_{name}, rows, valid, {again}, {x}, {width}, {p.start}, {p.width})")
            return
        tables = self.program.tables
        before = sum(w for j, w in enumerate(tables[: int(name[1:])]) if f"t{j}" in self.wanted)
        base = f"share + {self.shares['tables']} + steps * {before} + k * {width}"
        for p, x in zip(self.partitions[name], pieces, strict=True):
            self.text(f"add_row({base}, {again}, {x}, {p.start}, {p.width})")

    def _again(self, name: str, otherwise: str) -> str:
        before = name in self.written
        self.written.add(name)
        return "1" if before else otherwise

    # --- operations -------------------------------------------------------------------------------------------------

    def backward(self, number: int) -> None:
        """One operation."""
        op, name = self.program.ops[number - 1], f"%{number}"
        if name not in self.need:
            self.gradients.pop(name, None)
            return
        grads = self.take(name)
        if grads is None:
            return
        self.text(f"# gradients of {name} = {op.text()}")
        pieces = self.partitions[name]
        if op.kind == "linear":
            self._linear_back(op, grads, pieces)
        elif op.kind == "batch_norm_eval":
            self._eval_norm_back(op, [now(g) for g in grads], pieces)
        elif op.kind in ("layer_norm", "rms_norm"):
            self._row_norm_back(op, [now(g) for g in grads], pieces)
        elif op.kind == "add":
            for operand in op.inputs:
                self.send(operand, grads, pieces)
        elif op.kind == "mul":
            for operand, other in zip(op.inputs, op.inputs[::-1], strict=True):
                self.send(operand, self._each(grads, pieces, other, "{g} * {x}"), pieces)
        elif op.kind == "slice":
            start = int(op.attr("start"))
            self.send(op.inputs[0], grads, tuple(Piece(p.start + start, p.width) for p in pieces))
        elif op.kind == "concat":
            at = 0
            for operand in op.inputs:
                n = len(self.partitions[operand])
                self.send(operand, grads[at : at + n], self.partitions[operand])
                at += n
        elif op.kind == "affine":
            self.send(op.inputs[0], self._each(grads, pieces, "", f"{op.attr('scale')!r} * {{g}}"), pieces)
        else:
            more = f", {op.attr(SHAPED[op.kind])!r}" if op.kind in SHAPED else ""
            value = name if op.kind in _GRAD_OF_RESULT else op.inputs[0]
            self.send(op.inputs[0], self._each(grads, pieces, value, f"{op.kind}_grad({{x}}, {{g}}{more})"), pieces)

    def _each(self, grads: Sequence[Gradient], pieces: Partition, value: str, form: str) -> list[Gradient]:
        """Of every piece an expression of its gradient {g} and of the same piece of a value, {x}."""

        def one(g: Gradient, p: Piece) -> Later:
            return Later(lambda: form.format(g=now(g), x=self.fetch(value, (p,))[0] if value else ""))

        return [one(g, p) for g, p in zip(grads, pieces, strict=True)]

    def send(self, name: str, grads: Sequence[Gradient], pieces: Partition) -> None:
        """Add a gradient, cut in any way, to that of `name`, of which it may be a part."""
        if name not in self.need:
            return
        mine = self.partitions[name]
        if pieces != mine and not set(pieces) <= set(mine):
            # An expression is evaluated once before it is cut.
            written = [now(x) for x in grads]
            written = [x if x.isidentifier() else self.new("grad", x) for x in written]
            mine = tuple(p for p in mine if any(q.start < p.stop and p.start < q.stop for q in pieces))
            grads, pieces = self.recut(written, pieces, mine), mine
        for x, p in zip(grads, pieces, strict=True):
            self.add(name, self.partitions[name].index(p), x)

    def _linear_back(self, op: Op, grads: Sequence[Gradient], pieces: Partition) -> None:
        (x,), (weight, bias) = op.inputs, op.params
        columns, downwards = self.partitions[x], x in self.need
        for_weight, for_bias = f"p{weight}" in self.wanted, f"p{bias}" in self.wanted
        if for_weight:
            weight_again = self._parameter_again(weight)
        if for_bias:
            bias_again = self._parameter_again(bias)
        accs = [self.new("acc", f"tl.zeros([BLOCK, {p.size}], tl.float32)") for p in columns if downwards]
        # One piece of the gradient after the other, and all that is done with it: as the operand of a product each
        # piece takes several times the registers of a sum, since every warp holds all of it.
        for gradient, out in zip(grads, pieces, strict=True):
            g = now(gradient)
            g = g if g.isidentifier() else self.new("grad", g)
            if for_weight:
                self._weight_grads(weight, weight_again, x, g, out)
            if for_bias:
                self.text(f"add_row({self._share(bias)}, {bias_again}, {g}, {out.start}, {out.width})")
            for acc, p in zip(accs, columns, strict=downwards):
                self.text(f"{acc} = linear_input_grad({g}, {self.block(weight, out, p, acc)})")
        for i, acc in enumerate(accs):
            self.add(x, i, acc)

    def _weight_grads(self, weight: int | None, again: str, x: str, g: str, out: Piece) -> None:
        """The rows `out` of a weight's gradient: a piece of the gradient against all pieces of the input."""
        assert weight is not None
        blocks, base = self.layout.blocks_of(weight), self._share(weight)

        def write() -> None:
            for p in self.partitions[x]:
                # Read again for each: small beside the block of the gradient, and nothing is held meanwhile.
                block = f'linear_weight_grad({g}, {self.fetch(x, (p,))[0]}, "{self.precision}")'
                if (at := blocks.get((out, p))) is not None:
                    self.text(f"add_block({base} + {at}, {again}, {block})")
                    continue
                place = f"{self.program.params[weight][-1]}, {out.start}, {out.width}, {p.start}, {p.width}"
                self.text(f"add_matrix({base}, {again}, {block}, {place})")

        # Always so. Past a branch the compiler puts nothing off, and it lays these products out by themselves: in the
        # layout of the others every warp would hold all of g.
        self.text.block("if share_stride > 0:", write)

    def _share(self, index: int | None) -> str:
        return f"share + {self.shares[f'p{index}']}"

    def _parameter_again(self, index: int | None) -> str:
        """Whether a parameter's gradient has been stored before; where it has in this very step, threads meet first."""
        name = f"p{index}"
        if name in self.written:
            self.text("tl.debug_barrier()")
            return "1"
        self.written.add(name)
        return "later_step + later_tile"

    def _vector_grad(self, index: int | None, rows: Sequence[str], pieces: Partition) -> None:
        """The gradient of a vector parameter: the sum over the tile's rows."""
        if index is None or f"p{index}" not in self.wanted:
            return
        base, again = self._share(index), self._parameter_again(index)
        for x, p in zip(rows, pieces, strict=True):
            self.text(f"add_row({base}, {again}, {x}, {p.start}, {p.width})")

    def _norm_params(self, op: Op, grads: Sequence[str], hats: Sequence[str], pieces: Partition) -> None:
        self._vector_grad(op.param("weight"), [f"{g} * {h}" for g, h in zip(grads, hats, strict=True)], pieces)
        if op.kind != "rms_norm":
            self._vector_grad(op.param("bias"), grads, pieces)

    def _weighted(self, op: Op, grads: Sequence[str], pieces: Partition) -> list[str]:
        """Gradients of the normalised values."""
        scales = [self.parameter(op.param("weight"), p) for p in pieces]
        return [g if s is None else self.new("scaled", f"{g} * {s}") for g, s in zip(grads, scales, strict=True)]

    def _eval_norm_back(self, op: Op, grads: Sequence[str], pieces: Partition) -> None:
        moments = self._eval_moments_only(op, pieces)
        if any(f"p{index}" in self.wanted for index in (op.param("weight"), op.param("bias"))):
            xs = self.fetch(op.inputs[0])
            hats = [f"(({x} - {mean}) * {inverse})" for x, (mean, inverse) in zip(xs, moments, strict=True)]
            self._norm_params(op, grads, hats, pieces)
        if op.inputs[0] in self.need:
            scaled = self._weighted(op, grads, pieces)
            made = [f"{g} * {inverse}" for g, (_, inverse) in zip(scaled, moments, strict=True)]
            self.send(op.inputs[0], made, pieces)

    def _row_norm_back(self, op: Op, grads: Sequence[str], pieces: Partition) -> None:
        # dx = (g - mean(g) - hat mean(g hat)) / deviation, g the gradient of hat; without its mean in RMSNorm.
        width = self.widths[op.inputs[0]]
        mean, inverse, xs = self._row_moments(op, pieces)
        off = [f"({x} - {mean})" if mean else x for x in xs]
        hats = [self.new("hat", f"real({x} * {inverse}, {p.width})") for x, p in zip(off, pieces, strict=True)]
        self._norm_params(op, grads, hats, pieces)
        if op.inputs[0] not in self.need:
            return
        scaled = self._weighted(op, grads, pieces)
        along = " + ".join(f"tl.sum({g} * {h}, axis=1)[:, None]" for g, h in zip(scaled, hats, strict=True))
        along = self.new("along", f"({along}) / {width}")
        if mean:
            sums = " + ".join(f"tl.sum({g}, axis=1)[:, None]" for g in scaled)
            level = self.new("level", f"({sums}) / {width}")
            made = [f"real({inverse} * ({g} - {level} - {h} * {along}), {p.width})"
                    for g, h, p in zip(scaled, hats, pieces, strict=True)]  # fmt: skip
        else:
            made = [f"{inverse} * ({g} - {h} * {along})" for g, h in zip(scaled, hats, strict=True)]
        self.send(op.inputs[0], made, pieces)

    def _eval_moments_only(self, op: Op, pieces: Partition) -> list[tuple[str, str]]:
        found = []
        for p in pieces:
            variance = self.parameter(op.param("var"), p)
            inverse = self.new("inverse", f"inverse_deviation({variance}, {op.attr('eps')!r}, {p.width})")
            found.append((str(self.parameter(op.param("mean"), p)), inverse))
        return found

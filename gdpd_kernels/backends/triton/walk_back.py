"""Writes the source of a walk backward through a program: gradients of values, of outer values and of parameters."""

from __future__ import annotations

from collections.abc import Sequence

from gdpd_kernels.backends.triton.layout import Layout, Partition, Piece, Rows, is_outer
from gdpd_kernels.backends.triton.walk import KNOWN, SHAPED, TILE, Text, Walk, identifier
from gdpd_kernels.program import Op

_GRAD_OF_RESULT = {"relu", "tanh", "sigmoid"}


class BackwardWalk(Walk):
    """One walk backward; it may walk forward before, to compute again what it reads.

    Beside what `Walk` takes of the text around it, ``later_step`` and ``later_tile`` are zero at the first step and
    tile that this program meets: gradients are stored the first time and added to from then on.

    Args:
        need: values through which gradients flow.
        wanted: outer values and parameters whose gradient is asked for.
        shares: where each parameter's gradient begins in a program's share of the gradients; "tables" where those
            of the tables begin, one after the other.
        pending: values whose gradient earlier launches have left in the buffer ``gradients``; it is kept up to date.
        written: parameters and outer values whose gradient this step has stored before; it is kept up to date.
    """

    def __init__(
        self,
        layout: Layout,
        text: Text,
        precision: str,
        kept: Rows,
        statistics: str,
        need: frozenset[str],
        wanted: frozenset[str],
        shares: dict[str, int],
        per_row_tables: bool = False,
        pending: set[str] | None = None,
        written: set[str] | None = None,
    ) -> None:
        super().__init__(layout, text, precision, kept, statistics, per_row_tables)
        self.need, self.wanted, self.shares = need, wanted, shares
        self.gradients: dict[str, list[str | None]] = {}
        self.pending = set() if pending is None else pending
        self.written = set() if written is None else written

    # --- gradients under way ----------------------------------------------------------------------------------------

    def add(self, name: str, index: int, expression: str) -> None:
        """Add to the gradient of a value's piece."""
        if name not in self.need:
            return
        pieces = self._open(name)
        variable = f"d_{identifier(name)}_{index}"
        before = pieces[index]
        self.text(f"{variable} = {expression}" if before is None else f"{variable} = {before} + {expression}")
        pieces[index] = variable

    def _open(self, name: str) -> list[str | None]:
        if name not in self.gradients:
            self.gradients[name] = [None] * len(self.partitions[name])
            if name in self.pending:
                self.pending.discard(name)
                rows = self.layout.gradients
                for i, p in enumerate(self.partitions[name]):
                    variable = f"d_{identifier(name)}_{i}"
                    place = f"{rows.width}, {rows.at[name] + p.start}, {p.width}, {p.size}"
                    self.text(f"{variable} = load_rows(gradients, rows, valid, {place})")
                    self.gradients[name][i] = variable
        return self.gradients[name]

    def take(self, name: str) -> list[str] | None:
        """The finished gradient of a value, None if there is none."""
        pieces = self._open(name) if name in self.pending else self.gradients.get(name)
        self.gradients.pop(name, None)
        if pieces is None or not any(pieces):
            return None
        return [
            x or self.new("zero", f"tl.zeros([BLOCK, {p.size}], tl.float32)")
            for x, p in zip(pieces, self.partitions[name], strict=True)
        ]

    def hand_over(self) -> None:
        """Leave the gradients under way to the next launch."""
        for name in list(self.gradients):
            if not is_outer(name) and (pieces := self.take(name)) is not None:
                self.store(name, pieces, "gradients", self.layout.gradients)
                self.pending.add(name)

    def flush_outer(self) -> None:
        """Write the gradients of tables and rows that this walk has found."""
        program = self.program
        for i, width in enumerate(program.rows):
            self._flush(f"r{i}", width, "later_step")
        for i, width in enumerate(program.tables):
            if self.per_row_tables:
                self._flush(f"t{i}", width, "later_step")
                continue
            before = sum(w for j, w in enumerate(program.tables[:i]) if f"t{j}" in self.wanted)
            pieces = self.take(f"t{i}")
            if pieces is None:
                continue
            base = f"share + {self.shares['tables']} + steps * {before} + k * {width}"
            again = self._again(f"t{i}", "later_tile")
            for p, x in zip(self.partitions[f"t{i}"], pieces, strict=True):
                self.text(f"add_row({base}, {again}, {x}, {p.start}, {p.width})")

    def _flush(self, name: str, width: int, again: str) -> None:
        pieces = self.take(name)
        if pieces is None:
            return
        again = self._again(name, again)
        for p, x in zip(self.partitions[name], pieces, strict=True):
            self.text(f"add_rows(grad_{name}, rows, valid, {again}, {x}, {width}, {p.start}, {p.width})")

    def _again(self, name: str, otherwise: str) -> str:
        before = name in self.written
        self.written.add(name)
        return "1" if before else otherwise

    # --- operations -------------------------------------------------------------------------------------------------

    def backward(self, number: int) -> None:
        """One operation; of a BatchNorm whose sums are not the tile's, what comes after the sums."""
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
        elif op.kind == "batch_norm":
            self._batch_norm_back(number, op, grads, pieces)
        elif op.kind == "batch_norm_eval":
            self._eval_norm_back(op, grads, pieces)
        elif op.kind in ("layer_norm", "rms_norm"):
            self._row_norm_back(op, grads, pieces)
        elif op.kind == "add":
            for operand in op.inputs:
                self.send(operand, grads, pieces)
        elif op.kind == "mul":
            for operand, other in zip(op.inputs, op.inputs[::-1], strict=True):
                if operand in self.need:
                    xs = self.fetch(other, pieces)
                    self.send(operand, [f"{g} * {x}" for g, x in zip(grads, xs, strict=True)], pieces)
        elif op.kind == "slice":
            start = int(op.attr("start"))
            self.send(op.inputs[0], grads, tuple(Piece(p.start + start, p.width) for p in pieces))
        elif op.kind == "concat":
            at = 0
            for operand in op.inputs:
                n = len(self.partitions[operand])
                self.send(operand, grads[at : at + n], self.partitions[operand])
                at += n
        else:
            self._elementwise_back(op, name, grads)

    def send(self, name: str, grads: Sequence[str], pieces: Partition) -> None:
        """Add a gradient, cut in any way, to that of `name`, of which it may be a part."""
        if name not in self.need:
            return
        mine = self.partitions[name]
        if pieces != mine and not set(pieces) <= set(mine):
            # An expression is evaluated once before it is cut.
            grads = [x if x.isidentifier() else self.new("grad", x) for x in grads]
            mine = tuple(p for p in mine if any(q.start < p.stop and p.start < q.stop for q in pieces))
            grads, pieces = self.recut(grads, pieces, mine), mine
        for x, p in zip(grads, pieces, strict=True):
            self.add(name, self.partitions[name].index(p), x)

    def _elementwise_back(self, op: Op, name: str, grads: Sequence[str]) -> None:
        (x,) = op.inputs
        pieces = self.partitions[x]
        if op.kind == "affine":
            made = [f"{op.attr('scale')!r} * {g}" for g in grads]
        elif op.kind in SHAPED:
            shape = repr(op.attr(SHAPED[op.kind]))
            made = [f"{op.kind}_grad({v}, {g}, {shape})" for v, g in zip(self.fetch(x), grads, strict=True)]
        else:
            values = self.fetch(name if op.kind in _GRAD_OF_RESULT else x)
            made = [f"{op.kind}_grad({v}, {g})" for v, g in zip(values, grads, strict=True)]
        self.send(x, made, pieces)

    def _linear_back(self, op: Op, grads: Sequence[str], pieces: Partition) -> None:
        (x,), (weight, bias) = op.inputs, op.params
        columns = self.partitions[x]
        if f"p{weight}" in self.wanted:
            base, again = self._share(weight), self._parameter_again(weight)
            assert weight is not None
            blocks = self.layout.blocks_of(weight)
            for v, p in zip(self.fetch(x), columns, strict=True):
                for g, out in zip(grads, pieces, strict=True):
                    block = f"linear_weight_grad({g}, {v}, \"{self.precision}\")"
                    if (at := blocks.get((out, p))) is not None:
                        self.text(f"add_block({base} + {at}, {again}, {block})")
                        continue
                    place = f"{self.widths[x]}, {out.start}, {out.width}, {p.start}, {p.width}"
                    self.text(f"add_matrix({base}, {again}, {block}, {place})")
        self._vector_grad(bias, list(grads), pieces)
        if x in self.need:
            for i, p in enumerate(columns):
                acc = self.new("acc", f"tl.zeros([BLOCK, {p.size}], tl.float32)")
                for g, out in zip(grads, pieces, strict=True):
                    self.text(f"{acc} = linear_input_grad({g}, {self.block(weight, out, p, acc)})")
                self.add(x, i, acc)

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

    # --- BatchNorm in training mode ---------------------------------------------------------------------------------

    def _hats(self, number: int, op: Op, pieces: Partition) -> list[tuple[str, str]]:
        """The normalised input and 1 / deviation of each piece."""
        found = []
        before, self.statistics = self.statistics, KNOWN  # forward has written them
        for x, p in zip(self.fetch(op.inputs[0]), pieces, strict=True):
            mean, inverse = self.batch_moments(number, op, x, p)
            found.append((self.new("hat", f"({x} - {mean}) * {inverse}"), inverse))
        self.statistics = before
        return found

    def batch_norm_sums(self, number: int) -> None:
        """The tile's part of the sums that a BatchNorm's backward needs, and of its parameters' gradients."""
        op, name = self.program.ops[number - 1], f"%{number}"
        if name not in self.need or (grads := self.take(name)) is None:
            return
        self.text(f"# sums over the batch for {name} = {op.text()}")
        pieces = self.partitions[name]
        at, columns, stride = self.layout.stats[number], self.widths[op.inputs[0]], self.program.stats_width
        hats = [hat for hat, _ in self._hats(number, op, pieces)]
        self._norm_params(op, grads, hats, pieces)
        for g, hat, p in zip(grads, hats, pieces, strict=True):
            for x, start in ((g, at), (f"{g} * {hat}", at + columns)):
                row = f"tl.sum({x}, axis=0)[None, :]"
                self.text(f"store_row(sums + tile * {stride}, {row}, {start + p.start}, {p.width})")
        self.gradients[name] = list(grads)

    def _batch_norm_back(self, number: int, op: Op, grads: Sequence[str], pieces: Partition) -> None:
        # dx = weight / deviation (g - mean(g) - hat mean(g hat)), g the gradient of the result, means over the batch.
        at, columns, stride = self.layout.stats[number], self.widths[op.inputs[0]], self.program.stats_width
        hats = self._hats(number, op, pieces)
        if self.statistics == TILE:
            self._norm_params(op, grads, [hat for hat, _ in hats], pieces)
        if op.inputs[0] not in self.need:
            return
        made = []
        for g, (hat, inverse), p in zip(grads, hats, pieces, strict=True):
            if self.statistics == TILE:
                level = f"tl.sum({g}, axis=0)[None, :]"
                along = f"tl.sum({g} * {hat}, axis=0)[None, :]"
            else:
                place = f"sums, tiles, {stride}, {{}}, {p.width}, {p.size}"
                level = f"joined_sums({place.format(at + p.start)})"
                along = f"joined_sums({place.format(at + columns + p.start)})"
            level = self.new("level", f"{level} / total.to(tl.float32)")
            along = self.new("along", f"{along} / total.to(tl.float32)")
            scale = self.parameter(op.param("weight"), p)
            d = f"{inverse} * ({g} - {level} - {hat} * {along})" + (f" * {scale}" if scale else "")
            made.append(f"tl.where(valid[:, None], {d}, 0.0)")
        self.send(op.inputs[0], made, pieces)

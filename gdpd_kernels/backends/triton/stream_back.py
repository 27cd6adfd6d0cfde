"""Writes the source of a walk backward whose values and gradients lie in memory (see ``stream``)."""

from __future__ import annotations

from gdpd_kernels.backends.triton.layout import Piece, is_outer
from gdpd_kernels.backends.triton.stream import KNOWN, TILE, StreamWalk
from gdpd_kernels.backends.triton.walk import identifier
from gdpd_kernels.backends.triton.walk_back import BackwardWalk, Gradient, now
from gdpd_kernels.program import Op


class StreamBackwardWalk(StreamWalk, BackwardWalk):
    """One walk backward: a gradient is in registers in the loop that finds it, and in a slot from then on.

    ``found``: the gradients of the loop under way; ``waiting``: slots of those that earlier loops have found.
    """

    def __init__(self, *more: object, **named: object) -> None:
        super().__init__(*more, **named)  # type: ignore[arg-type]
        self.found: dict[str, str] = {}
        self.waiting: dict[str, int] = {}

    # --- gradients under way ------------------------------------------------------------------------------------------

    def add(self, name: str, index: int, expression: Gradient) -> None:
        if name not in self.need:
            return
        parts = [now(expression)]
        if before := self._under_way(name):
            parts.insert(0, before)
        self.found[name] = self.new(f"d_{identifier(name)}", " + ".join(parts))

    def _under_way(self, name: str) -> str:
        """The gradient of a value as far as it is known, '' if nothing is."""
        if name in self.found:
            return self.found[name]
        if name not in self.waiting:
            return ""
        (piece,) = self.partitions[name]
        return self.new("d", f"load_slot(room, {self.waiting[name]}, c, BLOCK, {piece.size})")

    def take(self, name: str) -> list[Gradient] | None:
        found = self._under_way(name)
        self.forget_gradient(name)
        return [found] if found else None

    def forget_gradient(self, name: str) -> None:
        """Of a value whose gradient nobody reads after the loop under way."""
        self.found.pop(name, None)
        if name in self.waiting:
            self.leave(self.waiting.pop(name), self.widths[name])

    def settle(self) -> None:
        super().settle()
        for name, x in list(self.found.items()):
            if is_outer(name):
                self.flush(name)
                self._wrote = True
                continue
            if name not in self.waiting:
                self.waiting[name] = self.room.take(self.layout.padded(self.widths[name]))
            self.put(self.waiting[name], x)
        self.found.clear()

    def flush_outer(self) -> None:
        """The loops have written them."""
        self.close()

    # --- operations ---------------------------------------------------------------------------------------------------

    def backward(self, number: int) -> None:
        op, name = self.program.ops[number - 1], f"%{number}"
        if name not in self.need:
            self.forget_gradient(name)
            return
        if name not in self.found and name not in self.waiting:
            return
        if op.kind in ("linear", "layer_norm", "rms_norm", "slice", "concat"):
            self.text(f"# gradients of {name} = {op.text()}")
            write = {"linear": self._linear_back_of, "slice": self._slice_back, "concat": self._concat_back}
            write.get(op.kind, self._row_norm_back_of)(op, name)
            self.forget_gradient(name)
            return
        self.enter(self.widths[name])
        if op.kind == "batch_norm":
            self._batch_norm_back(number, op, name)
        else:
            super().backward(number)

    def _linear_back_of(self, op: Op, name: str) -> None:
        (x,), (weight, bias) = op.inputs, op.params
        assert weight is not None
        for_weight, for_bias = f"p{weight}" in self.wanted, f"p{bias}" in self.wanted
        (out,) = self.partitions[name]
        if for_weight or for_bias:
            self.enter(self.widths[name])
            g = self._under_way(name)
        if for_bias:
            again = self._parameter_again(bias)
            self.text(f"add_row({self._share(bias)}, {again}, {g}, {out.start}, {out.width})")
        if for_weight:
            again, base = self._parameter_again(weight), self._share(weight)

            def block(p: Piece) -> None:
                product = f'linear_weight_grad({g}, {self.read(x, p)}, "{self.precision}")'
                self.text(f"add_block({base} + {self.inside(weight, out, p)}, {again}, {product})")

            self.each_block(x, "j", block)
        if x not in self.need:
            return
        self.close()
        self.enter(self.widths[x])
        (column,) = self.partitions[x]
        acc = self.new("acc", f"tl.zeros([BLOCK, {column.size}], tl.float32)")

        def product(p: Piece) -> None:
            g = self.new("g", f"load_slot(room, {self.waiting[name]}, {p.start}, BLOCK, {p.size})")
            self.text(f"{acc} = linear_input_grad({g}, {self.weight_block(weight, p, column, acc)})")

        self.each_block(name, "j", product)
        self.add(x, 0, acc)

    def _slice_back(self, op: Op, name: str) -> None:
        self._moved_back(op.inputs[0], name, -int(op.attr("start")))

    def _concat_back(self, op: Op, name: str) -> None:
        before = 0
        for operand in op.inputs:
            self._moved_back(operand, name, before)
            before += self.widths[operand]

    def _moved_back(self, source: str, name: str, shift: int) -> None:
        """Columns [c + shift, ..) of the gradient of `name` are those from c on of that of `source`."""
        if source not in self.need:
            return
        if name in self.found:
            self.close()
        self.enter(self.widths[source])
        (piece,) = self.partitions[source]
        blocked = self.layout.block(self.widths[name])
        where = f"{self.waiting[name]}, {shift}, {self.widths[name]}, {blocked}, c, {piece.width}, BLOCK, {piece.size}"
        self.add(source, 0, f"load_moved(room, {where})")

    def _row_norm_back_of(self, op: Op, name: str) -> None:
        # dx = (g - mean(g) - hat mean(g hat)) / deviation, g the gradient of hat; without its mean in RMSNorm.
        source, width = op.inputs[0], self.widths[name]
        (piece,) = self.partitions[name]
        self.close()
        mean, inverse = self.moments_of_rows(op)
        along, level = (self.new(stem, "tl.zeros([BLOCK, 1], tl.float32)") for stem in ("along", "level"))

        def gradient_and_hat() -> tuple[str, str, str]:
            self.enter(width)
            g, x = self._under_way(name), self.fetch(source)[0]
            off = f"({x} - {mean})" if mean else x
            hat = self.new("hat", f"real({off} * {inverse}, {piece.width})")
            return g, hat, self._weighted(op, [g], (piece,))[0]

        g, hat, scaled = gradient_and_hat()
        self._norm_params(op, [g], [hat], (piece,))
        self.text(f"{along} += tl.sum({scaled} * {hat}, axis=1)[:, None]")
        if mean:
            self.text(f"{level} += tl.sum({scaled}, axis=1)[:, None]")
        self.close()
        if source not in self.need:
            return
        _, hat, scaled = gradient_and_hat()
        centred = f"{scaled} - {level} / {width}" if mean else scaled
        self.add(source, 0, f"real({inverse} * ({centred} - {hat} * {along} / {width}), {piece.width})")

    # --- BatchNorm in training mode -----------------------------------------------------------------------------------

    def _hat(self, number: int, op: Op) -> tuple[str, str]:
        """The normalised input and 1 / deviation, from the statistics that forward wrote."""
        x = self.fetch(op.inputs[0])[0]
        mean, inverse = self.batch_moments(number, op, x, KNOWN)
        return self.new("hat", f"({x} - {mean}) * {inverse}"), inverse

    def leave_sums(self, number: int) -> None:
        """The sums that a BatchNorm's backward needs over the program's tiles, for `join_sums` in the next launch, and
        the gradients of its parameters."""
        op, name = self.program.ops[number - 1], f"%{number}"
        if name not in self.need or (name not in self.found and name not in self.waiting):
            return
        self.enter(self.widths[name])
        self.text(f"# sums over the batch for {name} = {op.text()}")
        g, (hat, _) = self._under_way(name), self._hat(number, op)
        self._norm_params(op, [g], [hat], self.partitions[name])
        stride, first, second, p = self.batch_columns(number)
        for x, start in ((g, first), (f"{g} * {hat}", second)):
            self.text(f"add_row(sums + program * {stride}, later_tile, {x}, {start}, {p.width})")

    def join_sums(self, number: int) -> None:
        """The sums over the batch. Every program joins what all have left, and writes the same row."""
        if f"%{number}" not in self.waiting:
            return
        stride, *starts, p = self.batch_columns(number)

        def body() -> None:
            for start in starts:
                row = f"joined_sums(sums, tl.num_programs(0), {stride}, {start}, {p.width}, {p.size})"
                self.text(f"store_row(joined, {row}, {start}, {p.width})")

        self.text.block(self.layout.loop("c", self.widths[f"%{number}"]), body)
        self.text("tl.debug_barrier()")

    def _batch_norm_back(self, number: int, op: Op, name: str) -> None:
        # dx = weight / deviation (g - mean(g) - hat mean(g hat)), g the gradient of the result, means over the batch.
        g = self._under_way(name)
        self.forget_gradient(name)
        self.text(f"# gradients of {name} = {op.text()}")
        weight, bias = op.param("weight"), op.param("bias")
        of_tile = self.statistics == TILE  # otherwise `leave_sums` has found the parameters' gradients
        again = {i: self._parameter_again(i) for i in (weight, bias) if of_tile and f"p{i}" in self.wanted}
        hat, inverse = self._hat(number, op)
        _, first, second, p = self.batch_columns(number)
        for index, row in ((weight, f"{g} * {hat}"), (bias, g)):
            if index in again:
                self.text(f"add_row({self._share(index)}, {again[index]}, {row}, {p.start}, {p.width})")
        if op.inputs[0] not in self.need:
            return
        if of_tile:
            sums: tuple[str, ...] = f"tl.sum({g}, axis=0)[None, :]", f"tl.sum({g} * {hat}, axis=0)[None, :]"
        else:
            sums = tuple(f"load_row(joined, {start}, {p.width}, {p.size})" for start in (first, second))
        level, along = (
            self.new(stem, f"{x} / total.to(tl.float32)") for stem, x in zip(("level", "along"), sums, strict=True)
        )
        scale = self.parameter(weight, p)
        d = f"{inverse} * ({g} - {level} - {hat} * {along})" + (f" * {scale}" if scale else "")
        self.send(op.inputs[0], [f"tl.where(valid[:, None], {d}, 0.0)"], (p,))

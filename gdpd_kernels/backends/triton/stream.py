"""Writes the source of a walk forward whose values lie in memory: loops over columns, one piece in registers at once.

Each program of the grid has a room for its tile, which stays in the caches. A value is a *slot* of it: blocks of
columns, one after the other. Operations that need no other columns than those they make go on in the loop that made
their input, so that a linear layer, its BatchNorm, activation and residual sum are one loop; what is read again goes
into a slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gdpd_kernels.backends.triton.layout import Partition, Piece, Rows, StreamLayout, is_outer
from gdpd_kernels.backends.triton.walk import Walk, identifier
from gdpd_kernels.program import Op

# Where a training-mode BatchNorm has its statistics from: the tile, which is the whole batch, or the row of statistics.
TILE, KNOWN = "tile", "known"

_OWN_LOOP = {"linear", "slice", "concat", "layer_norm", "rms_norm"}


class Room:
    """Where slots are: columns that are given away and come back."""

    def __init__(self) -> None:
        self.columns = 0
        self._free: dict[int, list[int]] = {}

    def take(self, columns: int) -> int:
        if free := self._free.get(columns):
            return free.pop()
        self.columns += columns
        return self.columns - columns

    def give_back(self, at: int, columns: int) -> None:
        self._free.setdefault(columns, []).append(at)


class StreamWalk(Walk):
    """One walk. The text around it defines ``room`` beside what `Walk` takes of it; its loops count columns as ``c``.

    Args:
        room: where slots come from.
        state: slot of z, where it is before and after; None if the text defines z.
        statistics: where BatchNorms have their statistics from.
        more: what `Walk` takes.
    """

    layout: StreamLayout

    def __init__(self, room: Room, state: int | None, statistics: str, *more: Any, **named: Any) -> None:
        super().__init__(*more, **named)
        self.room, self.statistics = room, statistics
        self.slots: dict[str, int] = {} if state is None else {"z": state}
        self._fixed = frozenset(self.slots)
        self.width = 0  # of the loop under way, 0 outside of loops
        self.position = 0  # the last operation that is written
        self.elsewhere: set[str] = set()  # what the loop under way reads at other columns than its own
        self._made: list[str] = []
        self._ragged: set[str] = set()  # values whose padding has never been written
        self._leaving: list[tuple[int, int]] = []
        self._wrote = False
        self._row_moments_found = "", ""
        self._last_read = {"z": 0} | {
            name: number for number, op in enumerate(self.program.ops, start=1) for name in op.inputs
        } | {self.program.output: len(self.program.ops) + 1}  # fmt: skip

    # --- loops --------------------------------------------------------------------------------------------------------

    def enter(self, width: int) -> None:
        """Be in a loop over the columns of values so wide: the one under way, or a new one."""
        if self.width == width:
            return
        self.close()
        self.text(self.layout.loop("c", width))
        self.text.depth += 1
        self.width = width

    def close(self) -> None:
        """End the loop under way: what is read later goes to memory, where all threads see it."""
        if not self.width:
            return
        self.settle()
        self.text.depth -= 1
        if self._wrote:
            self.text("tl.debug_barrier()")
        self.width, self._wrote = 0, False
        self.registers.clear()
        self.elsewhere.clear()
        for place in self._leaving:
            self.room.give_back(*place)
        self._leaving.clear()

    def settle(self) -> None:
        """Store what the loop has made and others read; free what nobody reads again."""
        for name in self._made:
            read_later = self._last_read.get(name, 0) > self.position
            if read_later and name not in self.slots and not self._is_kept(name):
                self.slots[name] = self.room.take(self.layout.padded(self.widths[name]))
                self.put(self.slots[name], self.registers[name][0])
        self._made.clear()
        for name in [n for n in self.slots if n not in self._fixed and self._last_read.get(n, 0) <= self.position]:
            self.leave(self.slots.pop(name), self.widths[name])

    def put(self, slot: int, x: str) -> None:
        """Store a piece."""
        self.text(f"store_slot(room, {slot}, c, {x})")
        self._wrote = True

    def leave(self, slot: int, width: int) -> None:
        """Free a slot, once the loop under way has ended."""
        place = slot, self.layout.padded(width)
        if self.width:
            self._leaving.append(place)
        else:
            self.room.give_back(*place)

    def end_forward(self) -> None:
        """What no gradient reads has been read."""
        self.position = len(self.program.ops) + 1
        self.close()

    def begin_step(self, state: str) -> None:
        """Keep the state where backward reads it; `state`: where it goes as well, row by row, if not ''."""
        if state or self._is_kept("z"):
            self.enter(self.program.features)
            self.define("z", [self.fetch("z")[0]])
            if state:
                ((start, width),) = ((p.start, p.width) for p in self.partitions["z"])
                what = f"{self.registers['z'][0]}, {self.program.features}, {start}, {width}"
                self.text(f"store_rows({state}, rows, valid, {what})")
                self._wrote = True

    def end_step(self) -> None:
        """Be in the loop that the state's update belongs to."""
        if "z" in self.elsewhere:
            self.close()
        self.enter(self.program.features)
        self.position = len(self.program.ops) + 1

    # --- values -------------------------------------------------------------------------------------------------------

    def _is_kept(self, name: str) -> bool:
        return self.kept is not None and name in self.kept.at

    def define(self, name: str, expressions: Sequence[str]) -> None:
        super().define(name, expressions)
        self._made.append(name)
        self._wrote = self._wrote or self._is_kept(name)

    def fetch(self, name: str, partition: Partition | None = None) -> list[str]:
        (piece,) = partition or self.partitions[name]
        if name not in self.registers:
            self.registers[name] = [self.read(name, piece)]
        return self.registers[name]

    def read(self, name: str, piece: Piece, shift: int = 0) -> str:
        """The columns of a value where `piece` is, or `shift` further, of which it tells how many there are."""
        if is_outer(name):
            return self._outer(name, piece)
        if name in self.slots:
            at, blocked = self.slots[name], self.layout.block(self.widths[name])
            if not shift and piece.size == blocked and name not in self._ragged:
                return self.new(identifier(name), f"load_slot(room, {at}, {piece.start}, BLOCK, {piece.size})")
            # Of a slice: the piece says where the slice is, of which it has so many columns.
            where = f"{at}, {shift}, {self.widths[name]}, {blocked}, {piece.start}, {piece.width}, BLOCK, {piece.size}"
            return self.new(identifier(name), f"load_moved(room, {where})")
        assert self.kept is not None
        place = f"{self.kept.width}, {self.kept.at[name] + shift + piece.start}, {piece.width}, {piece.size}"
        return self.new(identifier(name), f"load_rows(kept, slots, valid, {place})")

    # --- forward ------------------------------------------------------------------------------------------------------

    def forward(self, number: int) -> None:
        op, name = self.program.ops[number - 1], f"%{number}"
        if op.kind in _OWN_LOOP and (op.kind != "slice" or op.inputs[0] in self._made):
            self.close()
        if op.kind == "concat":
            self._concat(op, name)
            self.position = number
            self.close()
            return
        if op.kind in ("layer_norm", "rms_norm"):
            self._row_moments_found = self.moments_of_rows(op)
        self.enter(self.widths[name])
        self.position = number
        if op.kind == "batch_norm":
            self.text(f"# {name} = {op.text()}")
            self.define(name, self._batch_norm(number, op))
            return
        super().forward(number)

    def each_block(self, name: str, column: str, body: Any) -> None:
        """`body` of every block of a value, from left to right; one alone needs no loop."""
        width = self.widths[name]
        self.elsewhere.add(name)
        if self.layout.padded(width) == self.layout.block(width):
            body(Piece(0, width))
            return
        self.text.block(self.layout.loop(column, width), lambda: body(self.layout.stretch(width, column)))

    def _linear(self, op: Op, pieces: Partition) -> list[str]:
        weight, bias = op.params
        (out,), source = pieces, op.inputs[0]
        acc = self.new("acc", f"tl.zeros([BLOCK, {out.size}], tl.float32)")

        def product(p: Piece) -> None:
            self.text(f"{acc} = linear({self.read(source, p)}, {self.weight_block(weight, out, p, acc)})")

        self.each_block(source, "j", product)
        row = self.parameter(bias, out)
        return [acc if row is None else f"{acc} + {row}"]

    def weight_block(self, weight: int | None, out: Piece, p: Piece, acc: str) -> str:
        """Arguments of a product with a block of a weight."""
        assert weight is not None
        at = self.layout.weights[weight].at
        return f'packed + {at} + {self.inside(weight, out, p)}, {acc}, "{self.precision}", {out.size}, {p.size}'

    def inside(self, weight: int, out: Piece, p: Piece) -> str:
        """Where a block begins among those of its weight: rows of blocks, each as wide as the padded input."""
        across = self.layout.padded(self.program.params[weight][1])
        return f"{out.start} * {across} + {p.start} * {out.size}"

    def moments_of_rows(self, op: Op) -> tuple[str, str]:
        """Mean ('' for RMSNorm) and 1 / deviation of every row, by passes over its columns."""
        source, width = op.inputs[0], self.widths[op.inputs[0]]
        (piece,) = self.partitions[source]
        mean = ""
        if op.kind == "layer_norm":
            total = self.new("total", "tl.zeros([BLOCK, 1], tl.float32)")
            self.enter(width)
            self.text(f"{total} += row_sum({self.fetch(source)[0]}, {piece.width})")
            self.close()
            mean = self.new("mean", f"{total} / {width}")
        squares = self.new("squares", "tl.zeros([BLOCK, 1], tl.float32)")
        self.enter(width)
        x = self.fetch(source)[0]
        off = self.new("off", f"{x} - {mean}") if mean else x
        self.text(f"{squares} += row_sum({off} * {off}, {piece.width})")
        self.close()
        deviation = f"tl.sqrt(tl.where(valid[:, None], {squares} / {width} + {op.attr('eps')!r}, 1.0))"
        return mean, self.new("inverse", f"tl.where(valid[:, None], 1.0 / {deviation}, 0.0)")

    def _row_moments(self, op: Op, pieces: Partition) -> tuple[str, str, list[str]]:
        return *self._row_moments_found, self.fetch(op.inputs[0])

    def _slice(self, op: Op, pieces: Partition) -> list[str]:
        source, start = op.inputs[0], int(op.attr("start"))
        self.elsewhere.add(source)
        if source in self.slots:
            return [self.read(source, pieces[0], start)]
        width = int(op.attr("stop")) - start
        return [self.read(source, self.layout.stretch(width, shift=start))]

    def _concat(self, op: Op, name: str) -> None:
        self.text(f"# {name} = {op.text()}")
        kept, before, blocked = self._is_kept(name), 0, self.layout.block(self.widths[name])
        if not kept:
            self.slots[name] = self.room.take(self.layout.padded(self.widths[name]))
            self._ragged.add(name)
        for operand in op.inputs:
            self.enter(self.widths[operand])
            (x,), (piece,) = self.fetch(operand), self.partitions[operand]
            if kept:
                assert self.kept is not None
                self.store_part(x, piece, self.kept, self.kept.at[name] + before)
            else:
                self.text(f"store_moved(room, {self.slots[name]}, {before}, {blocked}, c, {piece.width}, {x})")
            self._wrote = True
            before += self.widths[operand]

    # --- BatchNorm in training mode ---------------------------------------------------------------------------------

    def _batch_norm(self, number: int, op: Op) -> list[str]:
        (x,), pieces = self.fetch(op.inputs[0]), self.partitions[f"%{number}"]
        mean, inverse = self.batch_moments(number, op, x, self.statistics)
        return self._scaled(op, [f"({x} - {mean}) * {inverse}"], pieces)

    def batch_columns(self, number: int) -> tuple[int, Any, Any, Piece]:
        """Of the statistics of a BatchNorm: the length of their row, where the loop is in each half, and its piece."""
        (p,) = self.partitions[f"%{number}"]
        at = self.layout.stats[number]
        return self.program.stats_width, at + p.start, at + self.widths[f"%{number}"] + p.start, p

    def batch_moments(self, number: int, op: Op, x: str, statistics: str) -> tuple[str, str]:
        """Mean and 1 / deviation of a piece of a BatchNorm's input."""
        stride, first, second, p = self.batch_columns(number)
        if statistics == KNOWN:
            row = f"load_row(stats + k * {stride}, {{}}, {p.width}, {p.size})"
            mean, variance = self.new("mean", row.format(first)), self.new("variance", row.format(second))
        else:
            self._fresh += 1
            mean, variance = f"mean_x{self._fresh}", f"variance_x{self._fresh}"
            self.text(f"{mean}, {variance} = column_moments({x}, valid, total.to(tl.float32))")
            self.text(f"{variance} = {variance} / total.to(tl.float32)")
            self.text.block("if tile == 0:", lambda: self._store_statistics(number, mean, variance))
        inverse = self.new("inverse", f"inverse_deviation({variance}, {op.attr('eps')!r}, {p.width})")
        return mean, inverse

    def _store_statistics(self, number: int, mean: str, variance: str) -> None:
        stride, first, second, p = self.batch_columns(number)
        for y, start in ((mean, first), (variance, second)):
            self.text(f"store_row(stats + k * {stride}, {y}, {start}, {p.width})")

    def leave_moments(self, number: int) -> None:
        """The moments of a BatchNorm's input over the program's tiles, for `join_moments` in the next launch."""
        source = self.program.ops[number - 1].inputs[0]
        self.enter(self.widths[source])
        self.position = number - 1
        stride, first, _, p = self.batch_columns(number)
        counts = "later_tile // tl.num_programs(0) * BLOCK, tl.minimum(total - tile * BLOCK, BLOCK)"
        x, columns = self.fetch(source)[0], self.widths[source]
        self.text(f"add_moments(moments + program * {stride}, {counts}, {x}, valid, {first}, {columns}, {p.width})")
        self.close()

    def join_moments(self, number: int) -> None:
        """The statistics of a BatchNorm's input. Every program joins what all have left, and writes the same row."""
        width = self.widths[f"%{number}"]
        stride, first, _, p = self.batch_columns(number)

        def body() -> None:
            place = f"{stride}, {first}, {width}, {p.width}, {p.size}, BLOCK"
            self.text(f"mean, variance = joined_moments(moments, tl.num_programs(0), tiles, total, {place})")
            self._store_statistics(number, "mean", "variance")

        self.text.block(self.layout.loop("c", width), body)
        self.text("tl.debug_barrier()")

    # --- joins --------------------------------------------------------------------------------------------------------

    def store_part(self, x: str, piece: Piece, rows: Rows, at: int) -> None:
        self.text(f"store_rows(kept, slots, valid, {x}, {rows.width}, {at + piece.start}, {piece.width})")

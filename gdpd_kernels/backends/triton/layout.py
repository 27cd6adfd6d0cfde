"""How the values of a program lie in registers and in memory: everything that follows from the program alone.

A value [rows, width] is held as *pieces*: blocks of at most `chunk` columns, each padded to a power of two, since that
is what a register block of Triton can be. A slice or a concatenation along the edges of pieces costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from gdpd_kernels.program import DenoiserProgram, Op

# Values that the backward of an operation reads; of "linear" and "batch_norm_eval" only if their weight is wanted.
_READS_INPUT = {
    "batch_norm", "layer_norm", "rms_norm", "leaky_relu", "elu", "silu", "softplus", "gelu", "gelu_tanh", "mul",
}  # fmt: skip
_READS_RESULT = {"relu", "tanh", "sigmoid"}
_READS_INPUT_FOR_PARAMS = {"linear", "batch_norm_eval"}

_ALIGNMENT = 4  # numbers: every value in a row of kept values begins where a load of 16 bytes may


@dataclass(frozen=True)
class Piece:
    """Columns [start, start + width) of a value."""

    start: int
    width: int

    @property
    def size(self) -> int:
        """Columns of the register block."""
        return block_size(self.width)

    @property
    def stop(self) -> int:
        return self.start + self.width


Partition = tuple[Piece, ...]


def block_size(width: int) -> int:
    """Columns of a register block for so many; matrix units take no fewer than 16."""
    return max(16, 1 << (width - 1).bit_length())


def cut(width: int, chunk: int, edges: Iterable[int] = ()) -> Partition:
    """[0, width) in pieces of at most `chunk` columns, none of which crosses an edge."""
    stops = sorted({*(edge for edge in edges if 0 < edge < width), width})
    pieces, start = [], 0
    for stop in stops:
        while start < stop:
            n = min(chunk, stop - start)
            pieces.append(Piece(start, n))
            start += n
    return tuple(pieces)


@dataclass(frozen=True)
class Field:
    """Blocks of a weight that lie in memory one after the other, row by row of blocks, each padded.

    Args:
        index: of the parameter.
        at: where the first begins.
        out: rows of the weight.
        columns: of the weight.
        row_size: rows of a block.
        col_size: columns of a block.
    """

    index: int
    at: int
    out: Piece
    columns: Piece
    row_size: int
    col_size: int

    @property
    def blocks(self) -> int:
        return -(-self.out.width // self.row_size) * -(-self.columns.width // self.col_size)

    @property
    def size(self) -> int:
        return self.blocks * self.row_size * self.col_size

    @property
    def place(self) -> str:
        """As the device functions take it."""
        out, columns = self.out, self.columns
        return f"{out.start}, {out.width}, {self.row_size}, {columns.start}, {columns.width}, {self.col_size}"


@dataclass(frozen=True)
class Rows:
    """Where values lie in a buffer of rows: the column at which each begins, and the length of a row."""

    at: dict[str, int]
    width: int

    @staticmethod
    def of(names: Sequence[str], widths: dict[str, int]) -> Rows:
        at, end = {}, 0
        for name in names:
            at[name] = end
            end += -(-widths[name] // _ALIGNMENT) * _ALIGNMENT
        return Rows(at, end)


class Layout:
    """A program's values in pieces of at most `chunk` columns."""

    def __init__(self, program: DenoiserProgram, chunk: int) -> None:
        self.program, self.chunk = program, chunk

    @cached_property
    def partitions(self) -> dict[str, Partition]:
        program, chunk = self.program, self.chunk
        edges: dict[str, set[int]] = {}
        for op in program.ops:
            if op.kind == "slice":
                edges.setdefault(op.inputs[0], set()).update((int(op.attr("start")), int(op.attr("stop"))))
        found: dict[str, Partition] = {}
        for name, width in program.widths.items():
            if name == "z" or name[0] in "tr":
                # The state is cut evenly: noise comes in groups of four columns.
                found[name] = cut(width, chunk, () if name == "z" else edges.get(name, ()))
                continue
            op = program.ops[int(name[1:]) - 1]
            if op.kind == "linear":
                found[name] = cut(width, chunk, edges.get(name, ()))
            elif op.kind == "concat":
                pieces, end = [], 0
                for operand in op.inputs:
                    pieces += [Piece(end + p.start, p.width) for p in found[operand]]
                    end += program.widths[operand]
                found[name] = tuple(pieces)
            elif op.kind == "slice":
                found[name] = sliced(found[op.inputs[0]], int(op.attr("start")), int(op.attr("stop")))
            else:
                found[name] = found[self.leader(op)]
        return found

    def leader(self, op: Op) -> str:
        """The operand whose pieces an elementwise operation follows: one in registers, if there is one."""
        return next((x for x in op.inputs if not is_outer(x)), op.inputs[0])

    def kept(self, for_params: bool) -> Rows:
        """The values that backward reads, as they lie in memory."""
        names: dict[str, None] = {}
        for number, op in enumerate(self.program.ops, start=1):
            if op.kind in _READS_INPUT or (for_params and op.kind in _READS_INPUT_FOR_PARAMS):
                names |= dict.fromkeys(op.inputs)
            elif op.kind in _READS_RESULT:
                names[f"%{number}"] = None
        return Rows.of([name for name in names if not is_outer(name)], self.program.widths)

    @cached_property
    def segments(self) -> tuple[range, ...]:
        """Numbers of the operations between the training-mode BatchNorms; each but the first begins with one."""
        edges = [0, *self.program.batch_norms, len(self.program.ops)]
        return tuple(range(a + 1, b + 1) for a, b in pairwise(edges))

    @cached_property
    def stats(self) -> dict[int, int]:
        """Column of each BatchNorm's mean in the row of batch statistics, by the number of its operation."""
        at, end = {}, 0
        for i in self.program.batch_norms:
            at[i + 1] = end
            end += 2 * self.program.widths[f"%{i + 1}"]
        return at

    @cached_property
    def packed(self) -> dict[tuple[int, Piece, Piece], int]:
        """Where each block of a weight (parameter, rows, columns) begins in the buffer of packed weights."""
        found: dict[tuple[int, Piece, Piece], int] = {}
        end = 0
        for number, op in enumerate(self.program.ops, start=1):
            if op.kind != "linear" or op.params[0] is None:
                continue
            for out in self.partitions[f"%{number}"]:
                for p in self.partitions[op.inputs[0]]:
                    if (op.params[0], out, p) not in found:
                        found[op.params[0], out, p] = end
                        end += out.size * p.size
        return found

    def blocks_of(self, index: int) -> dict[tuple[Piece, Piece], int]:
        """The blocks of one weight, by where each begins among them; none if they overlap: a weight that is used twice
        and cut in two ways."""
        found, end = {}, 0
        for i, out, p in self.packed:
            if i == index:
                found[out, p] = end
                end += out.size * p.size
        shape = self.program.params[index]
        return found if sum(out.width * p.width for out, p in found) == shape[0] * shape[-1] else {}

    @property
    def fields(self) -> list[Field]:
        """All weights, in the buffer of packed weights."""
        return [Field(i, at, out, p, out.size, p.size) for (i, out, p), at in self.packed.items()]

    def share_fields(self, index: int) -> list[Field]:
        """Where the gradient of a parameter lies in its part of a share; none: as the parameter itself does."""
        return [Field(index, at, out, p, out.size, p.size) for (out, p), at in self.blocks_of(index).items()]


class Column(str):
    """The text of a column that a loop counts; what is added to it is added in the text."""

    def __radd__(self, number: int) -> Column:
        return Column(f"{number} + {self}")


@dataclass(frozen=True)
class Stretch(Piece):
    """The piece of a value at which a loop over its columns is. `start` and `width` are text."""

    block: int

    @property
    def size(self) -> int:
        return self.block


class StreamLayout(Layout):
    """Of values that lie in memory: one `Stretch` each, of a loop over blocks of one size."""

    def block(self, width: int) -> int:
        """Columns of a block of a value so wide."""
        return min(self.chunk, block_size(width))

    def padded(self, width: int) -> int:
        """Columns of its blocks together."""
        return -(-width // self.block(width)) * self.block(width)

    def loop(self, column: str, width: int) -> str:
        """The head of a loop over the blocks of a value so wide.

        Nothing is taken out of it, since what waits outside takes registers; for the same reason the compiler does not
        know how often it runs (``one`` is 1).
        """
        stop = f"{self.padded(width)} * one"
        return f"for {column} in tl.range(0, {stop}, {self.block(width)}, disable_licm=True):"

    def stretch(self, width: int, column: str = "c", shift: int = 0) -> Stretch:
        """Where a loop whose variable is `column` is in a value; `shift`: columns further, of as many."""
        size = self.block(width)
        left = size if width % size == 0 else Column(f"{width} - {column}")
        return Stretch(Column(f"{shift} + {column}" if shift else column), left, size)  # type: ignore[arg-type]

    @cached_property
    def partitions(self) -> dict[str, Partition]:
        return {name: (self.stretch(width),) for name, width in self.program.widths.items()}

    @cached_property
    def weights(self) -> dict[int, Field]:
        """Of each weight its blocks in the buffer of packed weights."""
        found: dict[int, Field] = {}
        end = 0
        for op in self.program.ops:
            index = op.params[0] if op.kind == "linear" else None
            if index is not None and index not in found:
                rows, columns = self.program.params[index]
                found[index] = self._field(index, end, rows, columns)
                end += found[index].size
        return found

    def _field(self, index: int, at: int, rows: int, columns: int) -> Field:
        return Field(index, at, Piece(0, rows), Piece(0, columns), self.block(rows), self.block(columns))

    @property
    def fields(self) -> list[Field]:
        return list(self.weights.values())

    def share_fields(self, index: int) -> list[Field]:
        return [replace(self.weights[index], at=0)] if index in self.weights else []


def is_outer(name: str) -> bool:
    """Whether a value comes from outside the walk: a table or a row."""
    return name[0] in "tr"


def sliced(pieces: Partition, start: int, stop: int) -> Partition:
    """The pieces of columns [start, stop), counted from `start`."""
    parts = [(max(p.start, start), min(p.stop, stop)) for p in pieces]
    return tuple(Piece(a - start, b - a) for a, b in parts if a < b)


def needed(program: DenoiserProgram, wanted: frozenset[str], state: bool) -> frozenset[str]:
    """The values through which a wanted gradient flows; `state`: also that of z."""
    need = {name for name in program.widths if is_outer(name) and name in wanted}
    if state:
        need.add("z")
    for number, op in enumerate(program.ops, start=1):
        if need.intersection(op.inputs) or any(f"p{p}" in wanted for p in op.params if p is not None):
            need.add(f"%{number}")
    return frozenset(need)

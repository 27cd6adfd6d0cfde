"""How the values of a program lie in registers and in memory: everything that follows from the program alone.

A value [rows, width] is held as *pieces*: blocks of at most `chunk` columns, each padded to a power of two, since that
is what a register block of Triton can be. A slice or a concatenation along the edges of pieces costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
        """Columns of the register block; matrix units take no fewer than 16."""
        return max(16, 1 << (self.width - 1).bit_length())

    @property
    def stop(self) -> int:
        return self.start + self.width


Partition = tuple[Piece, ...]


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
    def distant(self) -> Rows:
        """The values that an operation other than the next one reads, and the state, which the step's end reads."""
        names = {"z": None}
        for number, op in enumerate(self.program.ops, start=1):
            names |= dict.fromkeys(x for x in op.inputs if x[0] == "%" and int(x[1:]) < number - 1)
        return Rows.of(list(names), self.program.widths)

    @cached_property
    def segments(self) -> tuple[range, ...]:
        """Numbers of the operations between the training-mode BatchNorms; each but the first begins with one."""
        edges = [0, *self.program.batch_norms, len(self.program.ops)]
        return tuple(range(a + 1, b + 1) for a, b in pairwise(edges))

    def segment_of(self, name: str) -> int:
        """The segment that makes a value."""
        number = int(name[1:]) if name[0] == "%" else 0
        return next((s for s, numbers in enumerate(self.segments) if number in numbers), 0)

    @cached_property
    def crossing(self) -> Rows:
        """The results that a later segment reads."""
        names: dict[str, None] = {}
        for s, numbers in enumerate(self.segments):
            read = [x for n in numbers for x in self.program.ops[n - 1].inputs]
            if s == len(self.segments) - 1:
                read.append(self.program.output)
            names |= dict.fromkeys(x for x in read if x[0] == "%" and self.segment_of(x) < s)
        return Rows.of(list(names), self.program.widths)

    @cached_property
    def gradients(self) -> Rows:
        """The values whose gradient one segment hands to another: those that cross, the results of BatchNorms, of which
        the sums over the batch come first, and the state."""
        norms = [f"%{i + 1}" for i in self.program.batch_norms]
        return Rows.of(list(dict.fromkeys((*self.crossing.at, *norms, "z"))), self.program.widths)

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
    def packed_size(self) -> int:
        """Numbers in the buffer of packed weights."""
        return sum(out.size * p.size for _, out, p in self.packed)


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

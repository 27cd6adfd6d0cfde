"""What every kernel's source is made of: what it depends on, the module under way, and the text that kernels share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from gdpd_kernels.backends.triton.layout import Field, Layout, Rows, StreamLayout
from gdpd_kernels.backends.triton.walk import Text, Walk
from gdpd_kernels.backends.triton.walk_back import BackwardWalk
from gdpd_kernels.program import DenoiserProgram

# Plans: values in registers, or in memory with a piece in registers at a time, or so with a launch per step and stretch
# between BatchNorms.
REGISTERS, MEMORY, SPLIT = "registers", "memory", "split"

# Numbers that change from call to call and should not make another binary.
_NUMBERS = ("batch", "total", "steps", "tiles", "k", "programs", "alpha_row", "alpha_col", "share_stride")
SAMPLER_START = ("z_short", "alpha", "alpha_row", "alpha_col", "noise", "seed")
PRIOR_START = ("z_long", "noise", "seed", "signal", "sigma")


@dataclass(frozen=True)
class Recipe:
    """What a kernel's source depends on.

    Args:
        program: the denoiser.
        chunk: columns of the largest piece.
        precision: of products: "ieee", "tf32", "bf16" or "fp16".
        plan: "registers", "memory" or "split" (docs/gpu.md, Plans).
        alpha: the start mixes noise in.
        drawn: that noise is drawn, not handed in.
        eta: noise is drawn at the steps.
        save: what forward keeps: "" (nothing), "values", "inputs" (the values that gradients of inputs need), "states".
        wanted: names of the inputs whose gradient is asked for: z, alpha, r0.., t0.., p0...
        prediction: of `prior_loss`.
    """

    program: DenoiserProgram
    chunk: int
    precision: str
    plan: str
    alpha: bool = False
    drawn: bool = False
    eta: bool = False
    save: str = ""
    wanted: frozenset[str] = frozenset()
    prediction: str = ""

    @property
    def layout(self) -> Layout:
        return _layout(self.program, self.chunk, self.plan != REGISTERS)

    @property
    def kept(self) -> Rows:
        for_params = self.save == "values" or any(name[0] == "p" for name in self.wanted)
        return self.layout.kept(for_params)


@lru_cache(maxsize=256)
def _layout(program: DenoiserProgram, chunk: int, streamed: bool) -> Layout:
    return StreamLayout(program, chunk) if streamed else Layout(program, chunk)


@dataclass(frozen=True)
class Source:
    """A module of kernels.

    Args:
        text: the module.
        arguments: the names of each kernel's arguments, in order, without BLOCK.
        shares: where each gradient that is added up over programs begins in a share; "tables" where those of the tables
            do, which have one row per step.
        written: names of the inputs whose gradient the kernels write; that of any other wanted one is zero.
        reductions: how many blocks and vectors `reduce` adds up, and the numbers of the largest block.
        room: numbers that lie in memory per row of a tile, for values and their gradients.
    """

    text: str
    arguments: dict[str, tuple[str, ...]]
    shares: dict[str, int]
    written: frozenset[str]
    reductions: tuple[int, int]
    room: int = 0


_HEADER = '''\
"""Written for one denoiser, by gdpd_kernels.backends.triton.kernels:

{program}
"""
import triton
import triton.language as tl
from gdpd_kernels.backends.triton.tiles import *
'''


class Module:
    """A module under way; its methods write what several kernels have in common."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.layout, self.program = recipe, recipe.layout, recipe.program
        self.parts = [_HEADER.format(program=recipe.program.text)]
        self.arguments: dict[str, tuple[str, ...]] = {}
        self.shares, end = {}, 0
        for i, shape in enumerate(recipe.program.params):
            if f"p{i}" in recipe.wanted:
                self.shares[f"p{i}"] = end
                end += sum(f.size for f in self.layout.share_fields(i)) or -(-prod(shape) // 4) * 4
        if recipe.prediction:
            self.shares["loss"] = end
            end += 4
        self.shares["tables"] = end
        self.written: set[str] = set()
        self.reductions = 0, 0
        self.room = 0

    @property
    def streams(self) -> StreamLayout:
        """The layout of values that lie in memory."""
        assert isinstance(self.layout, StreamLayout)
        return self.layout

    @property
    def operands(self) -> tuple[str, ...]:
        program = self.program
        return (
            *(f"r{i}" for i in range(len(program.rows))),
            *(f"t{i}" for i in range(len(program.tables))),
            *(f"p{i}" for i in range(len(program.params))),
            "packed",
        )

    @property
    def grad_outputs(self) -> tuple[str, ...]:
        """Arguments for gradients that are written row by row."""
        names = [f"r{i}" for i in range(len(self.program.rows))]
        if self.recipe.prediction:
            names += [f"t{i}" for i in range(len(self.program.tables))]
        return tuple(f"grad_{name}" for name in names if name in self.recipe.wanted)

    def kernel(self, name: str, arguments: Iterable[str], body: Callable[[Text], None]) -> None:
        text = Text()
        body(text)
        names = tuple(dict.fromkeys(arguments))
        numbers = [n for n in names if n in _NUMBERS]
        head = f"@triton.jit(do_not_specialize={numbers!r})\ndef {name}({', '.join(names)}, BLOCK: tl.constexpr):"
        self.parts.append("\n\n" + "\n".join([head, *text.lines]) + "\n")
        self.arguments[name] = names

    def packing(self) -> None:
        """Lays the weights out in padded blocks, one program of the grid each."""
        fields = self.layout.fields
        if not fields:
            return

        def body(text: Text) -> None:
            text("which = tl.program_id(0)")
            first = 0
            for field in fields:
                what = f"which - {first}, {self.program.params[field.index][1]}, {field.place}"
                inner = f"pack_block(p{field.index}, packed + {field.at}, {what})"
                head = f"if (which >= {first}) & (which < {first + field.blocks}):"
                text.block(head, lambda inner=inner: text(inner))  # type: ignore[misc]
                first += field.blocks

        self.kernel("pack", (*dict.fromkeys(f"p{field.index}" for field in fields), "packed"), body)

    def source(self) -> Source:
        text, written = "".join(self.parts), frozenset(self.written)
        return Source(text, self.arguments, self.shares, written, self.reductions, self.room)

    # --- pieces of text that kernels share ----------------------------------------------------------------------------

    def state(self) -> list[tuple[int, int, int, int]]:
        """Index, first column, width and block size of each piece of the state."""
        return [(i, p.start, p.width, p.size) for i, p in enumerate(self.layout.partitions["z"])]

    def place(self, text: Text, slots: str = "rows") -> None:
        text("rows = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)")
        text("valid = rows < total")
        text("sources = rows % batch")
        text("samples = rows // batch")
        text(f"slots = {slots}")

    def per_tile(self, text: Text, slots: str, body: Callable[[], None], shares: bool = True) -> None:
        """A program of the grid takes every so many-th tile; its share of the gradients, if any, is its own."""
        text("program = tl.program_id(0)")
        if shares:
            text("share = shares + tl.cast(program, tl.int64) * share_stride")

        def one() -> None:
            text("later_tile = tile - program")
            self.place(text, slots)
            body()
            text("tl.debug_barrier()")

        text.block("for tile in range(program, tiles, tl.num_programs(0)):", one)

    def load_state(self, text: Text, stem: str, base: str) -> None:
        for i, start, width, size in self.state():
            text(f"{stem}_{i} = load_rows({base}, rows, valid, {self.program.features}, {start}, {width}, {size})")

    def store_state(self, text: Text, stem: str, base: str) -> None:
        for i, start, width, _ in self.state():
            text(f"store_rows({base}, rows, valid, {stem}_{i}, {self.program.features}, {start}, {width})")

    def load_eps(self, text: Text) -> None:
        if not self.recipe.drawn:
            self.load_state(text, "eps", "noise")
            return
        for i, start, _, size in self.state():
            text(f"eps_{i} = normals(seed, sources, 0, samples, {start}, {size})")

    def load_alpha(self, text: Text) -> None:
        for i, start, width, size in self.state():
            place = f"alpha_row, alpha_col, {start}, {width}, {size}"
            text(f"alpha_{i} = load_mixed(alpha, sources, valid, {place})")

    def load_sources(self, text: Text, stem: str, base: str) -> None:
        for i, start, width, size in self.state():
            text(f"{stem}_{i} = load_rows({base}, sources, valid, {self.program.features}, {start}, {width}, {size})")

    def start(self, text: Text) -> None:
        """z = alpha z_short + (1 - alpha) eps; z_t = signal z_long + sigma eps in prior_loss."""
        if self.recipe.prediction:
            self.load_state(text, "clean", "z_long")
            self.load_eps(text)
            for name in ("signal", "sigma"):
                text(f"{name}_ = tl.load({name} + rows, mask=valid, other=0.0)[:, None]")
            for i, *_ in self.state():
                text(f"z_{i} = signal_ * clean_{i} + sigma_ * eps_{i}")
            return
        if not self.recipe.alpha:
            self.load_sources(text, "z", "z_short")
            return
        self.load_sources(text, "short", "z_short")
        self.load_alpha(text)
        self.load_eps(text)
        for i, *_ in self.state():
            text(f"z_{i} = alpha_{i} * short_{i} + (1.0 - alpha_{i}) * eps_{i}")

    def coefficients(self, text: Text, names: str) -> None:
        for i, name in enumerate("abs"):
            if name in names:
                text(f"{name} = tl.load(coefficients + 3 * k + {i})")

    def update(self, text: Text, walk: Walk) -> None:
        """z' = a z + b prediction + s noise."""
        predicted = walk.fetch(self.program.output, self.layout.partitions["z"])
        self.coefficients(text, "abs" if self.recipe.eta else "ab")
        for (i, start, _, size), z, x in zip(self.state(), walk.fetch("z"), predicted, strict=True):
            noise = f" + s * normals(seed, sources, k + 1, samples, {start}, {size})" if self.recipe.eta else ""
            text(f"z_{i} = a * {z} + b * {x}{noise}")

    def define_state(self, walk: Walk) -> None:
        walk.define("z", [f"z_{i}" for i, *_ in self.state()])

    def residual(self, text: Text, walk: Walk) -> None:
        """The prediction less what it should be, the tile's part of the loss, and the gradient of the prediction."""
        target = {"eps": "eps_{0}", "x0": "clean_{0}", "v": "(signal_ * eps_{0} - sigma_ * clean_{0})"}
        predicted = walk.fetch(self.program.output, self.layout.partitions["z"])
        losses = []
        for (i, _, width, _), x in zip(self.state(), predicted, strict=True):
            off = f"{x} - {target[self.recipe.prediction].format(i)}"
            text(f"off_{i} = tl.where(valid[:, None], real({off}, {width}), 0.0)")
            losses.append(f"tl.sum(off_{i} * off_{i})")
        text(f"loss = {' + '.join(losses)}")
        base = f"share + {self.shares['loss']}"
        again = "later_tile + c" if self.recipe.plan != REGISTERS else "later_tile"
        text(f"tl.store({base}, tl.where({again} > 0, tl.load({base}), 0.0) + loss)")
        for i, *_ in self.state():
            text(f"off_{i} = off_{i} * (2.0 / (total.to(tl.float32) * {self.program.features}))")

    def finish_prior(self, text: Text, walk: BackwardWalk) -> None:
        """The gradient of z_long, through the state and through the target."""
        found = walk.take_now("z") or ["0.0"] * len(self.state())
        through_target = {"eps": "", "x0": " - off_{0}", "v": " + sigma_ * off_{0}"}[self.recipe.prediction]
        for i, *_ in self.state():
            text(f"dz_{i} = signal_ * {found[i]}{through_target.format(i)} + off_{i} * 0.0")
        self.store_state(text, "dz", "grad_z")
        self.written.add("z")

    def finish_sample(self, text: Text) -> None:
        """Gradients of z_short and alpha from that of the start, per trajectory."""
        wanted, mixed = self.recipe.wanted, self.recipe.alpha
        if mixed and "z" in wanted:
            self.load_alpha(text)
        if "alpha" in wanted:
            self.load_sources(text, "short", "z_short")
            self.load_eps(text)
            for i, *_ in self.state():
                text(f"da_{i} = dz_{i} * (short_{i} - eps_{i})")
            self.store_state(text, "da", "grad_alpha")
            self.written.add("alpha")
        if "z" in wanted:
            if mixed:
                for i, *_ in self.state():
                    text(f"dz_{i} = alpha_{i} * dz_{i}")
            self.store_state(text, "dz", "grad_z")
            self.written.add("z")

    def begin_step_back(self, text: Text, walk: BackwardWalk) -> None:
        """Gradients of the prediction and the state from that of the next state."""
        self.coefficients(text, "ab")
        walk.send(self.program.output, [f"b * dz_{i}" for i, *_ in self.state()], self.layout.partitions["z"])
        for i, *_ in self.state():
            walk.add("z", i, f"a * dz_{i}")

    def reduction(self) -> None:
        """Adds up the programs' shares: grid (blocks, gradients)."""
        program, recipe = self.program, self.recipe
        parts: list[tuple[str, str, str]] = []  # argument, offset, numel
        weights: list[tuple[int, Field]] = []  # where the share of the parameter begins, and a part of it
        for i, shape in enumerate(program.params):
            if f"p{i}" in self.written and (fields := self.layout.share_fields(i)):
                weights += [(self.shares[f"p{i}"], field) for field in fields]
            elif f"p{i}" in self.written:
                parts.append((f"grad_p{i}", str(self.shares[f"p{i}"]), str(prod(shape))))
        if recipe.prediction:
            parts.append(("loss", str(self.shares["loss"]), "1"))
        else:
            before = 0
            for i, width in enumerate(program.tables):
                if f"t{i}" in recipe.wanted:
                    if f"t{i}" in self.written:
                        offset = f"{self.shares['tables']} + steps * {before}"
                        parts.append((f"grad_t{i}", offset, f"steps * {width}"))
                    before += width
        if not parts and not weights:
            return
        self.reductions = len(parts) + len(weights), max([field.size for _, field in weights], default=0)

        def body(text: Text) -> None:
            text("start = tl.program_id(0) * BLOCK")
            text("which = tl.program_id(1)")
            for which, (name, offset, numel) in enumerate(parts):
                scale = f"1.0 / (total.to(tl.float32) * {program.features})" if name == "loss" else "1.0"
                what = f"{name}, start, {numel}, {scale}, BLOCK"
                inner = f"reduce_block(shares + {offset}, programs, share_stride, {what})"
                text.block(f"if (which == {which}) & (start < {numel}):", lambda inner=inner: text(inner))  # type: ignore[misc]
            for which, (begin, field) in enumerate(weights, start=len(parts)):
                to = f"grad_p{field.index}, start, {program.params[field.index][1]}, {field.place}, BLOCK"
                inner = f"reduce_weight(shares + {begin + field.at}, programs, share_stride, {to})"
                head = f"if (which == {which}) & (start < {field.size}):"
                text.block(head, lambda inner=inner: text(inner))  # type: ignore[misc]

        names = [p[0] for p in parts] + [f"grad_p{field.index}" for _, field in weights]
        self.kernel("reduce", ("shares", *names, "programs", "share_stride", "steps", "total"), body)

"""The plan of several launches, for BatchNorm in training mode over a batch beyond one tile.

A launch per stretch between BatchNorms, K (n + 1) + 1 forward, as many backward plus one, and K more where values are
computed again. A stretch ends by writing its tiles' moments (or sums, backward); every tile of the next one joins them
in the same order. What crosses is handed on in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gdpd_kernels.backends.triton.layout import Rows
from gdpd_kernels.backends.triton.module import PRIOR_START, SAMPLER_START, Module
from gdpd_kernels.backends.triton.walk import JOINED, KNOWN, Text, Walk
from gdpd_kernels.backends.triton.walk_back import BackwardWalk


def forward(module: Module, kept: Rows | None) -> None:
    """Kernels start and forward_0.. of `reverse_sample`."""
    recipe = module.recipe
    where = ("state", "next_state", "coefficients", "seed", *module.operands, "stats", "moments", "crossing", "kept",
             "k", "batch", "total", "tiles")  # fmt: skip
    _start(module)

    def last(text: Text, walk: Walk) -> None:
        if "z" not in walk.registers:
            module.load_state(text, "z", "state")
        module.update(text, walk)
        module.store_state(text, "z", "next_state")

    _forward_segments(module, where, lambda text: Walk(module.layout, text, recipe.precision, kept, JOINED), last)


def _start(module: Module) -> None:
    def body(text: Text) -> None:
        text("tile = tl.program_id(0)")
        module.place(text)
        module.start(text)
        module.store_state(text, "z", "next_state")

    names = PRIOR_START if module.recipe.prediction else SAMPLER_START
    module.kernel("start", (*names, "next_state", "batch", "total"), body)


def _forward_segments(
    module: Module, arguments: Sequence[str], new: Callable[[Text], Walk], last: Callable[[Text, Walk], None]
) -> None:
    """Kernels forward_0.. of the stretches between BatchNorms."""
    layout, segments = module.layout, module.layout.segments
    for s, numbers in enumerate(segments):

        def body(text: Text, s: int = s, numbers: range = numbers) -> None:
            text("tile = tl.program_id(0)")
            module.place(text)
            walk = new(text)
            if s == 0:
                module.load_state(text, "z", "state")
                module.define_state(walk)
            for number in numbers:
                walk.forward(number)
            for name in layout.crossing.at:
                made_here = name in walk.registers and layout.segment_of(name) == s
                if made_here and not (walk.kept is not None and name in walk.kept.at):
                    walk.store(name, walk.registers[name], "crossing", layout.crossing)
            if s + 1 < len(segments):
                walk.tile_moments(segments[s + 1][0])
            else:
                last(text, walk)

        module.kernel(f"forward_{s}", arguments, body)


def backward(module: Module, need: frozenset[str]) -> None:
    """Kernels backward_n.. of `reverse_sample`, with what goes before and after them."""
    recipe, layout = module.recipe, module.layout
    if recipe.save == "states":

        def again(text: Text) -> None:
            text("tile = tl.program_id(0)")
            module.place(text)
            walk = Walk(layout, text, recipe.precision, recipe.kept, KNOWN)
            module.load_state(text, "z", "state")
            module.define_state(walk)
            for number in range(1, len(module.program.ops) + 1):
                walk.forward(number)

        module.kernel("recompute", ("state", *module.operands, "stats", "kept", "k", "batch", "total"), again)

    def first(text: Text, walk: BackwardWalk) -> None:
        module.load_state(text, "dz", "grad_state")
        module.begin_step_back(text, walk)

    def last(text: Text, walk: BackwardWalk) -> None:
        for i, x in enumerate(walk.take_now("z") or ()):
            text(f"dz_{i} = {x}")
        module.store_state(text, "dz", "next_grad_state")

    where = ("grad_state", "next_grad_state", "coefficients", *module.operands, "stats", "sums", "gradients", "kept",
             "shares", "share_stride", *module.grad_outputs, "k", "batch", "total", "steps", "tiles")  # fmt: skip
    _backward_segments(module, where, need, recipe.kept, first, last)

    def finish(text: Text) -> None:
        text("tile = tl.program_id(0)")
        module.place(text)
        module.load_state(text, "dz", "grad_state")
        module.finish_sample(text)

    if {"z", "alpha"} & recipe.wanted:
        module.kernel("finish", (*SAMPLER_START, "grad_state", "grad_z", "grad_alpha", "batch", "total"), finish)
    module.reduction()


def _backward_segments(
    module: Module,
    arguments: Sequence[str],
    need: frozenset[str],
    kept: Rows,
    first: Callable[[Text, BackwardWalk], None],
    last: Callable[[Text, BackwardWalk], None],
) -> None:
    """Kernels backward_n.. down to backward_0 of the stretches between BatchNorms."""
    recipe, layout, segments = module.recipe, module.layout, module.layout.segments
    pending: set[str] = set()
    for s in reversed(range(len(segments))):

        def body(text: Text, s: int = s) -> None:
            def tile() -> None:
                walk = BackwardWalk(
                    layout, text, recipe.precision, kept, JOINED, need, recipe.wanted, module.shares,
                    bool(recipe.prediction), pending, module.written,
                )  # fmt: skip
                if s == len(segments) - 1:
                    first(text, walk)
                else:
                    walk.backward(segments[s + 1][0])
                for number in reversed(segments[s]):
                    if s > 0 and number == segments[s][0]:
                        walk.batch_norm_sums(number)
                    else:
                        walk.backward(number)
                if s > 0:
                    walk.hand_over()
                else:
                    last(text, walk)
                walk.flush_outer()

            text("later_step = " + ("0" if recipe.prediction else "steps - 1 - k"))
            module.per_tile(text, "rows", tile)

        module.kernel(f"backward_{s}", arguments, body)


def prior(module: Module, need: frozenset[str], kept: Rows) -> None:
    """Kernels of `prior_loss` and its gradients."""
    recipe, layout = module.recipe, module.layout
    _start(module)
    before = ("state", *PRIOR_START, *module.operands, "stats", "moments", "crossing", "kept", "shares",
               "share_stride", "residuals", "k", "batch", "total", "tiles")  # fmt: skip

    def loss(text: Text, walk: Walk) -> None:
        text("later_tile = 0")
        text("share = shares + tl.cast(tile, tl.int64) * share_stride")
        module.start(text)
        module.residual(text, walk)
        if recipe.wanted:
            module.store_state(text, "off", "residuals")

    _forward_segments(
        module, before, lambda text: Walk(layout, text, recipe.precision, kept, JOINED, per_row_tables=True), loss
    )
    if recipe.wanted:

        def first(text: Text, walk: BackwardWalk) -> None:
            off = module.load_state(text, "off", "residuals")
            walk.send(module.program.output, off, layout.partitions["z"])

        def last(text: Text, walk: BackwardWalk) -> None:
            if "z" in recipe.wanted:
                for name in ("signal", "sigma"):
                    text(f"{name}_ = tl.load({name} + rows, mask=valid, other=0.0)[:, None]")
                module.load_state(text, "off", "residuals")
                module.finish_prior(text, walk)

        where = ("signal", "sigma", "residuals", *module.operands, "stats", "sums", "gradients", "kept", "shares",
                 "share_stride", "grad_z", *module.grad_outputs, "k", "batch", "total", "tiles")  # fmt: skip
        _backward_segments(module, where, need, kept, first, last)
    module.reduction()

"""The plan of several launches, for BatchNorm in training mode over a batch beyond one tile.

A launch per stretch between BatchNorms, K (n + 1) + 1 forward, as many backward plus one, and K more where values are
computed again. Values and gradients lie in memory as in ``streamed``, but every tile has a room of its own, where they
stay from launch to launch: one walk is written on through the kernels. A stretch ends by leaving the moments of each
program's tiles (or sums, backward); every program of the next one joins them, in the same order, before its tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gdpd_kernels.backends.triton.layout import Rows
from gdpd_kernels.backends.triton.module import PRIOR_START, SAMPLER_START, Module
from gdpd_kernels.backends.triton.stream import KNOWN, Room, StreamWalk
from gdpd_kernels.backends.triton.stream_back import StreamBackwardWalk
from gdpd_kernels.backends.triton.streamed import compute_again, end_prior, load, over_columns
from gdpd_kernels.backends.triton.walk import Text

_SIZES = ("k", "batch", "total", "steps", "tiles")


def _kernel(
    module: Module,
    name: str,
    arguments: Sequence[str],
    body: Callable[[Text], None],
    before: Sequence[str] = (),
    join: Callable[[Text], None] | None = None,
) -> None:
    """A kernel with a program per tile, or with several tiles per program.

    before: lines that come first for each tile.
    join: writes what a program of several tiles does before them; None if there is one program per tile.
    """

    def write(text: Text) -> None:
        def tile() -> None:
            text("whole = tl.cast(total, tl.int64)")
            text("room = rooms + tl.cast(tile, tl.int64) * (BLOCK * ROOM)")
            for line in before:
                text(line)
            body(text)

        text("one = tl.minimum(total, 1)")
        if join is not None:
            join(text)
            module.per_tile(text, "rows", tile, shares="shares" in arguments)
            return
        text("tile = tl.program_id(0)")
        module.place(text)
        tile()

    module.kernel(name, arguments, write)


def _set_room(module: Module, room: Room) -> None:
    """How large the rooms have to be is known at the end."""
    module.room = room.columns
    module.parts.append(f"\n\nROOM = tl.constexpr({room.columns})\n")


def _start(module: Module, state: int) -> None:
    def body(text: Text) -> None:
        def columns() -> None:
            module.start(text)
            text(f"store_slot(room, {state}, c, z_0)")

        over_columns(module, text, columns)

    names = PRIOR_START if module.recipe.prediction else SAMPLER_START
    _kernel(module, "start", (*names, "rooms", "batch", "total"), body)


def _forward_stretches(
    module: Module,
    walk: StreamWalk,
    arguments: Sequence[str],
    last: tuple[Sequence[str], Callable[[Text], None]],
    before: Sequence[str],
) -> None:
    """Kernels forward_0.. of the stretches between BatchNorms; `last`: arguments and end of the last one."""
    recipe, segments = module.recipe, module.layout.segments
    for s, numbers in enumerate(segments):
        ends = s == len(segments) - 1

        def body(text: Text, s: int = s, numbers: range = numbers, ends: bool = ends) -> None:
            if s == 0:
                walk.begin_step(f"saved + k * (whole * {module.program.features})" if recipe.save == "states" else "")
            for number in numbers:
                walk.forward(number)
            if ends:
                walk.end_step()
                last[1](text)
                walk.close()
            else:
                walk.leave_moments(segments[s + 1][0])

        def join(text: Text, s: int = s, numbers: range = numbers) -> None:
            walk.text = text
            if s > 0:
                walk.join_moments(numbers[0])

        _kernel(module, f"forward_{s}", last[0] if ends else arguments, body, before, join)


def forward(module: Module, kept: Rows | None) -> None:
    """Kernels start and forward_0.. of `reverse_sample`."""
    recipe, room = module.recipe, Room()
    state = room.take(module.streams.padded(module.program.features))
    walk = StreamWalk(room, state, KNOWN, module.layout, Text(), recipe.precision, kept)
    _start(module, state)

    def last(text: Text) -> None:
        module.update(text, walk)
        walk.put(state, "z_0")
        text.block("if k == steps - 1:", lambda: module.store_state(text, "z", "z_hat"))

    arguments = (
        "coefficients", "seed", *module.operands, "rooms", "stats", "moments", "z_hat", "saved", *_SIZES,
    )  # fmt: skip
    before = [] if kept is None else [f"kept = saved + k * (whole * {kept.width})"]
    _forward_stretches(module, walk, arguments, (arguments, last), before)
    _set_room(module, room)


def _backward_stretches(
    module: Module,
    walk: StreamBackwardWalk,
    arguments: Sequence[str],
    first: Callable[[Text], None],
    last: Callable[[Text], None],
    before: Sequence[str],
) -> None:
    """Kernels backward_n.. down to backward_0 of the stretches between BatchNorms."""
    segments = module.layout.segments
    for s in reversed(range(len(segments))):

        def join(text: Text, s: int = s) -> None:
            walk.text = text
            if s < len(segments) - 1:
                walk.join_sums(segments[s + 1][0])

        def body(text: Text, s: int = s) -> None:
            if s == len(segments) - 1:
                first(text)
            else:
                walk.backward(segments[s + 1][0])
            for number in reversed(segments[s]):
                if s > 0 and number == segments[s][0]:
                    walk.leave_sums(number)
                else:
                    walk.backward(number)
            walk.flush_outer()
            if s == 0:
                last(text)

        _kernel(module, f"backward_{s}", arguments, body, before, join)
    module.written |= walk.written


def backward(module: Module, need: frozenset[str]) -> None:
    """Kernels backward_n.. of `reverse_sample`, with what goes before and after them."""
    recipe, layout, room, states = module.recipe, module.layout, Room(), module.recipe.save == "states"
    gradient = room.take(module.streams.padded(module.program.features))
    kept = "kept = scratch" if states else f"kept = saved + k * (whole * {recipe.kept.width})"
    if states:

        def again(text: Text) -> None:
            compute_again(module, StreamWalk(room, None, KNOWN, layout, text, recipe.precision, recipe.kept))

        _kernel(module, "recompute", (*module.operands, "rooms", "stats", "saved", "scratch", *_SIZES), again, [kept])
    walk = StreamBackwardWalk(
        room, None, KNOWN, layout, Text(), recipe.precision, recipe.kept, need, recipe.wanted, module.shares
    )

    def first(text: Text) -> None:
        walk.enter(module.program.features)
        text.block("if k == steps - 1:", lambda: module.load_state(text, "dz", "grad"))
        text.block("else:", lambda: load(module, text, "dz_0", gradient))
        module.begin_step_back(text, walk)
        walk.waiting["z"] = gradient

    arguments = (
        "grad", "coefficients", *module.operands, "rooms", "stats", "sums", "joined", "saved", "scratch",
        "shares", "share_stride", *module.grad_outputs, *_SIZES,
    )  # fmt: skip
    _backward_stretches(module, walk, arguments, first, lambda text: None, ["later_step = steps - 1 - k", kept])

    def finish(text: Text) -> None:
        def columns() -> None:
            load(module, text, "dz_0", gradient)
            module.finish_sample(text)

        over_columns(module, text, columns)

    if {"z", "alpha"} & recipe.wanted:
        _kernel(module, "finish", (*SAMPLER_START, "rooms", "grad_z", "grad_alpha", "batch", "total"), finish)
    _set_room(module, room)
    module.reduction()


def prior(module: Module, need: frozenset[str], kept: Rows) -> None:
    """Kernels of `prior_loss` and its gradients."""
    recipe, layout, room = module.recipe, module.layout, Room()
    state = room.take(module.streams.padded(module.program.features))
    walk = StreamWalk(room, state, KNOWN, layout, Text(), recipe.precision, kept, per_row_tables=True)
    _start(module, state)

    def loss(text: Text) -> None:
        module.start(text)
        module.residual(text, walk)
        if recipe.wanted:
            walk.put(state, "off_0")  # where nobody reads the state any more

    arguments = (*PRIOR_START, *module.operands, "rooms", "stats", "moments", "kept", *_SIZES)
    before = ["k = 0", "later_step = 0"]
    _forward_stretches(module, walk, arguments, ((*arguments, "shares", "share_stride"), loss), before)
    if recipe.wanted:
        back = StreamBackwardWalk(
            room, None, KNOWN, layout, Text(), recipe.precision, kept, need, recipe.wanted, module.shares, True
        )

        def first(text: Text) -> None:
            back.enter(module.program.features)
            load(module, text, "off_0", state)
            back.send(module.program.output, ["off_0"], layout.partitions["z"])

        where = (
            "signal", "sigma", *module.operands, "rooms", "stats", "sums", "joined", "kept", "shares",
            "share_stride", "grad_z", *module.grad_outputs, *_SIZES,
        )  # fmt: skip
        _backward_stretches(module, back, where, first, lambda text: end_prior(module, text, back, state), before)
    _set_room(module, room)
    module.reduction()

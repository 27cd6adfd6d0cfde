"""The plan of one launch forward and one backward whose values lie in memory, for what registers cannot hold.

A program of the grid has a room of its own, which its tiles use one after the other; gradients lie there as well.
"""

from __future__ import annotations

from collections.abc import Callable

from gdpd_kernels.backends.triton.layout import Rows
from gdpd_kernels.backends.triton.module import PRIOR_START, SAMPLER_START, Module
from gdpd_kernels.backends.triton.stream import KNOWN, TILE, Room, StreamWalk
from gdpd_kernels.backends.triton.stream_back import StreamBackwardWalk
from gdpd_kernels.backends.triton.walk import Text

_SCRATCH_ROWS = "tl.cast(program, tl.int64) * BLOCK + tl.arange(0, BLOCK)"


def over_columns(module: Module, text: Text, body: Callable[[], None]) -> None:
    """A loop over the columns of the state."""
    text.block(module.streams.loop("c", module.program.features), body)
    text("tl.debug_barrier()")


def load(module: Module, text: Text, name: str, slot: int) -> None:
    """A slot of the state's width, in a loop over its columns."""
    text(f"{name} = load_slot(room, {slot}, c, BLOCK, {module.layout.partitions['z'][0].size})")


def _tiles(module: Module, text: Text, room: Room, slots: str, body: Callable[[], None], shares: bool) -> None:
    """A program's tiles, one after the other. How large the room has to be is known at the end."""
    at = len(text.lines)
    text("")

    def one() -> None:
        text("whole = tl.cast(total, tl.int64)")
        text("one = tl.minimum(total, 1)")
        body()

    if shares:
        module.per_tile(text, slots, one)
    else:
        text("program = tl.program_id(0)")

        def tile() -> None:
            module.place(text)
            one()

        text.block("for tile in tl.range(program, tiles, tl.num_programs(0), disable_licm=True):", tile)
    text.lines[at] = f"    room = rooms + tl.cast(tl.program_id(0), tl.int64) * (BLOCK * {room.columns})"
    module.room = max(module.room, room.columns)


def forward(module: Module, kept: Rows | None) -> None:
    """Kernel forward of `reverse_sample`."""
    recipe, program = module.recipe, module.program

    def body(text: Text) -> None:
        room = Room()
        state = room.take(module.streams.padded(program.features))

        def tile() -> None:
            def start() -> None:
                module.start(text)
                text(f"store_slot(room, {state}, c, z_0)")

            def step() -> None:
                walk = StreamWalk(room, state, TILE, module.layout, text, recipe.precision, kept)
                if kept is not None:
                    text(f"kept = saved + k * (whole * {kept.width})")
                to = f"saved + k * (whole * {program.features})" if recipe.save == "states" else ""
                walk.begin_step(to)
                for number in range(1, len(program.ops) + 1):
                    walk.forward(number)
                walk.end_step()
                module.update(text, walk)
                walk.put(state, "z_0")
                walk.close()

            def end() -> None:
                load(module, text, "z_0", state)
                module.store_state(text, "z", "z_hat")

            over_columns(module, text, start)
            text.block("for k in tl.range(steps, disable_licm=True):", step)
            over_columns(module, text, end)

        _tiles(module, text, room, "rows", tile, shares=False)

    results = ("z_hat", "stats", "saved")
    numbers = ("batch", "total", "steps", "tiles")
    module.kernel("forward", (*SAMPLER_START, "coefficients", *module.operands, "rooms", *results, *numbers), body)


def compute_again(module: Module, walk: StreamWalk) -> None:
    """The values that backward reads, from the state that forward kept."""
    walk.enter(module.program.features)
    module.load_state(walk.text, "z", f"saved + k * (whole * {module.program.features})")
    walk.define("z", ["z_0"])
    for number in range(1, len(module.program.ops) + 1):
        walk.forward(number)
    walk.end_forward()


def end_prior(module: Module, text: Text, walk: StreamBackwardWalk, residual: int) -> None:
    """The gradient of z_long; `residual`: slot of that of the prediction."""
    if "z" not in module.recipe.wanted:
        return
    walk.enter(module.program.features)
    load(module, text, "off_0", residual)
    for name in ("signal", "sigma"):
        text(f"{name}_ = tl.load({name} + rows, mask=valid, other=0.0)[:, None]")
    module.finish_prior(text, walk)
    walk.close()


def backward(module: Module, need: frozenset[str]) -> None:
    """Kernel backward of `reverse_sample`, and what adds up its shares."""
    recipe, program = module.recipe, module.program

    def body(text: Text) -> None:
        states, numbers, room = recipe.save == "states", range(1, len(program.ops) + 1), Room()
        gradient = room.take(module.streams.padded(program.features))

        def tile() -> None:
            def start() -> None:
                module.load_state(text, "dz", "grad")
                text(f"store_slot(room, {gradient}, c, dz_0)")

            def step() -> None:
                text("k = steps - 1 - i")
                text("later_step = i")
                walk = StreamBackwardWalk(
                    room, None, KNOWN, module.layout, text, recipe.precision, recipe.kept, need, recipe.wanted,
                    module.shares,
                )  # fmt: skip
                if states:
                    text("kept = scratch")
                    compute_again(module, walk)
                else:
                    text(f"kept = saved + k * (whole * {recipe.kept.width})")
                walk.statistics = TILE
                walk.enter(program.features)
                load(module, text, "dz_0", gradient)
                module.begin_step_back(text, walk)
                walk.waiting["z"] = gradient
                for number in reversed(numbers):
                    walk.backward(number)
                walk.flush_outer()
                text("tl.debug_barrier()")
                module.written |= walk.written

            def end() -> None:
                load(module, text, "dz_0", gradient)
                module.finish_sample(text)

            over_columns(module, text, start)
            text.block("for i in tl.range(steps, disable_licm=True):", step)
            if {"z", "alpha"} & recipe.wanted:
                over_columns(module, text, end)

        _tiles(module, text, room, _SCRATCH_ROWS if states else "rows", tile, shares=True)

    arguments = (
        *SAMPLER_START, "coefficients", *module.operands, "rooms", "grad", "stats", "saved", "scratch", "shares",
        "share_stride", "grad_z", "grad_alpha", *module.grad_outputs, "batch", "total", "steps", "tiles",
    )  # fmt: skip
    module.kernel("backward", arguments, body)
    module.reduction()


def prior(module: Module, need: frozenset[str], kept: Rows) -> None:
    """Kernel prior of `prior_loss` and its gradients, and what adds up its shares."""
    recipe, program = module.recipe, module.program

    def body(text: Text) -> None:
        numbers, room = range(1, len(program.ops) + 1), Room()
        target = room.take(module.streams.padded(program.features))

        def tile() -> None:
            text("later_step = 0")
            text("k = 0")
            walk = StreamBackwardWalk(
                room, None, TILE, module.layout, text, recipe.precision, kept, need, recipe.wanted, module.shares, True
            )
            walk.enter(program.features)
            module.start(text)
            walk.define("z", ["z_0"])
            for number in numbers:
                walk.forward(number)
            walk.end_step()
            module.start(text)
            module.residual(text, walk)
            if not recipe.wanted:
                walk.close()
                return
            walk.put(target, "off_0")
            walk.send(program.output, ["off_0"], module.layout.partitions["z"])
            for number in reversed(numbers):
                walk.backward(number)
            walk.flush_outer()
            end_prior(module, text, walk, target)
            module.written |= walk.written

        _tiles(module, text, room, _SCRATCH_ROWS, tile, shares=True)

    arguments = (
        *PRIOR_START, *module.operands, "rooms", "stats", "kept", "shares", "share_stride", "grad_z",
        *module.grad_outputs, "batch", "total", "tiles",
    )  # fmt: skip
    module.kernel("prior", arguments, body)
    module.reduction()

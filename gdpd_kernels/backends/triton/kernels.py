"""The kernels of a call, as source, by its plan.

*Registers* (here) and *memory* (``streamed``): one launch forward, one backward. A program of the grid takes a tile of
rows through all steps, its values in registers or in memory. Where the denoiser has BatchNorms in training mode the
tile is the whole batch, and the plan that of memory.

*Split* (``split``): BatchNorm in training mode over larger batches, a launch per stretch between BatchNorms, values in
memory.

Before either, one launch lays the weights out in padded blocks, whose addresses are constants; after it, one adds up
the programs' shares of the gradients of parameters and tables in a fixed order.
"""

from __future__ import annotations

from functools import lru_cache

from gdpd_kernels.backends.triton import split, streamed
from gdpd_kernels.backends.triton.layout import Rows, needed
from gdpd_kernels.backends.triton.module import MEMORY, PRIOR_START, REGISTERS, SAMPLER_START, Module, Recipe, Source
from gdpd_kernels.backends.triton.walk import Text, Walk
from gdpd_kernels.backends.triton.walk_back import BackwardWalk


@lru_cache(maxsize=512)
def forward_source(recipe: Recipe) -> Source:
    """`reverse_sample`."""
    module = Module(recipe)
    module.packing()
    kept = recipe.kept if recipe.save in ("values", "inputs") else None
    if recipe.plan != REGISTERS:
        (streamed if recipe.plan == MEMORY else split).forward(module, kept)
        return module.source()

    def body(text: Text) -> None:
        text("tile = tl.program_id(0)")
        module.place(text)
        text("whole = tl.cast(total, tl.int64)")
        module.start(text)

        def step() -> None:
            walk = Walk(module.layout, text, recipe.precision, kept)
            if kept is not None:
                text(f"kept = saved + k * (whole * {kept.width})")
            if recipe.save == "states":
                module.store_state(text, "z", f"saved + k * (whole * {module.program.features})")
            module.define_state(walk)
            for number in range(1, len(module.program.ops) + 1):
                walk.forward(number)
            module.update(text, walk)

        text.block("for k in range(steps):", step)
        module.store_state(text, "z", "z_hat")

    results = ("z_hat", "stats", "saved")
    arguments = (*SAMPLER_START, "coefficients", *module.operands, *results, "batch", "total", "steps")
    module.kernel("forward", arguments, body)
    return module.source()


@lru_cache(maxsize=512)
def backward_source(recipe: Recipe) -> Source:
    """The backward of `reverse_sample`."""
    module = Module(recipe)
    module.packing()
    need = needed(recipe.program, recipe.wanted, state=True)
    if recipe.plan != REGISTERS:
        (streamed if recipe.plan == MEMORY else split).backward(module, need)
        return module.source()

    def body(text: Text) -> None:
        states, numbers = recipe.save == "states", range(1, len(module.program.ops) + 1)
        text("whole = tl.cast(total, tl.int64)")

        def tile() -> None:
            module.load_state(text, "dz", "grad")

            def step() -> None:
                text("k = steps - 1 - i")
                text("later_step = i")
                walk = BackwardWalk(
                    module.layout, text, recipe.precision, recipe.kept, need, recipe.wanted, module.shares
                )  # fmt: skip
                if states:
                    text("kept = scratch")
                    module.load_state(text, "z", f"saved + k * (whole * {module.program.features})")
                    module.define_state(walk)
                    for number in numbers:
                        walk.forward(number)
                    text("tl.debug_barrier()")
                    walk.forget()
                else:
                    text(f"kept = saved + k * (whole * {recipe.kept.width})")
                module.begin_step_back(text, walk)
                for number in reversed(numbers):
                    walk.backward(number)
                walk.flush_outer()
                for i, x in enumerate(walk.take_now("z") or ()):
                    text(f"dz_{i} = {x}")
                text("tl.debug_barrier()")
                module.written |= walk.written

            text.block("for i in range(steps):", step)
            module.finish_sample(text)

        slots = "tl.cast(program, tl.int64) * BLOCK + tl.arange(0, BLOCK)" if states else "rows"
        module.per_tile(text, slots, tile)

    arguments = (
        *SAMPLER_START, "coefficients", *module.operands, "grad", "stats", "saved", "scratch", "shares",
        "share_stride", "grad_z", "grad_alpha", *module.grad_outputs, "batch", "total", "steps", "tiles",
    )  # fmt: skip
    module.kernel("backward", arguments, body)
    module.reduction()
    return module.source()


@lru_cache(maxsize=512)
def prior_source(recipe: Recipe) -> Source:
    """`prior_loss` with its gradients."""
    module = Module(recipe)
    module.packing()
    need = needed(recipe.program, recipe.wanted, state="z" in recipe.wanted)
    kept = recipe.kept if recipe.wanted else Rows({}, 4)
    if recipe.plan != REGISTERS:
        (streamed if recipe.plan == MEMORY else split).prior(module, need, kept)
        return module.source()

    def body(text: Text) -> None:
        numbers = range(1, len(module.program.ops) + 1)

        def tile() -> None:
            text("later_step = 0")
            text("k = 0")
            module.start(text)
            walk = BackwardWalk(
                module.layout, text, recipe.precision, kept, need, recipe.wanted, module.shares, True
            )  # fmt: skip
            module.define_state(walk)
            for number in numbers:
                walk.forward(number)
            module.residual(text, walk)
            if recipe.wanted:
                text("tl.debug_barrier()")
                walk.forget()
                off = [f"off_{i}" for i, *_ in module.state()]
                walk.send(module.program.output, off, module.layout.partitions["z"])
                for number in reversed(numbers):
                    walk.backward(number)
                walk.flush_outer()
                if "z" in recipe.wanted:
                    module.finish_prior(text, walk)
                module.written |= walk.written

        module.per_tile(text, "tl.cast(program, tl.int64) * BLOCK + tl.arange(0, BLOCK)", tile)

    arguments = (
        *PRIOR_START, *module.operands, "stats", "kept", "shares", "share_stride", "grad_z", *module.grad_outputs,
        "batch", "total", "tiles",
    )  # fmt: skip
    module.kernel("prior", arguments, body)
    module.reduction()
    return module.source()

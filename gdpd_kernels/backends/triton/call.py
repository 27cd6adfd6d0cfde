"""A call under way: its tile and plan, what its launches have in common, and the launches of the split plan."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from gdpd_kernels.backends.triton import autotune, tiling
from gdpd_kernels.backends.triton.module import SPLIT, Recipe, Source
from gdpd_kernels.program import DenoiserProgram

_FLOAT32 = torch.float32
_REDUCTION_BLOCK = 1024


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


def _precision(compute_dtype: torch.dtype) -> str:
    """Of matrix products, as `tiles.dot` names it. float32 means what it means to torch.matmul on this device."""
    if compute_dtype is not _FLOAT32:
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}[compute_dtype]
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" and not interpreted() else "ieee"


@lru_cache(maxsize=256)
def _pinned(coefficients: tuple[float, ...]) -> Tensor:
    # Kept for as long as the process lives, up to so many: a captured CUDA graph copies from it at every replay.
    return torch.tensor(coefficients, dtype=_FLOAT32).pin_memory()


def on_device_coefficients(coefficients: Sequence[float], device: torch.device) -> Tensor:
    """a, b and s of all steps, without waiting for the device."""
    if device.type == "cpu":
        return torch.tensor(coefficients, dtype=_FLOAT32)
    return _pinned(tuple(coefficients)).to(device, non_blocking=True)


class SplitPlan(UserWarning):
    """BatchNorm in training mode runs as several launches per step: the batch is too large for one tile."""


@cache
def _tell_of_split() -> None:
    warnings.warn(
        f"BatchNorm in training mode over more than {tiling.FUSED_BATCH_ROWS} rows, the limit of one tile: the plan is "
        "one launch per step and stretch between BatchNorms (docs/gpu.md, Plans); results are the same",
        SplitPlan,
        stacklevel=2,
    )


class Call:
    """One call under way: what its launches have in common."""

    def __init__(
        self,
        program: DenoiserProgram,
        total: int,
        batch: int,
        steps: int,
        compute_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.precision = _precision(compute_dtype)
        self.program, self.total, self.steps = program, total, steps
        self.tile, self.plan = tiling.tile(program, total, self.precision, tiling.architecture())
        self._choice = ""  # the key of a measured choice, where tiles are chosen by measurement
        if autotune.enabled() and device.type == "cuda" and not program.batch_norms:
            self._choice = autotune.key(program, total, self.precision, torch.cuda.get_device_name(device))
            self.tile = autotune.known(self._choice) or self.tile
        if self.plan == SPLIT:
            _tell_of_split()
        self.arguments: dict[str, Any] = {
            "total": total, "batch": batch, "steps": steps, "tiles": self.tiles, "k": 0,
        }  # fmt: skip

    @property
    def tiles(self) -> int:
        """How many tiles the trajectories make."""
        return -(-self.total // self.tile.rows)

    def tune(self, run: Callable[[], None]) -> None:
        """Choose the tile by measuring `run`, unless that is off, has been done, or a CUDA graph is being recorded."""
        if not self._choice or autotune.known(self._choice) or torch.cuda.is_current_stream_capturing():
            return
        from triton.testing import do_bench

        def use(tile: tiling.Tile) -> None:
            self.tile = tile
            self.arguments["tiles"] = self.tiles

        def seconds(tile: tiling.Tile) -> float:
            use(tile)
            return float(do_bench(run, warmup=5, rep=20)) * 1e-3

        among = autotune.candidates(self.program, self.total, self.precision, tiling.architecture())
        use(autotune.choose(self._choice, among, seconds))

    def recipe(self, **more: Any) -> Recipe:
        return Recipe(self.program, self.tile.chunk, self.precision, self.plan, **more)

    @property
    def programs(self) -> int:
        """How many programs of the grid take the tiles of backward, and of each launch of the split plan."""
        return min(self.tiles, tiling.MAX_PROGRAMS)

    def room(self, source: Source, like: Tensor, programs: int) -> None:
        """Memory for values: a room per program, in the split plan per tile."""
        rooms = self.tiles if self.plan == SPLIT else programs
        self.arguments["rooms"] = like.new_empty(rooms * self.tile.rows * source.room)

    def scratch(self, width: int, like: Tensor, programs: int) -> Tensor:
        """Memory for rows of values that are computed and read again, for as many tiles as there are rooms."""
        return like.new_empty((self.tiles if self.plan == SPLIT else programs) * self.tile.rows, width)

    def operands(self, rows: Sequence[Tensor], tables: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        for letter, tensors in (("r", rows), ("t", tables), ("p", params)):
            self.arguments |= {f"{letter}{i}": x for i, x in enumerate(tensors)}

    def launch(self, source: Source, kernel: str, programs: int | None = None, **more: Any) -> None:
        from gdpd_kernels.backends.triton.launch import launch

        given = self.arguments | more
        launch(source, kernel, (self.tiles if programs is None else programs,), given, self.tile.rows, self.tile.warps)

    def shares(self, source: Source, like: Tensor, programs: int, wanted_tables: int) -> None:
        stride = source.shares["tables"] + self.steps * wanted_tables
        room = like.new_empty(programs, max(stride, 1))
        self.arguments |= {"shares": room, "share_stride": stride, "programs": programs}

    def pack(self, source: Source, recipe: Recipe, like: Tensor) -> None:
        """Lay the weights out in padded blocks."""
        from gdpd_kernels.backends.triton.launch import launch

        self.arguments["packed"] = like.new_empty(sum(field.size for field in recipe.layout.fields))
        if "pack" in source.arguments:
            blocks = sum(field.blocks for field in recipe.layout.fields)
            launch(source, "pack", (blocks,), self.arguments, self.tile.rows, self.tile.warps)

    def reduce(self, source: Source) -> None:
        """Add up the programs' shares."""
        from gdpd_kernels.backends.triton.launch import launch

        if "reduce" not in source.arguments:
            return
        outputs = [x for name in source.arguments["reduce"] if name.startswith("grad_") or name == "loss"
                   for x in (self.arguments[name],)]  # fmt: skip
        parts, largest = source.reductions
        grid = (-(-max(largest, *(x.numel() for x in outputs)) // _REDUCTION_BLOCK), parts)
        launch(source, "reduce", grid, self.arguments, _REDUCTION_BLOCK, 4)


# --- the split plan's launches --------------------------------------------------------------------------------------


def split_sample(call: Call, source: Source, recipe: Recipe, like: Tensor) -> None:
    """The launches of forward."""
    call.arguments["moments"] = like.new_empty(call.programs, call.program.stats_width)
    call.launch(source, "start")
    for k in range(call.steps):
        for s in range(len(recipe.layout.segments)):
            call.launch(source, f"forward_{s}", call.programs, k=k)


def split_sample_backward(call: Call, source: Source, recipe: Recipe, like: Tensor) -> None:
    """The launches of backward."""
    _sums(call, like)
    for k in reversed(range(call.steps)):
        if "recompute" in source.arguments:
            call.launch(source, "recompute", k=k)
        for s in reversed(range(len(recipe.layout.segments))):
            call.launch(source, f"backward_{s}", call.programs, k=k)
    if "finish" in source.arguments:
        call.launch(source, "finish")


def split_prior(call: Call, source: Source, recipe: Recipe, like: Tensor) -> None:
    """The launches of `prior_loss`."""
    _sums(call, like)
    call.arguments["moments"] = like.new_empty(call.programs, call.program.stats_width)
    call.launch(source, "start")
    stretches = range(len(recipe.layout.segments))
    for name in (*(f"forward_{s}" for s in stretches), *(f"backward_{s}" for s in reversed(stretches))):
        if name in source.arguments:  # backward only if gradients are wanted
            call.launch(source, name, call.programs)


def _sums(call: Call, like: Tensor) -> None:
    width = call.program.stats_width
    call.arguments |= {"sums": like.new_empty(call.programs, width), "joined": like.new_empty(width)}

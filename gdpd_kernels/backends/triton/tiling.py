"""Tile configurations: how many rows and warps a program of the grid has, and which plan a batch takes.

A small, fixed set, chosen from sizes alone, so that results never depend on how busy or how large a GPU is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from gdpd_kernels.program import DenoiserProgram

# The widest value: its pieces are written out one by one, so that a linear layer of 512 × 512 is 16 to 64 block
# products of straight-line code, and compile time and the instruction cache set the limit.
MAX_WIDTH = 512

# Numbers of a value that one program holds when the batch has to be one tile (BatchNorm in training mode).
FUSED_BATCH_NUMBERS = 8192

# Programs of a backward launch, at most: each has a share of the parameters' gradients of its own, [programs, params].
MAX_SHARES = 128

# Columns of a block. Blocks of 128 spilled more registers; blocks of 32 took far longer to compile and to interpret.
_CHUNK = 64


@dataclass(frozen=True)
class Tile:
    """A configuration.

    Args:
        rows: of a tile.
        warps: per program.
        chunk: columns of the largest block of a value or a weight.
    """

    rows: int
    warps: int
    chunk: int


@lru_cache(maxsize=1024)
def tile(program: DenoiserProgram, total: int, precision: str, architecture: str) -> tuple[Tile, bool]:
    """The configuration for `total` trajectories, and whether the plan is the fused one.

    Args:
        architecture: "cuda" or "hip".
    """
    widest = max(program.widths.values())
    padded = _padded(widest)
    if program.batch_norms and total <= largest_fused_batch(widest):
        whole = max(16, 1 << (total - 1).bit_length())
        # 16 warps would leave half the registers to each.
        return Tile(whole, 8 if whole * padded > 4096 else 4, _CHUNK), True
    # 16 rows are what a matrix unit takes; more of them share each load of a weight, once there are programs enough.
    rows = 16 if total <= 16 * 256 or padded > 256 else 32
    return Tile(rows, 4 if rows * padded <= 1024 else 8, _CHUNK), not program.batch_norms


def largest_fused_batch(widest: int) -> int:
    """The most trajectories that BatchNorm in training mode takes in one tile; a power of two, 0 if there is none."""
    most = FUSED_BATCH_NUMBERS // _padded(widest)
    return 1 << (most.bit_length() - 1) if most >= 16 else 0


def _padded(widest: int) -> int:
    """Columns of a value's blocks together."""
    return max(16, 1 << (min(widest, _CHUNK) - 1).bit_length()) * -(-widest // _CHUNK)

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
    # Blocks of 128 spilled more registers; blocks of 32 took far longer to compile and to interpret.
    chunk = 64
    padded = max(16, 1 << (min(widest, chunk) - 1).bit_length()) * -(-widest // chunk)
    if program.batch_norms:
        whole = max(16, 1 << (total - 1).bit_length())
        if whole * padded <= FUSED_BATCH_NUMBERS:
            return Tile(whole, 8 if whole * padded > 4096 else 4, chunk), True
    # 16 rows are what a matrix unit takes; more of them share each load of a weight, once there are programs enough.
    rows = 16 if total <= 16 * 256 or padded > 256 else 32
    return Tile(rows, 4 if rows * padded <= 1024 else 8, chunk), not program.batch_norms



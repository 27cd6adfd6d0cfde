"""Tile configurations: how many rows and warps a program of the grid has, and which plan a batch takes.

A small, fixed set, chosen from sizes alone, so that results never depend on how busy or how large a GPU is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from gdpd_kernels.backends.triton.module import MEMORY, REGISTERS, SPLIT
from gdpd_kernels.program import DenoiserProgram

# The widest value: wider programs have not been compiled.
MAX_WIDTH = 512

# Rows that one program takes when the batch has to be one tile (BatchNorm in training mode).
FUSED_BATCH_ROWS = 64

# Programs of a launch, at most, where each takes several tiles. Backward, one has a share of the parameters' gradients
# of its own, [programs, params]; in the split plan each joins what all have left; forward, with values in memory, one
# has a room for them.
MAX_PROGRAMS, MAX_FORWARD_PROGRAMS = 128, 512

# The register budget. A thread has 255: values stay in registers where all values of a step together, as if nothing
# were ever let go, take a quarter of them. Otherwise they lie in memory, and a block of one takes 8 at most.
_REGISTERS_OF_VALUES, _REGISTERS_OF_BLOCK = 64, 8

# Columns of a block, of values in registers and of values in memory.
_CHUNK, _MEMORY_CHUNK = 64, 32


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


def architecture() -> str:
    """Of the GPUs that torch was built for: "cuda" or "hip"."""
    return "hip" if torch.version.hip is not None else "cuda"


@lru_cache(maxsize=1024)
def tile(program: DenoiserProgram, total: int, precision: str, architecture: str) -> tuple[Tile, str]:
    """The configuration for `total` trajectories, and the plan.

    Args:
        architecture: "cuda" or "hip", of the GPU.
    """
    if program.batch_norms and total <= FUSED_BATCH_ROWS:
        return _in_memory(program, max(16, 1 << (total - 1).bit_length()), architecture), MEMORY
    # 16 rows are what a matrix unit takes; more of them share each load of a weight, once there are programs enough.
    rows = 16 if total <= 16 * 256 else 32
    if program.batch_norms:
        return _in_memory(program, rows, architecture), SPLIT
    warps = 4 if rows * _padded(max(program.widths.values())) <= 1024 else 8
    # More than four warps of AMD's 64 threads leave each with so few registers that they count as four of 32.
    threads = 32 * (4 if architecture == "hip" else warps)
    if rows * sum(map(_padded, program.widths.values())) <= _REGISTERS_OF_VALUES * threads:
        return Tile(rows, warps, _CHUNK), REGISTERS
    return _in_memory(program, rows, architecture), MEMORY


def _in_memory(program: DenoiserProgram, rows: int, architecture: str) -> Tile:
    # Were all values one block wide, a step would be one stretch of code without loops, held in registers as a whole.
    chunk = _MEMORY_CHUNK if max(program.widths.values()) > _MEMORY_CHUNK else _MEMORY_CHUNK // 2
    # A thread of AMD's GPUs has twice the registers as long as there are four warps of 64 threads.
    warps = 4 if architecture == "hip" else max(4, rows * chunk // (32 * _REGISTERS_OF_BLOCK))
    return Tile(rows, warps, chunk)


def _padded(width: int) -> int:
    """Columns of a value's blocks together, in registers."""
    return max(16, 1 << (min(width, _CHUNK) - 1).bit_length()) * -(-width // _CHUNK)

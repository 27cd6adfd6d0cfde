"""Compiles Triton kernels ahead of time, which needs no GPU, and reads from the machine code what the compiler made.

Registers, stack, spills, shared memory and instructions, with the tools that come in Triton's wheel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdpd_kernels.backends.triton import tiling
from gdpd_kernels.backends.triton.module import Source

TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Bytes of shared memory that a program may have.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
_INTEGERS = {"batch", "total", "steps", "tiles", "k", "programs", "alpha_row", "alpha_col", "share_stride"}
_MATRIX = re.compile(r"HMMA|HGMMA|UTC\w*MMA|v_mfma")


@dataclass(frozen=True)
class Static:
    """Static facts of one compiled kernel: per thread, per program, and counts of instructions."""

    kernel: str
    registers: int
    stack: int
    spills: int
    shared: int
    matrix: int
    instructions: int


def inspect(source: Source, kernel: str, target: str, tile: tiling.Tile) -> Static:
    """Compile one kernel for `target`, ahead of time."""
    from triton import compile as build
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gdpd_kernels.backends.triton.launch import module
    from gdpd_kernels.backends.triton.launch import options as usual_options

    names = source.arguments[kernel]
    signature = {n: "i32" if n in _INTEGERS else "*i64" if n == "seed" else "*fp32" for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in _INTEGERS}
    made = ASTSource(
        module(source.text)[kernel], {**signature, "BLOCK": "constexpr"}, {(len(names),): tile.rows}, aligned
    )  # fmt: skip
    options = {"num_warps": tile.warps, **usual_options(TARGETS[target][0])}
    compiled: Any = build(made, target=GPUTarget(*TARGETS[target]), options=options)
    shared = int(compiled.metadata.shared)
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spills, stack = (
            int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]
            for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        )
        lines = [line for line in text.splitlines() if re.match(r"\s+[vs]_|\s+(ds|global|buffer)_", line)]
        return Static(kernel, registers, stack, spills, shared, len(_MATRIX.findall(text)), len(lines))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        text = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Static(
        kernel, int(found[1]), int(found[2]), len(re.findall(r"\b(?:STL|LDL)\b", text)), shared,
        len(_MATRIX.findall(text)), len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", text, re.MULTILINE)),
    )  # fmt: skip


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout

"""What the compiler says of the Triton kernels, with no GPU: `python -m bench.gpu_static [--target sm_80] [--write]`.

Compiles forward and backward of the cases below ahead of time and reads registers, stack, spills, shared memory and
instructions from the machine code with the tools of the Triton wheel. ``--write`` puts the table into docs/gpu.md.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.tables import write_between_markers
from gdpd_kernels.backends.triton import tiling
from gdpd_kernels.backends.triton.kernels import backward_source, forward_source
from gdpd_kernels.backends.triton.module import Recipe, Source
from gdpd_kernels.benchmark.cases import Case
from gdpd_kernels.program import DenoiserProgram

TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Bytes of shared memory that a program may have.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
CASES = ("mlp-1024x100-5-trainable", "mlp-1024x32-5-trainable", "paper-64x32-5-trainable", "paper-64x100-5-trainable")
_DOC = Path(__file__).parents[1] / "docs" / "gpu.md"
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

    names = source.arguments[kernel]
    signature = {n: "i32" if n in _INTEGERS else "*i64" if n == "seed" else "*fp32" for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in _INTEGERS}
    made = ASTSource(
        module(source.text)[kernel], {**signature, "BLOCK": "constexpr"}, {(len(names),): tile.rows}, aligned
    )  # fmt: skip
    options = {"num_warps": tile.warps, "num_stages": 1}
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


def sources(program: DenoiserProgram, rows: int, precision: str, target: str) -> tuple[tiling.Tile, list[Source]]:
    """Forward and backward with every gradient, as the backend would choose them."""
    tile, fused = tiling.tile(program, rows, precision, TARGETS[target][0])
    lists = (("t", program.tables), ("r", program.rows), ("p", program.params))
    names = frozenset(["z", "alpha", *(f"{letter}{i}" for letter, items in lists for i in range(len(items)))])
    wanted = names - {f"p{i}" for i in program.buffer_params}
    base: dict[str, Any] = {"alpha": True, "drawn": True, "save": "values"}
    recipes = [Recipe(program, tile.chunk, precision, fused, **base, wanted=w) for w in (frozenset(), wanted)]
    return tile, [forward_source(recipes[0]), backward_source(recipes[1])]


def table(cases: Sequence[str], targets: Sequence[str], precisions: Sequence[str]) -> list[str]:
    """Lines of a Markdown table."""
    heads = ("case", "target", "precision", "tile", "kernel", "registers", "stack, bytes", "spill instructions")
    heads += ("shared, bytes", "matrix instructions", "instructions")
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]
    for name in cases:
        case = Case.parse(name)
        for target in targets:
            for precision in precisions:
                tile, made = sources(case.program, case.batch, precision, target)
                for source, kernel in zip(made, ("forward", "backward"), strict=True):
                    s = inspect(source, kernel, target, tile)
                    shape = f"{tile.rows} rows, {tile.warps} warps, blocks of {tile.chunk}"
                    cells = (name, target, precision, shape, kernel, s.registers, s.stack, s.spills, s.shared)
                    cells += (s.matrix, s.instructions)  # type: ignore[assignment]
                    lines.append("| " + " | ".join(map(str, cells)) + " |")
                    print(lines[-1], file=sys.stderr, flush=True)
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; with --write, put it into docs/gpu.md."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_static", description=__doc__)
    parser.add_argument("--case", action="append", help="a case of gdpd_kernels.benchmark.cases; default: a few")
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--precision", action="append", choices=("tf32", "bf16", "fp16", "ieee"), help="default: tf32")
    parser.add_argument("--write", action="store_true", help="write the table into docs/gpu.md")
    options = parser.parse_args(arguments)
    lines = table(options.case or CASES, options.target or list(TARGETS), options.precision or ["tf32"])
    print("\n".join(lines))
    if options.write:
        write_between_markers(_DOC, "static", "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())

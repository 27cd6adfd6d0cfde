"""The grid that `bench.gpu_static` compiles, its records, and the tables made of them.

A record holds what the compiler said of one kernel, and a digest of what it was made of: the generated source, the
device functions that it names and the tile. A record whose digest is another today is stale: it is compiled again, and
a test fails as long as the page shows it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gdpd_kernels as gk
from bench.gpu_inspect import SHARED_LIMIT, TARGETS, Static
from gdpd.denoisers import AdaLNDenoiser
from gdpd_kernels.backends.triton import tiling
from gdpd_kernels.backends.triton.kernels import backward_source, forward_source
from gdpd_kernels.backends.triton.launch import options
from gdpd_kernels.backends.triton.module import Recipe, Source
from gdpd_kernels.benchmark.rivals import MLPDenoiser, PaperDenoiser
from gdpd_kernels.benchmark.tables import markdown
from gdpd_kernels.program import DenoiserProgram

RECORDS = Path(__file__).with_name("gpu_static.json")
DEVICE_FUNCTIONS = [Path(tiling.__file__).with_name(name) for name in ("tiles.py", "activations.py")]
WIDTHS = (32, 64, 100, 128, 256, 512)
SELECTED = (100, 512)  # widths at which every GPU, or every precision, stands
PRECISIONS = ("tf32", "bf16", "fp16", "ieee")
KERNELS = ("forward", "backward")
BATCH, PAPER_BATCH, LARGE_BATCH = 1024, 64, 8192
# Of a width: what is captured, and in which mode.
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "MLP": lambda n: MLPDenoiser(n, (n, n)),
    "paper's network, evaluation": lambda n: PaperDenoiser(n).eval(),
    "paper's network, training": lambda n: PaperDenoiser(n).train(),
    "AdaLN head": lambda n: _head(n),
}
_LARGE = {f"{name}, a batch of {LARGE_BATCH}": name for name in NETWORKS}
# The batch, and the network.
PROGRAMS: dict[str, tuple[int, Callable[[int], nn.Module]]] = {
    "MLP": (BATCH, NETWORKS["MLP"]),
    "MLP with hidden layers of 256": (BATCH, lambda n: MLPDenoiser(n, (256, 256))),
    "paper's network, evaluation": (BATCH, NETWORKS["paper's network, evaluation"]),
    "paper's network, training": (PAPER_BATCH, NETWORKS["paper's network, training"]),
    f"paper's network, training, a batch of {BATCH}": (BATCH, NETWORKS["paper's network, training"]),
    "AdaLN head": (BATCH, NETWORKS["AdaLN head"]),
    **{name: (LARGE_BATCH, NETWORKS[network]) for name, network in _LARGE.items()},
}
_CONDITION = 32
# The others come in every width.
ONLY = {"MLP with hidden layers of 256": (100,), **dict.fromkeys(_LARGE, (32, 100))}


def _head(width: int) -> nn.Module:
    made = AdaLNDenoiser(features=min(width, 64), cond_features=_CONDITION, hidden=width, blocks=2)
    return made.eval()


@dataclass(frozen=True)
class Cell:
    """One kernel of the grid."""

    program: str
    width: int
    target: str
    precision: str
    kernel: str

    @property
    def key(self) -> str:
        return f"{self.program}|{self.width}|{self.target}|{self.precision}|{self.kernel}"

    @property
    def batch(self) -> int:
        return PROGRAMS[self.program][0]


def grid() -> Iterator[Cell]:
    """A balanced choice: in tf32 every network in all its widths on sm_80 and sm_90; on the other GPUs, and in other
    precisions on sm_80, at two widths, those of the large batch in tf32 alone. What is asked for most comes first."""
    for precision, width in product(PRECISIONS, sorted(WIDTHS, key=(100, 512, 64, 32, 256, 128).index)):
        for target, program in product(TARGETS, PROGRAMS):
            always = precision == "tf32" and target in ("sm_80", "sm_90")
            selected = width in SELECTED and (precision == "tf32" or (target == "sm_80" and program not in _LARGE))
            if width in ONLY.get(program, WIDTHS) and (always or selected):
                yield from (Cell(program, width, target, precision, kernel) for kernel in KERNELS)


@lru_cache(maxsize=64)
def program_of(name: str, width: int) -> DenoiserProgram:
    """The program of a network of the grid."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = PROGRAMS[name][1](width)
        # Beside the condition, the token's index.
        cond_features = _CONDITION + 1 if isinstance(made, AdaLNDenoiser) else None
        return gk.capture(made, cond_features=cond_features).program


def source_of(cell: Cell) -> tuple[tiling.Tile, Source, str]:
    """The tile, the source and the plan, as the backend would choose them."""
    architecture = TARGETS[cell.target][0]
    program = program_of(cell.program, cell.width)
    tile, plan = tiling.tile(program, cell.batch, cell.precision, architecture)
    return tile, _source(program, tile.chunk, cell.precision, plan, cell.kernel), plan


@lru_cache(maxsize=512)
def _source(program: DenoiserProgram, chunk: int, precision: str, plan: str, kernel: str) -> Source:
    lists = (("t", program.tables), ("r", program.rows), ("p", program.params))
    names = frozenset(["z", "alpha", *(f"{letter}{i}" for letter, items in lists for i in range(len(items)))])
    wanted = names - {f"p{i}" for i in program.buffer_params} if kernel == "backward" else frozenset()
    recipe = Recipe(program, chunk, precision, plan, alpha=True, drawn=True, save="values", wanted=wanted)
    return backward_source(recipe) if kernel == "backward" else forward_source(recipe)


def kernels_of(cell: Cell, source: Source) -> list[str]:
    """The names of the kernels that a cell stands for: one, or of the split plan those between two BatchNorms."""
    return [name for name in source.arguments if name.rstrip("0123456789_") == cell.kernel]


def digest(cell: Cell) -> str:
    """Of everything that a kernel's machine code follows from, Triton's version aside."""
    tile, source, _ = source_of(cell)
    functions = "\n".join(device_functions(source))
    made = f"{source.text}\n{functions}\n{tile}\n{options(TARGETS[cell.target][0])}\n{cell.target}"
    return hashlib.sha256(made.encode()).hexdigest()[:16]


def device_functions(source: Source) -> list[str]:
    """What a source names of the device functions, and what that needs, without comments, in the order of names."""
    found, known = set[str](), _definitions()
    names = set(re.findall(r"\w+", source.text))
    while new := (names & known.keys()) - found:
        found |= new
        names = {node.id for name in new for node in ast.walk(known[name]) if isinstance(node, ast.Name)}
    return [ast.dump(known[name]) for name in sorted(found)]


@cache
def _definitions() -> dict[str, ast.stmt]:
    """Device functions, without docstrings, and constants, by name."""
    found: dict[str, ast.stmt] = {}
    for node in (node for path in DEVICE_FUNCTIONS for node in ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.FunctionDef):
            if ast.get_docstring(node) is not None:
                del node.body[0]
            found[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node
    return found


# --- records ----------------------------------------------------------------------------------------------------------


def read_records(path: Path = RECORDS) -> dict[str, dict[str, Any]]:
    """Records by the key of their cell; none if there is no file."""
    if not path.exists():
        return {}
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write_records(records: Mapping[str, Mapping[str, Any]], path: Path = RECORDS) -> None:
    """One record a line; the file appears whole or not at all."""
    lines = [f"{json.dumps(key)}: {json.dumps(record)}" for key, record in sorted(records.items())]
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as beside:
        beside.write("{\n" + ",\n".join(lines) + "\n}\n")
    os.chmod(beside.name, 0o644)
    os.replace(beside.name, path)


def record(cell: Cell, found: list[Static], triton: str) -> dict[str, Any]:
    """What is kept of a cell: of registers, stack and shared memory the largest of its kernels, of counts the sums."""
    tile, _, plan = source_of(cell)
    largest = {name: max(getattr(s, name) for s in found) for name in ("registers", "stack", "shared")}
    summed = {name: sum(getattr(s, name) for s in found) for name in ("spills", "matrix", "instructions")}
    chosen = {"kernels": len(found), "plan": plan, "tile": asdict(tile)}
    return {"digest": digest(cell), "triton": triton} | chosen | largest | summed


def current(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The records of the grid that are not stale."""
    cells = {cell.key: cell for cell in grid()}
    return {key: x for key, x in records.items() if key in cells and x["digest"] == digest(cells[key])}


# --- the page: tiles --------------------------------------------------------------------------------------------------


def tiles_page() -> str:
    """The table of plans and tiles, as the backend chooses them for the networks of the grid."""
    rows = [("network", "batch", "width", "GPU", "plan", "rows × columns of a block", "warps")]
    for name in NETWORKS:
        for batch in (PAPER_BATCH, PAPER_BATCH + 1, LARGE_BATCH) if "training" in name else (BATCH, LARGE_BATCH):
            for gpu, architecture in (("NVIDIA", "cuda"), ("AMD", "hip")):
                chosen: dict[tuple[str, str, str], list[int]] = {}
                for width in WIDTHS:
                    tile, plan = tiling.tile(program_of(name, width), batch, "tf32", architecture)
                    chosen.setdefault((plan, f"{tile.rows} × {tile.chunk}", str(tile.warps)), []).append(width)
                for what, widths in chosen.items():
                    rows.append((name, str(batch), ", ".join(map(str, widths)), gpu, *what))
    return markdown(_joined(rows))


def _joined(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Rows that differ in the GPU alone, as one."""
    found: dict[tuple[str, ...], list[str]] = {}
    for row in rows[1:]:
        found.setdefault((*row[:3], *row[4:]), []).append(row[3])
    return [rows[0], *((*row[:3], ", ".join(gpus), *row[3:]) for row, gpus in found.items())]


# --- the page: figures ------------------------------------------------------------------------------------------------


def page(records: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables of docs/gpu.md."""
    cells = list(grid())
    known = [(cell, records[cell.key]) for cell in cells if cell.key in records]
    spilled = [cell for cell, found in known if found["spills"] or found["stack"]]
    versions = ", ".join(sorted({found["triton"] for _, found in known}))
    about = [f"{len(known)} of the grid's {len(cells)} kernels, by Triton {versions}."]
    if len(known) < len(cells):
        about.append("The others have not been compiled for this page: a dash.")
    about.append(
        f"{len(known) - len(spilled)} spill nothing and use no stack."
        + (" Those that do stand in bold." if spilled else "")
    )
    parts = [" ".join(about)]
    for target in TARGETS:
        rows = list(_rows(target, records))
        if rows:
            limit = SHARED_LIMIT[target] // 1024
            parts.append(f"**{target}**, which has {limit} KiB of shared memory per program:")
            parts.append(markdown([("network", "width", "plan and tile", "kernel", *PRECISIONS), *rows]))
    return "\n\n".join(parts)


def _rows(target: str, records: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for program in PROGRAMS:
        for width in ONLY.get(program, WIDTHS):
            for kernel in KERNELS:
                cells = [Cell(program, width, target, precision, kernel) for precision in PRECISIONS]
                if found := [records[cell.key] for cell in cells if cell.key in records]:
                    t = found[0]["tile"]
                    tile = f"{found[0]['plan']}, {t['rows']} × {t['chunk']}, {t['warps']} warps"
                    many = f" ({found[0]['kernels']})" if found[0]["kernels"] > 1 else ""
                    yield program, str(width), tile, kernel + many, *(_told(records.get(cell.key)) for cell in cells)


def _told(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "—"
    shared = f"{found['shared'] / 1024:.0f} KiB"
    text = f"{found['registers']} · {shared} · {found['matrix']} of {found['instructions']}"
    return f"{text} · **{found['spills']} spills, {found['stack']} B**" if found["spills"] or found["stack"] else text

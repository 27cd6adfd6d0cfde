"""Tiles chosen by measurement, where GDPD_KERNELS_AUTOTUNE=1 asks for it; what was found is kept in a file.

Off by default: another tile adds up gradients in another order, so results would depend on a measurement. With the
file they do not change any more on one machine. It lies in the folder GDPD_KERNELS_CACHE, by default
~/.cache/gdpd-kernels, and may be deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

from gdpd_kernels.backends.triton.tiling import Tile, tile
from gdpd_kernels.program import DenoiserProgram

_ROWS, _WARPS = (16, 32, 64), (4, 8)


def enabled() -> bool:
    """Whether the environment asks for it."""
    return os.environ.get("GDPD_KERNELS_AUTOTUNE", "") == "1"


def cache_file() -> Path:
    """Where choices are kept."""
    folder = os.environ.get("GDPD_KERNELS_CACHE", "")
    return (Path(folder) if folder else Path.home() / ".cache" / "gdpd-kernels") / "tiles.json"


def candidates(program: DenoiserProgram, total: int, precision: str, architecture: str) -> list[Tile]:
    """The tile that sizes choose, then others. With BatchNorm in training mode there are none: the plan hangs on it."""
    usual, _ = tile(program, total, precision, architecture)
    if program.batch_norms:
        return [usual]
    others = [replace(usual, rows=rows, warps=warps) for rows in _ROWS for warps in _WARPS]
    return [usual, *(other for other in others if other != usual)]


def key(program: DenoiserProgram, total: int, precision: str, gpu: str) -> str:
    """Of a choice: batches up to the same power of two share it."""
    made = f"{program.text}\n{max(total - 1, 1).bit_length()}\n{precision}\n{gpu}"
    return hashlib.sha256(made.encode()).hexdigest()[:24]


def known(name: str) -> Tile | None:
    """The choice of a `key`, None if there is none yet."""
    found = _read(cache_file()).get(name)
    return None if found is None else Tile(**found)


def choose(name: str, among: list[Tile], seconds: Callable[[Tile], float]) -> Tile:
    """Measure, keep the fastest under its `key`, and return it.

    Args:
        seconds: of a call on a tile; one that a GPU cannot hold raises, and is passed over.

    Raises:
        RuntimeError: none of them runs.
    """
    found: dict[Tile, float] = {}
    wrong = ""
    for one in among:
        try:
            found[one] = seconds(one)
        except Exception as error:  # Triton has no one class for what does not fit
            wrong = f"{one}: {error}"
    if not found:
        raise RuntimeError(f"no tile can be used, the last {wrong}")
    best = min(found, key=found.__getitem__)
    _keep(cache_file(), name, best)
    return best


@cache
def _read(path: Path) -> dict[str, dict[str, int]]:
    try:
        found: dict[str, dict[str, int]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no file yet, or not one of ours: it is written anew
        return {}
    return found


def _keep(path: Path, name: str, best: Tile) -> None:
    """Add a choice; the file appears whole or not at all, with what other processes have added meanwhile."""
    _read.cache_clear()
    choices = _read(path) | {name: asdict(best)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as beside:
        json.dump(choices, beside, indent=1)
    os.replace(beside.name, path)
    _read.cache_clear()

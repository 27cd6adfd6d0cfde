"""Compiles generated modules and launches their kernels on the current stream."""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gdpd_kernels.backends.triton.module import Source
from gdpd_kernels.backends.triton.tiling import architecture

# Loads of weights do not depend on the step: software pipelining would prefetch all of them into shared memory.
# Products and sums are fused, which is more exact, whatever the default of a Triton release.
_OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}


def options(architecture: str) -> dict[str, Any]:
    """What kernels are compiled with, beside their number of warps; `architecture` as `tiling.tile` has it."""
    # NVIDIA's assembler gives a thread fewer registers than there are, and spills, to have room for another program.
    return _OPTIONS if architecture == "hip" else {**_OPTIONS, "maxnreg": 255}


@lru_cache(maxsize=512)
def module(text: str) -> dict[str, Any]:
    """The names that a source defines. Triton compiles a kernel for the GPU at hand when it is first launched."""
    name = f"<gdpd_kernels.triton.{hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    # Triton reads the source of a function again, and debuggers and profilers show it: this is where they look.
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(text, name, "exec"), namespace)
    return namespace


def launch(
    source: Source, kernel: str, grid: tuple[int, ...], given: Mapping[str, Tensor | int | None], rows: int, warps: int
) -> None:
    """Launch a kernel of `source` with what it takes of the arguments `given` by name, on tiles of so many rows."""
    arguments = [given[name] for name in source.arguments[kernel]]
    module(source.text)[kernel][grid](*arguments, BLOCK=rows, num_warps=warps, **options(architecture()))


def on_device(tensor: Tensor) -> Any:
    """Makes the tensor's GPU the current one; Triton launches on the current device and stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else _Nowhere()


class _Nowhere:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None

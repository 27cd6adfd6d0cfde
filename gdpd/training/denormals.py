"""Flushing subnormal floats to zero in every thread that computes, for the time of a training run.

The gradients of a recurrent network over a few hundred steps decay into subnormal numbers, on which CPUs are some
hundred times slower; LSTM training slows about tenfold. `torch.set_flush_denormal` sets a bit in the control
register of the *calling thread only*. Worker threads inherit the register of the thread that starts them, so the
bit must be set before torch's first parallel operation. In a process whose thread pool already runs (a notebook, a
second `fit`), it is handed to the workers by running C's `fesetenv` in each of them.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SUBNORMAL_BITS = 700_000  # as float32: about 1e-39
_SIZE = 1 << 18  # enough elements for torch to give every thread a share of an elementwise product


@contextmanager
def flush_denormals(wanted: bool = True) -> Iterator[None]:
    """Within the block, subnormal results are zero in the calling thread and in torch's CPU workers.

    What held before is restored at the end. On a processor without the feature, or where the workers cannot be
    reached, the block runs with what could be set, and a warning says that training may be slow.

    Args:
        wanted: False leaves everything as it is.
    """
    # One element: a parallel operation here would start the workers before the bit is set.
    if not wanted or _all_zero(_product_of_subnormals(1)):
        yield
        return
    supported = _set_everywhere(True)
    if not supported or not all(threads_flushing()):
        warnings.warn(
            "subnormal floats are not flushed to zero in every compute thread: training of long series may be slow. "
            "Call torch.set_flush_denormal(True) at the start of the program, before anything else of torch.",
            RuntimeWarning,
            stacklevel=3,
        )
    try:
        yield
    finally:
        _set_everywhere(False)


def threads_flushing() -> list[bool]:
    """For each of torch's CPU threads, the calling one first, whether it flushes subnormal results to zero."""
    threads = torch.get_num_threads()
    return [_all_zero(share) for share in _product_of_subnormals(threads * _SIZE).chunk(threads)]


def _product_of_subnormals(size: int) -> torch.Tensor:
    """1e-39 times one, `size` times over, as the integers of its bits: a comparison of floats would flush too."""
    subnormal = torch.full((size,), _SUBNORMAL_BITS, dtype=torch.int32).view(torch.float32)
    return (subnormal * 1.0).view(torch.int32)


def _all_zero(bits: torch.Tensor) -> bool:
    return not bool(bits.any())


def _set_everywhere(on: bool) -> bool:
    supported = torch.set_flush_denormal(on)
    libraries = _openmp_and_math()
    if supported and libraries is not None:
        openmp, math = libraries
        environment = ctypes.create_string_buffer(256)  # an fenv_t: 32 bytes on x86-64, 8 on aarch64
        math.fegetenv(environment)
        # void GOMP_parallel(void (*fn)(void *), void *data, unsigned threads, unsigned flags)
        function = ctypes.cast(math.fesetenv, ctypes.c_void_p)
        openmp.GOMP_parallel(function, environment, torch.get_num_threads(), 0)
    return supported


@functools.cache
def _openmp_and_math() -> tuple[ctypes.CDLL, ctypes.CDLL] | None:
    """The OpenMP library whose pool torch uses, and the C mathematics library; None where either is not found."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            loaded = [line.split(maxsplit=5)[-1].strip() for line in maps if "libgomp" in line]
        # scikit-learn's wheel carries an OpenMP of its own: torch's is the one beside torch, if it has brought one.
        loaded.sort(key=lambda path: not path.startswith(os.path.dirname(torch.__file__)))
        return (ctypes.CDLL(loaded[0]), ctypes.CDLL("libm.so.6")) if loaded else None
    except OSError:
        return None

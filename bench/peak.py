"""What the machine can do at most: float32 multiply-adds a second and bytes a second, both measured.

Neither torch's BLAS (slow on some processors) nor our own kernel (which would be measured against itself) is a fair
peak alone, so a loop of independent multiply-adds on registers, compiled on the fly, runs beside torch's product.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

# 12 chains: more than latency × throughput of any current processor, and 12 + 2 operands fit 16 registers.
_SOURCE = """
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define CHAINS 12
typedef float vec __attribute__((vector_size(BYTES)));

double multiply_adds(long iterations) {  /* returns operations done; the sum keeps them alive */
  vec a[CHAINS], x, y;
  float sum = 0;
  for (int i = 0; i < (int)(BYTES / sizeof(float)); ++i) x[i] = 0.5f + 1e-3f * i, y[i] = 0.25f;
  for (int j = 0; j < CHAINS; ++j) a[j] = x + (float)j;
  for (long n = 0; n < iterations; ++n)
    for (int j = 0; j < CHAINS; ++j) a[j] = a[j] * x + y;
  for (int j = 0; j < CHAINS; ++j)
    for (int i = 0; i < (int)(BYTES / sizeof(float)); ++i) sum += a[j][i];
  return sum > 1e30f ? 0 : 2.0 * CHAINS * (BYTES / sizeof(float)) * (double)iterations;
}

#if defined(__AVX512BF16__)
#include <immintrin.h>
double bf16_dots(long iterations) {
  __m512 a[CHAINS];
  __m512bh x = (__m512bh)_mm512_set1_epi32(0x3e803e80), y = (__m512bh)_mm512_set1_epi32(0x3c003c00);
#pragma GCC unroll 12  /* every loop over a: one left as a loop keeps it in memory */
  for (int j = 0; j < CHAINS; ++j) a[j] = _mm512_set1_ps((float)j);
  for (long n = 0; n < iterations; ++n)
#pragma GCC unroll 12
    for (int j = 0; j < CHAINS; ++j) a[j] = _mm512_dpbf16_ps(a[j], x, y);
  float sum = 0;
#pragma GCC unroll 12
  for (int j = 0; j < CHAINS; ++j) sum += _mm512_reduce_add_ps(a[j]);
  return sum > 1e30f ? 0 : 2.0 * CHAINS * 32 * (double)iterations;
}
#else
double bf16_dots(long iterations) { return iterations < 0; }
#endif
"""


@dataclass(frozen=True)
class Peak:
    """The machine's limits with torch's number of threads.

    Args:
        flops: float32 operations a second, the best of all ways tried.
        source: the way that reached it.
        ways: operations a second of each way.
        bf16_flops: bfloat16 operations a second of dot-product instructions; 0 without them or without a compiler.
        bytes: bytes a second, read and written, of a copy that is larger than the caches.
    """

    flops: float
    source: str
    ways: dict[str, float]
    bf16_flops: float
    bytes: float


def measure(seconds: float = 3.0) -> Peak:
    """Measure the peak in about so many seconds."""
    threads = torch.get_num_threads()
    ways = {}
    shapes = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 256, 256), (4096, 512, 512))
    for m, k, n in shapes:
        a, b, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
        best = _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), seconds / 8)
        ways[f"torch product {m}×{k}×{n}"] = 2.0 * m * k * n / best
    loops = _compiled_loops()
    bf16 = 0.0
    if loops is not None:
        ways[f"compiled loop, {threads} threads"] = _loop_rate(loops.multiply_adds, threads, seconds / 4)
        bf16 = _loop_rate(loops.bf16_dots, threads, seconds / 8)
    source = max(ways, key=ways.__getitem__)
    return Peak(ways[source], source, ways, bf16, _copy_rate(seconds / 8))


def _best(function: Callable[[], object], seconds: float) -> float:
    """The shortest of the times that fit."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        began = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - began)
    return best


def _loop_rate(loop: Callable[[int], float], threads: int, seconds: float) -> float:
    """Operations a second of a compiled loop on so many threads; ctypes lets go of the interpreter meanwhile."""
    iterations = 20_000_000  # some tens of milliseconds: starting threads does not count
    if loop(1) == 0:
        return 0.0
    with ThreadPoolExecutor(threads) as pool:

        def run() -> None:
            list(pool.map(loop, [iterations] * threads))

        return loop(iterations) * threads / _best(run, seconds)


def _copy_rate(seconds: float) -> float:
    source = torch.ones(32 * 2**20)
    target = source.clone()  # touched: the first write of a page is the system's time
    return 2 * source.nbytes / _best(lambda: target.copy_(source), seconds)


def _compiled_loops() -> ctypes.CDLL | None:
    """The loops as a library, or None without a C compiler."""
    candidates = (os.environ.get("CC"), "gcc", "cc", "clang")
    compiler = next((found for name in candidates if name and (found := shutil.which(name))), None)
    if compiler is None:
        return None
    native = "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "peak.c"), Path(folder, "peak.so")
        source.write_text(_SOURCE)
        command = [compiler, "-O3", native, "-ffp-contract=fast", "-shared", "-fPIC", str(source), "-o", str(library)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return None
        loops = ctypes.CDLL(str(library))
    for loop in (loops.multiply_adds, loops.bf16_dots):
        loop.restype, loop.argtypes = ctypes.c_double, [ctypes.c_long]
    return loops

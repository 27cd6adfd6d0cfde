"""Timing of contenders against each other: interleaved repeats in one process, medians and quantiles."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

# A sample lasts at least so long, so that the clock and a single interrupt do not count.
_SAMPLE_SECONDS = 2e-3
_MIN_ROUNDS = 5
_MAX_ROUNDS = 400


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median, 20 and 80 % quantiles, and the number of samples."""

    median: float
    low: float
    high: float
    samples: int


def interleave(
    contenders: Mapping[str, Callable[[], object]], seconds: float, now: Callable[[], float] = time.perf_counter
) -> dict[str, Timing]:
    """Time contenders in turn, A B A B ..., so that a slow minute of the machine slows all of them alike.

    Args:
        contenders: functions by name.
        seconds: time to spend on all of them together; each gets at least five samples.
        now: the clock. `time.thread_time` is the processor time of the calling thread, for machines that others use.
    """
    calls = {name: _calls_per_sample(function) for name, function in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        for done in range(_MAX_ROUNDS):
            if done >= _MIN_ROUNDS and time.perf_counter() > end:
                break
            for name, function in contenders.items():
                began = now()
                for _ in range(calls[name]):
                    function()
                samples[name].append((now() - began) / calls[name])
    finally:
        if enabled:
            gc.enable()
    return {name: _timing(found) for name, found in samples.items()}


def _calls_per_sample(function: Callable[[], object]) -> int:
    """Warm up, and count the calls that fill a sample."""
    fastest = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        function()
        fastest = min(fastest, time.perf_counter() - began)
    return max(1, round(_SAMPLE_SECONDS / fastest))


def _timing(samples: list[float]) -> Timing:
    low, median, high = np.quantile(samples, (0.2, 0.5, 0.8))
    return Timing(float(median), float(low), float(high), len(samples))

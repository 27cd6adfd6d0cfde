"""Timing of contenders against each other: interleaved repeats in one process, medians and quantiles."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

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


Call = Callable[[], object]
Stopwatch = Callable[[Call, int], float]  # seconds that so many calls take


def by(now: Callable[[], float] = time.perf_counter) -> Stopwatch:
    """A stopwatch for calls that have finished when they return.

    Args:
        now: the clock. `time.thread_time` is the processor time of the calling thread, for machines that others use.
    """

    def measure(function: Call, calls: int) -> float:
        began = now()
        for _ in range(calls):
            function()
        return now() - began

    return measure


def between_events(function: Call, calls: int) -> float:
    """A stopwatch for calls that leave work on the current CUDA stream: from the first launch to the last result."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def interleave(contenders: Mapping[str, Call], seconds: float, stopwatch: Stopwatch | None = None) -> dict[str, Timing]:
    """Time contenders in turn, A B A B ..., so that a slow minute of the machine slows all of them alike.

    Args:
        contenders: functions by name.
        seconds: time to spend on all of them together; each gets at least five samples.
        stopwatch: how a time is taken; by the wall clock if left out.
    """
    stopwatch = stopwatch or by()
    calls = {name: _calls_per_sample(function, stopwatch) for name, function in contenders.items()}
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
                samples[name].append(stopwatch(function, calls[name]) / calls[name])
    finally:
        if enabled:
            gc.enable()
    return {name: _timing(found) for name, found in samples.items()}


def _calls_per_sample(function: Call, stopwatch: Stopwatch) -> int:
    """Warm up, and count the calls that fill a sample."""
    fastest = min(stopwatch(function, 1) for _ in range(3))
    return max(1, round(_SAMPLE_SECONDS / max(fastest, 1e-7)))


def _timing(samples: list[float]) -> Timing:
    low, median, high = np.quantile(samples, (0.2, 0.5, 0.8))
    return Timing(float(median), float(low), float(high), len(samples))


def times(timing: Timing) -> str:
    """Median and 20 to 80 % quantiles, in µs or ms."""
    scale, unit = (1e6, "µs") if timing.median < 1e-3 else (1e3, "ms")
    median, low, high = (f"{value * scale:.3g}" for value in (timing.median, timing.low, timing.high))
    return f"{median} {unit} ({low}–{high})"

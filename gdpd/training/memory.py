"""Peak memory of a stretch of a run: resident memory of the process, and that of the CUDA device if there is one."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MIB = 2.0**20


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """Fill the dictionary that it yields, when the block ends, with what the block took at most.

    `peak_memory` is the largest resident memory of the whole process (code of torch and all other libraries
    included) while the block ran. A process has one such mark for its life: on Linux it is set back first; elsewhere
    it counts only if the block has raised it, and where it has not, the entry is missing rather than somebody else's.
    `peak_device_memory` is what torch had allocated on a CUDA device; missing for other devices.

    Args:
        device: where the block computes.
    """
    found: dict[str, float] = {}
    on_cuda = device.type == "cuda"
    was_reset = _reset()
    before = 0.0 if was_reset else _lifetime_peak()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    after = _marked_peak() if was_reset else _lifetime_peak()
    if after > before:
        found["peak_memory"] = after
    if on_cuda:
        found["peak_device_memory"] = torch.cuda.max_memory_allocated(device) / _MIB


def _reset() -> bool:
    """Set the process's mark back to what it holds now; False where that cannot be done."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:  # not Linux, or a container that forbids it
        return False
    return _marked_peak() > 0


def _marked_peak() -> float:
    """VmHWM of this process in MiB, 0 where there is none."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            match = re.search(r"^VmHWM:\s+(\d+) kB", file.read(), re.MULTILINE)
    except OSError:
        return 0.0
    return int(match[1]) / 1024 if match else 0.0


def _lifetime_peak() -> float:
    """Largest resident memory since the process began, in MiB; 0 where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _MIB if sys.platform == "darwin" else peak / 1024

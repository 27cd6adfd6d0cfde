"""Peak extra memory of one call, measured in a process of its own: `python -m bench.memory CASE HOW` prints bytes.

Resident memory is what counts, not what torch's allocator hands out: the native kernels have scratch of their own that
torch does not see. The process first runs the same network on a few rows, so that libraries, threads and caches are in
place, and makes the inputs; then the kernel's high-water mark is reset, and what the call adds to it is the result. One
process per contender, since memory that an allocator keeps would hide the next one's need.
"""

from __future__ import annotations

import ctypes
import gc
import re
import subprocess
import sys
from pathlib import Path

from gdpd_kernels.benchmark import cases
from gdpd_kernels.benchmark.cases import Case

_ROOT = Path(__file__).resolve().parents[1]
_WARM_ROWS = 16


def extra_memory(case: Case, how: str) -> int:
    """Bytes by which one call raises the peak of resident memory. Raises RuntimeError if the process fails."""
    command = [sys.executable, "-m", "bench.memory", case.name, how]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"memory of {case.name} by {how}: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout.split()[-1])


def measure(case: Case, how: str) -> int:
    """The same, in this process: bytes, right only for the first large call of a process."""
    warm = cases.prepare(case.with_rows(_WARM_ROWS), how)
    warm()
    call = cases.prepare(case, how)
    gc.collect()
    _give_back()
    if not _reset_peak():
        before = _max_resident()
        call()
        return _max_resident() - before
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _reset_peak() -> bool:
    """Reset the high-water mark of resident memory, where the system can do that (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(key: str) -> int:
    match = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {key}")
    return int(match[1]) * 1024


def _max_resident() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _give_back() -> None:
    """Return free memory of the C library's heap to the system, so that none of it serves the call unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    print(measure(Case.parse(sys.argv[1]), sys.argv[2]))

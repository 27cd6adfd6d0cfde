"""Every instruction set that this processor can run, each forced in a process of its own, passes the compact check."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from check_native import CHECKS
from gdpd_kernels.backends import load, native_backend

HERE = Path(__file__).parent
_MISSING = load("native").unusable()
pytestmark = pytest.mark.skipif(bool(_MISSING), reason="; ".join(_MISSING))
SETS = dict([] if _MISSING else native_backend._load().instruction_sets())  # type: ignore[union-attr]


@functools.cache
def report(isa: str) -> dict[str, str]:
    """What `check_native` finds with the instruction set forced."""
    environment = {**os.environ, "GDPD_KERNELS_ISA": isa, "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(
        [sys.executable, str(HERE / "check_native.py")],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("isa", SETS)
def test_the_instruction_set_can_be_forced(isa: str) -> None:
    found = report(isa)
    if SETS[isa]:
        assert found["instruction set"] == isa
    else:
        assert found["unusable"].startswith(f"GDPD_KERNELS_ISA={isa}: not usable on this processor")


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
@pytest.mark.parametrize("isa", SETS)
def test_the_compact_check_passes(isa: str, check: str) -> None:
    if not SETS[isa]:
        pytest.skip(f"this processor has no {isa}")
    wrong = report(isa)[check]
    assert not wrong, wrong


def test_the_baseline_runs_everywhere_and_the_fastest_is_the_default() -> None:
    usable = [isa for isa, ok in SETS.items() if ok]
    assert usable[0] == "baseline"
    if "GDPD_KERNELS_ISA" not in os.environ:
        assert native_backend.instruction_set() == usable[-1]

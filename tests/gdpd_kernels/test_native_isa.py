"""Every instruction set that this machine can run passes the whole of test_native.py, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gdpd_kernels.backends import load, native_backend

HERE = Path(__file__).parent
USABLE: list[str] = []
if not load("native").unusable():
    from gdpd_kernels import _native

    USABLE = [name for name, usable in _native.instruction_sets() if usable]


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "GDPD_KERNELS_ISA": isa},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.skipif(not USABLE, reason="the compiled module is missing")
@pytest.mark.parametrize("isa", [name for name in USABLE if name != native_backend.instruction_set()])
def test_every_usable_instruction_set_passes_the_native_tests(isa):
    told = run(isa, "-c", "from gdpd_kernels.backends.native_backend import instruction_set as i; print(i())")
    assert told.stdout.strip() == isa, told.stderr
    done = run(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_native.py"))
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout


@pytest.mark.skipif(not USABLE, reason="the compiled module is missing")
def test_an_unknown_instruction_set_is_refused_by_name():
    told = run("avx9000", "-c", "import gdpd_kernels as gk; print(gk.backends()[0])")
    assert "GDPD_KERNELS_ISA=avx9000" in told.stdout
    assert "baseline" in told.stdout

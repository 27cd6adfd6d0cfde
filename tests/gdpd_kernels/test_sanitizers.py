"""The compact check of the native kernels under the address and undefined-behaviour sanitizers, in their own build."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

from check_native import CHECKS
from gdpd_kernels.backends import load, native_backend

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMPILER = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++").split()[0]

# Runs check_native on the module at the path given first, in place of the installed one.
RUNNER = """
    import importlib.util, runpy, sys
    path = sys.argv.pop(1)
    spec = importlib.util.spec_from_file_location("gdpd_kernels._native", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["gdpd_kernels._native"] = module
"""
CHECK = "runpy.run_path('check_native.py', run_name='__main__')"
OVERRUN = "import torch; room = torch.empty(80); module.normals('', 0, 9, 9, 0, 0, room.data_ptr())"


def unavailable() -> str:
    """Why there can be no such build here, or ''."""
    if platform.system() != "Linux" or not (ROOT / "setup.py").exists():
        return "sanitizers are preloaded on Linux only, and built from a checkout"
    if not shutil.which(COMPILER) or load("native").unusable():
        return f"no compiler ({COMPILER}), or nothing that it would build runs here"
    missing = [name for name in ("libasan.so", "libubsan.so") if not library(name)]
    return f"{COMPILER} has no {', '.join(missing)}" if missing else ""


def library(name: str) -> str:
    """Path of one of the compiler's libraries, or ''."""
    asked = [COMPILER, f"-print-file-name={name}"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return found if os.path.isabs(found) and os.path.exists(found) else ""


_WHY_NOT = unavailable()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT)]


@pytest.fixture(scope="session")
def sanitized(request: pytest.FixtureRequest) -> Path:
    """The compiled module with sanitizers, for the fastest instruction set; built anew when a source has changed."""
    sources = [*sorted((ROOT / "csrc").iterdir()), ROOT / "setup.py"]
    isa = native_backend.instruction_set()
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + isa.encode()).hexdigest()[:16]
    assert request.config.cache is not None
    folder = request.config.cache.mkdir("sanitized")
    kept = folder / f"{digest}.so"
    if not kept.exists():
        for old in folder.glob("*.so"):
            old.unlink()
        work = folder / "work"
        switches = {"GDPD_KERNELS_SANITIZE": "1", "GDPD_KERNELS_BUILD": "1", "GDPD_KERNELS_ONLY": isa}
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(work), "--build-temp", str(work / "o")]
        environment = {**os.environ, **switches}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (built,) = (work / "gdpd_kernels").glob("_native*")
        os.replace(built, kept)
        shutil.rmtree(work)
    return kept


@functools.cache
def run(module: Path, then: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "GDPD_KERNELS_ISA"}
    # libstdc++ has to be there when the sanitizer looks for what throws exceptions.
    environment["LD_PRELOAD"] = " ".join(map(library, ("libasan.so", "libstdc++.so.6")))
    # Python never gives back all of its memory; what torch does with its own is its own affair.
    environment["ASAN_OPTIONS"] = "detect_leaks=0"
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(HERE)))
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RUNNER) + then, str(module)],
        cwd=HERE, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_sanitizers_find_nothing(sanitized: Path, check: str) -> None:
    done = run(sanitized, CHECK)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert not report["unusable"]
    assert not report[check], report[check]


def test_sanitizers_would_find_a_write_beyond_the_end(sanitized: Path) -> None:
    """81 numbers into room for 80."""
    done = run(sanitized, OVERRUN)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr

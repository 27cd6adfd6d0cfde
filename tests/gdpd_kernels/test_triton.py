"""The Triton kernels without a GPU: exact agreement in Triton's interpreter, in a process of its own; the choice."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gdpd_kernels import BackendError, BackendFallback
from gdpd_kernels.backends import Request, load, reasons, resolve, triton_backend
from gdpd_kernels.backends import _warn_once as warn_once
from gdpd_kernels.backends.triton.kernels import backward_source, forward_source
from gdpd_kernels.backends.triton.module import Recipe
from programs import Builder, bottleneck, mlp

HERE = Path(__file__).parent
# Read, not imported: importing the check would define kernels that cannot be interpreted any more.
_LISTING = (HERE / "check_triton.py").read_text(encoding="utf-8").partition("\nCHECKS: ")[2].partition("\n)\n")[0]
CHECKS = [line.strip(" ,") for line in _LISTING.splitlines()[1:]]


@functools.cache
def report() -> dict[str, str]:
    """What `check_triton` finds in the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(
        [sys.executable, str(HERE / "check_triton.py")],
        env=environment, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_checks_are_found_and_all_run() -> None:
    assert len(CHECKS) >= 15
    assert [*report()] == ["unusable", *CHECKS]
    assert report()["unusable"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_interpreted_kernels_pass(check: str) -> None:
    wrong = report()[check]
    assert not wrong, wrong


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.fixture
def forgetful() -> Iterator[None]:
    caches = (warn_once, resolve, triton_backend._obstacles)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def request(width: int = 8, device: str = "cuda", dtype: torch.dtype = torch.float32) -> Request:
    return Request(Builder(width).done("z"), device, dtype, dtype)


def gpu(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    """Let torch see GPUs of these compute capabilities."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])


@pytest.mark.usefixtures("forgetful")
def test_gpu_tensors_go_to_triton_where_a_gpu_can(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (8, 0), (9, 0))
    assert reasons("triton", request()) == []
    assert resolve("auto", request()) == "triton"
    assert "tensors are on cpu; it runs on cuda" in reasons("triton", request(device="cpu"))


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize(
    ("capabilities", "asked", "reason"),
    [
        ([], request(), "torch sees no GPU"),
        ([(9, 0), (7, 5)], request(), "GPU 1 is of compute capability 7.5; the oldest is 8.0; hide it"),
        ([(8, 0)], request(width=513), "the program is 513 wide; its limit is 512"),
        ([(8, 0)], request(dtype=torch.float64), "the state is torch.float64; it takes torch.float32"),
    ],
)
def test_what_triton_cannot_run_falls_back_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, capabilities: list[tuple[int, int]], asked: Request, reason: str
) -> None:
    gpu(monkeypatch, *capabilities)
    with pytest.raises(BackendError, match="backend 'triton' cannot run this call") as raised:
        resolve("triton", asked)
    assert reason in str(raised.value)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            assert resolve("auto", asked) == "reference"
            resolve.cache_clear()
    assert [warning.category for warning in told] == [BackendFallback]
    assert "running on backend 'reference'; 'triton' cannot" in str(told[0].message)
    assert reason in str(told[0].message)


@pytest.mark.usefixtures("forgetful")
def test_without_the_package_the_way_to_get_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(triton_backend.importlib.util, "find_spec", lambda name: None)
    assert reasons("triton", request()) == [
        'the package triton is missing; install it with pip install "gdpd-kernels[triton]"'
    ]


def test_importing_the_package_and_listing_backends_imports_no_triton() -> None:
    source = "import sys, gdpd_kernels as gk; gk.backends(); print('triton' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_record_names_its_limits() -> None:
    can = load("triton").CAPABILITIES
    assert (can.devices, can.dtypes, can.max_width) == (("cuda",), (torch.float32,), 512)
    assert can.compute_dtypes == (torch.bfloat16, torch.float16)


# --- the source -------------------------------------------------------------------------------------------------------


def test_what_nobody_asks_for_is_not_in_the_source() -> None:
    recipe = Recipe(mlp(8), 64, "ieee", True, alpha=True, save="inputs", wanted=frozenset({"z"}))
    source = backward_source(recipe)
    assert "linear_weight_grad" not in source.text
    assert "grad_alpha," not in source.text.partition("def backward")[2].partition("):")[2]
    assert list(source.arguments) == ["pack", "backward"]  # nothing to add up over programs
    assert source.written == {"z"}


def test_launches_of_the_fused_and_the_split_plan() -> None:
    fused = Recipe(bottleneck(32), 64, "tf32", True, save="states", wanted=frozenset({"z", "p0"}))
    assert list(forward_source(fused).arguments) == ["pack", "forward"]
    assert list(backward_source(fused).arguments) == ["pack", "backward", "reduce"]
    split = Recipe(bottleneck(32), 64, "tf32", False, save="states", wanted=frozenset({"z", "p0"}))
    assert list(forward_source(split).arguments) == ["pack", "start", *(f"forward_{s}" for s in range(8))]
    stretches = [f"backward_{s}" for s in reversed(range(8))]
    assert list(backward_source(split).arguments) == ["pack", "recompute", *stretches, "finish", "reduce"]

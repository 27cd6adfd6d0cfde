"""The choice of a backend: in order, with every reason, and told once per cause when a faster one is passed over."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator

import pytest
import torch

from gdpd_kernels import BackendError, BackendFallback, backends, ddim_table, reverse_sample
from gdpd_kernels import backends as listing
from gdpd_kernels.backends import ORDER, Capabilities, Request, load, native_backend, reasons, resolve, saved_numel
from gdpd_kernels.backends import _warn_once as warn_once
from gdpd_kernels.program import KINDS, DenoiserProgram
from modules import FEATURES, TimeMLP
from programs import Builder, every_operation, film, mlp

_MISSING = load("native").unusable()
needs_native = pytest.mark.skipif(bool(_MISSING), reason="; ".join(_MISSING))


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """Every test is told again."""
    for cached in (warn_once, resolve):
        cached.cache_clear()
    yield
    for cached in (warn_once, resolve):
        cached.cache_clear()


def request(
    program: DenoiserProgram | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compute: torch.dtype | None = None,
) -> Request:
    return Request(program or mlp(4), device, dtype, compute or dtype)


def test_every_backend_is_listed_fastest_first() -> None:
    found = listing()
    assert [entry["name"] for entry in found] == list(ORDER)
    assert found[-1] == {"name": "reference", "usable": True, "reasons": []}
    assert all(entry["usable"] is not bool(entry["reasons"]) for entry in found)
    assert listing is backends


def test_the_reference_runs_everything() -> None:
    for device in ("cpu", "cuda", "meta"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            assert reasons("reference", request(every_operation(9), device, dtype, torch.float16)) == []


def test_records_are_frozen() -> None:
    for name in ORDER:
        with pytest.raises(dataclasses.FrozenInstanceError):
            load(name).CAPABILITIES.devices = ("tpu",)  # type: ignore[misc]


@needs_native
@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (request(device="cuda"), "tensors are on cuda; it runs on cpu"),
        (request(dtype=torch.float16), "the state is torch.float16; it takes torch.float32, torch.float64"),
        (request(compute=torch.float16), "compute_dtype is torch.float16; it takes torch.bfloat16"),
        (request(Builder(20000).done("z")), "the program is 20000 wide; its limit is 16384"),
    ],
)
def test_native_says_what_it_cannot(asked: Request, reason: str) -> None:
    assert reasons("native", asked) == [reason]
    with pytest.raises(BackendError, match=r"(?s)backend 'native' cannot run this call:.*backend=\"auto\"") as raised:
        resolve("native", asked)
    assert f"\n  - {reason}\n" in str(raised.value)


@needs_native
def test_every_reason_is_given_at_once() -> None:
    asked = request(Builder(20000).done("z"), "cuda", torch.float16)
    assert len(reasons("native", asked)) == 3


def test_an_operation_that_a_backend_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = load("native")
    few = dataclasses.replace(backend.CAPABILITIES, operations=tuple(kind for kind in KINDS if kind != "gelu"))
    monkeypatch.setattr(type(backend), "CAPABILITIES", few)
    assert "it has no operation gelu" in reasons("native", request(every_operation(4)))
    assert "it has no operation gelu" not in reasons("native", request(mlp(4)))


@needs_native
def test_auto_takes_the_first_that_can() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve("auto", request()) == "native"
        assert resolve("auto", request(film(4), dtype=torch.float64)) == "native"
        assert resolve("auto", request(compute=torch.bfloat16)) == "native"
        assert resolve("reference", request()) == "reference"
        # Nobody expects a kernel of another device.
        assert resolve("auto", request(device="meta")) == "reference"


@needs_native
def test_a_fallback_is_told_once_per_cause() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            assert resolve("auto", request(dtype=torch.bfloat16)) == "reference"
            assert resolve("auto", request(film(4), dtype=torch.bfloat16)) == "reference"
            assert resolve("auto", request(Builder(20000).done("z"))) == "reference"
    assert [str(warning.message) for warning in told] == [
        "running on backend 'reference'; 'native' cannot: the state is torch.bfloat16; it takes torch.float32, "
        "torch.float64",
        "running on backend 'reference'; 'native' cannot: the program is 20000 wide; its limit is 16384",
    ]
    assert all(warning.category is BackendFallback for warning in told)


def test_where_no_backend_can_all_reasons_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    only_tpu = Capabilities(devices=("tpu",))
    for name in ORDER:
        monkeypatch.setattr(type(load(name)), "CAPABILITIES", only_tpu)
    with pytest.raises(BackendError, match="no backend can run this call") as raised:
        resolve("auto", request())
    for name in ORDER:
        assert f"  - {name}: " in str(raised.value)
    assert "tensors are on cpu; it runs on tpu" in str(raised.value)


def test_an_unknown_backend_is_named_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match="backend: 'tpu' is not known; known are 'auto', 'native', 'triton'"):
        resolve("tpu", request())


@needs_native
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 64, 65, 257, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_room_for_what_is_kept_grows_by_whole_tiles_of_rows(rows: int, dtype: torch.dtype) -> None:
    shape = load("native").saved_shape(mlp(33), dtype, 1)
    per_row, multiple, more = shape
    assert saved_numel(shape, 3, rows) == 3 * per_row * (-(-rows // multiple) * multiple) + more
    assert saved_numel(load("reference").saved_shape(mlp(33), dtype, 1), 3, rows) == 0


# --- processes that lack something ------------------------------------------------------------------------------------


def run(source: str, **environment: str) -> str:
    source = "import gdpd_kernels as gk, torch, warnings\n" + textwrap.dedent(source)
    done = subprocess.run(
        [sys.executable, "-c", source], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SAMPLE = """
    net = torch.nn.Linear(4, 4)
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
        def forward(self, z, t):
            return self.net(z)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            z = gk.reverse_sample(Net(), torch.ones(3, 4), table=gk.ddim_table(num_inference_steps=2))
    print(len(told), *{str(w.message) for w in told})
    try:
        gk.reverse_sample(Net(), torch.ones(3, 4), table=gk.ddim_table(num_inference_steps=2), backend="native")
    except gk.BackendError as error:
        print(error)
    print(gk.backends()[0]["usable"], z.isfinite().all().item())
"""


def test_without_the_compiled_module_the_reference_runs_and_says_so_once() -> None:
    printed = run("import sys; sys.modules['gdpd_kernels._native'] = None\n" + textwrap.dedent(SAMPLE))
    assert printed.startswith("1 running on backend 'reference'; 'native' cannot: the compiled module is missing (")
    assert "  - the compiled module is missing" in printed
    assert "install with a C++17 compiler at hand, GDPD_KERNELS_BUILD=1 shows what fails" in printed
    assert printed.endswith("False True\n")


@needs_native
def test_a_module_built_from_other_sources_is_not_called() -> None:
    stale = "import gdpd_kernels._native as native\nnative.INTERFACE -= 1\n"
    printed = run(stale + textwrap.dedent(SAMPLE))
    assert "these sources need" in printed
    assert "setup.py build_ext --inplace" in printed
    assert printed.endswith("False True\n")


@needs_native
def test_an_instruction_set_that_the_processor_lacks_is_refused_by_name() -> None:
    printed = run(SAMPLE, GDPD_KERNELS_ISA="avx10")
    assert "GDPD_KERNELS_ISA=avx10: not usable on this processor, which has baseline" in printed
    assert printed.endswith("False True\n")


def test_importing_the_package_loads_no_compiled_module_and_no_compiler() -> None:
    printed = run(
        "import sys; print([m for m in ('gdpd_kernels._native', 'sympy', 'torch._inductor') if m in sys.modules])"
    )
    assert printed == "[]\n"


def test_importing_the_package_adds_little_to_importing_torch() -> None:
    """Processor time, the least of three: on a busy machine others make it longer, nothing makes it shorter."""
    source = "import torch, time; began = time.process_time(); import gdpd_kernels; print(time.process_time() - began)"
    took = [
        float(subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(took) < 0.3  # seconds; 0.1 on the machine of docs/performance.md


@needs_native
def test_the_native_module_is_what_runs_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    native, calls = native_backend._load(), []

    class Spy:
        def __getattr__(self, name: str) -> object:
            calls.append(name)
            return getattr(native, name)

    monkeypatch.setattr(native_backend, "_load", lambda: Spy())
    z = torch.randn(3, FEATURES, requires_grad=True)
    reverse_sample(TimeMLP(), z, table=ddim_table(num_inference_steps=2)).sum().backward()
    assert "forward" in calls
    assert "backward" in calls

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
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gdpd_kernels import BackendError, BackendFallback
from gdpd_kernels.backends import Request, load, reasons, resolve, triton_backend
from gdpd_kernels.backends import _warn_once as warn_once
from gdpd_kernels.backends.triton import autotune, call, tiling
from gdpd_kernels.backends.triton.kernels import backward_source, forward_source
from gdpd_kernels.backends.triton.module import MEMORY, REGISTERS, SPLIT, Recipe, Source
from gdpd_kernels.ops import SAVE_STATES
from gdpd_kernels.program import DenoiserProgram
from problem import prior_problem, sample_problem
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


# --- launches ---------------------------------------------------------------------------------------------------------


class Guard:
    """Stands in for the guard of a device; knows whether it is entered, and of which tensor it is."""

    def __init__(self) -> None:
        self.inside: torch.Tensor | None = None

    def __call__(self, tensor: torch.Tensor) -> Guard:
        self.of = tensor
        return self

    def __enter__(self) -> None:
        self.inside = self.of

    def __exit__(self, *_: object) -> None:
        self.inside = None


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Names and grids of what is launched, while nothing runs; outside of the guard of z, a launch fails."""
    pytest.importorskip("triton")
    from gdpd_kernels.backends.triton import launch as launching

    guard, found = Guard(), []

    def note(source: Any, kernel: str, grid: tuple[int, ...], given: Any, rows: int, warps: int) -> None:
        assert guard.inside is not None
        assert set(source.arguments[kernel]) <= given.keys()
        found.append((kernel, grid))

    monkeypatch.setattr(launching, "on_device", guard)
    monkeypatch.setattr(launching, "launch", note)
    return found


def test_every_launch_is_under_the_guard_of_its_device(launched: list[tuple[str, tuple[int, ...]]]) -> None:
    sample_problem(mlp(9, 17), batch=40, steps=2).to(torch.float32).run("triton")
    assert launched == [
        ("pack", (3,)), ("forward", (3,)), ("pack", (3,)), ("backward", (3,)), ("reduce", (1, 7)),
    ]  # fmt: skip
    launched.clear()
    prior_problem(mlp(9, 17), batch=40).to(torch.float32).run("triton")
    assert [name for name, _ in launched] == ["pack", "prior", "reduce"]


@pytest.mark.usefixtures("forgetful")
def test_a_batch_beyond_the_tile_is_told_once_with_its_limit(launched: list[tuple[str, tuple[int, ...]]]) -> None:
    call._tell_of_split.cache_clear()
    problem = sample_problem(bottleneck(100), batch=65, steps=2).to(torch.float32)
    with pytest.warns(call.SplitPlan, match="more than 64 rows, the limit of one tile"):
        problem.run("triton")
    assert [name for name, _ in launched].count("forward_0") == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem.run("triton")
        sample_problem(bottleneck(100), batch=64, steps=2).to(torch.float32).run("triton")


def test_programs_and_rooms_of_the_split_plan(
    launched: list[tuple[str, tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gdpd_kernels.backends.triton import launch as launching

    rooms, note = set(), launching.launch

    def measure(source: Source, kernel: str, grid: tuple[int, ...], given: Any, rows: int, warps: int) -> None:
        rooms.add((given["rooms"].numel() if "rooms" in source.arguments[kernel] else 0, source.room))
        note(source, kernel, grid, given, rows, warps)

    monkeypatch.setattr(launching, "launch", measure)
    batch, tiles, programs = 4 * 32 * 32 + 1, 129, tiling.MAX_PROGRAMS  # a program takes a second tile
    problem = sample_problem(bottleneck(8, blocks=1), batch=batch, steps=1).to(torch.float32)
    problem.run("triton", save=SAVE_STATES)
    stretches = range(5)
    assert launched == [
        ("pack", (4,)), ("start", (tiles,)), *((f"forward_{s}", (programs,)) for s in stretches),
        ("pack", (4,)), ("recompute", (tiles,)), *((f"backward_{s}", (programs,)) for s in reversed(stretches)),
        ("finish", (tiles,)), ("reduce", (1, 17)),
    ]  # fmt: skip
    assert {columns > 0 for _, columns in rooms} == {True}
    assert {numel for numel, _ in rooms} == {0, *(tiles * 32 * columns for _, columns in rooms)}


@pytest.mark.parametrize(
    ("program", "total", "architecture", "expected"),
    [
        (mlp(64, 64), 1024, "cuda", (REGISTERS, 16, 4, 64)),
        (mlp(64, 64), 8192, "cuda", (REGISTERS, 32, 8, 64)),
        (mlp(512, 512), 1024, "cuda", (MEMORY, 16, 4, 32)),
        (mlp(512, 512), 8192, "hip", (MEMORY, 32, 4, 32)),
        (bottleneck(512), 3, "cuda", (MEMORY, 16, 4, 32)),
        (bottleneck(512), 64, "cuda", (MEMORY, 64, 8, 32)),
        (bottleneck(33), 64, "hip", (MEMORY, 64, 4, 32)),
        (bottleneck(32), 64, "cuda", (MEMORY, 64, 4, 16)),  # never one block alone
        (bottleneck(32), 65, "cuda", (SPLIT, 16, 4, 16)),
        (bottleneck(512), 10**6, "cuda", (SPLIT, 32, 4, 32)),
    ],
)
def test_sizes_choose_plan_and_tile(
    program: DenoiserProgram, total: int, architecture: str, expected: tuple[str, int, int, int]
) -> None:
    tile, plan = tiling.tile(program, total, "tf32", architecture)
    assert (plan, tile.rows, tile.warps, tile.chunk) == expected


def test_values_lie_in_memory_beyond_the_budget() -> None:
    # 64 registers of 256 threads hold 1024 numbers of each of 16 rows: two values of 512.
    for values, plan in ((2, REGISTERS), (3, MEMORY)):
        b, x = Builder(512), "z"
        for _ in range(values - 1):
            x = b.activation("relu", x)
        assert tiling.tile(b.done(x), 1, "tf32", "cuda")[1] == plan


def test_a_tile_is_measured_once_and_kept_in_a_file(
    launched: list[tuple[str, tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GDPD_KERNELS_CACHE", str(tmp_path / "new"))
    program = mlp(9, 17)
    name = autotune.key(program, 40, "ieee", "a GPU")
    among = autotune.candidates(program, 40, "ieee", "cuda")
    assert among[0] == tiling.tile(program, 40, "ieee", "cuda")[0]
    assert len(set(among)) == len(among) == 6

    def seconds(tile: tiling.Tile) -> float:
        if tile.rows == 64:
            raise RuntimeError("out of resource: shared memory")
        return 1.0 / (tile.rows * tile.warps)

    assert autotune.known(name) is None
    best = autotune.choose(name, among, seconds)
    assert (best.rows, best.warps) == (32, 8)
    assert autotune.known(name) == best
    assert autotune.known(autotune.key(program, 65, "ieee", "a GPU")) is None
    assert autotune.key(program, 33, "ieee", "a GPU") == name  # up to the same power of two
    autotune.choose("other", [among[0]], seconds)
    assert autotune.known(name) == best
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tiles.json"]
    with pytest.raises(RuntimeError, match="no tile can be used"):
        autotune.choose(name, [tiling.Tile(64, 4, 64)], seconds)
    (tmp_path / "new" / "tiles.json").write_text("{")
    autotune._read.cache_clear()
    assert autotune.known(name) is None


def test_a_call_takes_the_measured_tile_where_that_is_asked_for(
    launched: list[tuple[str, tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import triton.testing

    measured = []
    monkeypatch.setenv("GDPD_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    one = call.Call(mlp(9, 17), 40, 40, 2, torch.float32, torch.device("cuda"))
    one.tune(lambda: measured.append(one.tile))
    assert not measured  # off by default
    monkeypatch.setenv("GDPD_KERNELS_AUTOTUNE", "1")
    monkeypatch.setattr(triton.testing, "do_bench", lambda run, **_: (run(), abs(one.tile.rows - 32) + 1.0)[1])
    one = call.Call(mlp(9, 17), 40, 40, 2, torch.float32, torch.device("cuda"))
    one.tune(lambda: measured.append(one.tile))
    assert len(measured) == 6
    assert (one.tile.rows, one.tiles, one.arguments["tiles"]) == (32, 2, 2)
    again = call.Call(mlp(9, 17), 40, 40, 2, torch.float32, torch.device("cuda"))
    again.tune(lambda: measured.append(again.tile))
    assert len(measured) == 6
    assert again.tile == one.tile


def test_the_guard_is_that_of_the_tensor_s_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from gdpd_kernels.backends.triton.launch import on_device

    monkeypatch.setattr(torch.cuda, "device", lambda device: ("guard", device))
    assert on_device(SimpleNamespace(is_cuda=True, device="cuda:3")) == ("guard", "cuda:3")  # type: ignore[arg-type]
    with on_device(torch.zeros(1)):
        pass


def test_a_kernel_gets_its_arguments_by_name_and_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from gdpd_kernels.backends.triton import launch as launching

    got: dict[str, Any] = {}

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: got.update(grid=grid, args=args, options=options)

    monkeypatch.setattr(launching, "module", lambda text: {"k": Kernel()})
    source = Source("", {"k": ("z", "total")}, {}, frozenset(), (0, 0))
    launching.launch(source, "k", (3,), {"total": 5, "z": None, "more": 1}, 16, 4)
    assert got["grid"] == (3,)
    assert got["args"] == (None, 5)
    assert got["options"] == {"BLOCK": 16, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True, "maxnreg": 255}


def test_torch_compile_sees_shapes_and_device_without_a_gpu() -> None:
    program = mlp(9, 17)
    with FakeTensorMode():
        z = torch.empty(5, 9, device="cuda")
        tables = [torch.empty(2, width, device="cuda") for width in program.tables]
        params = [torch.empty(shape, device="cuda") for shape in program.params]
        more = program.text, [1.0, 0.5, 0.0] * 2, 3, "triton", "float32", SAVE_STATES
        z_hat, stats, saved = torch.ops.gdpd_kernels.reverse_sample(z, None, None, None, [], tables, params, *more)
        found = torch.ops.gdpd_kernels.reverse_sample_backward(
            z_hat, z, None, None, None, [], tables, params, stats, saved, *more, [0, 2]
        )
    assert (z_hat.shape, stats.shape, saved.shape) == ((15, 9), (2, 0), (2 * 15 * 9,))
    assert {x.device.type for x in (z_hat, stats, saved, *found)} == {"cuda"}
    assert [x.shape for x in found] == [z.shape, tables[0].shape]


# --- the source -------------------------------------------------------------------------------------------------------


def test_what_nobody_asks_for_is_not_in_the_source() -> None:
    recipe = Recipe(mlp(8), 64, "ieee", REGISTERS, alpha=True, save="inputs", wanted=frozenset({"z"}))
    source = backward_source(recipe)
    assert "linear_weight_grad" not in source.text
    assert "grad_alpha," not in source.text.partition("def backward")[2].partition("):")[2]
    assert list(source.arguments) == ["pack", "backward"]  # nothing to add up over programs
    assert source.written == {"z"}


def test_launches_of_the_fused_and_the_split_plan() -> None:
    for plan, program in ((MEMORY, bottleneck(32)), (REGISTERS, mlp(32)), (MEMORY, mlp(32))):
        fused = Recipe(program, 64, "tf32", plan, save="states", wanted=frozenset({"z", "p0"}))
        assert list(forward_source(fused).arguments) == ["pack", "forward"]
        assert list(backward_source(fused).arguments) == ["pack", "backward", "reduce"]
    split = Recipe(bottleneck(32), 32, "tf32", SPLIT, save="states", wanted=frozenset({"z", "p0"}))
    assert list(forward_source(split).arguments) == ["pack", "start", *(f"forward_{s}" for s in range(8))]
    stretches = [f"backward_{s}" for s in reversed(range(8))]
    assert list(backward_source(split).arguments) == ["pack", "recompute", *stretches, "finish", "reduce"]

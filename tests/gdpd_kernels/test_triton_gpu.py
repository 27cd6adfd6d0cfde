"""The Triton kernels on a GPU: `pytest -m gpu`. Where there is none these tests are skipped, and counted at the end."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import gdpd_kernels as gk
from accuracy import assert_as_accurate, assert_identical
from gdpd_kernels.backends import load
from gdpd_kernels.benchmark import report
from gdpd_kernels.benchmark.rivals import MLPDenoiser
from gdpd_kernels.ops import SAVE_NOTHING, SAVE_STATES, SAVE_VALUES
from problem import Problem, Result, prior_problem, sample_problem
from programs import FAMILIES, USUAL_EPS, bottleneck, mlp

_WHY_NOT = "" if torch.cuda.is_available() else "torch sees no GPU"
_WHY_NOT = _WHY_NOT or "; ".join(load("triton").unusable())
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT)]

FLOAT32 = torch.float32


def on_gpu(problem: Problem) -> Problem:
    moved = problem.map(lambda x: x.to("cuda", FLOAT32))
    return replace(moved, seed=problem.seed.cuda())


def run(problem: Problem, backend: str, compute_dtype: torch.dtype = FLOAT32, save: int = SAVE_VALUES) -> Result:
    return {key: x.cpu() for key, x in on_gpu(problem).run(backend, compute_dtype, save).items()}


def problems(name: str) -> list[Problem]:
    program = FAMILIES[name](100, USUAL_EPS)
    return [
        sample_problem(program, batch=37, alpha="full", eta=0.5, noise=False, samples=2),
        sample_problem(program, batch=300, steps=2, alpha="per sample"),
        prior_problem(program, batch=300, prediction="v"),
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_held_to_the_reference(name: str) -> None:
    for problem in problems(name):
        for save in (SAVE_VALUES, SAVE_STATES):
            found, plain = run(problem, "triton", save=save), run(problem, "reference")
            assert_as_accurate(found, plain, problem.run("reference"), FLOAT32)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_rounded_products_are_held_to_the_reference(precision: torch.dtype) -> None:
    for program in (mlp(100, 256), bottleneck(100)):
        problem = sample_problem(program, batch=64, alpha="full")
        found, plain = run(problem, "triton", precision), run(problem, "reference", precision)
        assert_as_accurate(found, plain, problem.run("reference"), precision)


def test_the_same_bits_again() -> None:
    split = sample_problem(bottleneck(100), batch=300, noise=False, alpha="full")
    for problem in (split, *problems("every operation")):
        first = run(problem, "triton")
        for _ in range(3):
            assert_identical(run(problem, "triton"), first)


def test_a_captured_graph_gives_the_bits_of_a_call() -> None:
    problem = replace(on_gpu(sample_problem(mlp(100, 256), batch=64, alpha="full")), frozen=frozenset())
    frozen = replace(problem, frozen=frozenset(name for name, _ in problem.named()))
    expected = frozen.run("triton", save=SAVE_NOTHING)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        frozen.run("triton", save=SAVE_NOTHING)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = frozen.run("triton", save=SAVE_NOTHING)
    found["z_hat"].fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert_identical(found, expected)


def test_the_current_stream_is_used() -> None:
    problem = on_gpu(sample_problem(mlp(100, 256), batch=64, alpha="full"))
    expected = problem.run("triton")
    side = torch.cuda.Stream()
    z = torch.full_like(problem.z, torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # whoever reads z from another stream sees NaN
        z.copy_(problem.z)
        found = replace(problem, z=z).run("triton")
    side.synchronize()
    assert_identical(found, expected)


def test_reduce_overhead_gives_the_gradients_of_eager() -> None:
    torch.manual_seed(0)
    denoiser = MLPDenoiser(32, (64, 64)).cuda()
    table = gk.ddim_table(num_inference_steps=4)
    z, noise = torch.randn(16, 32, device="cuda"), torch.randn(16, 32, device="cuda")

    def loss(z: torch.Tensor) -> torch.Tensor:
        return gk.reverse_sample(denoiser, z, table=table, alpha=0.5, noise=noise, backend="triton").square().sum()

    compiled, found = torch.compile(loss, mode="reduce-overhead"), []
    for run in (loss, compiled, compiled, compiled):
        denoiser.zero_grad()
        run(z).backward()
        found.append({name: p.grad.clone() for name, p in denoiser.named_parameters()})
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-5, atol=1e-6)


def test_the_benchmark_times_what_passed_its_check() -> None:
    hows = ["eager", "graphed", "triton"]
    record = report.bench("cuda", ["mlp-64x32-2-trainable", "paper-64x32-2-trainable"], hows, 0.1)
    for case in record["cases"]:
        assert all("time" in case["results"][how] for how in hows), report.table(record)


def test_the_device_of_the_tensors_is_used_and_the_current_one_kept() -> None:
    last = torch.cuda.device_count() - 1
    problem = sample_problem(mlp(16), batch=5)
    expected = run(problem, "triton")
    moved = replace(problem.map(lambda x: x.to(f"cuda:{last}", FLOAT32)), seed=problem.seed.to(f"cuda:{last}"))
    found = moved.run("triton")
    assert found["z_hat"].device.index == last
    assert torch.cuda.current_device() == 0
    assert_identical({key: x.cpu() for key, x in found.items()}, expected)

"""Threads: the same bits for any number of them, torch's own team and no other, calls from several at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accuracy import assert_identical
from gdpd_kernels.backends import load, native_backend
from gdpd_kernels.ops import SAVE_STATES, SAVE_VALUES
from problem import Problem, Result, prior_problem, problems, sample_problem
from programs import bottleneck, every_operation, families, mlp

pytestmark = pytest.mark.skipif(bool(load("native").unusable()), reason="; ".join(load("native").unusable()))

COUNTS = (1, 2, 3, 8)
TASKS = Path("/proc/self/task")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads, however little there is to do."""
    before, torch_before = native_backend._MACS_PER_THREAD, torch.get_num_threads()
    native_backend._MACS_PER_THREAD = 1
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(torch_before)
        native_backend._MACS_PER_THREAD = before


def run_with(count: int, problem: Problem, save: int = SAVE_VALUES) -> Result:
    with threads(count):
        return problem.run("native", save=save)


@settings(derandomize=True, deadline=None, max_examples=15, database=None)
@given(
    problems(lambda eps: families((1, 2, 31, 33, 100), eps), batches=(1, 2, 33, 100, 257, 600)),
    st.sampled_from([SAVE_VALUES, SAVE_STATES]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_any_number_of_threads_gives_the_same_bits(problem: Problem, save: int, dtype: torch.dtype) -> None:
    problem = problem.to(dtype)
    expected = run_with(1, problem, save)
    for count in COUNTS[1:]:
        assert_identical(run_with(count, problem, save), expected)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_large_batches_too(compute: torch.dtype) -> None:
    for problem in (
        sample_problem(bottleneck(100), batch=1500, alpha="full", eta=0.4, noise=False),
        sample_problem(every_operation(33), batch=700, samples=3, alpha="per feature", noise=False),
        prior_problem(bottleneck(100), batch=1500, noise=False),
    ):
        rounded, results = problem.to(torch.float32), []
        for count in COUNTS:
            with threads(count):
                results.append(rounded.run("native", compute))
        for result in results[1:]:
            assert_identical(result, results[0])


def spied_threads(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> list[int]:
    """Numbers of threads that the compiled module was asked for."""
    native, asked = native_backend._load(), []
    position = {"forward": -4, "backward": -9, "prior_loss": -7}

    class Spy:
        def __getattr__(self, name: str) -> object:
            found = getattr(native, name)
            if name not in position:
                return found

            def call(*arguments: object) -> object:
                asked.append(arguments[position[name]])
                return found(*arguments)

            return call

    with monkeypatch.context() as patched:
        patched.setattr(native_backend, "_load", lambda: Spy())
        run()
    return asked  # type: ignore[return-value]


def test_as_many_threads_as_torch_says_where_there_is_work_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = sample_problem(mlp(100, 256), batch=256), sample_problem(mlp(5), batch=1)
    for count in COUNTS:
        torch.set_num_threads(count)
        assert spied_threads(monkeypatch, lambda: large.run("native")) == [count, count]
        assert spied_threads(monkeypatch, lambda: prior_problem(mlp(100, 256), batch=256).run("native")) == [count]
        assert spied_threads(monkeypatch, lambda: small.run("native")) == [1, 1]


@pytest.mark.skipif("OpenMP" not in torch.__config__.parallel_info(), reason="torch does not use OpenMP here")
def test_torchs_own_openmp_runtime_is_used() -> None:
    native = native_backend._load()
    assert native.uses_openmp()  # type: ignore[union-attr]
    libraries = native_backend._openmp_libraries()
    assert libraries
    assert libraries[0].startswith(str(Path(torch.__file__).parent)) or "site-packages" not in libraries[0]


@pytest.mark.skipif(not TASKS.exists(), reason="threads of a process are listed on Linux only")
@pytest.mark.parametrize("count", [2, 3])
def test_no_threads_beside_torchs_own(count: int) -> None:
    """Alternating torch's products and ours leaves no thread that was not there after torch's alone."""
    problem, x = sample_problem(mlp(100, 256), batch=256).to(torch.float32), torch.randn(400, 400)
    with threads(count):
        (x @ x).relu().sum()
        before = set(os.listdir(TASKS))
        for _ in range(5):
            (x @ x).relu().sum()
            problem.run("native")
        # Fewer there may be: a team that was larger once is sent home.
        assert set(os.listdir(TASKS)) <= before


@pytest.mark.skipif(not TASKS.exists(), reason="threads of a process are listed on Linux only")
def test_without_openmp_threads_of_our_own_end_with_the_call() -> None:
    native = native_backend._load()
    problem = sample_problem(bottleneck(33), batch=600, alpha="full").to(torch.float32)
    expected = run_with(2, problem)
    before = set(os.listdir(TASKS))
    try:
        native.use_openmp(0, 0, 0)  # type: ignore[union-attr]
        assert not native.uses_openmp()  # type: ignore[union-attr]
        for count in COUNTS:
            assert_identical(run_with(count, problem), expected)
    finally:
        native_backend._share_openmp(native)  # type: ignore[arg-type]
    assert native.uses_openmp()  # type: ignore[union-attr]
    assert set(os.listdir(TASKS)) <= before


def test_calls_from_several_threads_at_once() -> None:
    cases = [
        sample_problem(bottleneck(33), batch=100, alpha="full"),
        sample_problem(mlp(100, 100), batch=300, eta=0.5, noise=False),
        prior_problem(every_operation(33), batch=100),
        sample_problem(every_operation(5), batch=2, samples=2),
    ]
    expected = [case.run("native") for case in cases]
    with threads(2), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: cases[i % 4].run("native"), range(32)))
    for i, result in enumerate(found):
        assert_identical(result, expected[i % 4])

"""`lstm` on the native kernels against torch.nn.LSTM in float64: values and gradients, every option, random sizes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accuracy import assert_as_accurate, assert_exact, assert_identical
from gdpd_kernels.backends import native_backend, native_lstm
from lstm_problem import MISSING, LstmProblem, Threads, lstm_problem, lstm_problems

pytestmark = pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING))


@st.composite
def drawn(draw: st.DrawFn) -> LstmProblem:
    return lstm_problem(
        draw(st.sampled_from((1, 2, 3, 8, 31, 65))),
        draw(st.sampled_from((1, 2, 5, 17, 40))),
        draw(st.sampled_from((1, 2, 3, 17, 33))),
        draw(st.sampled_from((1, 2, 5, 16, 17, 33, 100))),
        draw(st.integers(1, 3)),
        bias=draw(st.booleans()),
        state=draw(st.booleans()),
        ragged=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        last=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


def hold_to_torch(problem: LstmProblem, compare_bf16: bool = False) -> None:
    exact, rounded = problem.run_torch(), problem.to(torch.float32)
    assert_exact(problem.run(), exact)
    assert_as_accurate(rounded.run(), rounded.run_torch(), exact, torch.float32)
    if compare_bf16:
        plain = rounded.run("reference", torch.bfloat16)
        assert_as_accurate(rounded.run("native", torch.bfloat16), plain, exact, torch.bfloat16)


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(drawn())
def test_values_and_gradients_are_those_of_torch_in_float64(problem: LstmProblem) -> None:
    hold_to_torch(problem)


@pytest.mark.parametrize("hidden", [1, 3, 15, 64, 128, 257, 512])
def test_widths(hidden: int) -> None:
    hold_to_torch(lstm_problem(5, 4, hidden, hidden, 2, state=True, ragged=True), compare_bf16=hidden > 3)


@pytest.mark.parametrize("steps", [1, 2, 255, 2000])
def test_lengths(steps: int) -> None:
    hold_to_torch(lstm_problem(2, steps, 2, 9, 2, ragged=True, last=steps == 255))


@pytest.mark.parametrize("batch", [1, 16, 64, 513, 1100])
def test_batches_of_one_block_of_rows_and_of_several(batch: int) -> None:
    hold_to_torch(lstm_problem(batch, 6, 1, 20, 3, ragged=batch != 64), compare_bf16=True)


def test_the_paper_s_network() -> None:
    hold_to_torch(lstm_problem(64, 30, 1, 100, 3, last=True), compare_bf16=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_number_is_written_and_no_other(dtype: torch.dtype) -> None:
    for problem in lstm_problems():
        case = problem.to(dtype)
        for compute in (None, torch.bfloat16):
            assert_identical(case.run_between_guards(compute), case.run("native", compute))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dropped_units_are_those_of_the_reference(dtype: torch.dtype) -> None:
    for problem in (
        lstm_problem(5, 8, 3, 18, 3, dropout=0.4, state=True, ragged=True),
        lstm_problem(70, 3, 3, 70, 2, dropout=0.9, batch_first=False),
        lstm_problem(3, 3, 3, 4, 2, dropout=1.0),
    ):
        exact, case = problem.run("reference"), problem.to(dtype)
        if dtype == torch.float64:
            assert_exact(case.run(), exact)
        else:
            assert_as_accurate(case.run(), case.run("reference"), exact, torch.float32)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    cases = [*lstm_problems(), lstm_problem(1, 40, 1, 20, 3), lstm_problem(130, 5, 2, 40, 2, state=True)]
    for problem in cases:
        for compute in (None, torch.bfloat16):
            case, results = problem.to(torch.float32), []
            for count in (1, 2, 3, 8):
                with Threads(count):
                    results += [case.run("native", compute), case.run("native", compute)]
            for result in results[1:]:
                assert_identical(result, results[0])


def test_threads_of_our_own_where_there_is_no_openmp_to_share() -> None:
    native, case = native_backend._load(), lstm_problem(33, 7, 2, 20, 2).to(torch.float32)
    expected = case.run()
    try:
        native.use_openmp(0, 0, 0)  # type: ignore[union-attr]
        with Threads(3):
            assert_identical(case.run(), expected)
    finally:
        native_backend._share_openmp(native)  # type: ignore[arg-type]


def test_calls_from_several_threads_at_once() -> None:
    cases = [case.to(torch.float32) for case in lstm_problems()]
    expected = [case.run() for case in cases]
    with Threads(2), ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda i: cases[i % len(cases)].run(), range(3 * len(cases))))
    for i, result in enumerate(found):
        assert_identical(result, expected[i % len(cases)])


@pytest.mark.parametrize("asked", [{"x"}, {"p0"}, {"p5"}, {"p8", "p9"}, {"h0"}, {"c0"}, {"p2", "p3"}, {"x", "p11"}])
def test_gradients_nobody_asks_for_change_no_other(asked: set[str]) -> None:
    for dropout in (0.0, 0.5):
        problem = lstm_problem(9, 13, 3, 20, 3, state=True, ragged=True, dropout=dropout).to(torch.float32)
        whole = problem.run()
        part = replace(problem, frozen=frozenset(problem.leaves()) - asked).run()
        assert set(part) == {"output", "h_n", "c_n", *(f"grad {name}" for name in asked)}
        assert_identical(part, {key: whole[key] for key in part})


def test_rows_do_not_touch_each_other() -> None:
    """A NaN stays in its row; what lies past a row's end is not read."""
    problem = lstm_problem(5, 12, 2, 9, 2, ragged=True).to(torch.float32)
    x = problem.x.clone()
    assert problem.lengths is not None
    for row, length in enumerate(problem.lengths.tolist()):
        x[row, length:] = torch.nan
    clean = problem.run()
    padded = replace(problem, x=x).run()
    assert_identical(padded, clean)
    x = problem.x.clone()
    x[2, 0] = torch.nan
    spoilt = replace(problem, x=x).run()
    others = torch.arange(5) != 2
    assert spoilt["h_n"][:, 2].isnan().all()
    assert spoilt["grad x"][2, 0].isnan().all()
    for key in ("output", "grad x"):
        assert torch.equal(spoilt[key][others], clean[key][others])
    assert spoilt["grad p0"].isnan().all()


def test_subnormals_are_zero_inside_and_left_alone_outside() -> None:
    problem = lstm_problem(2, 400, 1, 20, 2, last=True).to(torch.float32)
    problem = replace(problem, grad_h=torch.zeros_like(problem.grad_h), grad_c=torch.zeros_like(problem.grad_c))
    tiny = torch.finfo(torch.float32).tiny
    for count in (1, 2):
        with Threads(count):
            grad = problem.run()["grad x"].abs()
        assert ((grad == 0) | (grad >= tiny)).all()
        assert (grad[:, 0] == 0).all()
        assert grad[:, -1].min() > 0
        subnormal = torch.full((1 << 18,), 700_000, dtype=torch.int32).view(torch.float32)
        torch.set_num_threads(2)
        assert (subnormal * 1.0).view(torch.int32).count_nonzero() == 1 << 18
        torch.set_num_threads(1)


@pytest.mark.parametrize("ragged", [False, True])
def test_steps_that_no_gradient_reaches_are_skipped_without_a_trace(ragged: bool) -> None:
    """Gradients of the last output alone: in float32 they end some 250 steps before it."""
    problem = lstm_problem(18, 600, 1, 12, 2, last=True, ragged=ragged)
    problem = replace(problem, grad_h=torch.zeros_like(problem.grad_h), grad_c=torch.zeros_like(problem.grad_c))
    case = problem.to(torch.float32)
    results = []
    for count in (1, 2, 8):
        with Threads(count):
            results.append(case.run("native"))
    assert_identical(results[1], results[0])
    assert_identical(results[2], results[0])
    assert_as_accurate(results[0], case.run_torch(), problem.run_torch(), torch.float32)
    assert (results[0]["grad x"][0, :200] == 0).all() or ragged


def test_the_last_output_alone_is_that_of_all() -> None:
    problem = lstm_problem(7, 9, 3, 17, 2, ragged=True)
    rows = torch.arange(7)
    assert problem.lengths is not None
    assert torch.equal(
        replace(problem, last=True, grad_output=problem.grad_h[-1]).run()["output"],
        problem.run()["output"][rows, problem.lengths - 1],
    )


def test_memory_of_gone_graphs_is_used_again_up_to_a_limit() -> None:
    native, case = native_backend._load(), lstm_problem(64, 20, 1, 100, 1).to(torch.float32)
    native.release_waiting()  # type: ignore[union-attr]
    case.run()
    kept = native_lstm.saved_numel(64, 20, 100) * 4
    case.run()
    assert kept <= native.release_waiting() < 2 * kept  # type: ignore[union-attr]
    assert native.release_waiting() == 0  # type: ignore[union-attr]


def test_saved_rows_are_as_long_as_the_module_says() -> None:
    for hidden in (1, 3, 16, 100, 257):
        assert native_lstm.saved_numel(2, 3, hidden) == 6 * native_backend._load().lstm_saved_row(hidden)  # type: ignore[union-attr]

"""A compact check of the native kernels, run as a program: once per instruction set, and once under sanitizers.

Prints one JSON object: the instruction set, and of every check "" or what went wrong. It needs no pytest, so that it
also runs where a preloaded library makes everything slow.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from accuracy import assert_as_accurate, assert_exact, assert_identical
from gdpd_kernels import philox_normal
from gdpd_kernels.backends import load, native_backend
from gdpd_kernels.ops import SAVE_NOTHING, SAVE_STATES, SAVE_VALUES, SAVE_VALUES_FOR_INPUTS
from guarded import run_between_guards
from lstm_problem import Threads, lstm_problems
from problem import Problem, prior_problem, sample_problem
from programs import (
    NARROW_EPS,
    WIRED,
    bottleneck,
    every_operation,
    film,
    gendd_head,
    mlp,
    normed,
    random_program,
    wired,
)


def problems() -> Iterator[Problem]:
    """Some of everything; batches of one row, of less and of more than a tile, and of several groups of tiles."""
    yield sample_problem(bottleneck(100), batch=64, steps=5, alpha="per sample", noise=False)
    yield sample_problem(every_operation(33), batch=37, samples=2, alpha="full")
    yield sample_problem(gendd_head(31), batch=1, alpha="number", eta=0.5, noise=False)
    yield sample_problem(film(33), batch=257, steps=2, alpha="per feature")
    yield sample_problem(mlp(17, 70, "gelu"), batch=100, eta=0.7)
    yield sample_problem(normed(257), batch=5, steps=2)
    yield sample_problem(normed(1, "rms_norm", eps=NARROW_EPS), batch=2)
    yield sample_problem(bottleneck(8, norm="batch_norm_eval"), batch=1100, steps=2)
    yield prior_problem(bottleneck(33), batch=100, noise=False)
    yield prior_problem(every_operation(5), batch=31, prediction="v")
    yield prior_problem(gendd_head(9), batch=2, prediction="x0")


def float64() -> None:
    for problem in problems():
        assert_exact(problem.run("native"), problem.run("reference"))


def float32() -> None:
    for problem in problems():
        rounded, exact = problem.to(torch.float32), problem.run("reference")
        assert_as_accurate(rounded.run("native"), rounded.run("reference"), exact, torch.float32)


def bfloat16() -> None:
    for problem in problems():
        if problem.z.shape[0] < 30:
            continue
        rounded, exact = problem.to(torch.float32), problem.run("reference")
        plain = rounded.run("reference", torch.bfloat16)
        found = rounded.run("native", torch.bfloat16)
        assert_as_accurate(found, plain, exact, torch.bfloat16)


def wiring() -> None:
    for program in (*map(wired, WIRED), *map(random_program, range(40))):
        for problem in (
            sample_problem(program, batch=5, alpha="full"),
            sample_problem(program, batch=33, steps=1, samples=2),
            prior_problem(program, batch=33, prediction="v"),
        ):
            assert_exact(problem.run("native"), problem.run("reference"))


def kept() -> None:
    for problem in problems():
        frozen = frozenset(name for name, _ in problem.named() if name.startswith("p"))
        for case, other in ((problem, SAVE_VALUES), (replace(problem, frozen=frozen), SAVE_VALUES_FOR_INPUTS)):
            case = case.to(torch.float32)
            assert_identical(case.run("native", save=SAVE_STATES), case.run("native", save=other))


def memory() -> None:
    for problem in problems():
        for save in (SAVE_NOTHING, SAVE_VALUES, SAVE_STATES):
            for precision in (torch.float64, torch.float32, torch.bfloat16):
                case = problem if precision == torch.float64 else problem.to(torch.float32)
                expected = case.run("native", precision)
                found = run_between_guards(case, save, precision)
                assert_identical(found, {key: expected[key] for key in found})


def threads() -> None:
    native_backend._MACS_PER_THREAD = 1
    before = torch.get_num_threads()
    for problem in problems():
        results = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(problem.to(torch.float32).run("native"))
        torch.set_num_threads(before)
        for result in results[1:]:
            assert_identical(result, results[0])


def noise() -> None:
    native = native_backend._load()
    for rows, cols in ((1, 1), (33, 31), (7, 130)):
        found = torch.full((rows, cols), torch.nan)
        native.normals(native_backend.instruction_set(), 2**63 + 5, rows, cols, 7, 3, found.data_ptr())  # type: ignore[union-attr]
        exact = philox_normal(2**63 + 5, rows, cols, 7, 3, dtype=torch.float64)
        plain = philox_normal(2**63 + 5, rows, cols, 7, 3)
        assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max() + 2e-6


def nan() -> None:
    for program in (mlp(9, activation="relu"), mlp(9, activation="gelu"), normed(9), gendd_head(9)):
        problem = sample_problem(program, batch=37).to(torch.float32)
        problem.z[17, 3] = torch.nan
        z_hat = problem.run("native")["z_hat"]
        assert z_hat[17].isnan().any()
        assert z_hat[torch.arange(37) != 17].isfinite().all()


def lstm_values() -> None:
    for problem in lstm_problems():
        rounded, exact = problem.to(torch.float32), problem.run("reference")
        assert_exact(problem.run("native"), exact)
        assert_as_accurate(rounded.run("native"), rounded.run("reference"), exact, torch.float32)
        plain = rounded.run("reference", torch.bfloat16)
        assert_as_accurate(rounded.run("native", torch.bfloat16), plain, exact, torch.bfloat16)


def lstm_memory() -> None:
    for problem in lstm_problems():
        for precision in (torch.float64, torch.float32, torch.bfloat16):
            case = problem if precision == torch.float64 else problem.to(torch.float32)
            assert_identical(case.run_between_guards(precision), case.run("native", precision))


def lstm_threads() -> None:
    for problem in lstm_problems():
        case, results = problem.to(torch.float32), []
        for count in (1, 2, 3, 8):
            with Threads(count):
                results.append(case.run("native"))
        for result in results[1:]:
            assert_identical(result, results[0])


CHECKS: tuple[Callable[[], None], ...] = (
    float64, float32, bfloat16, wiring, kept, memory, threads, noise, nan, lstm_values, lstm_memory, lstm_threads
)  # fmt: skip


def main(names: list[str]) -> None:
    why = load("native").unusable()
    report = {"unusable": "; ".join(why), "instruction set": native_backend.instruction_set()}
    torch.set_num_threads(1)
    for check in CHECKS:
        if why or (names and check.__name__ not in names):
            continue
        try:
            check()
            report[check.__name__] = ""
        except Exception:
            report[check.__name__] = traceback.format_exc()
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])

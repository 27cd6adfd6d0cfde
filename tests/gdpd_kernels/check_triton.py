"""A check of the Triton kernels in Triton's interpreter, run as a program with TRITON_INTERPRET=1 in its environment.

The interpreter has to be asked for before a kernel is defined, so this is a process of its own. Prints one JSON object:
of every check "" or what went wrong.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings

from accuracy import assert_as_accurate, assert_identical
from gdpd_kernels import philox_normal, philox_words
from gdpd_kernels.backends import load
from gdpd_kernels.backends.triton import tiles, tiling
from gdpd_kernels.backends.triton.module import MEMORY, REGISTERS, SPLIT
from gdpd_kernels.ops import SAVE_NOTHING, SAVE_STATES, SAVE_VALUES, SAVE_VALUES_FOR_INPUTS
from guarded import run_between_guards
from problem import Problem, prior_problem, problems, sample_problem
from programs import (
    ACTIVATIONS,
    FAMILIES,
    NARROW_EPS,
    USUAL_EPS,
    WIRED,
    Builder,
    bottleneck,
    every_operation,
    families,
    film,
    gendd_head,
    mlp,
    normed,
    random_program,
    wired,
)

FLOAT32 = torch.float32


def tiled(rows: int = 16, chunk: int = 64, plan: str = "") -> Any:
    """Another tile or plan than sizes would choose, where a program with BatchNorms can have it."""
    usual = tiling.tile

    def chosen(program: Any, total: int, precision: str, architecture: str) -> tuple[tiling.Tile, str]:
        tile, found = usual(program, total, precision, architecture)
        if not program.batch_norms:
            return tiling.Tile(rows, 4, chunk), REGISTERS if plan == SPLIT else plan or found
        if plan == SPLIT:
            return tiling.Tile(rows, 4, chunk), SPLIT
        return tiling.Tile(tile.rows, 4, chunk), found

    return mock.patch.object(tiling, "tile", chosen)


def assert_held_to_reference(problem: Problem, save: int = SAVE_VALUES, precision: torch.dtype = FLOAT32) -> None:
    rounded = problem.to(FLOAT32)
    found, plain = rounded.run("triton", precision, save=save), rounded.run("reference", precision)
    assert_as_accurate(found, plain, problem.run("reference"), precision)


def sizes() -> Iterator[Problem]:
    """Odd widths and batches, each way of mixing noise in, several samples."""
    yield sample_problem(bottleneck(33), batch=31, alpha="per sample", noise=False)
    yield sample_problem(mlp(100, 130), batch=33, steps=2, alpha="per feature", eta=0.5, noise=False)
    yield sample_problem(every_operation(31), batch=7, samples=2, alpha="full", steps=2)
    yield sample_problem(gendd_head(17, 20), batch=1, alpha="number", eta=0.7, noise=False, samples=3)
    yield sample_problem(normed(257), batch=5, steps=1)
    yield sample_problem(normed(1, "rms_norm", eps=NARROW_EPS), batch=2)
    yield sample_problem(film(31), batch=40, steps=2, alpha="per sample")
    yield prior_problem(bottleneck(33), batch=31, noise=False)
    yield prior_problem(every_operation(5), batch=33, prediction="v")
    yield prior_problem(gendd_head(9, 10), batch=2, prediction="x0")


def few() -> Iterator[Problem]:
    """A smaller some of everything, to be run again and again."""
    yield sample_problem(every_operation(9), batch=5, samples=2, alpha="full", steps=2)
    yield sample_problem(gendd_head(5, 9), batch=17, alpha="number", eta=0.7, noise=False, steps=2)
    yield sample_problem(bottleneck(9, blocks=1), batch=9, steps=2, alpha="per feature")
    yield sample_problem(mlp(17, 70), batch=3, alpha="per sample", steps=2)
    yield prior_problem(film(5), batch=7, noise=False)
    yield prior_problem(gendd_head(5, 9), batch=17, prediction="v")


def every_family() -> None:
    for name, make in FAMILIES.items():
        assert_held_to_reference(sample_problem(make(17, USUAL_EPS), batch=9, steps=2, alpha="full"), SAVE_STATES)
        prediction = "v" if "mlp" in name else "x0"
        assert_held_to_reference(prior_problem(make(9, NARROW_EPS), batch=19, prediction=prediction))


def odd_sizes() -> None:
    for problem in sizes():
        assert_held_to_reference(problem)


def wiring() -> None:
    for program in map(wired, WIRED):
        assert_held_to_reference(sample_problem(program, batch=5, steps=2, alpha="full"))
        assert_held_to_reference(prior_problem(program, batch=17, prediction="v"))


@settings(derandomize=True, deadline=None, max_examples=4, database=None)
@given(problems(lambda eps: families((1, 2, 17), eps), batches=(1, 2, 17)))
def anything(problem: Problem) -> None:
    assert_held_to_reference(problem)


def random_programs() -> None:
    for seed in range(14):
        problem = sample_problem(random_program(seed), batch=5, steps=2, alpha="full", noise=False, eta=0.5)
        assert_held_to_reference(problem, (SAVE_VALUES, SAVE_STATES)[seed % 2])


def several_pieces() -> None:
    with tiled(chunk=16):
        for program in (every_operation(33), gendd_head(18, 17), normed(18), film(18)):
            assert_held_to_reference(sample_problem(program, batch=9, steps=2, alpha="full"))
            assert_held_to_reference(prior_problem(program, batch=9))
        for name in ("overlapping slices", "concat of one thing twice", "one weight twice"):
            assert_held_to_reference(sample_problem(wired(name, 37), batch=5, steps=2))


def programs_with_several_tiles() -> None:
    for plan in (REGISTERS, MEMORY):
        most = {"MAX_PROGRAMS": 2, "MAX_FORWARD_PROGRAMS": 2}
        with mock.patch.multiple(tiling, **most), tiled(plan=plan):
            for program in (gendd_head(9, 17), wired("one weight twice")):
                for save in (SAVE_VALUES, SAVE_STATES):
                    assert_held_to_reference(sample_problem(program, batch=50, steps=2, alpha="full"), save)
                assert_held_to_reference(prior_problem(program, batch=50, prediction="v"))


def values_in_memory() -> None:
    usual = [every_operation(33), gendd_head(18, 17), normed(18), normed(33, "rms_norm"), film(18), mlp(70)]
    for chunk, programs in ((32, usual), (16, [*map(wired, WIRED), *map(random_program, range(4))])):
        with tiled(plan=MEMORY, chunk=chunk):
            for number, program in enumerate(programs):
                problem = sample_problem(program, batch=18, steps=2, alpha="full", noise=False, eta=0.5)
                assert_held_to_reference(problem, (SAVE_VALUES, SAVE_STATES)[number % 2])
    with tiled(plan=MEMORY, chunk=16):
        for number, program in enumerate(usual):
            assert_held_to_reference(prior_problem(program, batch=9, prediction=("eps", "x0", "v")[number % 3]))


def split(programs: int = 2, together: int = 2) -> Any:
    """The split plan with several tiles per program, joined so many at a time, and several blocks per value."""
    stack = ExitStack()
    stack.enter_context(tiled(plan=SPLIT, chunk=16))
    stack.enter_context(mock.patch.object(tiling, "MAX_PROGRAMS", programs))
    stack.enter_context(mock.patch.object(tiles, "TOGETHER", tl.constexpr(together)))
    return stack


def split_plan() -> None:
    with tiled(plan=SPLIT, chunk=32), mock.patch.object(tiling, "MAX_PROGRAMS", 2):
        for program in (bottleneck(9, blocks=1), film(18)):
            for save in (SAVE_VALUES, SAVE_STATES):
                problem = sample_problem(program, batch=20, steps=2, alpha="full", noise=False, eta=0.5, samples=2)
                assert_held_to_reference(problem, save)
            for prediction in ("eps", "x0", "v"):
                assert_held_to_reference(prior_problem(program, batch=20, prediction=prediction))
        for name in (name for name in WIRED if "batch norm" in name):
            assert_held_to_reference(sample_problem(wired(name), batch=17, steps=2), SAVE_STATES)
            assert_held_to_reference(prior_problem(wired(name), batch=17))


def split_plan_in_several_blocks_and_tiles() -> None:
    # Four tiles, the last with two rows, of two programs or of three, of which two are joined, then one.
    for programs, program in ((2, every_operation(18)), (3, random_program(11)), (2, random_program(35))):
        with split(programs):
            problem = sample_problem(program, batch=25, steps=2, alpha="full", noise=False, eta=0.5, samples=2)
            assert_held_to_reference(problem, (SAVE_VALUES, SAVE_STATES)[programs % 2])
    with split(3):
        assert_held_to_reference(prior_problem(bottleneck(18, blocks=1), batch=50, prediction="v"))


def split_plan_keeps_its_bits() -> None:
    with split():
        for problem in (
            sample_problem(film(18), batch=40, steps=2, alpha="per sample"),
            prior_problem(film(18), batch=40, prediction="v"),
        ):
            names, problem = [name for name, _ in problem.named()], problem.to(FLOAT32)
            everything = problem.run("triton")
            assert_identical(problem.run("triton"), everything)
            for kept in (names[:1], names[1:3], names[-2:]):
                some = replace(problem, frozen=frozenset(names) - set(kept)).run("triton")
                assert [key for key in some if key.startswith("grad")] == [f"grad {name}" for name in kept]
                assert_identical(some, {key: everything[key] for key in some})
            if problem.signal is None:
                assert_identical(problem.run("triton", save=SAVE_STATES), everything)
                inputs = replace(problem, frozen=frozenset(name for name in names if name[0] == "p"))
                found = inputs.run("triton", save=SAVE_VALUES_FOR_INPUTS)
                assert_identical(found, {key: everything[key] for key in found})


def split_plan_of_a_large_mean() -> None:
    """Deviations are taken from means before they are squared, within a tile and between tiles."""
    program = wired("batch norm of the state")
    problem = sample_problem(program, batch=50, steps=1)
    problem = replace(problem, z=problem.z + 1e3)
    with split():
        assert_held_to_reference(problem)


def the_split_plan_is_taken_beyond_the_limit() -> None:
    program = bottleneck(100)
    limit = tiling.FUSED_BATCH_ROWS
    assert tiling.tile(program, limit, "tf32", "cuda")[1] == MEMORY
    assert tiling.tile(program, limit + 1, "tf32", "cuda")[1] == SPLIT
    assert tiling.tile(mlp(100), 10**6, "tf32", "cuda")[1] == MEMORY


def rounded_products() -> None:
    for precision in (torch.bfloat16, torch.float16):
        for program in (mlp(33), bottleneck(33, blocks=1), gendd_head(17)):
            assert_held_to_reference(sample_problem(program, batch=33, steps=2, alpha="full"), SAVE_STATES, precision)
        assert_held_to_reference(prior_problem(normed(33), batch=33), precision=precision)
        problem = sample_problem(mlp(33), batch=33).to(FLOAT32)
        assert not torch.equal(problem.run("triton", precision)["z_hat"], problem.run("triton")["z_hat"])


def recomputed_values_are_the_kept_ones() -> None:
    for problem in few():
        if problem.signal is not None:
            continue
        frozen = frozenset(name for name, _ in problem.named() if name.startswith("p"))
        for case, other in ((problem, SAVE_VALUES), (replace(problem, frozen=frozen), SAVE_VALUES_FOR_INPUTS)):
            case = case.to(FLOAT32)
            assert_identical(case.run("triton", save=SAVE_STATES), case.run("triton", save=other))


def gradients_asked_for_one_by_one() -> None:
    for problem in (
        sample_problem(every_operation(9), batch=5, alpha="per sample", steps=2),
        prior_problem(film(9), batch=5),
    ):
        names, problem = [name for name, _ in problem.named()], problem.to(FLOAT32)
        everything = problem.run("triton")
        for kept in (names[:1], names[1:3], names[-2:], [name for name in names if name[0] == "t"], []):
            some = replace(problem, frozen=frozenset(names) - set(kept)).run("triton")
            assert [key for key in some if key.startswith("grad")] == [f"grad {name}" for name in kept]
            assert_identical(some, {key: everything[key] for key in some})


def memory() -> None:
    """Every result is written, nothing else is, and what was in a buffer before does not matter."""
    for problem in few():
        problem = problem.to(FLOAT32)
        for save in (SAVE_NOTHING, SAVE_VALUES, SAVE_STATES)[: 1 if problem.signal is not None else 3]:
            found = run_between_guards(problem, save, FLOAT32, "triton")
            expected = problem.run("triton")
            assert_identical(found, {key: expected[key] for key in found})
    with split():
        for problem, saves in (
            (sample_problem(film(18), batch=40, alpha="full", steps=1), (SAVE_NOTHING, SAVE_VALUES, SAVE_STATES)),
            (prior_problem(film(18), batch=40), (SAVE_VALUES,)),
        ):
            problem = problem.to(FLOAT32)
            expected = problem.run("triton")
            for save in saves:
                found = run_between_guards(problem, save, FLOAT32, "triton")
                assert_identical(found, {key: expected[key] for key in found})


def the_same_bits_again() -> None:
    for problem in few():
        problem = problem.to(FLOAT32)
        assert_identical(problem.run("triton"), problem.run("triton"))


def nan() -> None:
    for program in (mlp(9, activation="relu"), mlp(9, activation="gelu"), normed(9), gendd_head(9)):
        problem = sample_problem(program, batch=18, steps=1).to(FLOAT32)
        problem.z[17, 3] = torch.nan
        z_hat = problem.run("triton")["z_hat"]
        assert z_hat[17].isnan().any()
        assert z_hat[:17].isfinite().all()


def activations_over_their_range() -> None:
    for kind in ACTIVATIONS:
        b = Builder(64)
        program = b.done(b.activation(kind, "z"))
        exponents = torch.linspace(-20, 18 if kind == "gelu_tanh" else 37, 640)
        z = torch.cat([torch.linspace(-12, 12, 1280), 10**exponents, -(10**exponents)]).view(-1, 64)
        problem = replace(sample_problem(program, batch=len(z), steps=1), coefficients=(0.0, 1.0, 0.0), z=z.double())
        problem = replace(problem, grad=torch.ones_like(problem.z))
        exact, found = problem.run("reference"), problem.to(FLOAT32).run("triton")
        allowed = {"z_hat": exact["z_hat"].abs().maximum(problem.z.abs().clamp_max(1)), "grad z": torch.ones(1)}
        for key, scale in allowed.items():
            error = (found[key].double() - exact[key]).abs() / scale
            limit = (32 if kind == "gelu_tanh" else 8) * torch.finfo(FLOAT32).eps
            worst = float(problem.z.flatten()[error.argmax()])
            assert error.max() <= limit, f"{kind}, {key}: {float(error.max()):.1e} at {worst}"


@triton.jit
def _words(seed, out, step, sample, ROWS: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    zero = tl.zeros([ROWS, GROUPS], tl.uint32)
    group = zero + tl.arange(0, GROUPS)[None, :].to(tl.uint32)
    row = zero + tl.arange(0, ROWS)[:, None].to(tl.uint32)
    words = tiles.philox_words(tl.load(seed), group, row, zero + step.to(tl.uint32), zero + sample.to(tl.uint32))
    at = (tl.arange(0, ROWS)[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]) * 4
    for i in tl.static_range(4):
        tl.store(out + at + i, words[i].to(tl.int64))


def philox() -> None:
    for key in (0, 2**63 + 5, 0x0123456789ABCDEF, 2**64 - 1):
        seed = torch.tensor(key - 2**64 if key >= 2**63 else key)
        for step, sample in ((0, 0), (7, 3), (2**31 - 1, 1)):
            out = torch.full((32, 8, 4), -1)
            _words[(1,)](seed, out, step, sample, ROWS=32, GROUPS=8)
            assert torch.equal(out, philox_words(key, 32, 32, step, sample))
    program = Builder(9).done("z")
    problem = sample_problem(program, batch=35, samples=2, steps=1, alpha="number", noise=False).to(FLOAT32)
    problem = replace(problem, alpha=torch.zeros(1, 1), coefficients=(1.0, 0.0, 0.0))
    found = problem.run("triton")["z_hat"].view(2, 35, 9)
    for j in range(2):
        expected = philox_normal(problem.seed, 35, 9, sample=j, dtype=torch.float64)
        assert (found[j] - expected).abs().max() < 2e-6


def bad_input() -> None:
    good = sample_problem(mlp(5), batch=4, alpha="full").to(FLOAT32)
    for change, told in (
        ({"z": good.z.double()}, "expected [4, 5], torch.float32"),
        ({"alpha": good.alpha[:2]}, "alpha has shape [2, 5]"),  # type: ignore[index]
        ({"tables": [x[:, 1:] for x in good.tables]}, "tables has shape [3, 63]"),
        ({"params": [x.double() for x in good.params]}, "params has shape"),
        ({"params": good.params[1:]}, "the program takes 0, 1 and 6"),
        ({"noise": None, "seed": None}, "seed: noise must be drawn"),
        ({"noise": None, "seed": torch.tensor(1.0)}, "expected int64 []"),
    ):
        with pytest.raises(ValueError, match=re.escape(told)):
            replace(good, **change).run("triton")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="parameter gradients are wanted"):
        good.run("triton", save=SAVE_VALUES_FOR_INPUTS)


def running_statistics() -> None:
    stats = torch.rand(3, 2 * 8)
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        means, variances = [torch.rand(3), torch.rand(5)], [torch.rand(3), torch.rand(5)]
        counters = [torch.tensor(4), torch.tensor(0)]
        load(backend).update_running_stats(means, variances, counters, stats, [3, 5], [0.1, -1.0], 9)
        assert [int(x) for x in counters] == [7, 3]
        results.append(torch.cat([*means, *variances]))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


CHECKS: tuple[Callable[[], None], ...] = (
    every_family,
    odd_sizes,
    wiring,
    anything,
    random_programs,
    several_pieces,
    programs_with_several_tiles,
    values_in_memory,
    split_plan,
    split_plan_in_several_blocks_and_tiles,
    split_plan_keeps_its_bits,
    split_plan_of_a_large_mean,
    the_split_plan_is_taken_beyond_the_limit,
    rounded_products,
    recomputed_values_are_the_kept_ones,
    gradients_asked_for_one_by_one,
    memory,
    the_same_bits_again,
    nan,
    activations_over_their_range,
    philox,
    bad_input,
    running_statistics,
)


def main(names: list[str]) -> None:
    why = load("triton").unusable()
    report = {"unusable": "; ".join(why)}
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

"""Native kernels against the float64 reference: values, batch statistics, every gradient, of every kind of program."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accuracy import assert_as_accurate, assert_exact, assert_identical
from gdpd_kernels import philox_normal
from gdpd_kernels.backends import load, native_backend
from gdpd_kernels.ops import SAVE_NOTHING, SAVE_STATES, SAVE_VALUES, SAVE_VALUES_FOR_INPUTS
from guarded import run_between_guards
from problem import ALPHAS, Problem, prior_problem, problems, sample_problem
from programs import ACTIVATIONS, WIRED, Builder, bottleneck, every_operation, families, film, mlp, programs, wired

pytestmark = pytest.mark.skipif(bool(load("native").unusable()), reason="; ".join(load("native").unusable()))

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
fixed = settings(derandomize=True, deadline=None, max_examples=40, database=None)
few = settings(fixed, max_examples=15)


def wired_problems(name: str) -> list[Problem]:
    program = wired(name)
    return [
        sample_problem(program, batch=5, steps=3, alpha="full"),
        sample_problem(program, batch=33, steps=1, samples=2),
        prior_problem(program, batch=33, prediction="v"),
    ]


def assert_held_to_reference(problem: Problem) -> None:
    exact = problem.run("reference")
    assert_exact(problem.run("native"), exact)
    rounded = problem.to(FLOAT32)
    assert_as_accurate(rounded.run("native"), rounded.run("reference"), exact, FLOAT32)


@fixed
@given(problems(lambda eps: families(eps=eps)))
def test_denoisers_of_every_family_are_held_to_the_reference(problem: Problem) -> None:
    assert_held_to_reference(problem)


@fixed
@given(problems(lambda eps: programs()))
def test_any_program_is_held_to_the_reference(problem: Problem) -> None:
    assert_held_to_reference(problem)


@pytest.mark.parametrize("name", WIRED)
def test_odd_wiring_is_held_to_the_reference(name: str) -> None:
    for problem in wired_problems(name):
        assert_held_to_reference(problem)


@few
@given(problems(lambda eps: families(sizes=(31, 33, 100)), batches=(31, 33, 100, 257)))
def test_bfloat16_products_are_held_to_the_reference(problem: Problem) -> None:
    exact, rounded = problem.run("reference"), problem.to(FLOAT32)
    plain = rounded.run("reference", BFLOAT16)
    assert_as_accurate(rounded.run("native", BFLOAT16), plain, exact, BFLOAT16)


def test_bfloat16_products_do_round() -> None:
    problem = sample_problem(mlp(33), batch=33).to(FLOAT32)
    assert not torch.equal(problem.run("native", BFLOAT16)["z_hat"], problem.run("native")["z_hat"])


def test_the_papers_network_at_its_size() -> None:
    assert_held_to_reference(sample_problem(bottleneck(100), batch=64, steps=5, alpha="per sample", noise=False))


# --- what is kept, and what is asked for ----------------------------------------------------------------------------


@few
@given(problems(lambda eps: st.one_of(families(eps=eps), programs())))
def test_recomputed_values_give_the_bits_of_kept_ones(problem: Problem) -> None:
    problem = problem.to(FLOAT32)
    assert_identical(problem.run("native", save=SAVE_STATES), problem.run("native", save=SAVE_VALUES))


@few
@given(problems(lambda eps: st.one_of(families(eps=eps), programs())))
def test_values_kept_for_inputs_alone_give_the_bits_of_all(problem: Problem) -> None:
    params = [name for name, _ in problem.named() if name.startswith("p")]
    problem = replace(problem.to(FLOAT32), frozen=frozenset(params))
    expected = problem.run("native", save=SAVE_VALUES)
    assert_identical(problem.run("native", save=SAVE_VALUES_FOR_INPUTS), expected)
    assert_identical(problem.run("native", save=SAVE_STATES), expected)


def test_values_kept_for_inputs_alone_are_fewer_and_serve_no_parameter() -> None:
    backend, problem = load("native"), sample_problem(mlp(33), batch=33)
    kept = [backend.saved_shape(problem.program, FLOAT32, save)[0] for save in range(4)]
    assert kept[SAVE_NOTHING] == 0
    assert kept[SAVE_STATES] < kept[SAVE_VALUES_FOR_INPUTS] < kept[SAVE_VALUES]
    with pytest.raises(ValueError, match="parameter gradients are wanted, but forward kept only what inputs need"):
        problem.run("native", save=SAVE_VALUES_FOR_INPUTS)


@few
@given(problems(lambda eps: st.one_of(families(eps=eps), programs())), st.randoms(use_true_random=False))
def test_gradients_do_not_depend_on_which_others_are_asked_for(problem: Problem, random: object) -> None:
    names = [name for name, _ in problem.named()]
    frozen = frozenset(random.sample(names, random.randrange(len(names) + 1)))  # type: ignore[attr-defined]
    everything, some = problem.run("native"), replace(problem, frozen=frozen).run("native")
    assert [key for key in everything if key.removeprefix("grad ") not in frozen] == list(some)
    assert_exact(some, {key: everything[key] for key in some})


# --- memory ---------------------------------------------------------------------------------------------------------


@fixed
@given(
    problems(lambda eps: st.one_of(families((1, 2, 31, 33), eps), programs()), batches=(1, 2, 15, 31, 33, 65)),
    st.sampled_from([SAVE_NOTHING, SAVE_VALUES, SAVE_STATES]),
    st.sampled_from([torch.float64, FLOAT32, BFLOAT16]),
)
def test_all_results_are_written_and_nothing_else(problem: Problem, save: int, precision: torch.dtype) -> None:
    problem = problem if precision == torch.float64 else problem.to(FLOAT32)
    found = run_between_guards(problem, save, precision)
    expected = problem.run("native", precision)
    assert_identical(found, {key: expected[key] for key in found})


def test_nothing_of_the_call_before_is_left_in_the_workspace() -> None:
    for problem in (
        sample_problem(bottleneck(33), batch=37, alpha="full"),
        sample_problem(every_operation(33), batch=37, eta=0.5, noise=False),
        prior_problem(film(33), batch=37),
    ):
        clean = problem.run("native")
        problem.map(lambda x: torch.full_like(x, torch.nan)).run("native")
        assert_identical(problem.run("native"), clean)


@few
@given(problems(lambda eps: families((5, 33), eps), batches=(3, 33)), st.integers(0, 2))
def test_tensors_of_any_layout_give_the_bits_of_dense_ones(problem: Problem, how: int) -> None:
    def rearranged(x: torch.Tensor) -> torch.Tensor:
        if how == 0:
            return x.t().contiguous().t() if x.dim() == 2 else x.repeat_interleave(2)[::2].view(x.shape)
        if how == 1:
            wide = torch.full((*x.shape[:-1], x.shape[-1] + 3) if x.dim() else (3,), torch.nan, dtype=x.dtype)
            inside = wide[..., 1 : x.shape[-1] + 1] if x.dim() else wide[1]
            return inside.copy_(x)
        return x.flip(0).contiguous().flip(0) if x.dim() else x

    assert_identical(problem.map(rearranged).run("native"), problem.run("native"))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("samples", [1, 2])
def test_expanded_inputs_and_gradients(backend: str, samples: int) -> None:
    problem = sample_problem(film(5), batch=4, alpha="full", samples=samples)
    assert problem.alpha is not None
    expanded = replace(
        problem,
        z=problem.z[:1].expand(4, -1),
        alpha=problem.alpha[:, :1].expand(-1, 5),
        grad=torch.tensor(2.0).double().expand(4 * samples, 5),
        rows=[x[:, :1].expand_as(x) for x in problem.rows],
    )
    dense = expanded.map(lambda x: x.clone(memory_format=torch.contiguous_format))
    assert_exact(expanded.run(backend), dense.run(backend))


def test_one_tensor_may_serve_as_several_inputs() -> None:
    problem = sample_problem(wired("table times row"), batch=5, steps=5)
    noise = problem.z[None]
    shared = replace(problem, noise=noise, rows=[problem.z], tables=[problem.z], grad=problem.z)
    apart = shared.map(torch.clone)
    assert_identical(shared.run("native"), apart.run("native"))


# --- not a number, and numbers at the edge --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*ACTIVATIONS, "layer_norm", "rms_norm", "batch_norm_eval", "linear"])
def test_a_nan_stays_in_its_row_and_is_not_lost(kind: str) -> None:
    b = Builder(7)
    output = b.linear("z", 7) if kind == "linear" else b.norm(kind, "z") if "norm" in kind else b.activation(kind, "z")
    problem = sample_problem(b.done(output), batch=37, steps=2)
    problem.z[17, 3] = torch.nan
    for dtype in (torch.float64, FLOAT32):
        z_hat = problem.to(dtype).run("native")["z_hat"]
        assert z_hat[17, 3].isnan()
        assert z_hat[torch.arange(37) != 17].isfinite().all()


def test_a_nan_reaches_the_whole_batch_through_batch_norm() -> None:
    problem = sample_problem(wired("batch norm of the state"), batch=37)
    problem.z[17, 3] = torch.nan
    assert problem.run("native")["z_hat"][:, 3].isnan().all()


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, FLOAT32])
def test_activations_over_their_whole_range(kind: str, dtype: torch.dtype) -> None:
    b = Builder(64)
    program = b.done(b.activation(kind, "z"))
    # From there on x² is infinite, and GELU's tanh form has no derivative in PyTorch either.
    exponents = torch.linspace(-20, 18 if kind == "gelu_tanh" else 38, 1600)
    around_zero = torch.linspace(-12, 12, 3200)
    z = torch.cat([around_zero, 10**exponents, -(10**exponents)]).view(-1, 64)
    problem = replace(sample_problem(program, batch=len(z), steps=1), coefficients=(0.0, 1.0, 0.0), z=z.double())
    problem = replace(problem, grad=torch.ones_like(problem.z))
    exact, found = problem.run("reference"), problem.to(dtype).run("native")
    # Near zero and far out relative to the number; between, where tails and slopes are differences from 1, to 1.
    allowed = {"z_hat": exact["z_hat"].abs().maximum(problem.z.abs().clamp_max(1)), "grad z": torch.ones(1)}
    for key, scale in allowed.items():
        error = (found[key].double() - exact[key]).abs() / scale
        worst = problem.z.flatten()[error.argmax()]
        limit = (32 if kind == "gelu_tanh" else 8) * torch.finfo(dtype).eps
        assert error.max() <= limit, f"{key}: {float(error.max()):.1e} at {float(worst)}"


def test_subnormal_numbers_keep_their_meaning_outside_our_calls() -> None:
    tiny = torch.full((64,), 1e-40)
    sample_problem(mlp(33), batch=300, steps=5).to(FLOAT32).run("native")
    assert (tiny * 0.5 > 0).all()


def test_padding_rows_do_not_disturb_norms_without_eps() -> None:
    b = Builder(5, eps=0.0)
    program = b.done(b.linear(b.norm("rms_norm", b.norm("layer_norm", "z")), 5))
    assert_held_to_reference(sample_problem(program, batch=3))


# --- noise and samples ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (2, 3), (33, 31), (100, 257), (5, 4)])
@pytest.mark.parametrize("seed", [0, 2**64 - 1, 0x0123456789ABCDEF])
def test_normals_are_those_of_philox(rows: int, cols: int, seed: int) -> None:
    native = native_backend._load()
    for step, sample in ((0, 0), (7, 2**32 - 1)):
        found = torch.full((rows, cols), torch.nan)
        native.normals(native_backend.instruction_set(), seed, rows, cols, step, sample, found.data_ptr())  # type: ignore[union-attr]
        exact = philox_normal(seed, rows, cols, step, sample, dtype=torch.float64)
        plain = philox_normal(seed, rows, cols, step, sample)
        # A wrong word would be off by about one.
        assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max() + 2e-6


@pytest.mark.parametrize("dtype", [torch.float64, FLOAT32])
def test_the_start_is_noise_where_alpha_is_zero(dtype: torch.dtype) -> None:
    program = Builder(9).done("z")
    problem = sample_problem(program, batch=35, samples=3, steps=1, alpha="number", noise=False).to(dtype)
    problem = replace(problem, alpha=torch.zeros(1, 1, dtype=dtype), coefficients=(1.0, 0.0, 0.0))
    found = problem.run("native")["z_hat"].view(3, 35, 9)
    for j in range(3):
        expected = philox_normal(problem.seed, 35, 9, sample=j, dtype=dtype)
        torch.testing.assert_close(found[j], expected, rtol=1e-5 if dtype == FLOAT32 else 1e-12, atol=2e-6)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_samples_are_runs_of_their_own_where_rows_are_apart(backend: str, alpha: str) -> None:
    problem = sample_problem(mlp(6), batch=5, samples=3, alpha=alpha)
    together = problem.run(backend)
    assert problem.noise is not None
    apart = [
        replace(problem, samples=1, noise=problem.noise[j : j + 1], grad=problem.grad[5 * j : 5 * j + 5]).run(backend)
        for j in range(3)
    ]
    expected = {key: sum(run[key] for run in apart) for key in apart[0] if key.startswith("grad")}
    expected["z_hat"] = torch.cat([run["z_hat"] for run in apart])
    assert_exact(together, {key: expected.get(key, x) for key, x in together.items()})


def test_the_same_call_gives_the_same_bits_again() -> None:
    for problem in (
        sample_problem(bottleneck(100), batch=257, eta=0.3, noise=False, alpha="full").to(FLOAT32),
        prior_problem(every_operation(33), batch=257, noise=False).to(FLOAT32),
    ):
        first = problem.run("native")
        for _ in range(3):
            assert_identical(problem.run("native"), first)


# --- running statistics, and calls that make no sense ---------------------------------------------------------------


@pytest.mark.parametrize("stats_dtype", [torch.float64, FLOAT32])
@pytest.mark.parametrize("dtype", [torch.float64, FLOAT32])
def test_running_statistics_as_the_reference_updates_them(dtype: torch.dtype, stats_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    widths = [3, 17, 8, 3]
    stats = torch.rand(4, 2 * sum(widths), generator=generator).to(stats_dtype)
    results = []
    for backend in ("native", "reference"):
        generator.manual_seed(1)
        means, variances = ([torch.rand(w, generator=generator).to(dtype) for w in widths] for _ in range(2))
        counters = [torch.tensor(n) for n in (5, 0, 7, 0)]
        means[1] = variances[1] = counters[1] = stats.new_empty(0)  # keeps none
        means[3], variances[3], counters[3] = means[0], variances[0], counters[0]  # is called twice
        load(backend).update_running_stats(means, variances, counters, stats, widths, [-1.0, 0.1, 0.0, -1.0], 9)
        assert [int(x) for x in counters if x.numel()] == [13, 11, 13]
        results.append(torch.cat([*means, *variances]))
    torch.testing.assert_close(*results, rtol=1e-6 if FLOAT32 in (dtype, stats_dtype) else 1e-14, atol=0)


@pytest.mark.parametrize(
    "broken",
    [
        {"means": [torch.zeros(3).bfloat16()], "variances": [torch.zeros(3).bfloat16()]},
        {"means": [torch.zeros(3).double()]},
        {"means": [torch.zeros(2)]},
        {"variances": [torch.zeros(4)]},
        {"variances": [torch.zeros(0)]},
        {"means": [torch.zeros(0)]},
        {"variances": [torch.zeros(6)[::2]]},
        {"means": [torch.zeros(3, device="meta")]},
        {"counters": [torch.tensor(0, dtype=torch.int32)]},
        {"counters": [torch.zeros(0, dtype=torch.int64)]},
    ],
)
def test_running_statistics_of_another_form_are_refused(broken: dict[str, list[torch.Tensor]]) -> None:
    arguments = {"means": [torch.zeros(3)], "variances": [torch.ones(3)], "counters": [torch.tensor(0)]} | broken
    with pytest.raises(ValueError, match=r"running statistics: expected dense tensors .* move the denoiser with"):
        load("native").update_running_stats(**arguments, stats=torch.zeros(2, 6), widths=[3], momenta=[0.1], rows=4)


def test_batch_statistics_of_another_form_are_refused() -> None:
    arguments = {"means": [torch.zeros(3)], "variances": [torch.ones(3)], "counters": [torch.tensor(0)]}
    with pytest.raises(ValueError, match=r"stats has shape \[2, 5\], .* expected \[2, 6\]"):
        load("native").update_running_stats(**arguments, stats=torch.zeros(2, 5), widths=[3], momenta=[0.1], rows=4)
    with pytest.raises(ValueError, match="do not match, or rows < 2"):
        load("native").update_running_stats(**arguments, stats=torch.zeros(2, 6), widths=[3], momenta=[0.1], rows=1)


def test_noise_without_noise_and_seed_is_refused() -> None:
    for problem in (
        sample_problem(mlp(5), alpha="number", noise=False),
        sample_problem(mlp(5), eta=0.5),
        prior_problem(mlp(5), noise=False),
    ):
        for backend in ("native", "reference"):
            with pytest.raises(ValueError, match="seed: noise must be drawn, but"):
                replace(problem, seed=None).run(backend)  # type: ignore[arg-type]


FORMS = [
    (argument, how)
    for argument in ("z", "alpha", "noise", "rows", "tables", "params", "grad", "signal", "sigma")
    for how in ("dtype", "shape")
    if (argument, how) != ("grad", "dtype")  # which autograd converts
]


@pytest.mark.parametrize(("argument", "how"), FORMS)
def test_operators_refuse_tensors_of_another_form(argument: str, how: str) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        return x.float() if how == "dtype" else torch.cat([x, x], -1)[..., :-1] if x.shape[-1] > 1 else x[:-1]

    of_prior = argument in ("signal", "sigma")
    problem = prior_problem(film(5)) if of_prior else sample_problem(film(5), alpha="full")
    whole = getattr(problem, argument)
    changed = [broken(whole[0]), *whole[1:]] if isinstance(whole, list) else broken(whole)
    with pytest.raises((ValueError, RuntimeError), match=r"expected|Mismatch in shape|must match"):
        replace(problem, **{argument: changed}).run("native")


@pytest.mark.parametrize(
    ("lists", "message"),
    [("rows", "rows: 1 .*takes 2"), ("tables", "tables: 1 .*takes 2"), ("params", "params: 5 .*takes 6")],
)
def test_operators_refuse_another_number_of_tensors(lists: str, message: str) -> None:
    problem = sample_problem(film(5))
    with pytest.raises(ValueError, match=message):
        load("native").reverse_sample(
            problem.program,
            problem.z,
            None,
            None,
            None,
            *(getattr(problem, name)[: -1 if name == lists else None] for name in ("rows", "tables", "params")),
            problem.coefficients,
            1,
            torch.float64,
            SAVE_NOTHING,
        )


def test_the_compiled_module_refuses_what_it_cannot_read() -> None:
    native = native_backend._load()
    with pytest.raises(ValueError, match="the code ends too early"):
        native.Program([5, 0, 0], [], "")  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="instruction set 'sse9' cannot run here; usable: baseline"):
        native.Program([5, 0, 0, 0, 0, 0], [], "sse9")  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="malformed"):
        native.Program([5, 0, 0, 0, 0, 7], [], "")  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="unknown operation"):
        native.Program([5, 0, 0, 0, 1, 99, 5, 1, 0, -1, -1, -1, -1, 1], [], "")  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="operand before it is made"):
        native.Program([5, 0, 0, 0, 1, 5, 5, 1, 1, -1, -1, -1, -1, 1], [], "")  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="no such parameter"):
        native.Program([5, 0, 0, 0, 1, 0, 5, 1, 0, 3, -1, -1, -1, 1], [], "")  # type: ignore[union-attr]

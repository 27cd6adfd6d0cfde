"""The operators as PyTorch sees them: opcheck, gradcheck, double backward, inputs left alone, on both backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from accuracy import assert_exact, assert_identical
from gdpd_kernels import ops
from gdpd_kernels.backends import load, native_backend
from gdpd_kernels.library import is_plain
from problem import Problem, prior_problem, sample_problem
from programs import bottleneck, film, gendd_head, mlp, normed

_MISSING = load("native").unusable()
BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(bool(_MISSING), reason="; ".join(_MISSING))),
]
on_both = pytest.mark.parametrize("backend", BACKENDS)


def columns_first(x: Tensor) -> Tensor:
    return x.t().contiguous().t() if x.dim() == 2 else x


SAMPLES = {
    "rows, tables, batch norm, J = 2": lambda: sample_problem(film(3), batch=3, steps=2, samples=2, alpha="full"),
    "eta": lambda: sample_problem(normed(3), batch=3, steps=2, alpha="per feature", noise=False, eta=0.5),
    "the state alone": lambda: sample_problem(mlp(3, 4), batch=1, steps=3),
    "columns first": lambda: sample_problem(film(3), batch=4, alpha="full").map(columns_first),
    "a number alpha": lambda: sample_problem(gendd_head(3, 4), batch=2, steps=2, alpha="number"),
}
LOSSES = {
    "eps": lambda: prior_problem(film(3), batch=4),
    "x0": lambda: prior_problem(normed(3), batch=3, prediction="x0", noise=False),
    "columns first in the loss": lambda: prior_problem(film(3), batch=4).map(columns_first),
    "v": lambda: prior_problem(gendd_head(3, 4), batch=2, prediction="v"),
}


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """torch fills what it allocates with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def arguments(problem: Problem, backend: str, save: int = ops.SAVE_VALUES) -> tuple[Any, ...]:
    """Of the operator, with leaves that ask for gradients."""
    p = problem.map(torch.clone)
    for _, x in p.named():
        x.requires_grad_()
    name = str(p.dtype).removeprefix("torch.")
    lists = p.rows, p.tables, p.params, p.program.text
    if p.signal is None:
        return p.z, p.alpha, p.noise, p.seed, *lists, list(p.coefficients), p.samples, backend, name, save
    wanted = [i for i, x in enumerate([p.z, *p.rows, *p.tables, *p.params]) if x.requires_grad]
    return p.z, p.noise, p.seed, p.signal, p.sigma, *lists, p.prediction, backend, name, wanted


def detached(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(detached, value))
    return value.detach() if isinstance(value, Tensor) else value


def operator(problem: Problem) -> Any:
    return torch.ops.gdpd_kernels.reverse_sample if problem.signal is None else torch.ops.gdpd_kernels.prior_loss


def as_function(problem: Problem, backend: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The operator as a function of everything that takes a gradient, and those tensors."""
    given = arguments(problem, backend)

    def flatten(values: tuple[Any, ...]) -> list[Any]:
        return [x for value in values for x in (value if isinstance(value, list) else [value])]

    leaves = [x for x in flatten(given) if isinstance(x, Tensor) and x.requires_grad]

    def function(*xs: Tensor) -> Tensor:
        new = iter(xs)

        def swap(value: Any) -> Any:
            if isinstance(value, list):
                return [swap(x) for x in value]
            return next(new) if isinstance(value, Tensor) and value.requires_grad else value

        return operator(problem)(*map(swap, given))[0]

    return function, leaves


@on_both
@pytest.mark.parametrize("name", [*SAMPLES, *LOSSES])
def test_opcheck(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Results are compared, also those that are only kept for backward, in which there is room that nobody uses.
    monkeypatch.setattr(Tensor, "new_empty", Tensor.new_zeros)
    monkeypatch.setattr(native_backend, "reused", lambda numel, dtype: torch.zeros(numel, dtype=dtype))
    problem = (SAMPLES | LOSSES)[name]()
    torch.library.opcheck(operator(problem), arguments(problem, backend))


@on_both
@pytest.mark.parametrize("save", [ops.SAVE_NOTHING, ops.SAVE_VALUES, ops.SAVE_STATES])
def test_opcheck_of_backward(backend: str, save: int) -> None:
    problem = sample_problem(film(3), batch=3, steps=2, samples=2, alpha="per sample")
    save = save or ops.SAVE_STATES
    given = list(detached(arguments(problem, backend, save)))
    _, stats, saved = torch.ops.gdpd_kernels.reverse_sample(*given)
    rest = (stats.detach(), saved.detach(), *given[7:])
    backward = torch.ops.gdpd_kernels.reverse_sample_backward
    torch.library.opcheck(backward, (problem.grad, *given[:7], *rest, [0, 1, 2, 4, 6]))
    torch.library.opcheck(backward, (problem.grad, *given[:7], *rest, [5]))


def test_opcheck_of_prior_loss_backward() -> None:
    given = detached(arguments(LOSSES["eps"](), "reference"))
    torch.library.opcheck(
        torch.ops.gdpd_kernels.prior_loss_backward, (torch.tensor(2.0).double(), *given[:10], *given[11:])
    )


@on_both
def test_opcheck_of_running_statistics(backend: str) -> None:
    means, variances, counters = [torch.zeros(3)], [torch.ones(3)], [torch.tensor(0)]
    torch.library.opcheck(
        torch.ops.gdpd_kernels.update_running_stats_,
        (means, variances, counters, torch.rand(2, 6), [3], [0.1], 4, backend),
    )


@on_both
@pytest.mark.parametrize("name", [*SAMPLES, *LOSSES])
def test_gradcheck(name: str, backend: str) -> None:
    function, leaves = as_function((SAMPLES | LOSSES)[name](), backend)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@on_both
@pytest.mark.parametrize("name", [*SAMPLES, *LOSSES])
def test_gradgradcheck(name: str, backend: str) -> None:
    function, leaves = as_function((SAMPLES | LOSSES)[name](), backend)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@on_both
@pytest.mark.parametrize("name", [*SAMPLES, *LOSSES])
def test_gradients_with_a_graph_of_their_own_are_the_same(name: str, backend: str) -> None:
    problem = (SAMPLES | LOSSES)[name]()
    result = problem.run(backend, create_graph=True)
    assert all(x.requires_grad for key, x in result.items() if key.startswith("grad t"))
    assert_exact({key: x.detach() for key, x in result.items()}, problem.run(backend))


@on_both
@pytest.mark.parametrize("problem", [sample_problem(bottleneck(5), alpha="full"), prior_problem(film(5))])
def test_inputs_and_incoming_gradients_are_left_alone(backend: str, problem: Problem) -> None:
    versions: list[tuple[Tensor, int, Tensor]] = []
    watched = problem.map(lambda x: versions.append((x, x._version, x.clone())) or x)
    assert len(versions) > 5
    watched.run(backend)
    for x, version, before in versions:
        assert x._version == version
        assert torch.equal(x, before)


@on_both
@pytest.mark.parametrize("name", [*SAMPLES, *LOSSES])
def test_backward_may_run_twice_through_a_retained_graph(name: str, backend: str) -> None:
    function, leaves = as_function((SAMPLES | LOSSES)[name](), backend)
    value = function(*leaves)
    grad = torch.ones_like(value)
    first = torch.autograd.grad(value, leaves, grad, retain_graph=True)
    for x in first:
        x.mul_(torch.nan)  # a caller may do with its gradients what it likes
    second = torch.autograd.grad(value, leaves, grad, retain_graph=True)
    third = torch.autograd.grad(value, leaves, grad)
    for x, y in zip(second, third, strict=True):
        assert x.isfinite().all()
        assert torch.equal(x, y)


@on_both
def test_an_input_changed_between_forward_and_backward_is_noticed(backend: str) -> None:
    given = arguments(sample_problem(mlp(3)), backend)
    z_hat = operator(sample_problem(mlp(3)))(*given)[0]
    with torch.no_grad():
        given[6][0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z_hat.sum().backward()


@on_both
def test_results_that_take_no_gradient_say_so(backend: str) -> None:
    for problem in (sample_problem(film(3)), prior_problem(film(3))):
        value, stats, rest = operator(problem)(*arguments(problem, backend))
        assert value.requires_grad
        assert not stats.requires_grad
        assert not any(x.requires_grad for x in ([rest] if isinstance(rest, Tensor) else rest))


@on_both
def test_nothing_is_kept_where_nothing_asks_for_a_gradient(backend: str) -> None:
    problem = sample_problem(mlp(3))
    given = detached(arguments(problem, backend, ops.SAVE_NOTHING))
    z_hat, _, saved = operator(problem)(*given)
    assert saved.numel() == 0
    assert z_hat.grad_fn is None


@on_both
def test_noise_takes_no_gradient(backend: str) -> None:
    given = list(arguments(sample_problem(mlp(3), alpha="number"), backend))
    given[2].requires_grad_()
    z_hat = operator(sample_problem(mlp(3)))(*given)[0]
    with pytest.raises(RuntimeError, match=r"noise: no gradient is computed for it; pass noise\.detach\(\)"):
        z_hat.sum().backward()


@on_both
def test_the_short_way_to_the_operators_gives_what_the_dispatcher_gives(backend: str) -> None:
    for problem in (sample_problem(film(3), alpha="full"), prior_problem(film(3))):
        given = arguments(problem, backend)
        short = (ops.reverse_sample if problem.signal is None else ops.prior_loss)(*given)
        long = operator(problem)(*given)
        leaves = [x for _, x in replace(problem).named()]
        assert len(leaves) > 5
        assert torch.equal(short[0], long[0])
        assert torch.equal(short[1], long[1])
        grads = [torch.autograd.grad(x[0], given[0], torch.ones_like(x[0]))[0] for x in (short, long)]
        assert torch.equal(*grads)
        with torch.no_grad():
            assert torch.equal(short[0], (ops.reverse_sample if problem.signal is None else ops.prior_loss)(*given)[0])


@on_both
def test_modes_and_transforms_see_the_operators(backend: str) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    problem = sample_problem(mlp(3))
    given = arguments(problem, backend)
    with Names():
        ops.reverse_sample(*given)[0].sum().backward()
    assert "gdpd_kernels.reverse_sample.default" in seen
    assert "gdpd_kernels.reverse_sample_backward.default" in seen


@on_both
def test_fake_tensors_and_the_meta_device(backend: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    problem = sample_problem(film(3), samples=2)
    with FakeTensorMode() as mode:
        fake = replace(problem.map(mode.from_tensor), seed=mode.from_tensor(problem.seed))
        z_hat, stats, _ = operator(problem)(*arguments(fake, backend))
    real = problem.run(backend)
    assert (z_hat.shape, stats.shape) == (real["z_hat"].shape, real["stats"].shape)


@on_both
def test_uninitialised_memory_is_never_read(backend: str, nan_in_new_memory: None) -> None:
    problems = [sample_problem(bottleneck(33), batch=37, alpha="full"), prior_problem(film(33), batch=37)]
    found = [problem.run(backend) for problem in problems]
    torch.use_deterministic_algorithms(False)
    for problem, result in zip(problems, found, strict=True):
        assert_identical(problem.run(backend), result)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_transform_left_behind_counts_as_the_tensor_it_wraps(backend: str) -> None:
    """A tensor that got out of torch.func.grad is a wrapper around nothing any more; autograd wants what is in it."""
    problem = sample_problem(mlp(3, 4), batch=2, steps=2)
    left: list[Tensor] = []
    torch.func.grad(lambda z: (left.append(z), z.sum())[1])(problem.z.detach())
    assert is_plain(left[0])
    assert torch._C._functorch.is_dead_tensor_wrapper(left[0])
    _, alpha, noise, seed, rows, tables, params, *constants = arguments(problem, backend)
    found = []
    for z in (problem.z.detach(), left[0]):
        z_hat, *_ = ops.reverse_sample(z, alpha, noise, seed, rows, tables, params, *constants)
        gradients = torch.autograd.grad(z_hat.sum(), params)
        found.append({"z_hat": z_hat.detach(), **{f"p{i}": g for i, g in enumerate(gradients)}})
    assert_identical(*found)


@pytest.mark.skipif(bool(_MISSING), reason="; ".join(_MISSING))
def test_lists_that_are_as_long_together_are_refused() -> None:
    problem = sample_problem(film(3), batch=3, steps=3)  # rows and tables of the same shapes
    moved = list(arguments(problem, "native"))
    moved[4], moved[5] = moved[4][1:], [moved[4][0], *moved[5]]
    with pytest.raises(ValueError, match="rows: 1 tensors; the program takes 2"):
        ops.reverse_sample(*moved)

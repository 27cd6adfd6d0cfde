"""Autocast: operands of matrix products are rounded, sums and the state stay float32, compute_dtype has precedence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accuracy import assert_as_accurate, size
from gdpd_kernels import alphas_cumprod, ddim_table, prior_loss, reverse_sample
from gdpd_kernels.backends import load
from modules import COND, FEATURES, ConditionalHead, PaperDenoiser, RawCondition, TimeMLP, eager_sample
from problem import prior_problem, sample_problem
from programs import film

_MISSING = load("native").unusable()
BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(bool(_MISSING), reason="; ".join(_MISSING))),
]
on_both = pytest.mark.parametrize("backend", BACKENDS)
BATCH, TABLE, BF16 = 33, ddim_table(num_inference_steps=3, window="lower"), torch.bfloat16


def autocast(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype=BF16, enabled=enabled)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(
    call: Callable[..., Tensor], module: nn.Module, under: bool = True, state: torch.dtype = torch.float32, **given: Any
) -> dict[str, Tensor]:
    """A value and the gradients of state and parameters, forward under autocast, backward outside, as is usual."""
    module.zero_grad()
    z = normal(BATCH, FEATURES).to(state).requires_grad_()
    with autocast(under):
        value = call(module, z, **given)
    value.backward(normal(*value.shape, seed=1).to(value.dtype))
    grads = {f"grad {name}": p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    assert z.grad is not None
    return {"value": value.detach(), "grad z": z.grad, **grads}


def make(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for key, x in expected.items():
        assert found[key].dtype == x.dtype, key
        assert torch.equal(found[key], x), key


@on_both
@pytest.mark.parametrize("kind", [TimeMLP, PaperDenoiser])
def test_the_error_is_at_most_twice_that_of_the_module_under_autocast(kind: Any, backend: str) -> None:
    module = make(kind)
    found = run(reverse_sample, module, table=TABLE, backend=backend)
    plain = run(eager_sample, copy.deepcopy(module), table=TABLE)
    twin = copy.deepcopy(module).double()
    exact = run(eager_sample, twin, under=False, state=torch.float64, table=TABLE)
    assert_as_accurate(found, {key: x.float() for key, x in plain.items()}, exact, BF16)
    assert size(found["value"] - exact["value"]) > 1e-4 * size(exact["value"]), "nothing was rounded"


@on_both
def test_autocast_is_a_compute_dtype(backend: str) -> None:
    """Of a denoiser with a learned time table, whose look-up autocast does not touch."""
    module = make(PaperDenoiser)
    found = run(reverse_sample, module, table=TABLE, backend=backend)
    assert_equal(found, run(reverse_sample, module, under=False, table=TABLE, backend=backend, compute_dtype=BF16))
    given: dict[str, Any] = {"alphas_cumprod": alphas_cumprod(), "seed": 3, "backend": backend}
    found = run(prior_loss, module, **given)
    assert_equal(found, run(prior_loss, module, under=False, compute_dtype=BF16, **given))


@on_both
def test_a_compute_dtype_has_precedence(backend: str) -> None:
    module = make(PaperDenoiser)
    found = run(reverse_sample, module, table=TABLE, backend=backend, compute_dtype=torch.float32)
    assert_equal(found, run(reverse_sample, module, under=False, table=TABLE, backend=backend))


@on_both
@pytest.mark.parametrize("kind", [TimeMLP, PaperDenoiser])
def test_values_are_float32_whatever_autocast_made_of_the_time_table(kind: Any, backend: str) -> None:
    found = run(reverse_sample, make(kind), table=TABLE, backend=backend)
    assert all(x.dtype == torch.float32 for x in found.values())
    exact = run(reverse_sample, make(kind), under=False, table=TABLE, backend=backend)
    for key, x in exact.items():
        assert size(found[key] - x) < 0.05 * max(map(size, exact.values())), key


@on_both
def test_a_float64_state_is_not_rounded(backend: str) -> None:
    module = make(PaperDenoiser).double()
    found = run(reverse_sample, module, state=torch.float64, table=TABLE, backend=backend)
    assert_equal(found, run(reverse_sample, module, under=False, state=torch.float64, table=TABLE, backend=backend))


@on_both
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_half_precision_state_is_kept_in_float32(half: torch.dtype, backend: str) -> None:
    """Under autocast, z_short usually comes out of a linear layer, in bfloat16."""
    module = make(PaperDenoiser)
    z = normal(BATCH, FEATURES).to(half).requires_grad_()
    alpha = torch.rand(BATCH, 1).to(half).requires_grad_()
    noise = normal(BATCH, FEATURES, seed=2).to(half)
    with autocast():
        z_hat = reverse_sample(module, z, table=TABLE, alpha=alpha, noise=noise, backend=backend)
        loss = prior_loss(module, z, alphas_cumprod=alphas_cumprod(), backend=backend)
    assert z_hat.dtype == loss.dtype == torch.float32
    (z_hat.sum() + loss).backward()
    assert z.grad is not None
    assert z.grad.dtype == half
    assert alpha.grad is not None
    assert alpha.grad.dtype == half


@on_both
@pytest.mark.parametrize("kind", [ConditionalHead, RawCondition])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conditions_come_in_the_dtype_that_autocast_gave_them(kind: Any, dtype: torch.dtype, backend: str) -> None:
    module = make(kind)
    cond = normal(BATCH, COND if kind is ConditionalHead else FEATURES).to(dtype).requires_grad_()
    with autocast():
        z_hat = reverse_sample(module, normal(BATCH, FEATURES), table=TABLE, cond=cond, backend=backend)
    z_hat.sum().backward()
    assert cond.grad is not None
    assert cond.grad.dtype == dtype
    exact = reverse_sample(module, normal(BATCH, FEATURES), table=TABLE, cond=cond.detach().float(), backend=backend)
    assert z_hat.dtype == torch.float32
    assert size(z_hat - exact) < 0.05 * size(exact)


@on_both
def test_operators_themselves_are_not_cast(backend: str) -> None:
    for problem in (sample_problem(film(5), batch=9), prior_problem(film(5), batch=9)):
        rounded = problem.to(torch.float32)
        with autocast():
            found = rounded.run(backend)
            again = rounded.run(backend, create_graph=True)
        assert_equal(found, rounded.run(backend))
        for key, x in rounded.run(backend).items():
            torch.testing.assert_close(again[key].detach(), x, rtol=1e-4, atol=1e-4)


@on_both
def test_running_statistics_stay_in_float32(backend: str) -> None:
    module = make(PaperDenoiser)
    exact = copy.deepcopy(module)
    run(reverse_sample, module, table=TABLE, backend=backend)
    run(reverse_sample, exact, under=False, table=TABLE, backend=backend)
    for (name, x), y in zip(module.named_buffers(), exact.buffers(), strict=True):
        assert x.dtype == y.dtype, name
        torch.testing.assert_close(x, y, rtol=0.05, atol=0.05)

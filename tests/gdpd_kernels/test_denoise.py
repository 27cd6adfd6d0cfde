"""denoise is a call of the module with a time step per row: values, gradients, statistics, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdpd_kernels import BackendError, BackendFallback, DenoiserProgram, capture, denoise, prior_loss
from gdpd_kernels.backends import load
from gdpd_kernels.passes import tables_as_rows
from modules import COND, DENOISERS, FEATURES, TimeMLP, Uncapturable, make, takes_condition

_MISSING = load("native").unusable()
BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(bool(_MISSING), reason="; ".join(_MISSING))),
]
on_both = pytest.mark.parametrize("backend", BACKENDS)
T = torch.tensor([0, 999, 500, 3, 500, 17, 998])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run(module: nn.Module, call: Any, **form: Any) -> list[Tensor | None]:
    """The prediction, every gradient and every buffer of one call."""
    z = normal(len(T), FEATURES, **form).requires_grad_()
    given = [z, T]
    if takes_condition(module):
        width = {"RawCondition": FEATURES}.get(type(module).__name__, COND)
        given.append(normal(len(T), width, seed=1, **form).requires_grad_())
    found = call(module, *given)
    found.backward(normal(*found.shape, seed=2, **form))
    leaves = [x for x in given if x.requires_grad] + list(module.parameters())
    return [found.detach(), *(x.grad for x in leaves), *module.buffers()]


def fused(backend: str) -> Any:
    def call(module: nn.Module, z: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return denoise(module, z, t, cond=cond, backend=backend)

    return call


@on_both
@pytest.mark.parametrize("name", DENOISERS)
def test_denoise_is_a_call_of_the_module(name: str, backend: str) -> None:
    ours, theirs = make(name)
    for found, expected in zip(run(ours, fused(backend)), run(theirs, lambda m, *given: m(*given)), strict=True):
        if expected is None:
            assert found is None or not found.any()
        else:
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(bool(_MISSING), reason="; ".join(_MISSING))
@pytest.mark.parametrize("name", ["paper", "time mlp", "conditional head"])
def test_in_float32_it_errs_no_more_than_plain_pytorch(name: str) -> None:
    ours, theirs = make(name, torch.float32)
    exact = run(copy.deepcopy(ours).double(), lambda m, *given: m(*given))
    single = {"dtype": torch.float32}
    found, plain = run(ours, fused("native"), **single), run(theirs, lambda m, *given: m(*given), **single)
    exact_inputs = [x for x in exact if x is not None and x.is_floating_point()]
    scale = max(float(x.norm()) for x in exact_inputs)
    for x, y, z in zip(found, plain, exact, strict=True):
        if x is None or y is None or z is None or not x.is_floating_point():
            continue
        error, allowed = float((x - z).norm()), 2 * float((y - z).norm())
        assert error <= allowed + 8 * torch.finfo(torch.float32).eps / 2 * scale


def test_a_module_that_cannot_be_captured_runs_itself_and_says_so() -> None:
    torch.manual_seed(0)
    ours = Uncapturable().double()
    theirs = copy.deepcopy(ours)
    with pytest.warns(BackendFallback, match="running the module itself"):
        found = run(ours, fused("auto"))
    for x, y in zip(found, run(theirs, lambda m, *given: m(*given)), strict=True):
        assert y is None or torch.equal(x, y)  # type: ignore[arg-type]
    if not _MISSING:
        with pytest.raises(BackendError, match="'native' cannot run this denoiser"):
            denoise(ours, normal(len(T), FEATURES), T, backend="native")


@on_both
def test_a_loss_on_the_prediction_is_prior_loss(backend: str) -> None:
    module, twin = make("time mlp")
    z, noise, bar = normal(len(T), FEATURES), normal(len(T), FEATURES, seed=1), torch.linspace(0.99, 0.01, 1000)
    loss = prior_loss(module, z, alphas_cumprod=bar.double(), timesteps=T, noise=noise, backend=backend)
    ab = bar.double()[T, None]
    ours = (denoise(twin, ab.sqrt() * z + (1 - ab).sqrt() * noise, T, backend=backend) - noise).square().mean()
    torch.testing.assert_close(ours, loss)
    loss.backward()
    ours.backward()
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-12)


@on_both
def test_gradients_can_be_differentiated_again(backend: str) -> None:
    module, twin = make("time mlp")
    found = []
    for net, call in ((module, fused(backend)), (twin, lambda m, z, t: m(z, t))):
        z = normal(len(T), FEATURES).requires_grad_()
        (slope,) = torch.autograd.grad(call(net, z, T).sin().sum(), z, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), z)[0])
    torch.testing.assert_close(*found)


def test_tables_become_rows_and_nothing_else_changes() -> None:
    program = DenoiserProgram.parse(
        "denoiser z:3 tables:3,2 rows:2 params:3x2\n"
        "%1 = add(z, t0)\n%2 = mul(t1, r0)\n%3 = linear(%2, p0, -)\n%4 = add(%1, %3)\nreturn %4"
    )
    assert tables_as_rows(program) == DenoiserProgram.parse(
        "denoiser z:3 tables:- rows:2,3,2 params:3x2\n"
        "%1 = add(z, r1)\n%2 = mul(r2, r0)\n%3 = linear(%2, p0, -)\n%4 = add(%1, %3)\nreturn %4"
    )


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"z": torch.zeros(7)}, ValueError, r"z has shape \(7,\).*expected floating \[batch, features\]"),
        ({"z": [[1.0]]}, TypeError, r"z: expected a tensor \[batch, features\], got list"),
        ({"timesteps": 5}, TypeError, r"timesteps: expected a tensor \[batch\], got int"),
        ({"timesteps": T[:3]}, ValueError, r"timesteps has shape \(3,\), torch.int64 on cpu; expected int64 \[7\]"),
        ({"timesteps": T.float()}, ValueError, r"timesteps has shape \(7,\), torch.float32"),
        ({"timesteps": T + 4000}, ValueError, "the denoiser has no embedding of time step 4999"),
        ({"cond": torch.zeros(3, COND)}, ValueError, rf"cond has shape \(3, {COND}\).*expected \[7, width\]"),
        ({"denoiser": lambda z, t: z}, TypeError, "denoiser: expected an nn.Module"),
        ({"denoiser": capture(TimeMLP()), "z": torch.zeros(7, 4)}, ValueError, "the state has 4 features, the den"),
    ],
)
def test_bad_arguments_are_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"denoiser": make("paper", torch.float32)[0], "z": torch.zeros(7, FEATURES), "timesteps": T}
    with pytest.raises(error, match=message):
        denoise(**(given | changed))

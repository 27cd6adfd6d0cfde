"""torch.func: vmap, grad and their kin, forward mode and functional_call, against plain loops and ordinary autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap

import gdpd_kernels as gk
from gdpd_kernels import BackendError, BackendFallback, ddim_table, prior_loss, reverse_sample
from gdpd_kernels.backends import load
from modules import COND, FEATURES, ConditionalHead, PaperDenoiser, TimeMLP

_MISSING = load("native").unusable()
BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(bool(_MISSING), reason="; ".join(_MISSING))),
]
TABLE = ddim_table(num_inference_steps=3, window="lower")
pytestmark = pytest.mark.filterwarnings("ignore::gdpd_kernels.BackendFallback")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def denoiser(kind: Callable[[], nn.Module] = TimeMLP) -> nn.Module:
    torch.manual_seed(0)
    return kind().double().eval()


class Student(nn.Module):
    """A model that holds a denoiser and runs the sampler over it."""

    def __init__(self, net: nn.Module, backend: str = "auto") -> None:
        super().__init__()
        self.encoder, self.denoiser, self.backend = nn.Linear(FEATURES, FEATURES).double(), net, backend

    def forward(self, x: Tensor) -> Tensor:
        return reverse_sample(self.denoiser, self.encoder(x), table=TABLE, alpha=0.7, seed=3, backend=self.backend)


class OfACapture(nn.Module):
    """z as a map, and t as one number: what only the capture knows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.time = nn.Conv2d(FEATURES, FEATURES, 1), nn.Embedding(1000, FEATURES)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        assert t.dim() == 0
        return self.conv(torch.tanh(z)) + self.time(t)[None, :, None, None]


# --- functional_call ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [TimeMLP, PaperDenoiser])
def test_functional_call_runs_with_the_tensors_it_is_given(kind: Any, backend: str) -> None:
    torch.manual_seed(0)
    student = Student(denoiser(kind).train(), backend)
    other, x = copy.deepcopy(student), normal(5, FEATURES)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    student(x)  # captured with its own tensors
    student.load_state_dict(before)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    given = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    given |= {name: b.clone() for name, b in other.named_buffers()}
    found, expected = functional_call(student, given, (x,)), other(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    found.square().sum().backward()
    expected.square().sum().backward()
    for name, p in other.named_parameters():
        torch.testing.assert_close(given[name].grad, p.grad, rtol=1e-10, atol=1e-12, msg=name)
    for name, b in other.named_buffers():  # statistics go where they belong too
        torch.testing.assert_close(given[name], b, msg=name)
    assert all(p.grad is None for p in student.parameters())
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# --- transforms -----------------------------------------------------------------------------------------------------


def sampled(net: Any, **options: Any) -> Callable[..., Tensor]:
    return lambda z: reverse_sample(net, z, table=TABLE, **({"alpha": 0.6, "seed": 1} | options))


@pytest.mark.parametrize("kind", [TimeMLP, PaperDenoiser, ConditionalHead])
def test_vmap_is_a_loop(kind: Any) -> None:
    net, zs = denoiser(kind), normal(3, 4, FEATURES)
    options: dict[str, Any] = {"cond": normal(4, COND, seed=1)} if kind is ConditionalHead else {}
    run = sampled(net, num_samples=2, **options)
    torch.testing.assert_close(vmap(run)(zs), torch.stack([run(z) for z in zs]), rtol=1e-11, atol=1e-12)


def test_vmap_over_alpha_noise_seed_and_eta() -> None:
    net, z, table = denoiser(), normal(4, FEATURES), ddim_table(num_inference_steps=2, eta=0.5)

    def run(alpha: Tensor, noise: Tensor, seed: Tensor) -> Tensor:
        return reverse_sample(net, z, table=table, alpha=alpha, noise=noise, seed=seed)

    given = torch.tensor([0.1, 0.9]).double(), normal(2, 4, FEATURES, seed=2), torch.tensor([5, -6])
    expected = torch.stack([run(*each) for each in zip(*given, strict=True)])
    torch.testing.assert_close(vmap(run)(*given), expected, rtol=1e-11, atol=1e-12)


def test_drawn_noise_under_vmap_is_torchs_to_allow() -> None:
    run = sampled(denoiser(), seed=None)
    z = normal(1, FEATURES).expand(3, 4, FEATURES)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(run)(z)
    same = vmap(run, randomness="same")(z)
    assert torch.equal(same[0], same[1])
    different = vmap(run, randomness="different")(z)
    assert not torch.equal(different[0], different[1])


def test_an_ensemble_of_denoisers_and_gradients_per_sample() -> None:
    students = [Student(denoiser()) for _ in range(3)]
    for i, student in enumerate(students):
        with torch.no_grad():
            for p in student.parameters():
                p.mul_(1 + 0.1 * i)
    params, buffers = stack_module_state(students)  # type: ignore[arg-type]
    base, x = copy.deepcopy(students[0]), normal(4, FEATURES)
    found = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(params, buffers)
    torch.testing.assert_close(found, torch.stack([s(x) for s in students]), rtol=1e-11, atol=1e-12)

    own = {name: p.detach() for name, p in base.named_parameters()}
    # One row at a time draws the noise of row 0 each time, so per-sample gradients add up over calls of one row.
    loss = lambda p, row: functional_call(base, p, (row[None],)).square().sum()  # noqa: E731
    each = vmap(grad(loss), in_dims=(None, 0))(own, x)
    base.zero_grad()
    for row in x:
        base(row[None]).square().sum().backward()
    for name, p in base.named_parameters():
        torch.testing.assert_close(each[name].sum(0), p.grad, rtol=1e-9, atol=1e-11, msg=name)


def test_derivatives_are_those_of_autograd() -> None:
    net, z, direction = denoiser(), normal(2, FEATURES), normal(2, FEATURES, seed=1)
    run = sampled(net)
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(run(leaf).square().sum(), leaf)
    torch.testing.assert_close(grad(lambda z: run(z).square().sum())(z), expected, rtol=1e-10, atol=1e-12)
    jacobian = torch.autograd.functional.jacobian(run, z)
    torch.testing.assert_close(jacrev(run)(z), jacobian, rtol=1e-10, atol=1e-12)
    along = torch.einsum("abcd,cd->ab", jacobian, direction)
    torch.testing.assert_close(jvp(run, (z,), (direction,))[1], along, rtol=1e-10, atol=1e-12)
    with torch.autograd.forward_ad.dual_level():
        dual = run(torch.autograd.forward_ad.make_dual(z, direction))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, along, rtol=1e-10, atol=1e-12)
    scalar = lambda z: run(z).square().sum()  # noqa: E731
    torch.testing.assert_close(hessian(scalar)(z), torch.autograd.functional.hessian(scalar, z), rtol=1e-9, atol=1e-11)


def test_the_loss_of_the_prior_too() -> None:
    net, bar = denoiser(PaperDenoiser), gk.alphas_cumprod()

    def loss(z: Tensor, t: Tensor | None = None) -> Tensor:
        return prior_loss(net, z, alphas_cumprod=bar, timesteps=t, seed=4)

    zs, ts = normal(3, 4, FEATURES), torch.arange(12).view(3, 4)
    torch.testing.assert_close(vmap(loss)(zs, ts), torch.stack([loss(*each) for each in zip(zs, ts, strict=True)]))
    leaf = zs[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(grad(loss)(zs[0]), expected, rtol=1e-10, atol=1e-12)


def test_a_captured_denoiser_is_called_as_its_module_takes_it() -> None:
    torch.manual_seed(0)
    captured = gk.capture(OfACapture().double(), FEATURES, map_input=True)
    zs, run = normal(3, 4, FEATURES), sampled(captured)
    torch.testing.assert_close(vmap(run)(zs), torch.stack([run(z) for z in zs]), rtol=1e-11, atol=1e-12)


def test_a_kernel_asked_for_by_name_says_why_not() -> None:
    run = sampled(denoiser(), backend="native")
    with pytest.raises(BackendError, match=r'"?vmap, grad, jvp.*plain PyTorch only\nUse backend="auto"'):
        vmap(run)(normal(2, 3, FEATURES))
    with pytest.raises(ValueError, match="backend: 'nativ' is not known"):
        vmap(sampled(denoiser(), backend="nativ"))(normal(2, 3, FEATURES))


def test_it_is_told_once() -> None:
    from gdpd_kernels.functional import _note_stepwise

    _note_stepwise.cache_clear()
    run = sampled(denoiser())
    with pytest.warns(BackendFallback, match=r"the module itself, step by step: a transform of torch.func") as told:
        vmap(lambda z: run(z) + run(z))(normal(2, 3, FEATURES))
    assert len(told) == 1


def test_statistics_cannot_be_updated_per_example_and_torch_says_so() -> None:
    with pytest.raises(RuntimeError, match="running_mean"):
        vmap(sampled(denoiser(PaperDenoiser).train()))(normal(2, 3, FEATURES))

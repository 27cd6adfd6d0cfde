"""reverse_sample and prior_loss of a module behave as an eager loop over the module: values, gradients, statistics."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gdpd_kernels import BackendFallback, alphas_cumprod, capture, ddim_table, prior_loss, reverse_sample
from gdpd_kernels.backends import load
from modules import (
    COND,
    DENOISERS,
    FEATURES,
    PaperDenoiser,
    TimeMLP,
    Uncapturable,
    eager_loss,
    eager_sample,
    make,
    takes_condition,
)

_MISSING = load("native").unusable()
BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(bool(_MISSING), reason="; ".join(_MISSING))),
]
on_both = pytest.mark.parametrize("backend", BACKENDS)
TABLE = ddim_table(num_inference_steps=3, window="lower")
BATCH = 7


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(ours: nn.Module, theirs: nn.Module, found: list[Any], expected: list[Any]) -> None:
    """Values, gradients of inputs and parameters, and every buffer, in float64."""

    def close(x: Tensor | None, y: Tensor | None, name: str) -> None:
        if y is None:
            assert x is None or not x.any(), name
            return
        assert x is not None, name
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12, msg=lambda m: f"{name}: {m}")

    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        close(x, y, f"result {i}")
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        close(p.grad, q.grad, name)
    for (name, x), y in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        close(x, y, name)


def run_both(
    name: str, backend: str, eta: float = 0.0, num_samples: int | None = None, seed: int | None = None, calls: int = 1
) -> None:
    ours, theirs = make(name)
    table = ddim_table(num_inference_steps=3, window="lower", eta=eta)
    results = []
    for module, sample, extra in ((ours, reverse_sample, {"backend": backend}), (theirs, eager_sample, {})):
        inputs = [normal(BATCH, FEATURES), torch.rand(BATCH, 1, generator=torch.Generator().manual_seed(1)).double()]
        inputs += [normal(BATCH, {"raw condition": FEATURES}.get(name, COND))] if takes_condition(module) else []
        z, alpha, *cond = (x.requires_grad_() for x in inputs)
        noise = normal(num_samples or 1, BATCH, FEATURES, seed=2) if seed is None else None
        noise = noise[0] if noise is not None and num_samples is None else noise
        result: list[Any] = []
        for _ in range(calls):
            z_hat = sample(  # type: ignore[operator]
                module, z, table=table, alpha=alpha, noise=noise, seed=seed, cond=cond[0] if cond else None,
                num_samples=num_samples, **extra,
            )  # fmt: skip
            z_hat.backward(normal(*z_hat.shape, seed=3))
            result.append(z_hat)
        results.append([*result, *(x.grad for x in (z, alpha, *cond))])
    assert_same(ours, theirs, *results)


@on_both
@pytest.mark.parametrize("name", DENOISERS)
def test_a_captured_module_behaves_as_a_loop_over_the_module(name: str, backend: str) -> None:
    run_both(name, backend, calls=2)


@on_both
@pytest.mark.parametrize("name", ["paper", "conditional head", "cumulative statistics"])
def test_samples_go_through_the_denoiser_as_one_batch(name: str, backend: str) -> None:
    run_both(name, backend, num_samples=3)
    run_both(name, backend, num_samples=1, eta=0.6, seed=2**64 - 3)
    run_both(name, backend, num_samples=2, eta=0.6, seed=-5)


@on_both
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("name", DENOISERS)
def test_prior_loss_behaves_as_a_call_of_the_module(name: str, prediction: str, backend: str) -> None:
    ours, theirs = make(name)
    bar = alphas_cumprod("cosine")
    timesteps = torch.tensor([0, 999, 500, 3, 500, 17, 998])
    results = []
    for module in (ours, theirs):
        z = normal(BATCH, FEATURES).requires_grad_()
        width = {"raw condition": FEATURES}.get(name, COND)
        cond = normal(BATCH, width).requires_grad_() if takes_condition(module) else None
        given: dict[str, Any] = {
            "alphas_cumprod": bar, "timesteps": timesteps, "noise": normal(BATCH, FEATURES, seed=2),
            "prediction": prediction, "cond": cond,
        }  # fmt: skip
        loss = prior_loss(module, z, backend=backend, **given) if module is ours else eager_loss(module, z, **given)
        (3 * loss).backward()
        results.append([loss, z.grad, None if cond is None else cond.grad])
    assert_same(ours, theirs, *results)


@on_both
@pytest.mark.parametrize("name", ["paper", "time mlp"])
def test_frozen_denoisers_pass_gradients_on(name: str, backend: str) -> None:
    ours, theirs = make(name)
    results = []
    for module, sample, extra in ((ours, reverse_sample, {"backend": backend}), (theirs, eager_sample, {})):
        module.requires_grad_(False)
        z = normal(BATCH, FEATURES).requires_grad_()
        z_hat = sample(module, z, table=TABLE, **extra)  # type: ignore[operator]
        z_hat.backward(normal(*z_hat.shape, seed=3))
        results.append([z_hat, z.grad])
    assert_same(ours, theirs, *results)
    assert all(p.grad is None for p in ours.parameters())


@on_both
def test_some_parameters_may_be_frozen(backend: str) -> None:
    ours, theirs = make("paper")
    results = []
    for module, sample, extra in ((ours, reverse_sample, {"backend": backend}), (theirs, eager_sample, {})):
        for name, p in module.named_parameters():
            p.requires_grad_("blocks.1" in name or name.endswith("bias"))
        z_hat = sample(module, normal(BATCH, FEATURES), table=TABLE, **extra)  # type: ignore[operator]
        z_hat.backward(normal(*z_hat.shape, seed=3))
        results.append([z_hat])
    assert_same(ours, theirs, *results)
    assert ours.time.weight.grad is None


@on_both
def test_statistics_are_updated_without_gradients_too(backend: str) -> None:
    ours, theirs = make("paper")
    with torch.no_grad():
        found = reverse_sample(ours, normal(BATCH, FEATURES), table=TABLE, backend=backend)
        expected = eager_sample(theirs, normal(BATCH, FEATURES), TABLE)
    assert not found.requires_grad
    assert_same(ours, theirs, [found], [expected])


@on_both
def test_an_optimiser_trains_through_the_sampler(backend: str) -> None:
    """Live parameters: after ten steps of Adam, the module and its twin are still the same."""
    ours, theirs = make("paper")
    for module in (ours, theirs):
        optimiser = torch.optim.Adam(module.parameters(), lr=1e-2)
        losses = []
        for step in range(10):
            optimiser.zero_grad()
            z = normal(BATCH, FEATURES, seed=step)
            if module is ours:
                z_hat = reverse_sample(module, z, table=TABLE, backend=backend)
            else:
                z_hat = eager_sample(module, z, TABLE)
            loss = (z_hat - 1).square().mean()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


@on_both
def test_train_and_eval_mode_follow_the_module(backend: str) -> None:
    ours, theirs = make("paper")
    z = normal(BATCH, FEATURES)
    captured = capture(ours)
    for training in (True, False, True):
        ours.train(training)
        theirs.train(training)
        found = reverse_sample(captured, z, table=TABLE, backend=backend)
        assert_same(ours, theirs, [found], [eager_sample(theirs, z, TABLE)])


@on_both
@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("shape", [(), (FEATURES,), (BATCH,), (BATCH, FEATURES), (1, FEATURES), (BATCH, 1), "number"])
def test_alpha_of_every_shape(shape: Any, samples: int | None, backend: str) -> None:
    module, _ = make("time mlp")
    results = []
    for sample, extra in ((reverse_sample, {"backend": backend}), (eager_sample, {})):
        alpha: Any = 0.3
        if shape != "number":
            alpha = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
        given = alpha[:, None] if shape == (BATCH,) and sample is eager_sample else alpha
        noise = normal(samples or 1, BATCH, FEATURES, seed=4)
        z_hat = sample(  # type: ignore[operator]
            module, normal(BATCH, FEATURES), table=TABLE, alpha=given, noise=noise if samples else noise[0],
            num_samples=samples, **extra,
        )  # fmt: skip
        grads = [] if shape == "number" else torch.autograd.grad(z_hat, alpha, normal(*z_hat.shape, seed=3))
        results.append([z_hat, *grads])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_alpha_in_the_layout_of_columns() -> None:
    module, _ = make("time mlp")
    rows = torch.rand(BATCH, FEATURES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = []
    for alpha in (rows.clone().requires_grad_(), rows.t().contiguous().t().requires_grad_()):
        z_hat = reverse_sample(module, normal(BATCH, FEATURES), table=TABLE, alpha=alpha, noise=normal(BATCH, FEATURES))
        grads.append(torch.autograd.grad(z_hat.square().sum(), alpha)[0])
    assert torch.equal(*grads)


# --- noise ------------------------------------------------------------------------------------------------------------


@on_both
def test_the_seed_comes_from_torchs_generator(backend: str) -> None:
    module, _ = make("time mlp")
    table = ddim_table(num_inference_steps=3, eta=0.5)

    def run(seed: int | None) -> list[Tensor]:
        if seed is not None:
            torch.manual_seed(seed)
        drawn = reverse_sample(module, normal(BATCH, FEATURES), table=table, alpha=0.5, backend=backend)
        loss = prior_loss(module, normal(BATCH, FEATURES), alphas_cumprod=alphas_cumprod(), backend=backend)
        return [drawn, loss]

    first, again, other = run(5), run(5), run(None)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


@on_both
def test_a_seed_may_be_a_number_or_a_tensor_and_leaves_the_generator_alone(backend: str) -> None:
    module, _ = make("time mlp")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draws = [
        reverse_sample(module, normal(BATCH, FEATURES), table=TABLE, alpha=0.5, seed=seed, backend=backend)
        for seed in (2**64 - 2, -2, torch.tensor(-2), torch.tensor([-2]))
    ]
    assert all(torch.equal(draws[0], x) for x in draws)
    assert torch.equal(torch.get_rng_state(), before)


@settings(derandomize=True, deadline=None, max_examples=20, database=None)
@given(st.integers(-(2**63), 2**64 - 1), st.integers(1, 2000))
def test_drawn_time_steps_lie_in_the_schedule(seed: int, steps: int) -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            seen.append(t)
            return z.sort(-1).values

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BackendFallback)
        prior_loss(Spy(), torch.zeros(64, 3), alphas_cumprod=alphas_cumprod(num_train_timesteps=steps), seed=seed)
    t = seen[-1]
    assert t.dtype == torch.int64
    assert 0 <= int(t.min()) <= int(t.max()) < steps


@on_both
def test_drawn_time_steps_are_spread_evenly(backend: str) -> None:
    counts = torch.zeros(10)

    class Spy(nn.Module):
        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            counts.add_(torch.bincount(t, minlength=10)) if t.numel() == 4096 else None
            return z.sort(-1).values

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BackendFallback)
        prior_loss(Spy(), torch.zeros(4096, 1), alphas_cumprod=alphas_cumprod(num_train_timesteps=10), seed=3)
    assert counts.sum() == 4096
    assert (counts - 409.6).abs().max() < 5 * 409.6**0.5


# --- modules that cannot be captured ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("samples", [None, 2])
def test_a_module_that_cannot_be_captured_runs_itself(backend: str, samples: int | None) -> None:
    torch.manual_seed(0)
    ours = Uncapturable().double()
    theirs = copy.deepcopy(ours)
    results = []
    for module, sample in ((ours, reverse_sample), (theirs, eager_sample)):
        z, alpha = normal(BATCH, FEATURES).requires_grad_(), normal(1, FEATURES).requires_grad_()
        table = ddim_table(num_inference_steps=3, eta=0.4)
        extra = {"backend": backend} if module is ours else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BackendFallback)
            z_hat = sample(module, z, table=table, alpha=alpha, seed=9, num_samples=samples, **extra)  # type: ignore[operator]
        z_hat.backward(normal(*z_hat.shape, seed=3))
        results.append([z_hat, z.grad, alpha.grad])
    assert_same(ours, theirs, *results)


def test_prior_loss_of_a_module_that_cannot_be_captured() -> None:
    torch.manual_seed(0)
    ours = Uncapturable().double()
    theirs = copy.deepcopy(ours)
    given: dict[str, Any] = {"alphas_cumprod": alphas_cumprod(), "timesteps": torch.arange(BATCH), "prediction": "v"}
    given |= {"noise": normal(BATCH, FEATURES, seed=1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BackendFallback)
        found = prior_loss(ours, normal(BATCH, FEATURES), **given)
    expected = eager_loss(theirs, normal(BATCH, FEATURES), **given)
    for loss in (found, expected):
        loss.backward()
    assert_same(ours, theirs, [found], [expected])


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_memory_kept_for_backward_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit only states are kept, and the gradients are those of keeping everything."""
    from gdpd_kernels import functional

    module = PaperDenoiser(16)
    grads, kept = [], []
    for limit in (2**40, 0):
        monkeypatch.setattr(functional, "SAVED_VALUES_LIMIT", limit)
        saved: list[int] = []
        z = torch.randn(33, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: s.append(x.numel()) or x, lambda x: x):  # type: ignore[misc]
            z_hat = reverse_sample(module, z, table=ddim_table(num_inference_steps=8))
        kept.append(max(saved))
        grads.append(torch.autograd.grad(z_hat.sum(), z)[0])
    assert torch.equal(*grads)
    if not _MISSING:
        assert kept[1] < kept[0] / 3


# --- inside what PyTorch wraps around a call --------------------------------------------------------------------------


@on_both
def test_checkpointing_draws_the_same_noise_again(backend: str) -> None:
    from torch.utils.checkpoint import checkpoint

    grads = []
    for wrapped in (True, False):
        module, _ = make("paper in eval mode")  # so that it is captured within the checkpoint
        z = normal(BATCH, FEATURES).requires_grad_()

        def sample(z: Tensor, module: nn.Module = module) -> Tensor:
            return reverse_sample(module, z, table=TABLE, alpha=0.5, backend=backend)

        torch.manual_seed(7)
        z_hat = checkpoint(sample, z, use_reentrant=False) if wrapped else sample(z)
        z_hat.square().sum().backward()
        grads.append([z.grad, *(p.grad for p in module.parameters())])
    assert all(map(torch.equal, *grads))


@on_both
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_under_a_profiler_in_anomaly_mode_and_in_inference_mode(backend: str) -> None:
    results = []
    for context in (
        torch.profiler.profile,
        torch.autograd.detect_anomaly,
        torch.autograd.graph.save_on_cpu,
        nullcontext,
    ):
        module, _ = make("paper")
        z = normal(BATCH, FEATURES).requires_grad_()
        with context() as found:
            z_hat = reverse_sample(module, z, table=TABLE, alpha=0.5, seed=1, backend=backend)
            loss = prior_loss(module, z, alphas_cumprod=alphas_cumprod(), seed=1, backend=backend)
            (z_hat.sum() + loss).backward()
        results.append([z_hat, loss, z.grad, *(p.grad for p in module.parameters()), *module.buffers()])
        if context is torch.profiler.profile:
            names = {event.key for event in found.key_averages()}
            assert {"gdpd_kernels::reverse_sample", "gdpd_kernels::prior_loss"} <= names
    module, _ = make("paper")
    with torch.inference_mode():
        z_hat = reverse_sample(module, normal(BATCH, FEATURES), table=TABLE, alpha=0.5, seed=1, backend=backend)
    results.append([z_hat, *results[0][1:]])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_half_precision_states_run_on_the_reference() -> None:
    module = TimeMLP().bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BackendFallback)
        z_hat = reverse_sample(module, normal(BATCH, FEATURES).bfloat16(), table=TABLE)
    assert z_hat.dtype == torch.bfloat16
    assert z_hat.isfinite().all()

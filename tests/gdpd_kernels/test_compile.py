"""torch.compile with fullgraph=True: one graph, forward and backward, that serves every batch size."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from gdpd_kernels import alphas_cumprod, capture, ddim_table, prior_loss, reverse_sample
from gdpd_kernels.backends import load
from gdpd_kernels.capture import COMPILES
from modules import (
    COND,
    FEATURES,
    ConditionalHead,
    PaperDenoiser,
    SharedNorm,
    TimeMLP,
    Uncapturable,
    eager_loss,
    eager_sample,
    takes_condition,
)

_MISSING = load("native").unusable() or ([] if COMPILES else ["before torch 2.13 the module itself is compiled"])
BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(bool(_MISSING), reason="; ".join(_MISSING))),
]
on_both = pytest.mark.parametrize("backend", BACKENDS)
TABLE = ddim_table(num_inference_steps=2, window="lower", eta=0.5)
BATCHES = (7, 9, 33)


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def twins(kind: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(kind().double())
    return found[0], found[1]


def close(ours: nn.Module, theirs: nn.Module, found: list[Tensor], expected: list[Tensor]) -> None:
    pairs = list(zip(found, expected, strict=True))
    pairs += [(p.grad, q.grad) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)]  # type: ignore[misc]
    pairs += list(zip(ours.buffers(), theirs.buffers(), strict=True))
    for x, y in pairs:
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@on_both
@pytest.mark.parametrize(
    ("kind", "dynamic"),
    [
        (TimeMLP, True),
        (PaperDenoiser, True),
        (PaperDenoiser, None),
        (lambda: SharedNorm(momentum=None), True),
        (ConditionalHead, True),
    ],
)
def test_one_graph_serves_every_batch_size(kind: Any, dynamic: bool | None, backend: str) -> None:
    ours, theirs = twins(kind)
    counter, compiled_so_far = CompileCounterWithBackend("aot_eager"), []

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=counter)
    def compiled(z: Tensor, alpha: Tensor, cond: Tensor | None) -> Tensor:
        return reverse_sample(ours, z, table=TABLE, alpha=alpha, seed=5, cond=cond, backend=backend)

    for batch in BATCHES:
        results = []
        for module in (ours, theirs):
            z, alpha = normal(batch, FEATURES).requires_grad_(), normal(batch, 1, seed=1).requires_grad_()
            cond = normal(batch, COND).requires_grad_() if takes_condition(module) else None
            if module is ours:
                z_hat = compiled(z, alpha, cond)
            else:
                z_hat = eager_sample(module, z, TABLE, alpha, cond=cond, seed=5)
            z_hat.backward(normal(batch, FEATURES, seed=3))
            results.append([z_hat, z.grad, alpha.grad, *([] if cond is None else [cond.grad])])
        close(ours, theirs, *results)  # type: ignore[arg-type]
        compiled_so_far.append(counter.frame_count)
    # Without being told, a compiler takes the first size for a constant, and the second for a hint that it is none.
    first, second, last = compiled_so_far
    assert last == second
    assert second == first or not dynamic


@on_both
@pytest.mark.parametrize("kind", [TimeMLP, PaperDenoiser])
def test_the_loss_compiles_for_every_batch_size(kind: Any, backend: str) -> None:
    ours, theirs = twins(kind)
    bar, counter, compiled_so_far = alphas_cumprod(), CompileCounterWithBackend("aot_eager"), []

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return prior_loss(ours, z, alphas_cumprod=bar, timesteps=t, noise=noise, prediction="v", backend=backend)

    for batch in BATCHES:
        results = []
        for module in (ours, theirs):
            z, t, noise = normal(batch, FEATURES).requires_grad_(), torch.arange(batch), normal(batch, FEATURES, seed=1)
            loss = compiled(z, t, noise) if module is ours else eager_loss(module, z, bar, t, noise, "v")
            loss.backward()
            results.append([loss, z.grad])
        close(ours, theirs, *results)  # type: ignore[arg-type]
        compiled_so_far.append(counter.frame_count)
    assert len(set(compiled_so_far)) == 1


@on_both
def test_drawn_noise_and_time_steps_are_those_of_eager_calls(backend: str) -> None:
    module, _ = twins(TimeMLP)

    def both(z: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        z_hat = reverse_sample(module, z, table=TABLE, alpha=0.5, seed=seed, num_samples=2, backend=backend)
        return z_hat, prior_loss(module, z, alphas_cumprod=alphas_cumprod(), seed=seed, backend=backend)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for seed in (0, 2**62, -1):
        given = normal(5, FEATURES), torch.tensor(seed)
        torch.testing.assert_close(compiled(*given), both(*given), rtol=1e-12, atol=1e-13)


@on_both
def test_a_compiled_graph_follows_the_module(backend: str) -> None:
    """New parameter values, train and eval mode, frozen or not: all are noticed."""
    ours, theirs = twins(PaperDenoiser)
    table = ddim_table(num_inference_steps=2)
    compiled = torch.compile(
        lambda z: reverse_sample(ours, z, table=table, backend=backend), fullgraph=True, backend="aot_eager"
    )
    for training, trainable in ((True, True), (False, True), (False, False), (True, True)):
        results = []
        for module in (ours, theirs):
            module.train(training).requires_grad_(trainable).zero_grad()
            with torch.no_grad():
                for p in module.parameters():
                    p.add_(0.01)
            z = normal(9, FEATURES).requires_grad_()
            z_hat = compiled(z) if module is ours else eager_sample(module, z, table)
            z_hat.backward(normal(9, FEATURES, seed=3))
            results.append([z_hat, z.grad])
        if trainable:
            close(ours, theirs, *results)  # type: ignore[arg-type]
        else:
            torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
            assert all(p.grad is None for p in ours.parameters())


@on_both
def test_captured_denoisers_compile_too(backend: str) -> None:
    captured = capture(twins(TimeMLP)[0])
    compiled = torch.compile(
        lambda z: reverse_sample(captured, z, table=TABLE, seed=1, backend=backend), fullgraph=True, backend="aot_eager"
    )
    z = normal(5, FEATURES)
    torch.testing.assert_close(compiled(z), reverse_sample(captured, z, table=TABLE, seed=1, backend=backend))


def test_a_denoiser_that_cannot_be_captured_is_compiled_itself() -> None:
    ours, theirs = twins(Uncapturable)
    compiled = torch.compile(
        lambda z: reverse_sample(ours, z, table=TABLE, seed=1), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    results = []
    for module in (ours, theirs):
        z = normal(9, FEATURES).requires_grad_()
        z_hat = compiled(z) if module is ours else eager_sample(module, z, TABLE, seed=1)
        z_hat.backward(normal(9, FEATURES, seed=3))
        results.append([z_hat, z.grad])
    close(ours, theirs, *results)  # type: ignore[arg-type]


@on_both
@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="Inductor needs a C++ compiler")
def test_inductor_compiles_a_training_step(backend: str) -> None:
    ours, theirs = twins(PaperDenoiser)
    bar, noise = alphas_cumprod(), normal(9, FEATURES, seed=1)

    def step(module: nn.Module, z: Tensor, sample: Any, loss: Any, **extra: Any) -> Tensor:
        z_hat = sample(module, torch.tanh(z), table=TABLE, alpha=0.5, noise=noise, seed=5, **extra)
        timesteps = torch.arange(9)
        prior = loss(module, z, alphas_cumprod=bar, timesteps=timesteps, noise=noise, prediction="eps", **extra)
        return torch.nn.functional.cross_entropy(z_hat, timesteps % FEATURES) + prior

    compiled = torch.compile(step, fullgraph=True)
    results = []
    for module, run, functions, extra in (
        (ours, compiled, (reverse_sample, prior_loss), {"backend": backend}),
        (theirs, step, (eager_sample, eager_loss), {}),
    ):
        z = normal(9, FEATURES).requires_grad_()
        value = run(module, z, *functions, **extra)
        value.backward()
        results.append([value, z.grad])
    close(ours, theirs, *results)  # type: ignore[arg-type]


@on_both
def test_autocast_inside_a_compiled_graph(backend: str) -> None:
    module = PaperDenoiser().eval()
    table = ddim_table(num_inference_steps=2)

    def under_autocast(z: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return reverse_sample(module, z, table=table, backend=backend)

    z = normal(9, FEATURES).float()
    compiled = torch.compile(under_autocast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z), under_autocast(z))

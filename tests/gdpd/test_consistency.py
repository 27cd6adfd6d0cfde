"""Consistency distillation: its loss in loops, what it moves, and that one step does the work of many."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gdpd_kernels as gk
from gdpd.consistency import ConsistencyLoss, consistency_table
from gdpd.denoisers import MLPDenoiser
from gdpd.distillers import GDPD, Batch
from gdpd.models import build_model


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_loss_is_the_definition_written_out(prediction: str) -> None:
    torch.manual_seed(0)
    table = gk.ddim_table(100, 4, "cosine", prediction=prediction)
    loss = ConsistencyLoss(table)
    prior, learner = (MLPDenoiser(3, hidden=(8,), num_train_timesteps=100).double() for _ in range(2))
    x = torch.randn(12, 3).double()
    torch.manual_seed(5)
    found = loss(prior, learner, x)
    torch.manual_seed(5)
    ks, eps = torch.randint(4, (12,)), torch.randn(12, 3, dtype=torch.float64)
    ab = [*gk.alphas_cumprod("cosine", 100)[[75, 50, 25, 0]].tolist(), 1.0]
    steps = (75, 50, 25, 0)

    def clean(denoiser: MLPDenoiser, z: Tensor, k: int) -> Tensor:
        out = denoiser(z[None], torch.tensor([steps[k]]))[0]
        if prediction == "eps":
            return (z - math.sqrt(1 - ab[k]) * out) / math.sqrt(ab[k])
        return out if prediction == "x0" else math.sqrt(ab[k]) * z - math.sqrt(1 - ab[k]) * out

    total = 0.0
    for i in range(12):
        k = int(ks[i])
        z = math.sqrt(ab[k]) * x[i] + math.sqrt(1 - ab[k]) * eps[i]
        x0 = clean(prior, z, k)
        noise = (z - math.sqrt(ab[k]) * x0) / math.sqrt(1 - ab[k])
        moved = math.sqrt(ab[k + 1]) * x0 + math.sqrt(1 - ab[k + 1]) * noise
        target = moved if k == 3 else clean(learner, moved, k + 1)
        total += float((clean(learner, z, k) - target).square().mean()) / 12
    assert set(ks.tolist()) == {0, 1, 2, 3}
    assert float(found) == pytest.approx(total, rel=1e-8)


def test_the_loss_moves_the_learner_alone_and_takes_no_path_with_noise() -> None:
    prior, learner = MLPDenoiser(3, hidden=(8,)), MLPDenoiser(3, hidden=(8,))
    ConsistencyLoss(gk.ddim_table(1000, 4))(prior, learner, torch.randn(6, 3)).backward()
    assert all(p.grad is None for p in prior.parameters())
    assert all(p.grad is not None for p in learner.parameters())
    with pytest.raises(ValueError, match=r"eta=0.5: a path with noise"):
        ConsistencyLoss(gk.ddim_table(1000, 4, eta=0.5))


FLOW = gk.alphas_cumprod("flow", 1000).float()


class TwoPoints(nn.Module):
    """The exact v prediction for x = (2, 2) or (-2, -2), each half of the time."""

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        ab = FLOW[t].view(-1, 1)
        signal, square = ab.sqrt(), 1 - ab
        x0 = 2 * torch.tanh(2 * signal * z.sum(dim=1, keepdim=True) / square)
        return (signal * z - x0) / square.sqrt()


def test_one_step_lands_where_many_steps_of_the_prior_do() -> None:
    """One step of the prior itself lands between the points, where nothing lies."""
    torch.manual_seed(0)
    grid = gk.ddim_table(1000, 10, "flow", prediction="v", timestep_spacing="trailing")
    prior, learner, loss = TwoPoints(), MLPDenoiser(2, hidden=(48, 48)), ConsistencyLoss(grid)
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-3)
    for _ in range(400):
        optimizer.zero_grad()
        loss(prior, learner, (4.0 * torch.randint(2, (128, 1)) - 2).expand(-1, 2)).backward()
        optimizer.step()
    start = torch.randn(200, 2)

    def landed(denoiser: nn.Module, steps: int) -> float:
        table = gk.ddim_table(1000, steps, "flow", prediction="v", timestep_spacing="trailing")
        with torch.no_grad():
            z = reverse_loop(lambda z, k: denoiser(z, torch.tensor(table.timesteps[k])), start, table)
        return float(torch.minimum((z - 2).norm(dim=1), (z + 2).norm(dim=1)).mean())

    one, many, distilled = landed(prior, 1), landed(prior, 10), landed(learner, 1)
    assert many < 0.2 * one
    assert distilled < 0.4 * one


def reverse_loop(denoiser: Callable[[Tensor, int], Tensor], z: Tensor, table: gk.DDIMTable) -> Tensor:
    """The plain walk."""
    for k, (a, b, _) in enumerate(table.coefficients):
        z = a * z + b * denoiser(z, k)
    return z


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_several_steps_noise_the_clean_state_anew(prediction: str) -> None:
    torch.manual_seed(0)
    table = consistency_table(gk.ddim_table(100, 3, "cosine", prediction=prediction))
    net = MLPDenoiser(4, hidden=(8,), num_train_timesteps=100).double()
    start = torch.randn(5, 4).double()
    found = gk.reverse_sample(net, start, table=table, seed=4)
    ab = [*gk.alphas_cumprod("cosine", 100)[[66, 33, 0]].tolist(), 1.0]
    z = start
    for k, t in enumerate((66, 33, 0)):
        out = net(z, torch.full((5,), t))
        signal, sigma = math.sqrt(ab[k]), math.sqrt(1 - ab[k])
        x0 = {"eps": (z - sigma * out) / signal, "x0": out, "v": signal * z - sigma * out}[prediction]
        noise = gk.philox_normal(4, 5, 4, step=k + 1, dtype=torch.float64)
        z = math.sqrt(ab[k + 1]) * x0 + math.sqrt(1 - ab[k + 1]) * noise
    torch.testing.assert_close(found, z, rtol=1e-9, atol=1e-9)


def test_one_step_draws_nothing_and_is_ddim_s() -> None:
    table = gk.ddim_table(1000, 1, "flow", prediction="v", timestep_spacing="trailing")
    one = consistency_table(table)
    assert not one.stochastic
    assert one.flat == pytest.approx(table.flat)


def test_gdpd_learns_it_in_the_warm_up_and_samples_by_it_afterwards() -> None:
    torch.manual_seed(0)
    student = build_model("lstm", in_channels=1, num_classes=3, layers=1, hidden=8)
    options: dict[str, Any] = {"num_inference_steps": 1, "timestep_spacing": "trailing", "consistency_steps": 20}
    made = GDPD(student, 12, warmup_epochs=2, **options)
    data = Batch(torch.randn(6, 1, 5), torch.arange(6) % 3, z_long=torch.randn(6, 12), teacher_logits=torch.randn(6, 3))
    assert [made.phase(epoch) for epoch in range(3)] == ["warmup", "distil", "main"]
    assert "consistency" not in made.loss(data, 0)[1]
    loss, parts = made.loss(data, 1)
    assert "consistency" in parts
    loss.backward()
    made.zero_grad()
    made.loss(data, 2)[0].backward()
    assert made.prior.few_step is not None
    assert any(p.grad is not None and bool(p.grad.any()) for p in made.prior.few_step.parameters())
    assert all(p.grad is None or not p.grad.any() for p in made.prior.denoiser.parameters())
    with pytest.raises(ValueError, match=r"consistency_steps=3 makes a grid without .* \(499,\)"):
        GDPD(student, 12, warmup_epochs=1, **{**options, "consistency_steps": 3})
    with pytest.raises(ValueError, match="consistency_steps=-1 is below 0"):
        GDPD(student, 12, warmup_epochs=1, consistency_steps=-1)

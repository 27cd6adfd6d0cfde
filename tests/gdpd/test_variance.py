"""The learned variance's bound against KL divergences of torch.distributions, its sampler against diffusers' DDPM."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import gdpd_kernels as gk
from gdpd.variance import LearnedRange, ancestral_sample


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_variational_term_is_the_mean_divergence_in_bits(schedule: str) -> None:
    steps = 40
    beta = gk.make_betas(schedule, steps)
    alpha = 1 - beta
    alpha_bar = alpha.cumprod(0)
    generator = torch.Generator().manual_seed(0)
    rows, width = 80, 3

    def normals() -> Tensor:
        return torch.randn(rows, width, generator=generator, dtype=torch.float64)

    x0, eps, predicted, v = normals(), normals(), normals(), normals().tanh()
    t = torch.arange(rows) % steps
    total = 0.0
    for i in range(rows):
        k = int(t[i])
        before = alpha_bar[k - 1] if k else torch.tensor(1.0, dtype=torch.float64)
        ab = alpha_bar[k]
        z = ab.sqrt() * x0[i] + (1 - ab).sqrt() * eps[i]

        # q(z_{t-1} | z_t, x0): Ho et al. (2020), eqs. 6 and 7
        def posterior_mean(x: Tensor, k: int = k, before: Tensor = before, ab: Tensor = ab, z: Tensor = z) -> Tensor:
            return (before.sqrt() * beta[k] * x + alpha[k].sqrt() * (1 - before) * z) / (1 - ab)

        low = beta[max(k, 1)] * (1 - alpha_bar[max(k, 1) - 1]) / (1 - alpha_bar[max(k, 1)])
        fraction = (v[i] + 1) / 2
        variance = torch.exp(fraction * beta[k].log() + (1 - fraction) * low.log())
        model = Normal(posterior_mean((z - (1 - ab).sqrt() * predicted[i]) / ab.sqrt()), variance.sqrt())
        term = kl_divergence(Normal(posterior_mean(x0[i]), low.sqrt()), model) if k else -model.log_prob(x0[i])
        total += float(term.mean()) / math.log(2)
    found = LearnedRange(alpha_bar).variational_term(eps, predicted, v, t)
    assert float(found) == pytest.approx(total / rows, rel=1e-10)


def test_variational_term_moves_the_variance_alone() -> None:
    bound = LearnedRange(gk.alphas_cumprod("cosine", 20))
    eps, predicted, v = (torch.randn(6, 4, requires_grad=True) for _ in range(3))
    bound.variational_term(eps.detach(), predicted, v, torch.arange(6)).backward()
    assert predicted.grad is None
    assert v.grad is not None
    assert v.grad.all()


def test_true_noise_and_the_posterior_s_variance_have_no_divergence() -> None:
    eps = torch.randn(5, 4, dtype=torch.float64)
    bound = LearnedRange(gk.alphas_cumprod("cosine", 20))
    t = torch.arange(1, 6)
    assert float(bound.variational_term(eps, eps, -torch.ones_like(eps), t)) == pytest.approx(0, abs=1e-12)
    assert float(bound.variational_term(eps, eps + 0.1, -torch.ones_like(eps), t)) > 1e-4


def test_one_training_step_has_no_range() -> None:
    with pytest.raises(ValueError, match="num_train_timesteps=1: a learned variance needs two steps"):
        LearnedRange(torch.tensor([0.5]))


def made_up(z: Tensor, t: Tensor) -> Tensor:
    """A prediction of noise and interpolation that depends on both."""
    return torch.cat([torch.tanh(z + 0.001 * t), torch.sin(2 * z - 0.002 * t)], dim=1)


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small"])
def test_ancestral_steps_are_diffusers_ddpm(variance: str) -> None:
    scheduler = DDPMScheduler(
        num_train_timesteps=200, beta_schedule="squaredcos_cap_v2", variance_type=variance, clip_sample=False,
        timestep_spacing="leading",
    )  # fmt: skip
    scheduler.set_timesteps(8)
    table = gk.ddim_table(200, 8, "cosine", eta=1.0)
    assert table.timesteps == tuple(scheduler.timesteps.tolist())
    torch.manual_seed(0)
    start = torch.randn(5, 3, dtype=torch.float64)
    theirs = start
    for t in scheduler.timesteps:
        given = made_up(theirs, t)
        given = given if variance == "learned_range" else given[:, :3]
        seeded = torch.Generator().manual_seed(int(t))
        theirs = scheduler.step(given, t, theirs, generator=seeded).prev_sample

    def noise(k: int) -> Tensor:
        return torch.randn(5, 3, generator=torch.Generator().manual_seed(table.timesteps[k]), dtype=torch.float64)

    def model(z: Tensor, t: Tensor) -> Tensor:  # v = -1 is the posterior's variance
        given = made_up(z, t)
        return given if variance == "learned_range" else torch.cat([given[:, :3], -torch.ones_like(z)], dim=1)

    ours = ancestral_sample(model, start, table, noise)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # diffusers keeps its schedule in float32
    assert float((ours - start).abs().min()) > 1e-3


def test_an_ancestral_step_needs_an_ancestral_table() -> None:
    with pytest.raises(ValueError, match=r"eta=0.0.*ancestral steps need eta=1"):
        ancestral_sample(made_up, torch.randn(2, 3), gk.ddim_table(200, 8, "cosine"), lambda k: torch.randn(2, 3))

"""FeaturePrior: its space and its stage-one losses."""

from __future__ import annotations

import pytest
import torch

from gdpd.denoisers import BottleneckDenoiser, MLPDenoiser
from gdpd.prior import FeaturePrior


def test_autoencoder_maps_teacher_width_to_latent_width_and_back() -> None:
    prior = FeaturePrior(BottleneckDenoiser(8), teacher_dim=12, latent_dim=8)
    assert prior.autoencoder is not None
    code, reconstruction = prior.autoencoder(torch.randn(5, 12))
    assert code.shape == (5, 8)
    assert reconstruction.shape == (5, 12)


def test_noise_loss_does_not_move_the_encoder() -> None:
    prior = FeaturePrior(BottleneckDenoiser(8), 12, 8)
    losses = prior.losses(torch.randn(6, 12))
    assert set(losses) == {"noise", "autoencoder"}
    losses["noise"].backward()
    assert prior.autoencoder is not None
    assert all(p.grad is None for p in prior.autoencoder.parameters())
    assert any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in prior.denoiser.parameters())


def test_autoencoder_loss_is_the_mean_squared_reconstruction_error() -> None:
    torch.manual_seed(0)
    prior, z = FeaturePrior(BottleneckDenoiser(8), 12, 8), torch.randn(6, 12)
    assert prior.autoencoder is not None
    expected = (prior.autoencoder(z)[1] - z).square().mean()
    torch.testing.assert_close(prior.losses(z)["autoencoder"], expected)


def test_losses_pass_no_gradient_to_the_teacher_s_features() -> None:
    z = torch.randn(6, 12, requires_grad=True)
    sum(FeaturePrior(BottleneckDenoiser(8), 12, 8).losses(z).values()).backward()  # type: ignore[union-attr]
    assert z.grad is None


def test_identity_space_has_only_the_noise_loss_and_leaves_features_as_they_are() -> None:
    prior, z = FeaturePrior(MLPDenoiser(8), 8, 8, target_space="identity"), torch.randn(6, 8)
    assert set(prior.losses(z)) == {"noise"}
    assert prior.encode(z) is z


def test_prior_learns_to_predict_the_noise_of_a_point_mass() -> None:
    """For data at one point, noise can be read off z_t: the loss of a trained denoiser falls well below 1."""
    torch.manual_seed(0)
    prior = FeaturePrior(MLPDenoiser(2, hidden=(64, 64)), 2, 2, target_space="identity")
    optimizer = torch.optim.Adam(prior.parameters(), lr=3e-3)
    z = torch.ones(64, 2)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = prior.losses(z)["noise"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[:5]) / 5 > 0.6
    assert sum(losses[-20:]) / 20 < 0.3


def test_identity_space_between_different_widths_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"12 dimensions where the student's head reads 8.*target_space='autoencoder'"):
        FeaturePrior(BottleneckDenoiser(8), 12, 8, target_space="identity")


def test_unknown_target_space_is_refused() -> None:
    with pytest.raises(ValueError, match="target_space='code' is not known"):
        FeaturePrior(BottleneckDenoiser(8), 12, 8, target_space="code")

"""The step-by-step reverse process agrees with the fused operator."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gdpd_kernels as gk
from gdpd.denoisers import MLPDenoiser
from gdpd.sampler import noise_fused_init, trajectory


@pytest.mark.parametrize("window", ["full", "lower"])
def test_trajectory_ends_where_the_fused_operator_ends(window: str) -> None:
    torch.manual_seed(0)
    denoiser: nn.Module = MLPDenoiser(6, hidden=(16,)).double()
    table = gk.ddim_table(num_inference_steps=5, window=window)
    z_short, eps = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    states = trajectory(denoiser, noise_fused_init(z_short, 0.3, eps), table)
    assert states.shape == (6, 4, 6)
    z_hat = gk.reverse_sample(denoiser, z_short, table=table, alpha=0.3, noise=eps, backend="reference")
    torch.testing.assert_close(states[-1], z_hat)


def test_lower_window_of_five_steps_walks_the_release_s_grid() -> None:
    assert gk.ddim_table(num_inference_steps=5, window="lower").timesteps == (400, 300, 200, 100, 0)


def test_start_is_a_linear_mix_without_square_roots() -> None:
    z, eps = torch.tensor([[2.0, 4.0]]), torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(noise_fused_init(z, 0.75, eps), torch.tensor([[1.75, 2.75]]))
    torch.testing.assert_close(noise_fused_init(z, 1.0, eps), z)


def test_stochastic_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"eta=1.0.*reverse_sample"):
        trajectory(MLPDenoiser(2, hidden=(4,)), torch.zeros(1, 2), gk.ddim_table(eta=1.0))

"""GenDD's head: what it starts as, what it refuses, and its real size through the fused sampler, both ways."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import gdpd_kernels as gk
from gdpd.denoisers import AdaLNDenoiser


def small(tokens: int = 3) -> AdaLNDenoiser:
    torch.manual_seed(0)
    return AdaLNDenoiser(features=6, cond_features=5, tokens=tokens, hidden=16, blocks=2, time_dim=8)


def lively(net: AdaLNDenoiser) -> AdaLNDenoiser:
    """What starts at zero, as it may be after training."""
    for layer in (net.out, net.modulation, *(block.modulation for block in net.blocks)):
        torch.nn.init.normal_(layer.weight, std=0.5 / layer.in_features**0.5)
        torch.nn.init.normal_(layer.bias, std=0.1)
    return net


def test_the_first_prediction_is_zero() -> None:
    net = small()
    cond = net.condition(torch.randn(4, 5), torch.tensor([0, 1, 2, 0]))
    assert torch.equal(net(torch.randn(4, 6), torch.tensor([0, 5, 999, 7]), cond), torch.zeros(4, 6))


def test_time_condition_and_token_each_matter_and_rows_are_independent() -> None:
    net = lively(small())
    z, c, t, token = torch.randn(4, 6), torch.randn(4, 5), torch.tensor([3, 3, 3, 3]), torch.tensor([0, 1, 2, 0])
    base = net(z, t, net.condition(c, token))
    assert base.shape == (4, 6)
    for other in (
        net(z, t + 400, net.condition(c, token)),
        net(z, t, net.condition(c + 1, token)),
        net(z, t, net.condition(c, (token + 1) % 3)),
    ):
        assert ((other - base).abs().amax(1) > 1e-4).all()
    torch.testing.assert_close(net(z[1:2], t[1:2], net.condition(c[1:2], token[1:2])), base[1:2])
    torch.testing.assert_close(net(z, t[0], net.condition(c, token)), base)


def test_the_noise_is_the_first_half_of_what_is_predicted() -> None:
    net = lively(small(tokens=1))
    z, t, cond = torch.randn(4, 6), torch.tensor([1, 2, 3, 4]), net.condition(torch.randn(4, 5))
    both = net.noise_and_variance(z, t, cond)
    assert both.shape == (4, 12)
    assert torch.equal(net(z, t, cond), both[:, :6])


def test_a_token_picks_its_embedding() -> None:
    net = small()
    c, token = torch.randn(2, 5), torch.tensor([2, 0])
    picked = net.condition(c, token)[:, 5:] @ net.token_embedding
    assert torch.equal(picked, net.token_embedding[token])


def test_bad_arguments_are_named() -> None:
    net, c = small(), torch.randn(2, 5)
    for name in ("features", "cond_features", "tokens", "hidden", "blocks", "num_train_timesteps"):
        with pytest.raises(ValueError, match=f"{name}=0 must be 1 or more"):
            AdaLNDenoiser(**{name: 0})
    with pytest.raises(ValueError, match=r"c has shape \[2, 4\]; this denoiser takes \[batch, 5\]"):
        net.condition(c[:, :4], torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="token is None; with 3 tokens"):
        net.condition(c)
    with pytest.raises(ValueError, match=r"token has shape \[1\], torch.int64; expected int64 \[2\]"):
        net.condition(c, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"token has values 0..3; expected 0..2"):
        net.condition(c, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"cond has shape \[2, 5\]; this denoiser takes \[batch, 8\]"):
        net(torch.randn(2, 6), torch.tensor([0, 0]), c)
    with pytest.raises(ValueError, match=r"z has shape \[2, 7\]"):
        net(torch.randn(2, 7), torch.tensor([0, 0]), net.condition(c, torch.tensor([0, 1])))


def sample(net: AdaLNDenoiser, inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """z_hat and every gradient of one call of the sampler."""
    net = copy.deepcopy(net).to(inputs["z_short"].dtype)
    z, c = (inputs[name].clone().requires_grad_() for name in ("z_short", "c"))
    table = gk.ddim_table(num_inference_steps=2, beta_schedule="cosine", window="full")
    z_hat = gk.reverse_sample(net, z, table=table, cond=net.condition(c, inputs["token"]), backend=backend)
    leaves = {"z_short": z, "c": c} | dict(net.named_parameters())
    gradients = torch.autograd.grad(z_hat, list(leaves.values()), inputs["grad"].to(z.dtype))
    return {"z_hat": z_hat.detach()} | dict(zip(leaves, gradients, strict=True))


def test_the_head_at_its_real_size_runs_natively_in_both_precisions() -> None:
    torch.manual_seed(1)
    net = lively(AdaLNDenoiser(features=64, cond_features=512, tokens=8))
    inputs = {"z_short": torch.randn(5, 64), "c": torch.randn(5, 512), "grad": torch.randn(5, 64)}
    double = {name: x.double() for name, x in inputs.items()}
    token = {"token": torch.tensor([0, 7, 3, 3, 1])}
    exact = sample(net, double | token, "reference")
    native = sample(net, double | token, "native")
    plain = sample(net, inputs | token, "reference")
    found = sample(net, inputs | token, "native")
    whole = torch.cat([x.flatten() for name, x in exact.items() if name != "z_hat"]).norm()
    for name, x in exact.items():
        scale = x.norm() if name == "z_hat" else whole
        assert (native[name] - x).norm() <= 1e-12 * scale, name
        error, allowed = (found[name] - x).norm(), 2 * (plain[name] - x).norm()
        assert error <= allowed + 8 * torch.finfo(torch.float32).eps / 2 * scale, name

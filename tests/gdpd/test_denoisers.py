"""Denoisers: agreement with the convolutional form of the releases, time inputs, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gdpd_kernels as gk
from gdpd.denoisers import (
    Bottleneck,
    BottleneckDenoiser,
    MLPDenoiser,
    SinusoidalEmbedding,
    WideDenoiser,
    build_denoiser,
    denoiser_names,
)


class ConvBottleneck(nn.Module):
    """The bottleneck as DiffKD-style releases write it: 1×1, 3×3 and 1×1 convolutions on [batch, A, 1, 1] maps."""

    def __init__(self, linear: Bottleneck) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, layer in enumerate(linear.body):
            if isinstance(layer, nn.Linear):
                kernel = 3 if i == 3 else 1
                conv = nn.Conv2d(layer.in_features, layer.out_features, kernel, padding=kernel // 2).to(
                    layer.weight.dtype
                )
                with torch.no_grad():  # the outer taps keep their random values: they must not matter
                    conv.weight[:, :, kernel // 2, kernel // 2] = layer.weight
                    conv.bias.copy_(layer.bias)  # type: ignore[union-attr]
                layers.append(conv)
            elif isinstance(layer, nn.BatchNorm1d):
                norm = nn.BatchNorm2d(layer.num_features).to(layer.weight.dtype)
                norm.load_state_dict(layer.state_dict())
                layers.append(norm)
            else:
                layers.append(nn.ReLU())
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        maps = x[:, :, None, None]
        return (maps + self.body(maps)).flatten(1)


class ConvDenoiser(nn.Module):
    """BottleneckDenoiser with convolutions in place of Linear layers and copies of its weights."""

    def __init__(self, linear: BottleneckDenoiser) -> None:
        super().__init__()
        self.table = nn.Parameter(linear.time_embedding.weight.detach().clone())
        self.blocks = nn.Sequential(*(ConvBottleneck(block) for block in linear.blocks))  # type: ignore[arg-type]
        self.out = nn.Conv2d(linear.features, linear.features, 1).to(linear.out.weight.dtype)
        with torch.no_grad():
            self.out.weight[:, :, 0, 0] = linear.out.weight
            self.out.bias.copy_(linear.out.bias)  # type: ignore[union-attr]
        self.norm = nn.BatchNorm2d(linear.features).to(linear.out.weight.dtype)
        self.norm.load_state_dict(linear.out_norm.state_dict())

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.norm(self.out(self.blocks(z + self.table[t])[:, :, None, None])).flatten(1)


@pytest.mark.parametrize("features", [16, 100])
def test_bottleneck_denoiser_is_the_convolutional_one_of_the_releases(features: int) -> None:
    torch.manual_seed(0)
    linear = BottleneckDenoiser(features).double()
    conv = ConvDenoiser(linear)
    t = torch.tensor([0, 999, 400, 1279, 7])
    z_linear = torch.randn(5, features, dtype=torch.float64, requires_grad=True)
    z_conv = z_linear.detach().clone().requires_grad_()
    for _ in range(2):  # the second pass sees running statistics that the first has moved
        out_linear, out_conv = linear(z_linear, t), conv(z_conv, t)
        torch.testing.assert_close(out_linear, out_conv, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(out_linear)
    (out_linear * weight).sum().backward()
    (out_conv * weight).sum().backward()
    torch.testing.assert_close(z_linear.grad, z_conv.grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(linear.time_embedding.weight.grad, conv.table.grad, rtol=1e-8, atol=1e-10)
    linear.eval()
    conv.eval()
    torch.testing.assert_close(linear(z_linear, t), conv(z_conv, t), rtol=1e-10, atol=1e-10)


def test_bottleneck_denoiser_has_the_layers_of_the_paper() -> None:
    denoiser = BottleneckDenoiser(100)
    assert denoiser.time_embedding.weight.shape == (1280, 100)
    assert len(denoiser.blocks) == 2
    linears = [(m.in_features, m.out_features) for m in denoiser.modules() if isinstance(m, nn.Linear)]
    assert linears == [(100, 25), (25, 25), (25, 100)] * 2 + [(100, 100)]
    assert all(m.bias is not None for m in denoiser.modules() if isinstance(m, nn.Linear))
    assert sum(isinstance(m, nn.BatchNorm1d) for m in denoiser.modules()) == 7
    assert not any(isinstance(m, nn.Conv2d) for m in denoiser.modules())
    layer = BottleneckDenoiser(100, norm="layer")
    assert sum(isinstance(m, nn.LayerNorm) for m in layer.modules()) == 7
    assert not any(isinstance(m, nn.BatchNorm1d) for m in layer.modules())


def all_denoisers(features: int) -> list[nn.Module]:
    return [
        BottleneckDenoiser(features, reduction=2, norm="batch"),
        BottleneckDenoiser(features, reduction=2, blocks=1, norm="layer"),
        WideDenoiser(features, expansion=2),
        MLPDenoiser(features, hidden=(8,)),
        MLPDenoiser(features, hidden=(8, 16, 4), time_embedding="learned"),
    ]


@given(st.integers(2, 33), st.integers(2, 9), st.integers(0, 999))
@settings(max_examples=15, deadline=None)
def test_one_step_for_all_rows_is_the_same_as_the_step_repeated(features: int, batch: int, t: int) -> None:
    torch.manual_seed(features)
    z = torch.randn(batch, features)
    for denoiser in all_denoisers(features):
        shared = denoiser(z, torch.tensor(t))
        assert shared.shape == (batch, features)
        torch.testing.assert_close(shared, denoiser(z, torch.full((batch,), t)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [BottleneckDenoiser, WideDenoiser])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_batch_statistics_hide_a_step_that_all_rows_share(norm: str, kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    denoiser, z = kind(16, norm=norm).double(), torch.randn(8, 16, dtype=torch.float64)

    def difference() -> Tensor:
        return (denoiser(z, torch.tensor(0)) - denoiser(z, torch.tensor(400))).abs().max()

    if norm == "batch":
        assert difference() < 1e-12
        steps = torch.tensor([0, 400] * 4)
        assert (denoiser(z, steps) - denoiser(z, torch.tensor(0))).abs().max() > 0.1
        denoiser.eval()
    assert difference() > 0.1


def test_a_shared_step_gets_no_gradient_through_the_sampler() -> None:
    torch.manual_seed(0)
    denoiser, z = BottleneckDenoiser(16).double(), torch.randn(8, 16, dtype=torch.float64)
    gk.reverse_sample(denoiser, z, table=gk.ddim_table(), backend="reference").square().sum().backward()
    gradients = [p.grad.norm() for name, p in denoiser.named_parameters() if p.grad is not None and "time" not in name]
    assert denoiser.time_embedding.weight.grad is not None
    assert float(denoiser.time_embedding.weight.grad.norm()) < 1e-12 * float(torch.stack(gradients).max())


def test_rows_are_independent_without_batch_statistics() -> None:
    torch.manual_seed(0)
    z, t = torch.randn(6, 12), torch.arange(6)
    for denoiser in all_denoisers(12):
        if any(isinstance(m, nn.BatchNorm1d) for m in denoiser.modules()):
            denoiser.eval()
        torch.testing.assert_close(denoiser(z, t)[2:3], denoiser(z[2:3], t[2:3]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_denoisers_export_with_any_batch(shared: bool) -> None:
    batch = torch.export.Dim("batch", min=2)
    t = torch.tensor(3) if shared else torch.arange(4)
    z = torch.randn(7, 12)
    for denoiser in all_denoisers(12):
        shapes = {"z": {0: batch}, "t": None if shared else {0: batch}}
        exported = torch.export.export(denoiser.eval(), (torch.randn(4, 12), t), dynamic_shapes=shapes)
        steps = t if shared else torch.arange(7)
        torch.testing.assert_close(exported.module()(z, steps), denoiser(z, steps))


def test_sinusoid_is_that_of_the_literature() -> None:
    values = SinusoidalEmbedding(8)(torch.tensor([0, 5]))
    assert values.shape == (2, 8)
    assert values[0].tolist() == [0.0] * 4 + [1.0] * 4
    expected = [math.sin(5 * 10000 ** (-i / 4)) for i in range(4)] + [math.cos(5 * 10000 ** (-i / 4)) for i in range(4)]
    torch.testing.assert_close(values[1], torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert SinusoidalEmbedding(8)(torch.tensor(5)).shape == (8,)


def test_time_steps_stay_apart_in_bfloat16() -> None:
    embedding = SinusoidalEmbedding(64).bfloat16()
    values = embedding(torch.tensor([999, 1000]))
    assert values.dtype == torch.bfloat16
    assert (values[0] - values[1]).abs().max() > 0.1


def test_mlp_depth_and_time_path_follow_the_arguments() -> None:
    torch.manual_seed(0)
    denoiser = MLPDenoiser(6, hidden=(5, 4), time_embedding="learned", num_train_timesteps=10)
    z, t = torch.randn(3, 6), torch.tensor([0, 9, 4])
    first, second = denoiser.layers
    silu = torch.nn.functional.silu
    hidden = silu(first(z) + denoiser.time_embedding.weight[t])  # type: ignore[index]
    torch.testing.assert_close(denoiser(z, t), denoiser.out(silu(second(hidden))))
    with pytest.raises(IndexError):
        denoiser(z, torch.tensor([0, 10, 4]))


def test_a_batch_of_one_is_refused_in_training_with_the_way_out() -> None:
    denoiser = BottleneckDenoiser(8)
    with pytest.raises(ValueError, match=r"batch of one row.*norm='layer'"):
        denoiser(torch.randn(1, 8), torch.tensor(0))
    with pytest.raises(ValueError, match="batch of one row"):
        Bottleneck(8)(torch.randn(1, 8))
    assert denoiser.eval()(torch.randn(1, 8), torch.tensor(0)).shape == (1, 8)
    assert BottleneckDenoiser(8, norm="layer")(torch.randn(1, 8), torch.tensor(0)).shape == (1, 8)


def test_bad_arguments_name_their_limit() -> None:
    with pytest.raises(ValueError, match=r"choose a reduction in 1\.\.3"):
        BottleneckDenoiser(3)
    with pytest.raises(ValueError, match="norm='group' is not one of 'batch', 'layer'"):
        BottleneckDenoiser(8, norm="group")
    with pytest.raises(ValueError, match="blocks=0 must be 1 or more"):
        BottleneckDenoiser(8, blocks=0)
    with pytest.raises(ValueError, match="num_train_timesteps=0"):
        BottleneckDenoiser(8, num_train_timesteps=0)
    with pytest.raises(ValueError, match="one or more hidden widths"):
        MLPDenoiser(8, hidden=())
    with pytest.raises(ValueError, match="time_dim=7 must be even"):
        MLPDenoiser(8, time_dim=7)
    with pytest.raises(ValueError, match="time_embedding='fourier'"):
        MLPDenoiser(8, time_embedding="fourier")
    for denoiser in all_denoisers(8):
        with pytest.raises(ValueError, match=r"z has shape \[2, 9\]; this denoiser takes \[batch, 8\]"):
            denoiser(torch.randn(2, 9), torch.tensor(0))


def test_denoisers_are_built_by_name_and_wrong_names_are_corrected() -> None:
    assert denoiser_names() == ["bottleneck", "wide", "mlp"]
    built = build_denoiser("bottleneck", 16, norm="layer", blocks=3)
    assert isinstance(built, BottleneckDenoiser)
    assert len(built.blocks) == 3
    assert isinstance(build_denoiser("mlp", 16, hidden=[4]), MLPDenoiser)
    with pytest.raises(ValueError, match="did you mean 'bottleneck'"):
        build_denoiser("botleneck", 16)
    with pytest.raises(ValueError, match=r"no option 'reducton' .did you mean 'reduction'"):
        build_denoiser("bottleneck", 16, reducton=2)

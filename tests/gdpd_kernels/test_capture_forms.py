"""Denoisers as tutorials and released code write them: captured, and run by the native backend as the module runs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gdpd_kernels as gk
from capture_cases import COND, WIDTH, Net, assert_captured, linear
from modules import eager_sample, sinusoid

HIDDEN = 16


def between(layer: object, out: int = HIDDEN) -> Net:
    """A layer between two linear ones."""
    return Net(lambda s, z, t: s.b(s.layer(s.a(z))), a=linear(WIDTH, HIDDEN), layer=layer, b=linear(out))


class Norm(nn.Module):
    """A norm written out, with a weight."""

    def __init__(self, forward: object) -> None:
        super().__init__()
        self.run = forward
        self.weight, self.bias = nn.Parameter(torch.rand(HIDDEN) + 0.5), nn.Parameter(torch.randn(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)  # type: ignore[operator]


def layer_norm(s: Norm, x: Tensor) -> Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) * (var + 1e-5).rsqrt() * s.weight + s.bias


def layer_norm_of_squares(s: Norm, x: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    var = (x - mean).pow(2).mean(1, keepdim=True)
    return s.weight * ((x - mean) / torch.sqrt(var + 1e-6)) + s.bias


def layer_norm_unbiased(s: Norm, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, -1, keepdim=True)
    return (x - mean) / (var + 1e-3) ** 0.5 * s.weight


def root_mean_square(s: Norm, x: Tensor) -> Tensor:
    norm = x.norm(dim=-1, keepdim=True) * HIDDEN**-0.5
    return x / norm.clamp(min=1e-8) * s.weight


NORMS = {
    "layer_norm": (layer_norm, layer_norm_of_squares, layer_norm_unbiased),
    "rms_norm": (
        root_mean_square,
        lambda s, x: s.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        lambda s, x: F.normalize(x, dim=1) * s.weight * x.shape[1] ** 0.5,
        lambda s, x: x / torch.sqrt((x * x).sum(1, keepdim=True) / 5 + 1e-8),
        lambda s, x: x / torch.linalg.vector_norm(x, dim=1)[:, None],
    ),
}


@pytest.mark.parametrize(("kind", "number"), [(kind, i) for kind in NORMS for i in range(len(NORMS[kind]))])
def test_norms_written_out_by_hand_become_one_operation(kind: str, number: int) -> None:
    program = assert_captured(between(Norm(NORMS[kind][number]))).program
    kinds = [op.kind for op in program.ops]
    assert kinds.count(kind) == 1
    assert set(kinds) <= {"linear", kind, "mul", "add", "affine"}
    assert "mul" not in kinds[: kinds.index(kind)]  # the squares that it was written in are gone


def test_a_row_of_zeros_stays_zero_under_normalize() -> None:
    net = Net(lambda s, z, t: F.normalize(z, dim=-1) + s.a.bias * 0, a=linear())
    z = torch.zeros(3, WIDTH)
    z_hat = gk.reverse_sample(net, z, table=gk.ddim_table(num_inference_steps=2), backend="native")
    assert torch.equal(z_hat, z)


ACTIVATIONS = {
    "prelu": nn.PReLU(init=0.2),
    "prelu per feature": nn.PReLU(HIDDEN),
    "elu": nn.ELU(0.5),
    "celu": nn.CELU(1.7),
    "selu": nn.SELU(),
    "softplus": nn.Softplus(beta=2.0),
    "log sigmoid": nn.LogSigmoid(),
    "mish": nn.Mish(),
    "hardtanh": nn.Hardtanh(-0.3, 0.2),
    "relu6": nn.ReLU6(),
    "hardsigmoid": nn.Hardsigmoid(),
    "hardswish": nn.Hardswish(),
    "threshold": nn.Threshold(0.1, 0.1),
    "tanhshrink": nn.Tanhshrink(),
}
# Where a kink may lie, and around; far out too, where parts of a sum must not cancel to NaN.
NEAR = -6, -3, -1, -0.3, -1e-3, -0.0, 0, 1e-3, 0.1, 0.2, 1, 3, 6, 21
KINKS = torch.tensor([-torch.inf, -1e30, *NEAR, 1e30, torch.inf])


# In float64 too, PyTorch computes these with constants in float32.
WRITTEN = {
    # Without clamp, whose derivative at its bound is 1 up to torch 2.13 and 0 in 2.14.
    "celu": lambda x: torch.where(x > 0, x, 1.7 * torch.expm1(torch.where(x > 0, 0.0, x) / 1.7)),
    "hardsigmoid": lambda x: F.relu6(x + 3) / 6,
    "hardswish": lambda x: x * F.relu6(x + 3) / 6,
}


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name not in WRITTEN])
def test_activations_made_of_others(name: str) -> None:
    assert_captured(between(copy.deepcopy(ACTIVATIONS[name])))


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "prelu per feature"])
def test_activations_at_their_kinks_and_far_out(name: str) -> None:
    act = copy.deepcopy(ACTIVATIONS[name]).double()
    table = gk.ddim_table(alphas_cumprod=torch.tensor([0.5], dtype=torch.float64), timesteps=[0])
    ((a, b, _),) = table.coefficients
    z = KINKS.double()[:, None].requires_grad_()
    if name in ("mish", "hardswish", "tanhshrink"):  # their own parts are inf − inf, or 0 · inf, in PyTorch too
        z = z.detach()[1:-1].requires_grad_()
    found = gk.reverse_sample(Net(lambda s, z, t: s.act(z), act=act), z, table=table, backend="native")
    expected = a * z + b * WRITTEN.get(name, act)(z)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    finite = z.detach().isfinite()
    gradients = (torch.autograd.grad(y[finite].sum(), z, retain_graph=True)[0] for y in (found, expected))
    ours, theirs = (gradient[finite] for gradient in gradients)
    # At a kink a derivative is either of two; only clamps choose the other end than PyTorch there.
    kink = (theirs - ours).abs() > 1e-3
    assert not kink.any() or name in ("hardtanh", "relu6", "hardsigmoid", "hardswish", "threshold")
    torch.testing.assert_close(ours[~kink], theirs[~kink], rtol=1e-10, atol=1e-12)
    assert kink.sum() <= 2


def film(s: Net, z: Tensor, t: Tensor) -> Tensor:
    scale, shift = s.time(sinusoid(t, 8, z.dtype)).chunk(2, dim=-1)
    return z + s.b(F.silu(s.norm(s.a(z)) * (scale + 1) + shift))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(HIDDEN), nn.Dropout(0.1)
        self.a, self.b = linear(HIDDEN, 2 * HIDDEN), linear(2 * HIDDEN, HIDDEN)
        self.time = nn.Sequential(nn.SiLU(), linear(8, 2 * HIDDEN))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = F.gelu(self.a(self.norm(x)) + self.time(time), approximate="tanh")
        return x + self.b(self.drop(h))


def residual(s: Net, z: Tensor, t: Tensor) -> Tensor:
    time, x = s.time(sinusoid(t, 8, z.dtype)), s.a(z)
    for block in s.blocks:
        x = block(x, time)
    return s.b(x)


def preconditioned(s: Net, z: Tensor, t: Tensor) -> Tensor:
    """EDM (Karras et al., 2022): the network between scalings by functions of the noise level."""
    sigma = (t.to(z.dtype) / 1000 + 0.01)[:, None]
    total = sigma**2 + 0.25
    inner = s.net(torch.cat([z / total.sqrt(), sigma.log() / 4], 1))
    return 0.25 / total * z + inner * (sigma * 0.5) / total.sqrt()


def squeeze_and_excite(s: Net, z: Tensor, t: Tensor) -> Tensor:
    h = s.a(z) + s.e(t)
    return h * torch.sigmoid(s.c(F.relu(s.b(h))))


def mlp(a: int, *layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(linear(a, HIDDEN), *layers, linear(HIDDEN, WIDTH))


def embedding(width: int = WIDTH) -> nn.Embedding:
    return nn.Embedding(1000, width)


def wide(layer: nn.Module) -> nn.Module:
    return torch.nn.utils.parametrizations.weight_norm(layer)


FORMS: dict[str, Net] = {
    "sinusoid joined to the state": Net(
        lambda s, z, t: s.net(torch.cat([z, s.time(sinusoid(t, 8, z.dtype))], -1)),
        net=mlp(WIDTH + WIDTH, nn.GELU()), time=mlp(8, nn.SiLU()),
    ),
    "time joined as a number": Net(
        lambda s, z, t: s.net(torch.cat([z, t.view(-1, 1) / 1000], 1)), net=mlp(WIDTH + 1, nn.Softplus())
    ),
    "layers scaled by time": Net(
        lambda s, z, t: s.b(F.softplus(s.e(t).view(-1, HIDDEN) * s.a(z))),
        a=linear(WIDTH, HIDDEN), b=linear(HIDDEN), e=embedding(HIDDEN),
    ),
    "film": Net(
        film, a=linear(WIDTH, HIDDEN), b=linear(HIDDEN), norm=nn.LayerNorm(HIDDEN), time=linear(8, 2 * HIDDEN)
    ),
    "residual blocks with dropout": Net(
        residual, time=linear(8, 8), a=linear(WIDTH, HIDDEN), b=linear(HIDDEN),
        blocks=nn.ModuleList([Residual(), Residual()]),
    ).eval(),
    "preconditioned": Net(preconditioned, net=mlp(WIDTH + 1, nn.SiLU())),
    "squeeze and excite": Net(
        squeeze_and_excite, a=linear(), b=linear(WIDTH, 4), c=linear(4, WIDTH), e=embedding()
    ),
    "gated by one number": Net(lambda s, z, t: s.a(z) * torch.sigmoid(s.b(z)) + s.b(z), a=linear(), b=linear(WIDTH, 1)),
    "gated by heads": Net(
        lambda s, z, t: (s.a(z).view(-1, 3, 4) * s.b(z).view(-1, 3, 1)).flatten(1), a=linear(), b=linear(WIDTH, 3)
    ),
    "gated linear unit": Net(lambda s, z, t: s.b(F.glu(s.a(z))), a=linear(WIDTH, 2 * HIDDEN), b=linear(HIDDEN)),
    "divided by time, condition of the layer": Net(
        lambda s, z, t: s.a(z) / (1 + s.e(t) ** 2) / s.a.bias.exp() / 2, a=linear(), e=embedding()
    ),
    "quotient of time added": Net(
        lambda s, z, t: torch.addcdiv(z, s.a(z), 1 + s.e(t) ** 2, value=0.3), a=linear(), e=embedding()
    ),
    "interpolated": Net(
        lambda s, z, t: torch.lerp(torch.lerp(z, s.a(z), 0.3), s.b(z), torch.sigmoid(s.b(z))), a=linear(), b=linear()
    ),
    "groups": between(nn.GroupNorm(4, HIDDEN)),
    "groups without weights": between(nn.GroupNorm(4, HIDDEN, affine=False)),
    "heads": Net(
        lambda s, z, t: s.norm(s.a(z).view(-1, 3, 4)).flatten(1), a=linear(), norm=nn.LayerNorm(4)
    ),
    "heads with rms": Net(
        lambda s, z, t: s.norm(s.a(z).unflatten(1, (3, 4))).flatten(1), a=linear(), norm=nn.RMSNorm(4)
    ),
    "grouped convolution": Net(
        lambda s, z, t: s.c(z[..., None, None]).flatten(1), c=nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1, groups=3),
    ),
    "columns moved about": Net(
        lambda s, z, t: s.a(z.view(-1, 3, 4).mT.flatten(1).roll(2, 1)) + z.flip(1)[:, ::2].repeat(1, 2), a=linear()
    ),
    "stacked on the inside": Net(lambda s, z, t: s.a(torch.stack([z[:, :6], z[:, 6:]], -1).flatten(1)), a=linear()),
    "powers": Net(lambda s, z, t: s.a(z) ** 3 - z**4 + s.a(z).abs(), a=linear()),
    "learned variance left out": Net(lambda s, z, t: s.a(z).chunk(2, 1)[0], a=linear(WIDTH, 2 * WIDTH)),
    "weights normalised": Net(lambda s, z, t: s.a(z), a=wide(linear())),
    "weights by their spectrum": Net(
        lambda s, z, t: s.a(z), a=torch.nn.utils.parametrizations.spectral_norm(linear())
    ).eval(),
    "tied weights": Net(lambda s, z, t: F.linear(torch.tanh(s.a(z)), s.a.weight.T), a=linear(WIDTH, HIDDEN)),
}  # fmt: skip
FORMS["grouped convolution"].run = lambda s, z, t: s.c(z[..., None, None]).flatten(1)[:, WIDTH:]


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_people_write(name: str) -> None:
    net = copy.deepcopy(FORMS[name])
    assert_captured(net)
    net.zero_grad()
    table = gk.ddim_table(num_inference_steps=3)
    z = torch.randn(5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    twin = copy.deepcopy(net)
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    found = gk.reverse_sample(net, ours, table=table, backend="native")
    expected = eager_sample(twin, theirs, table)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-9)
    for (key, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


def test_a_condition_is_joined_masked_and_divided_by() -> None:
    def forward(s: Net, z: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        known = torch.where(cond[:, :1] > 0, s.c(cond), s.nothing)
        return s.a(torch.cat([z, known], 1)) / (1 + cond[:, :1] ** 2)

    net = Net(forward, a=linear(WIDTH + 4), c=linear(COND, 4), nothing=nn.Parameter(torch.randn(4)))
    assert len(assert_captured(net, cond=True).program.rows) == 2


def test_what_a_split_leaves_over_is_not_computed() -> None:
    net = FORMS["learned variance left out"]
    assert [op.kind for op in gk.capture(net, WIDTH).program.ops] == ["linear", "slice"]


def test_dropout_is_refused_in_training_and_gone_in_evaluation() -> None:
    net = copy.deepcopy(FORMS["residual blocks with dropout"]).train()
    reason = r"blocks.0.drop \(Dropout\): bernoulli_: it draws random numbers"
    with pytest.raises(gk.CaptureError, match=reason) as caught:
        gk.capture(net, WIDTH)
    found = [reason.split(":")[0] for reason in caught.value.reasons]
    assert found == ["blocks.0.drop (Dropout)", "blocks.1.drop (Dropout)"]
    net.blocks[0].drop.p = net.blocks[1].drop.p = 0.0
    assert gk.capture(net, WIDTH).program == gk.capture(net.eval(), WIDTH).program


def test_division_by_an_integer_time_is_in_the_precision_of_the_state() -> None:
    net = Net(lambda s, z, t: s.a(z) / (t[:, None] + 3), a=linear()).double()
    (table,) = assert_captured(net).tables(torch.tensor([4]))
    assert table.dtype == torch.float64
    assert math.isclose(float(table.detach()[0, 0]), 1 / 7, rel_tol=1e-15)

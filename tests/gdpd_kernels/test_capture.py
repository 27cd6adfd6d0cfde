"""Capture: a captured denoiser computes what its module computes, values and gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capture_cases import COND, CONDITION, WIDTH, Net, assert_captured, inputs, linear, run_captured
from gdpd_kernels import capture
from gdpd_kernels.backends import reference

ACTIVATIONS = {
    "relu": nn.ReLU(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "leaky_relu": nn.LeakyReLU(0.2),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation_layers(kind: str) -> None:
    body = nn.Sequential(linear(), ACTIVATIONS[kind], linear(bias=False))
    captured = assert_captured(Net(lambda s, z, t: s.body(z), body=body), kinds=f"linear {kind} linear")
    if kind == "leaky_relu":
        assert captured.program.ops[1].attrs == (0.2,)


@pytest.mark.parametrize("layer", [nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.LeakyReLU(0.1, inplace=True)])
def test_inplace_activation_is_read_by_everything_on_its_memory(layer: nn.Module) -> None:
    def forward(s: Net, z: Tensor, t: Tensor) -> Tensor:
        h = s.a(z)
        view = h.view(-1, WIDTH, 1)
        s.act(h)
        return s.b(h) + view.flatten(1)

    assert_captured(Net(forward, a=linear(), b=linear(), act=layer))


NORMS = {
    "layer_norm": nn.LayerNorm(WIDTH),
    "layer_norm without weights": nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-3),
    "layer_norm without bias": nn.LayerNorm(WIDTH, bias=False),
    "layer_norm as group_norm": nn.GroupNorm(1, WIDTH),
    "rms_norm": nn.RMSNorm(WIDTH),
    "rms_norm without weights": nn.RMSNorm(WIDTH, elementwise_affine=False, eps=1e-4),
    "batch_norm": nn.BatchNorm1d(WIDTH),
    "batch_norm without weights": nn.BatchNorm1d(WIDTH, affine=False),
    "batch_norm without statistics": nn.BatchNorm1d(WIDTH, track_running_stats=False),
    "batch_norm cumulative": nn.BatchNorm1d(WIDTH, momentum=None),
    "batch_norm_eval": nn.BatchNorm1d(WIDTH).eval(),
    "batch_norm_eval without weights": nn.BatchNorm1d(WIDTH, affine=False).eval(),
    "batch_norm in eval without statistics": nn.BatchNorm1d(WIDTH, track_running_stats=False).eval(),
}


@pytest.mark.parametrize("name", NORMS)
def test_norm_layers(name: str) -> None:
    norm = copy.deepcopy(NORMS[name])
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2.0)
    net = Net(lambda s, z, t: s.b(s.norm(s.a(z))), a=linear(), b=linear(), norm=norm)
    captured = assert_captured(net, kinds=f"linear {name.split()[0]} linear")
    assert captured.program.ops[1].attr("eps") == (getattr(norm, "eps", None) or torch.finfo(torch.float64).eps)
    if captured.program.batch_norms:
        (found,) = captured.batch_norms
        assert (found is net.norm) == norm.track_running_stats
        assert found.num_features == WIDTH


def test_statistics_of_eval_batch_norm_are_live_and_take_no_gradient() -> None:
    net = Net(lambda s, z, t: s.norm(s.a(z)), a=linear(), norm=nn.BatchNorm1d(WIDTH)).double().eval()
    captured = capture(net, WIDTH)
    z, t = inputs()
    with torch.no_grad():
        net.norm.running_mean.fill_(0.7)
        net.norm.running_var.fill_(3.0)
    torch.testing.assert_close(run_captured(captured, z, t), net(z, t))
    assert {captured.program.names[i] for i in captured.program.buffer_params} == {
        "norm.running_mean",
        "norm.running_var",
    }


def sinusoid(t: Tensor, width: int) -> Tensor:
    frequencies = torch.exp(-math.log(100.0) * torch.arange(0, width, 2, device=t.device) / width)
    angles = t[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def interleaved(t: Tensor, like: Tensor) -> Tensor:
    """The embedding that transformers code writes column by column, in place."""
    table = torch.zeros(t.shape[0], WIDTH, device=t.device, dtype=like.dtype)
    angles = t[:, None] / 10.0 ** torch.arange(0, WIDTH // 2, device=t.device)
    table[:, 0::2] = torch.sin(angles)
    table[:, 1::2] = torch.cos(angles)
    return table


def film(s: Net, z: Tensor, t: Tensor) -> Tensor:
    scale, shift = s.e(t).chunk(2, dim=-1)
    return s.b(s.a(z) * (1 + scale) + shift)


TIME = {
    "learned table at the input": Net(lambda s, z, t: s.a(z + s.e(t)), a=linear(), e=nn.Embedding(10, WIDTH)),
    "learned table by indexing": Net(
        lambda s, z, t: s.a(z + s.e[t]), a=linear(), e=nn.Parameter(torch.randn(10, WIDTH))
    ),
    "table at a hidden layer": Net(
        lambda s, z, t: s.b(F.silu(s.a(z) + s.e(t))), a=linear(WIDTH, 20), b=linear(20), e=nn.Embedding(10, 20)
    ),
    "sinusoid and time mlp": Net(
        lambda s, z, t: s.a(z) + s.mlp(sinusoid(t, 8).to(z.dtype)),
        a=linear(),
        mlp=nn.Sequential(linear(8, 16), nn.SiLU(), linear(16, WIDTH)),
    ),
    "sinusoid written in place": Net(lambda s, z, t: s.a(z) + s.b(interleaved(t, z)), a=linear(), b=linear()),
    "film": Net(film, a=linear(), b=linear(), e=nn.Embedding(10, 2 * WIDTH)),
    "gate of width one": Net(lambda s, z, t: s.a(z) * s.e(t), a=linear(), e=nn.Embedding(10, 1)),
    "time itself": Net(lambda s, z, t: s.a(z) + t[:, None] / 10, a=linear()),
    "subtracted": Net(lambda s, z, t: s.e(t) - 2 * s.a(z), a=linear(), e=nn.Embedding(10, WIDTH)),
    "scaled sum": Net(lambda s, z, t: torch.add(s.a(z), s.e(t), alpha=0.3), a=linear(), e=nn.Embedding(10, WIDTH)),
    "joined": Net(lambda s, z, t: s.a(torch.cat([z, s.e(t)], dim=-1)), a=linear(WIDTH + 6), e=nn.Embedding(10, 6)),
    "batch norm of time": Net(
        lambda s, z, t: s.a(z) + s.n(s.e(t)), a=linear(), n=nn.BatchNorm1d(WIDTH), e=nn.Embedding(10, WIDTH)
    ),
    "eval batch norm of time": Net(
        lambda s, z, t: s.a(z) + s.n(s.e(t)), a=linear(), n=nn.BatchNorm1d(WIDTH).eval(), e=nn.Embedding(10, WIDTH)
    ),
}


@pytest.mark.parametrize("name", TIME)
def test_time_enters_as_tables(name: str) -> None:
    captured = assert_captured(copy.deepcopy(TIME[name]))
    assert len(captured.program.tables) == 1 + (name == "film")


def test_what_depends_on_time_alone_runs_once_per_step_not_per_row() -> None:
    captured = capture(copy.deepcopy(TIME["sinusoid and time mlp"]), WIDTH)
    assert [op.kind for op in captured.program.ops] == ["linear", "add"]
    (table,) = captured.tables(torch.tensor([4, 2, 0]))
    assert table.shape == (3, WIDTH)
    assert table.requires_grad


@pytest.mark.parametrize("body", ["mul", "broadcast", "expand", "one_dimension"])
def test_modules_that_take_time_as_one_number(body: str) -> None:
    def forward(s: Net, z: Tensor, t: Tensor) -> Tensor:
        if t.dim() != 0:
            raise TypeError("t must be a number")
        embedding = {
            "mul": lambda: sinusoid(t, 8),
            "broadcast": lambda: sinusoid(t, 8)[None],
            "expand": lambda: sinusoid(t.expand(z.shape[0]), 8),
            "one_dimension": lambda: sinusoid(t.reshape(1), 8),
        }[body]()
        return s.a(z) + s.b(embedding.to(z.dtype))

    net = Net(forward, a=linear(), b=linear(8)).double()
    captured = capture(net, WIDTH)
    z, _ = inputs()
    for t in (0, 7):
        tables = captured.tables(torch.tensor([t]))
        ours = reference.denoise(captured.program, z, [], tables, captured.parameters_now(), z.dtype)
        torch.testing.assert_close(ours, net(z, torch.tensor(t)), rtol=1e-6, atol=1e-7)
    (table,) = captured.tables(torch.tensor([5, 7, 9]))
    assert table.shape == (3, WIDTH)
    table.sum().backward()
    assert net.b.weight.grad is not None


@pytest.mark.parametrize("name", CONDITION)
def test_condition_enters_as_rows(name: str) -> None:
    captured = assert_captured(copy.deepcopy(CONDITION[name]), cond=True)
    assert len(captured.program.rows) == 1


def test_condition_that_is_not_used_makes_no_rows() -> None:
    captured = assert_captured(Net(lambda s, z, t, c=None: s.a(z), a=linear()), cond=True)
    assert captured.rows(torch.zeros(3, COND)) == []
    assert captured.rows(None) == []


def by_head(s: Net, z: Tensor, t: Tensor) -> Tensor:
    h = s.a(z).view(-1, 3, WIDTH // 3)
    first, rest = h[:, 0], h[:, 1:]
    return s.b(torch.cat([rest.flatten(1), first], 1))


SHAPES = {
    "residual": lambda s, z, t: z + s.b(F.relu(s.a(z))),
    "arithmetic": lambda s, z, t: (3 * s.a(z) - 1) / 4 + (2 - s.b(-z)) * 0.5,
    "square": lambda s, z, t: s.a(z) ** 2 + s.b(z).square(),
    "products of states": lambda s, z, t: s.a(z) * torch.sigmoid(s.b(z)),
    "by head": by_head,
    "split": lambda s, z, t: s.a(torch.cat(z.split([3, 4, 5], dim=1)[::-1], dim=1)),
    "unbind and stack": lambda s, z, t: s.a(torch.stack(z.view(-1, 3, 4).unbind(1)[::-1], dim=1).flatten(1)),
    "columns": lambda s, z, t: s.a(torch.cat([z[:, -3:], z[..., :-3]], -1)),
    "clamp": lambda s, z, t: s.a(z).clamp(min=0) + s.b(z).clamp_min(0),
    "map of one point": lambda s, z, t: F.adaptive_avg_pool2d(s.a(z)[..., None, None], 1).squeeze(),
    "matmul with parameters": lambda s, z, t: z @ s.a.weight + z @ s.b.weight[:, 2:].T.repeat(6, 2)[:WIDTH, :WIDTH],
    "one column": lambda s, z, t: s.a(z) + torch.cat([(z @ s.b.weight[0])[:, None], z[:, 1:]], 1),
    "zeros like": lambda s, z, t: torch.cat([s.a(z)[:, :6], torch.zeros_like(z[:, :6])], 1) + torch.ones_like(z),
    "scale of its own": lambda s, z, t: s.a(z) * s.b.bias + s.b.bias.exp() * torch.tensor(0.3),
    "same layer twice": lambda s, z, t: s.a(F.relu(s.a(z))),
    "output is a view": lambda s, z, t: s.a(z).unsqueeze(1).squeeze(1),
    "in place on the input": lambda s, z, t: s.a(z.clone().add_(1).mul_(2)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_arithmetic_and_shapes(name: str) -> None:
    assert_captured(Net(SHAPES[name], a=linear(), b=linear()))


@pytest.mark.parametrize(
    "make", [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrizations.orthogonal]
)
def test_computed_weights_are_captured_with_their_computation(make: Callable[[nn.Module], nn.Module]) -> None:
    assert_captured(Net(lambda s, z, t: s.a(z), a=make(linear())), kinds="linear")


def test_tied_weights_are_one_parameter() -> None:
    net = Net(lambda s, z, t: s.b(F.relu(s.a(z))) + F.linear(z, s.a.weight.t()), a=linear(), b=linear())
    net.b.weight = net.a.weight
    captured = assert_captured(net)
    assert captured.program.names.count("a.weight") == 1


def test_forward_may_branch_on_flags_dtypes_and_widths() -> None:
    def forward(s: Net, z: Tensor, t: Tensor) -> Tensor:
        if z.dtype == torch.float64 and z.shape[-1] == WIDTH and not isinstance(s.extra, str) and t.dim() == 1:
            return s.a(z) if s.training else s.b(z)
        raise AssertionError

    net = Net(forward, a=linear(), b=linear(), extra=3)
    assert assert_captured(net).program.names[0] == "a.weight"
    net.zero_grad()
    assert assert_captured(net.eval()).program.names[0] == "b.weight"


def test_dropout_that_does_nothing_leaves_no_trace() -> None:
    net = Net(lambda s, z, t: s.off(s.a(s.zero(z))), a=linear(), zero=nn.Dropout(0.0), off=nn.Dropout(0.5).eval())
    assert_captured(net, kinds="linear")


class ReleaseBottleneck(nn.Module):
    """A bottleneck as public releases write it: convolutions on maps of one point."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, inner, 1),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, inner, 3, padding=1),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, width, 1),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ReleaseDenoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Embedding(10, WIDTH)
        self.blocks = nn.Sequential(ReleaseBottleneck(WIDTH, 3), ReleaseBottleneck(WIDTH, 3))
        self.out = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.out(self.blocks(z + self.time(t)[..., None, None]))


@pytest.mark.parametrize("training", [True, False])
def test_convolutions_on_maps_of_one_point_become_linear(training: bool) -> None:
    net = ReleaseDenoiser().double().train(training)
    captured = capture(net, WIDTH, map_input=True)
    assert {op.kind for op in captured.program.ops} == {
        "add", "linear", "relu", "batch_norm" if training else "batch_norm_eval"
    }  # fmt: skip
    twin = copy.deepcopy(net)
    z, t = inputs()
    ours, theirs = run_captured(captured, z, t), twin(z[..., None, None], t).flatten(1)
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for (name, p), q in zip(net.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q[1].grad, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    centre = captured.parameters_now()[captured.program.names.index("blocks.0.body.3.weight.select(2, 1).select(2, 1)")]
    assert torch.equal(centre, net.blocks[0].body[3].weight[:, :, 1, 1])


def test_one_dimensional_convolution_inside_a_vector_module() -> None:
    net = Net(lambda s, z, t: s.c(z[..., None])[..., 0] + s.a(z), a=linear(), c=nn.Conv1d(WIDTH, WIDTH, 5, padding=2))
    assert_captured(net)

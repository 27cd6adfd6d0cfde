"""What cannot be captured is refused: every obstacle with its module path, operation and reason."""

from __future__ import annotations

import pickle
import timeit
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capture_cases import WIDTH, Net, linear
from gdpd_kernels import CaptureError, capture


@pytest.mark.parametrize(
    "net",
    [
        Net(lambda s, z, t: s.a(z + s.e(t)), e=nn.Embedding(10, WIDTH), a=linear()),
        Net(lambda s, z, t: s.b(F.relu(s.a(z) + s.e(t))), e=nn.Embedding(10, 20), a=linear(WIDTH, 20), b=linear(20)),
        Net(lambda s, z, t: s.a(z), features=WIDTH, other=linear(3, 3), a=linear()),
        Net(lambda s, z, t: s.n(z), n=nn.BatchNorm1d(WIDTH)),
    ],
)
def test_the_width_is_inferred(net: Net) -> None:
    assert capture(net).program.features == WIDTH


def test_a_width_that_cannot_be_inferred_is_asked_for() -> None:
    with pytest.raises(CaptureError, match=r"could not be inferred \(no layer tells it\); give features="):
        capture(Net(lambda s, z, t: z * 2))
    assert capture(Net(lambda s, z, t: z * 2), WIDTH).program.features == WIDTH
    with pytest.raises(CaptureError, match=r"could not be inferred \(5, 6\)"):
        capture(Net(lambda s, z, t: s.a(z), a=linear(5, 6)))


def no_grad(s: Net, z: Tensor, t: Tensor) -> Tensor:
    with torch.no_grad():
        h = s.a(z)
    return s.b(h)


def counts(s: Net, z: Tensor, t: Tensor) -> Tensor:
    s.seen.add_(1)
    return s.a(z) * s.seen


REFUSED: dict[str, tuple[Callable[..., object], list[str]]] = {
    "attention": (
        lambda s, z, t: (z.view(-1, 3, 4) @ z.view(-1, 3, 4).mT).flatten(1)[:, :1] * s.a(z),
        [r"the module \(Net\): bmm: a product of two activations"],
    ),
    "softmax": (lambda s, z, t: s.a(z).softmax(-1), [r"_softmax: a softmax over features"]),
    "dropout": (
        lambda s, z, t: s.drop(s.a(z)),
        [r"drop \(Dropout\): bernoulli_?: it draws random numbers; call .eval"],
    ),
    "noise on time": (
        lambda s, z, t: s.a(z) + s.drop(s.e(t)),
        ["drop .Dropout.: bernoulli_?: it draws random numbers"],
    ),
    "several": (
        lambda s, z, t: s.act(s.drop(s.a(z)).exp()).softmax(-1),
        ["drop .Dropout.: bernoulli", "the module .Net.: exp: ", "act .Softsign.: div: ", ": _softmax: "],
    ),
    "obstacle before an error": (
        lambda s, z, t: s.b(s.act(s.a(z))[:, :3]),
        ["act .Softsign.: div: ", "b .Linear.: raised RuntimeError"],
    ),
    "data-dependent branch": (lambda s, z, t: s.a(z) if z.sum() > 0 else z, ["reads values out of a tensor"]),
    "item": (lambda s, z, t: s.a(z) * t[0].item(), ["mul: uses a number read out of a tensor"]),
    "branch on the batch size": (
        lambda s, z, t: s.a(z) if z.shape[0] > 64 else s.b(z),
        [r"test_capture_refusals.py, line \d+ .*: branches on the batch size"],
    ),
    "batch size as a number": (lambda s, z, t: s.a(z) * z.shape[0], ["mul: computes with the batch size"]),
    "batch size as a number in time": (
        lambda s, z, t: s.a(z) + s.e(t) / z.shape[0],
        ["div: computes with the batch size"],
    ),
    "mean over the batch": (
        lambda s, z, t: s.a(z) - z.mean(0),
        [r"mean: its result \[12\] does not hold one row per sample"],
    ),
    "mean over the time steps": (lambda s, z, t: s.a(z) + s.e(t).mean(0), ["mean: its result mixes the rows"]),
    "softmax over the time steps": (lambda s, z, t: s.a(z) + s.e(t).softmax(0), ["differs from it by"]),
    "rows reversed": (lambda s, z, t: s.a(z).flip(0), ["flip: its result does not hold one row per sample"]),
    "part of the batch": (
        lambda s, z, t: torch.cat([s.a(z)[:1], z[1:]]),
        ["slice: its result|takes a part of dimension 0"],
    ),
    "rows folded together": (
        lambda s, z, t: s.a(z).view(-1, 6).relu().view(-1, WIDTH),
        [r"mixes the rows|one row per sample"],
    ),
    "a row in many pieces": (
        lambda s, z, t: s.a(z.repeat(1, 50).flip(1)[:, :WIDTH]),
        [r"flip: takes a row apart into 600 pieces; at most 256"],
    ),
    "columns by number": (lambda s, z, t: s.a(z)[:, torch.arange(11, -1, -1)], ["index: this operation"]),
    "mean of a row": (lambda s, z, t: s.a(z) - z.mean(-1, keepdim=True), ["sub: takes the mean or norm of a row"]),
    "sum of a row": (lambda s, z, t: s.a(z) * z.sum(1, keepdim=True), [r"sum: turns \[batch, 12\] into \[batch, 1\]"]),
    "norm of a row": (lambda s, z, t: s.a(z) * z.norm(dim=1, keepdim=True), ["mul: takes the mean or norm of a row"]),
    "root of a mean": (
        lambda s, z, t: s.a(z) * z.square().mean(1, keepdim=True).sqrt().sigmoid(),
        ["sigmoid: takes the mean or norm of a row"],
    ),
    "norm by the deviation": (
        lambda s, z, t: (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-3),
        ["add: takes the mean or norm of a row"],
    ),
    "norm with a high floor": (lambda s, z, t: F.normalize(s.a(z), eps=0.1), ["holds a norm above 0.1; only up to"]),
    "other precision": (lambda s, z, t: s.a(z).double().relu().float(), ["_to_copy: computes in torch.float64"]),
    "division of states": (lambda s, z, t: s.a(z) / (1 + s.b(z) ** 2), ["div: divides by a value that is made"]),
    "root": (lambda s, z, t: s.a(z) ** 0.5, ["pow: the exponent is 0.5; only 1, 2, 3 and 4"]),
    "power of the state": (lambda s, z, t: s.a(z) ** s.b(z), ["pow: the exponent is"]),
    "clamp to a tensor": (lambda s, z, t: s.a(z).clamp(max=s.e(t)), ["clamp: clamps to a tensor"]),
    "threshold with a jump": (lambda s, z, t: F.threshold(s.a(z), 0.0, 1.0), ["threshold: jumps at its threshold"]),
    "softplus with a threshold": (
        lambda s, z, t: F.softplus(s.a(z), threshold=3),
        ["softplus: has threshold 3 and beta 1; only threshold 20"],
    ),
    "elu turned over": (lambda s, z, t: F.celu(s.a(z), alpha=-1.0), ["celu: its input scale is -1"]),
    "detach": (lambda s, z, t: s.a(z).detach() + z, ["detach: cuts the gradient"]),
    "no_grad": (no_grad, ["a .Linear.: addmm: runs under torch.no_grad"]),
    "weights from the state": (lambda s, z, t: F.layer_norm(z, (WIDTH,), weight=s.e(t)[0]) + s.a(z), ["weight|mixes"]),
    "counting buffer": (counts, ["add_: changes seen in place"]),
    "groups of maps": (lambda s, z, t: F.group_norm(s.a(z).view(-1, 3, 4), 3).flatten(1), ["normalises .batch, 3, 4."]),
    "batch norm of a sequence": (
        lambda s, z, t: F.batch_norm(s.a(z).view(-1, 3, 4), None, None, training=True).flatten(1),
        [r"batch_norm: normalises \[batch, 3, 4\]"],
    ),
    "running statistics without a module": (
        lambda s, z, t: F.batch_norm(s.a(z), s.mean, s.var, training=True),
        ["batch_norm: updates running statistics of its own"],
    ),
    "convolution over features": (lambda s, z, t: s.conv(s.a(z)[:, None]).flatten(1), [r"convolves \[batch, 1, 12\]"]),
    "transposed convolution": (lambda s, z, t: s.up(s.a(z)[..., None]).flatten(1), ["transposed convolutions have no"]),
    "wrong width": (lambda s, z, t: s.wide(z), [r"returned \[batch, 13\]; expected a prediction \[batch, 12\]"]),
    "two results": (lambda s, z, t: (s.a(z), s.b(z)), ["returned tuple; expected one tensor"]),
    "wrong call": (lambda s, z: s.a(z), ["raised TypeError"]),
    "an error of its own": (lambda s, z, t: s.missing(z), ["the module .Net.: raised AttributeError: .*missing"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_every_obstacle_is_named(name: str) -> None:
    forward, expected = REFUSED[name]
    net = Net(
        forward,  # type: ignore[arg-type]
        a=linear(),
        b=linear(),
        wide=linear(WIDTH, 13),
        e=nn.Embedding(10, WIDTH),
        drop=nn.Dropout(0.3),
        act=nn.Softsign(),
        conv=nn.Conv1d(1, 1, 3, padding=1),
        up=nn.ConvTranspose1d(WIDTH, WIDTH, 1),
    )
    for buffer in ("seen", "mean", "var"):
        net.register_buffer(buffer, torch.ones(WIDTH))
    with pytest.raises(CaptureError) as caught:
        capture(net, WIDTH)
    for pattern in expected:
        assert caught.match(pattern)
    assert len(caught.value.reasons) >= len(expected)
    assert pickle.loads(pickle.dumps(caught.value)).reasons == caught.value.reasons


def test_a_refusal_is_remembered_until_the_module_changes() -> None:
    net = Net(lambda s, z, t: s.drop(s.a(z)), a=linear(), drop=nn.Dropout(0.5))
    with pytest.raises(CaptureError):
        capture(net, WIDTH)
    started = timeit.default_timer()
    with pytest.raises(CaptureError):
        capture(net, WIDTH)
    assert timeit.default_timer() - started < 0.01
    net.drop.p = 0.0
    assert capture(net, WIDTH).program.features == WIDTH


def test_arguments_are_checked_by_name() -> None:
    with pytest.raises(TypeError, match=r"module: expected an nn.Module, got function"):
        capture(lambda z, t: z, WIDTH)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="features is 0"):
        capture(nn.Identity(), 0)
    with pytest.raises(ValueError, match=r"cond_features is 2\.5"):
        capture(nn.Identity(), WIDTH, 2.5)  # type: ignore[arg-type]


def test_a_captured_denoiser_prints_its_program() -> None:
    text = repr(capture(Net(lambda s, z, t: s.a(z), a=linear()), WIDTH))
    assert "CapturedDenoiser(Net)" in text
    assert "linear(z, p0, p1)" in text

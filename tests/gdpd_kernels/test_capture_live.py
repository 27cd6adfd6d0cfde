"""A capture stays live: it reads the module as it is, notices what changes, and traces under torch.compile."""

from __future__ import annotations

import copy
import gc
import pickle
import timeit
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from capture_cases import COND, CONDITION, WIDTH, Net, inputs, linear, run_captured, simple
from gdpd_kernels import CaptureError, capture


def test_parameters_are_read_at_every_call() -> None:
    net = simple().double().eval()
    captured = capture(net, WIDTH)
    z, t = inputs()
    changes = [
        lambda: torch.optim.SGD(net.parameters(), 0.1).step(),
        lambda: net.load_state_dict(simple().state_dict()),
        lambda: net.body[0].weight.data.mul_(2),
        lambda: net.body[0].register_parameter("weight", nn.Parameter(torch.randn(WIDTH, WIDTH).double())),
        lambda: net.load_state_dict(simple().double().state_dict(), assign=True),
    ]
    for change in changes:
        run_captured(captured, z, t).sum().backward()
        change()
        captured = captured.current()
        torch.testing.assert_close(run_captured(captured, z, t), net(z, t))


def test_capture_is_found_again_while_nothing_changes() -> None:
    net = simple()
    first = capture(net, WIDTH)
    assert first.current() is first
    assert capture(net, WIDTH).program is first.program
    for p in net.parameters():
        p.requires_grad_(False)
    assert capture(net, WIDTH).program is first.program
    net.eval()
    assert capture(net, WIDTH).program is not first.program
    net.train()
    assert capture(net, WIDTH).program is first.program


def replace_layer(net: Net) -> None:
    net.body[2] = nn.SiLU()


CHANGES: dict[str, Callable[[Net], object]] = {
    "eval": lambda net: net.eval(),
    "eval of one layer": lambda net: net.body[1].eval(),
    "layer replaced": replace_layer,
    "layer appended": lambda net: net.body.append(nn.Tanh()),
    "layer removed": lambda net: net.body.pop(2),
    "attribute": lambda net: setattr(net, "factor", 3.0),
    "attribute of a layer": lambda net: setattr(net.body[1], "eps", 0.1),
    "dtype": lambda net: net.float(),
    "bias removed": lambda net: net.body[0].register_parameter("bias", None),
    "width": lambda net: (net.body.insert(3, linear(WIDTH, 9).double()), setattr(net.body, "4", linear(9).double())),
    "forward of another class": lambda net: net.body.__setitem__(3, nn.Sequential(linear(bias=False)).double()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_the_module_are_noticed(name: str) -> None:
    net = simple().double()
    captured = capture(net, WIDTH)
    CHANGES[name](net)
    renewed = captured.current()
    assert renewed is not captured
    z, t = inputs()
    z = z.to(net.e.weight.dtype)
    torch.testing.assert_close(run_captured(renewed, z, t), copy.deepcopy(net)(z, t))


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre", "module_forward"])
def test_a_module_with_hooks_is_not_captured_until_they_are_gone(kind: str) -> None:
    net = simple()
    captured = capture(net, WIDTH)
    owner = nn.modules.module if kind == "module_forward" else net.body[2]
    handle = getattr(owner, f"register_{kind}_hook")(lambda *_: pytest.fail("capturing must call no hook"))
    try:
        place = "every module" if kind == "module_forward" else r"body\.2 \(ReLU\)"
        with pytest.raises(CaptureError, match=f"{place}: has a .*hook"):
            captured.current()
        with pytest.raises(CaptureError, match="hook"):
            capture(net, WIDTH)
    finally:
        handle.remove()
    assert captured.current() is captured


def test_hooks_that_compute_a_weight_are_captured_and_their_exchange_is_noticed() -> None:
    net = Net(lambda s, z, t: s.a(z), a=nn.utils.weight_norm(linear(), dim=0)).double()
    z, t = inputs()
    captured = capture(net, WIDTH)
    torch.testing.assert_close(run_captured(captured, z, t), net(z, t))
    with torch.no_grad():
        net.a.weight_g.mul_(3)
    torch.testing.assert_close(run_captured(captured.current(), z, t), net(z, t))
    nn.utils.remove_weight_norm(net.a)
    nn.utils.weight_norm(net.a, dim=1)
    assert captured.current() is not captured
    torch.testing.assert_close(run_captured(captured.current(), z, t), net(z, t))


def test_a_plain_tensor_attribute_is_watched() -> None:
    net = Net(lambda s, z, t: s.a(z) * s.scale, a=linear(), scale=torch.full((WIDTH,), 2.0)).double()
    net.scale = net.scale.double()
    captured = capture(net, WIDTH)
    z, t = inputs()
    net.scale.mul_(3)
    torch.testing.assert_close(run_captured(captured, z, t), net(z, t))
    net.scale = torch.full((1,), 5.0, dtype=torch.float64)
    assert captured.current() is not captured
    torch.testing.assert_close(run_captured(captured.current(), z, t), net(z, t))


def test_swapped_parameters_of_the_same_form_need_no_new_capture() -> None:
    net = simple().double().eval()
    captured = capture(net, WIDTH)
    other = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    z, t = inputs()

    def both(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        again = captured.current()
        assert again is captured
        return run_captured(again, z, t), Net.forward(net, z, t)

    wrapped = Net(lambda s, z, t: both(z, t), net=net)
    ours, theirs = torch.func.functional_call(wrapped, {f"net.{k}": v for k, v in other.items()}, (z, t))
    torch.testing.assert_close(ours, theirs)


def test_a_counter_that_forward_keeps_does_not_end_a_capture() -> None:
    def forward(s: Net, z: Tensor, t: Tensor) -> Tensor:
        s.calls += 1
        return s.a(z)

    net = Net(forward, a=linear(), calls=0)
    captured = capture(net, WIDTH)
    assert net.calls == 0
    net(torch.zeros(2, WIDTH), torch.zeros(2, dtype=torch.int64))
    assert captured.current() is captured


def test_an_attribute_that_changes_at_every_call_is_told_about() -> None:
    net = Net(lambda s, z, t: s.a(z) * s.factor, a=linear(), factor=1.0)

    def train() -> None:
        for epoch in range(10):
            net.factor = float(epoch)
            capture(net, WIDTH)

    with pytest.warns(UserWarning, match="factor changes between calls"):
        train()


def test_capturing_leaves_the_module_and_the_random_state_alone() -> None:
    net = simple()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    attributes = set(vars(net))
    capture(net, WIDTH)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(vars(net)) == attributes
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in net.parameters())
    assert not net._forward_hooks


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = linear()

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.a(z)


def test_modules_and_captures_copy_and_pickle() -> None:
    net = Plain()
    captured = capture(net, WIDTH)
    for other in (copy.deepcopy(captured), pickle.loads(pickle.dumps(captured))):
        assert other.program == captured.program
        assert other.module is not net
    twin = pickle.loads(pickle.dumps(net))
    assert capture(copy.deepcopy(net), WIDTH).program == capture(twin, WIDTH).program
    with torch.no_grad():
        twin.a.weight.zero_()
    assert captured.parameters_now()[0] is net.a.weight


class OnlyNorm(nn.BatchNorm1d):
    def forward(self, z: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(z)


@pytest.mark.parametrize("make", [simple, lambda: OnlyNorm(WIDTH)])
def test_the_cache_lets_go_of_a_module(make: Callable[[], nn.Module]) -> None:
    net = make()
    assert capture(net, WIDTH).batch_norms == [m for m in net.modules() if isinstance(m, nn.BatchNorm1d)]
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_surroundings_do_not_change_what_is_captured(surroundings: Callable[[], object]) -> None:
    plain = capture(simple(), WIDTH).program
    net = simple()
    with surroundings():  # type: ignore[attr-defined]
        assert capture(net, WIDTH).program == plain


def test_the_check_of_a_known_capture_takes_microseconds() -> None:
    blocks = nn.Sequential(*(nn.Sequential(linear(), nn.BatchNorm1d(WIDTH), nn.ReLU()) for _ in range(7)))
    net = Net(lambda s, z, t: s.blocks(z), blocks=blocks)
    assert len(list(net.modules())) == 30
    capture(net, WIDTH)
    # 7 µs on the machine of docs/performance.md; the bound leaves room for a busy one.
    assert min(timeit.repeat(lambda: capture(net, WIDTH), number=200, repeat=5)) / 200 < 60e-6


# --- under torch.compile ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cond", [False, True])
def test_capture_traces_in_one_graph(cond: bool) -> None:
    net = copy.deepcopy(CONDITION["with time"] if cond else simple()).double()

    def step(*given: Tensor) -> Tensor:
        return run_captured(capture(net, WIDTH, COND if cond else None), *given)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    given = inputs(cond)
    torch.testing.assert_close(compiled(*given), step(*given))
    compiled(*given).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.1)
    torch.testing.assert_close(compiled(*given), step(*given))
    net.eval()
    torch.testing.assert_close(compiled(*given), step(*given))


def test_a_failed_capture_raises_in_the_compiled_function_too() -> None:
    net = Net(lambda s, z, t: s.a(z).softmax(-1), a=linear())

    def step(z: Tensor) -> Tensor:
        try:
            return capture(net, WIDTH).tables(z)[0]
        except CaptureError:
            return z * 2

    z = torch.ones(2, WIDTH)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(z), z * 2)

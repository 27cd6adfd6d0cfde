"""FlatAdam is torch's Adam after torch's clipping, also where some parameters have no gradient for a while."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gdpd.training.adam import FlatAdam


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 3), nn.Linear(3, 1))


def grouped(net: nn.Sequential) -> list[list[nn.Parameter]]:
    return [list(net[:2].parameters()), list(net[2:].parameters())]


def flat(net: nn.Sequential, max_norm: float | None = 0.5) -> FlatAdam:
    return FlatAdam(grouped(net), lr=1e-2, weight_decay=1e-2, max_norm=max_norm)


def give_gradients(nets: list[nn.Sequential], step: int) -> None:
    """The same gradients to every network; which parameters get none changes every four steps."""
    generator = torch.Generator().manual_seed(step)
    for index, twins in enumerate(zip(*(net.parameters() for net in nets), strict=True)):
        gradient = torch.randn(twins[0].shape, generator=generator, dtype=twins[0].dtype)
        for parameter in twins:
            parameter.grad = gradient.clone() if (step // 4 + index) % 3 else None


@pytest.mark.parametrize("max_norm", [0.5, None])
def test_flat_adam_is_torch_s_adam_after_clipping_by_group(max_norm: float | None) -> None:
    net = network().double()
    twin = copy.deepcopy(net)
    mine = flat(net, max_norm)
    theirs = torch.optim.Adam([{"params": group} for group in grouped(twin)], lr=1e-2, weight_decay=1e-2)
    for step in range(16):
        for optimizer in (mine, theirs):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + step)
        give_gradients([net, twin], step)
        mine.step()
        for group in theirs.param_groups if max_norm is not None else ():
            nn.utils.clip_grad_norm_(group["params"], max_norm)
        theirs.step()
        for a, b in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for index, entries in theirs.state_dict()["state"].items():
        for name, value in entries.items():
            torch.testing.assert_close(mine.state_dict()["state"][index][name], value, rtol=1e-10, atol=1e-14)


def test_a_state_taken_up_goes_on_with_the_same_bits() -> None:
    net = network()
    optimizer = flat(net)
    for step in range(6):
        optimizer.zero_grad()
        give_gradients([net], step)
        optimizer.step()
    twin = copy.deepcopy(net)
    other = flat(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(6, 14):
        for one in (optimizer, other):
            one.zero_grad()
        give_gradients([net, twin], step)
        optimizer.step()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_parameters_are_views_of_one_tensor_until_they_are_released() -> None:
    net = network()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    optimizer = flat(net)
    assert all(parameter.data_ptr() % 64 == 0 for parameter in net.parameters())
    storages = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    assert len(storages) == 2
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    optimizer.release()
    assert len({parameter.untyped_storage().data_ptr() for parameter in net.parameters()}) == len(before)


def test_what_cannot_be_laid_out_is_refused() -> None:
    net = network()
    net[1].double()
    with pytest.raises(ValueError, match="one dtype on the CPU"):
        flat(net)
    optimizer = flat(network())
    with pytest.raises(ValueError, match="set_to_none"):
        optimizer.zero_grad(set_to_none=False)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)

"""Tables over time of a frozen denoiser are kept from call to call, and made anew whenever they could differ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gdpd_kernels as gk
from modules import sinusoid

TABLE = gk.ddim_table(num_inference_steps=4)
OTHER = gk.ddim_table(num_inference_steps=4, window="lower")


class Timed(nn.Module):
    """A denoiser whose time embedding is a network of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 12), nn.SiLU(), nn.Linear(12, 8))
        self.body = nn.Linear(8, 8)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.body(torch.tanh(z + self.time(sinusoid(t, 16, z.dtype))))


def frozen() -> Timed:
    torch.manual_seed(3)
    return Timed().double().requires_grad_(False)


def loop(net: nn.Module, z: Tensor, table: gk.DDIMTable) -> Tensor:
    for t, (a, b, _) in zip(table.timesteps, table.coefficients, strict=True):
        z = a * z + b * net(z, torch.full((len(z),), t))
    return z


def made(captured: gk.CapturedDenoiser, table: gk.DDIMTable = TABLE) -> list[Tensor]:
    return captured.tables_of(table.timesteps, torch.tensor(table.timesteps))


def test_tables_of_a_frozen_denoiser_are_kept() -> None:
    captured = gk.capture(frozen(), 8)
    first = made(captured)
    assert first
    assert all(a is b for a, b in zip(made(captured), first, strict=True))


CHANGES: dict[str, Callable[[Timed], object]] = {
    "in place": lambda net: net.time[0].weight.mul_(2),
    "through .data": lambda net: net.time[0].weight.data.mul_(2),
    "other data": lambda net: setattr(net.time[2].bias, "data", torch.ones(8).double()),
    "another parameter": lambda net: setattr(net.time[2], "bias", nn.Parameter(torch.ones(8).double())),
    "state dict": lambda net: net.load_state_dict(Timed().double().state_dict()),
    "NaN": lambda net: net.time[2].bias.fill_(torch.nan),
    "single precision": lambda net: net.float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_time_network_is_seen_in_the_next_call(change: str) -> None:
    net, z = frozen(), torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(gk.reverse_sample(net, z, table=TABLE), loop(net, z, TABLE))
    CHANGES[change](net)
    z = z.to(net.body.weight.dtype)
    torch.testing.assert_close(gk.reverse_sample(net, z, table=TABLE), loop(net, z, TABLE), equal_nan=True)


def test_other_steps_have_other_tables() -> None:
    net, z = frozen(), torch.randn(5, 8, dtype=torch.float64)
    for table in (TABLE, OTHER, TABLE):
        torch.testing.assert_close(gk.reverse_sample(net, z, table=table), loop(net, z, table))


def test_gradients_of_the_time_network_are_asked_for_again_after_a_frozen_call() -> None:
    net, z = frozen(), torch.randn(5, 8, dtype=torch.float64)
    gk.reverse_sample(net, z, table=TABLE)
    net.requires_grad_(True)
    gk.reverse_sample(net, z, table=TABLE).sum().backward()
    found = net.time[0].weight.grad
    net.zero_grad()
    loop(net, z, TABLE).sum().backward()
    torch.testing.assert_close(found, net.time[0].weight.grad)


def test_tables_kept_in_inference_mode_serve_training() -> None:
    net, z = frozen(), torch.randn(5, 8, dtype=torch.float64)
    with torch.inference_mode():
        gk.reverse_sample(net, z, table=TABLE)
    z.requires_grad_()
    found = torch.autograd.grad(gk.reverse_sample(net, z, table=TABLE).sum(), z)
    torch.testing.assert_close(found, torch.autograd.grad(loop(net, z, TABLE).sum(), z))


def test_a_lookup_is_not_kept() -> None:
    """Comparing an embedding takes longer than looking four rows up."""

    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.body = nn.Embedding(1000, 8), nn.Linear(8, 8)

        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            return self.body(z + self.table(t))

    captured = gk.capture(Looked().requires_grad_(False), 8)
    assert made(captured)[0] is not made(captured)[0]

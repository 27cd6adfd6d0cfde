"""Names reach whoever listens, and nobody else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import gdpd_kernels as gk
from gdpd_kernels import ranges


class Heard:
    """Notes what begins and ends."""

    def __init__(self) -> None:
        self.told: list[str] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.told.append(f"+{name}")
        yield
        self.told.append(f"-{name}")


def test_spans_nest_and_reach_every_listener_until_the_block_ends() -> None:
    one, two = Heard(), Heard()
    with ranges.listening(one), ranges.listening(two), ranges.span("a"), ranges.span("b"):
        pass
    assert one.told == two.told == ["+a", "+b", "-b", "-a"]
    with ranges.span("c"):
        pass
    assert len(one.told) == 4


def test_a_listener_is_gone_after_an_error() -> None:
    heard = Heard()
    with pytest.raises(RuntimeError), ranges.listening(heard):
        raise RuntimeError
    with ranges.span("a"):
        pass
    assert not heard.told
    assert not ranges._listeners


def test_nothing_is_made_while_nobody_listens() -> None:
    assert ranges.span("a") is ranges.span("b")


def test_the_operators_have_names() -> None:
    heard = Heard()
    denoiser = _Denoiser()
    table = gk.ddim_table(num_train_timesteps=10, num_inference_steps=2)
    with ranges.listening(heard):
        gk.reverse_sample(denoiser, torch.randn(3, 4), table=table)
        gk.prior_loss(denoiser, torch.randn(3, 4), alphas_cumprod=table_alphas())
    expected = ["+reverse_sample", "+sampler forward", "+prior_loss"]
    assert [name for name in heard.told if name[0] == "+"] == expected


def test_the_sampler_s_passes_come_with_batch_steps_and_backend() -> None:
    facts = {}

    @contextmanager
    def listen(name: ranges.Name) -> Iterator[None]:
        facts[str(name)] = dict(name.facts)
        yield

    table = gk.ddim_table(num_train_timesteps=10, num_inference_steps=2)
    with ranges.listening(listen):
        z = torch.randn(3, 4, requires_grad=True)
        gk.reverse_sample(_Denoiser(), z, table=table, backend="reference").sum().backward()
    expected = {"batch": 3, "steps": 2, "samples": 1, "backend": "reference"}
    assert facts == {"reverse_sample": {}, "sampler forward": expected, "sampler backward": expected}


def table_alphas() -> torch.Tensor:
    return gk.alphas_cumprod("linear", num_train_timesteps=10)


class _Denoiser(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.layer(z)

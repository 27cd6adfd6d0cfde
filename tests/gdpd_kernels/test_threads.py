"""Threads: the same bits for every number of them, and no second pool beside torch's."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gdpd_kernels as gk
from gdpd_kernels.backends import load

NATIVE = not load("native").unusable()
needs_native = pytest.mark.skipif(not NATIVE, reason="the compiled module is missing")


class Net(nn.Module):
    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.time = nn.Embedding(1000, 40)
        self.first = nn.Linear(40, 70)
        self.norm = norm(70)
        self.last = nn.Linear(70, 40)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return z + self.last(nn.functional.silu(self.norm(self.first(z + self.time(t)))))


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def sample(net: nn.Module, z: Tensor, noise: Tensor) -> list[Tensor]:
    net.zero_grad()
    leaf = z.clone().requires_grad_()
    table = gk.ddim_table(num_inference_steps=3, eta=0.5)
    z_hat = gk.reverse_sample(net, leaf, table=table, alpha=0.4, noise=noise, seed=7, backend="native")
    z_hat.square().sum().backward()
    return [z_hat.detach(), leaf.grad, *(p.grad for p in net.parameters())]


@needs_native
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
@pytest.mark.parametrize("batch", [33, 700])
def test_results_are_bit_equal_for_every_thread_count(norm, batch):
    torch.manual_seed(0)
    net, z, noise = Net(norm), torch.randn(batch, 40), torch.randn(batch, 40)
    torch.set_num_threads(1)
    expected = sample(net, z, noise)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        for got, want in zip(sample(net, z, noise), expected, strict=True):
            assert torch.equal(got, want), threads


@needs_native
@pytest.mark.usefixtures("_threads")
@pytest.mark.skipif("OpenMP" not in torch.__config__.parallel_info(), reason="torch without OpenMP")
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc")
def test_kernels_run_on_the_threads_that_torch_has():
    from gdpd_kernels import _native

    assert _native.uses_openmp()
    torch.set_num_threads(2)
    torch.mm(torch.randn(600, 600), torch.randn(600, 600))
    net, z = Net(nn.LayerNorm), torch.randn(700, 40)
    sample(net, z, torch.randn(700, 40))
    before = len(list(Path("/proc/self/task").iterdir()))
    for _ in range(5):
        torch.mm(torch.randn(600, 600), torch.randn(600, 600))
        sample(net, z, torch.randn(700, 40))
    assert len(list(Path("/proc/self/task").iterdir())) == before

"""reverse_sample and prior_loss inside torch.compile(fullgraph=True), with a dynamic batch."""

import copy

import pytest
import torch
from torch import Tensor, nn

import gdpd_kernels as gk


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Embedding(1000, 24)
        self.first = nn.Linear(12, 24)
        self.norm = nn.BatchNorm1d(24)
        self.last = nn.Linear(24, 12)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(z)) + self.time(t)))


TABLE = gk.ddim_table(num_inference_steps=3, window="lower")


@pytest.mark.parametrize("backend", [b["name"] for b in gk.backends() if b["usable"]])
def test_compiled_sampler_matches_eager_for_two_batch_sizes_with_gradients_and_running_statistics(backend):
    torch.manual_seed(0)
    net = Net().double()
    captured = gk.capture(net)

    def loss(z: Tensor, alpha: Tensor, noise: Tensor) -> Tensor:
        return gk.reverse_sample(captured, z, table=TABLE, alpha=alpha, noise=noise, backend=backend).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    state = copy.deepcopy(net.state_dict())
    for batch in (8, 21):
        z, alpha, noise = (torch.randn(batch, n, dtype=torch.float64) for n in (12, 1, 12))
        results = []
        for run in (loss, compiled):
            net.load_state_dict(state)
            net.zero_grad()
            inputs = [x.clone().requires_grad_() for x in (z, alpha)]
            value = run(*inputs, noise)
            value.backward()
            gradients = [x.grad for x in (*inputs, *net.parameters())]
            results.append([value.detach(), *gradients, *(b.clone() for b in net.buffers())])
        for got, expected in zip(*reversed(results), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_noise_and_time_steps_are_drawn_inside_a_compiled_graph():
    net = gk.capture(Net().eval())
    alphas_cumprod = gk.alphas_cumprod()

    def both(z: Tensor) -> tuple[Tensor, Tensor]:
        z_hat = gk.reverse_sample(net, z, table=TABLE, alpha=0.5)
        return z_hat, gk.prior_loss(net, z, alphas_cumprod=alphas_cumprod)

    compiled = torch.compile(both, fullgraph=True)
    z = torch.randn(9, 12)
    first, second = compiled(z), compiled(z)
    assert torch.isfinite(first[0]).all()
    assert torch.isfinite(first[1])
    assert not torch.equal(first[0], second[0])  # another draw, not a constant of the graph

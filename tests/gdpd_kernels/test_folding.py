"""Folding inside reverse_sample: only where it pays, and with the same result."""

import torch
from torch import nn

import gdpd_kernels as gk
from gdpd_kernels import functional


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Embedding(1000, 24)
        self.first = nn.Linear(8, 24)
        self.norm = nn.BatchNorm1d(24)
        self.last = nn.Linear(24, 8)

    def forward(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(self.first(z) + self.time(t))))


def sample(net: nn.Module, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    z = z.clone().requires_grad_()
    z_hat = gk.reverse_sample(net, z, table=gk.ddim_table(num_inference_steps=4))
    return z_hat.detach(), torch.autograd.grad(z_hat.square().sum(), z)[0]


def test_folded_evaluation_batch_norm_gives_the_same_samples_and_gradients(monkeypatch):
    torch.manual_seed(0)
    net = Net().double()
    net(torch.randn(64, 8, dtype=torch.float64), torch.randint(0, 1000, (64,)))  # running statistics of their own
    net.eval().requires_grad_(False)
    z = torch.randn(33, 8, dtype=torch.float64)
    plain = sample(net, z)
    folded = []
    original = functional._folded
    monkeypatch.setattr(functional, "_folded", lambda program: folded.append(program) or original(program))
    monkeypatch.setattr(functional, "FOLDING_PAYS_FROM", 33 * 4)
    for got, expected in zip(sample(net, z), plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert len(folded) == 1


def test_nothing_is_folded_while_parameters_train_or_the_batch_is_small(monkeypatch):
    monkeypatch.setattr(functional, "_folded", lambda program: (_ for _ in ()).throw(AssertionError("folded")))
    net = Net().eval()
    sample(net.requires_grad_(False), torch.randn(4, 8))
    monkeypatch.setattr(functional, "FOLDING_PAYS_FROM", 1)
    sample(net.requires_grad_(True), torch.randn(4, 8))
    sample(net.requires_grad_(False).train(), torch.randn(4, 8))

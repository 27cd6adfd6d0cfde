"""A plain PyTorch loop: learn a diffusion prior over teacher features, then train a student through its sampler."""

import torch
import torch.nn.functional as F
from torch import nn

import gdpd_kernels as gk

FEATURES = 32


class Denoiser(nn.Module):
    """Any module (z [batch, features], t int64 [batch]) -> [batch, features] is a denoiser."""

    def __init__(self):
        super().__init__()
        self.time = nn.Embedding(1000, 64)
        self.inner, self.outer = nn.Linear(FEATURES, 64), nn.Linear(64, FEATURES)

    def forward(self, z, t):
        return self.outer(F.silu(self.inner(z) + self.time(t)))


def main(steps=300):
    """Returns the losses of both stages, a list each."""
    torch.manual_seed(0)
    labels = torch.randint(4, (256,))
    z_long = 2 * torch.randn(4, FEATURES)[labels] + 0.3 * torch.randn(256, FEATURES)  # the teacher's features
    x = z_long[:, :8] + 0.5 * torch.randn(256, 8)  # what a student sees

    denoiser = Denoiser()
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=3e-3)
    alphas_cumprod = gk.alphas_cumprod("linear", num_train_timesteps=1000)
    prior_losses = []
    for _ in range(steps):
        loss = gk.prior_loss(denoiser, z_long, alphas_cumprod=alphas_cumprod)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        prior_losses.append(loss.item())

    student, head = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, FEATURES)), nn.Linear(FEATURES, 4)
    optimizer = torch.optim.Adam([*student.parameters(), *head.parameters()], lr=3e-3)
    denoiser.requires_grad_(False)
    table = gk.ddim_table(num_inference_steps=5, window="lower")
    losses = []
    for _ in range(steps):
        z_short = student(x)
        z_hat = gk.reverse_sample(denoiser, z_short, table=table, alpha=0.8)  # the whole sampler, one operation
        loss = F.cross_entropy(head(z_short), labels) + F.cross_entropy(head(z_hat), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return prior_losses, losses


if __name__ == "__main__":
    for name, losses in zip(("prior", "student"), main(), strict=True):
        print(f"{name}: {losses[0]:.3f} -> {losses[-1]:.3f}")

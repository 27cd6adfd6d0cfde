"""The rivals: the same sampler as people write it by hand in PyTorch, from the public releases' way to a hoisted loop.

Written from the description in docs/method.md, not from anybody's code. All of them, and the module that the operator
captures, hold the same weights, so that every contender of a benchmark computes the same function.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gdpd_kernels as gk

TRAIN_TIMESTEPS = 1000
TIME_ROWS = 1280  # of the paper's learned time table

# --- networks in Linear layers ----------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """A denoiser whose time embedding can be computed apart from the rest: what hoisting needs."""

    def time(self, t: Tensor) -> Tensor:
        """The embedding of time steps, int64 [...] -> [..., width]."""
        raise NotImplementedError

    def step(self, z: Tensor, time: Tensor) -> Tensor:
        """The prediction [batch, features] for z [batch, features], given the embedding of its time step."""
        raise NotImplementedError

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.step(z, self.time(t))


class Bottleneck(nn.Module):
    """x + BN(W3 relu(BN(W2 relu(BN(W1 x))))), widths A -> A/r -> A/r -> A (GDPD; DiffKD, arXiv 2305.15712)."""

    def __init__(self, features: int, reduction: int = 4) -> None:
        super().__init__()
        inner = features // reduction
        self.linear1, self.norm1 = nn.Linear(features, inner), nn.BatchNorm1d(inner)
        self.linear2, self.norm2 = nn.Linear(inner, inner), nn.BatchNorm1d(inner)
        self.linear3, self.norm3 = nn.Linear(inner, features), nn.BatchNorm1d(features)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm1(self.linear1(x)))
        h = torch.relu(self.norm2(self.linear2(h)))
        return x + self.norm3(self.linear3(h))


class PaperDenoiser(Denoiser):
    """The paper's network: h = z + E[t], two bottlenecks, Linear, BatchNorm."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TIME_ROWS, features)
        self.block1, self.block2 = Bottleneck(features), Bottleneck(features)
        self.out, self.out_norm = nn.Linear(features, features), nn.BatchNorm1d(features)

    def time(self, t: Tensor) -> Tensor:
        return self.embedding(t)

    def step(self, z: Tensor, time: Tensor) -> Tensor:
        return self.out_norm(self.out(self.block2(self.block1(z + time))))


class MLPDenoiser(Denoiser):
    """A SiLU MLP; the time embedding is added to the first hidden layer. `learned`: a table in place of a sinusoid."""

    def __init__(self, features: int, hidden: Sequence[int] = (256, 256), learned: bool = False) -> None:
        super().__init__()
        widths = [features, *hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.out = nn.Linear(widths[-1], features)
        if learned:
            self.time_network: nn.Module = nn.Embedding(TRAIN_TIMESTEPS, widths[1])
        else:
            project = nn.Linear(128, widths[1]), nn.SiLU(), nn.Linear(widths[1], widths[1])
            self.time_network = nn.Sequential(Sinusoid(128), *project)

    def time(self, t: Tensor) -> Tensor:
        return self.time_network(t)

    def step(self, z: Tensor, time: Tensor) -> Tensor:
        first, *rest = self.layers
        h = F.silu(first(z) + time)
        for layer in rest:
            h = F.silu(layer(h))
        return self.out(h)


class Sinusoid(nn.Module):
    """sin and cos of t at dim / 2 frequencies (Vaswani et al., 2017, section 3.5)."""

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        frequencies = torch.exp(torch.arange(dim // 2) * (-math.log(10000.0) / (dim // 2)))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t.unsqueeze(-1) * self.frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


# --- the paper's network as the releases write it ---------------------------------------------------------------------


class ReleaseBottleneck(nn.Module):
    """The bottleneck with convolutions on 1 × 1 maps: of the 3 × 3 kernel only the centre tap meets data."""

    def __init__(self, features: int, reduction: int = 4) -> None:
        super().__init__()
        inner = features // reduction
        self.body = nn.Sequential(
            nn.Conv2d(features, inner, 1),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, features, 1),
            nn.BatchNorm2d(features),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ReleaseDenoiser(nn.Module):
    """The paper's network with 1 × 1 and 3 × 3 convolutions, on maps [batch, features, 1, 1]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TIME_ROWS, features)
        self.blocks = nn.Sequential(ReleaseBottleneck(features), ReleaseBottleneck(features))
        self.out = nn.Sequential(nn.Conv2d(features, features, 1), nn.BatchNorm2d(features))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.out(self.blocks(z + self.embedding(t)[..., None, None]))

    @torch.no_grad()
    def load(self, twin: PaperDenoiser) -> ReleaseDenoiser:
        """Take over the weights of `twin`, whose parameters come in the same order."""
        for mine, theirs in zip(self.parameters(), twin.parameters(), strict=True):
            centre(mine).copy_(theirs)
        return self


def centre(tensor: Tensor) -> Tensor:
    """The part of a convolution's weight, or of a 1 × 1 map, that a Linear layer has too."""
    return tensor if tensor.dim() < 4 else tensor[:, :, tensor.shape[2] // 2, tensor.shape[3] // 2]


# --- loops ------------------------------------------------------------------------------------------------------------


class ReleaseScheduler:
    """DDIM as in public code: coefficients from tensors at every step, nothing kept from one call to the next."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        betas = torch.linspace(1e-4, 0.02, TRAIN_TIMESTEPS, dtype=torch.float64)
        self.alphas_cumprod = (1 - betas).cumprod(0).to(dtype)
        self.final_alpha_cumprod = torch.tensor(1.0)

    def set_timesteps(self, steps: int, device: torch.device | str = "cpu") -> None:
        """A grid of `steps` time steps, descending."""
        self.stride = TRAIN_TIMESTEPS // steps
        self.timesteps = (torch.arange(steps, device=device) * self.stride).flip(0)

    def step(self, eps: Tensor, t: Tensor, z: Tensor, eta: float = 0.0) -> Tensor:
        """One step from t to t - stride (Song et al., 2021, eq. 12)."""
        previous = t - self.stride
        alpha_bar = self.alphas_cumprod[t]
        alpha_bar_prev = self.alphas_cumprod[previous] if previous >= 0 else self.final_alpha_cumprod
        x0 = (z - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
        variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
        sigma = eta * variance**0.5
        z = alpha_bar_prev**0.5 * x0 + (1 - alpha_bar_prev - sigma**2) ** 0.5 * eps
        return z + sigma * torch.randn_like(z) if eta > 0 else z


def release_sample(
    module: ReleaseDenoiser, z_short: Tensor, noise: Tensor, alpha: Tensor, scheduler: ReleaseScheduler, steps: int
) -> Tensor:
    """The sampler of the releases: a grid of 2 `steps` time steps, of which the lower half is walked, on 1 × 1 maps."""
    scheduler.set_timesteps(2 * steps, z_short.device)
    z = alpha[:, :, None, None] * z_short[:, :, None, None] + (1 - alpha[:, :, None, None]) * noise[:, :, None, None]
    for t in scheduler.timesteps[steps:]:
        z = scheduler.step(module(z, t), t, z)
    return z.flatten(1)


def stepwise_sample(
    module: Denoiser, z_short: Tensor, noise: Tensor, alpha: Tensor, scheduler: ReleaseScheduler, steps: int
) -> Tensor:
    """The same with the network's Linear layers: the module and the scheduler are called at every step."""
    scheduler.set_timesteps(2 * steps, z_short.device)
    z = alpha * z_short + (1 - alpha) * noise
    for t in scheduler.timesteps[steps:]:
        z = scheduler.step(module(z, t), t, z)
    return z


def hoisted_sample(module: Denoiser, z_short: Tensor, noise: Tensor, alpha: Tensor, table: gk.DDIMTable) -> Tensor:
    """The loop as a careful user writes it: coefficients are numbers, the time embedding is computed once."""
    times = module.time(torch.tensor(table.timesteps, device=z_short.device))
    z = alpha * z_short + (1 - alpha) * noise
    for k, (a, b, _) in enumerate(table.coefficients):
        z = a * z + b * module.step(z, times[k])
    return z


def operator_sample(
    denoiser: gk.CapturedDenoiser,
    z_short: Tensor,
    noise: Tensor,
    alpha: Tensor,
    table: gk.DDIMTable,
    backend: str,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """The library's own operator."""
    return gk.reverse_sample(
        denoiser, z_short, table=table, alpha=alpha, noise=noise, backend=backend, compute_dtype=compute_dtype
    )


# --- the contenders by name -------------------------------------------------------------------------------------------

OWN = ("reference", "native", "native_bf16", "triton", "triton_bf16")
RIVALS = {
    "release": "eager PyTorch with convolutions, coefficients per step, as in the public releases",
    "stepwise": "eager PyTorch with Linear layers, time embedding and coefficients at every step",
    "eager": "eager PyTorch with Linear layers, hoisted coefficients and time embedding",
    "compiled": "torch.compile of the hoisted eager loop, warmed up",
    "graphed": "the hoisted eager loop, forward and backward, replayed as one CUDA graph",
    "reference": "this library's reference backend, float32",
    "native": "this library's native backend, float32",
    "native_bf16": "this library's native backend, bfloat16 products with float32 sums and state",
    "triton": "this library's Triton backend, float32",
    "triton_bf16": "this library's Triton backend, bfloat16 products with float32 sums and state",
}

Sampler = Callable[[Tensor, Tensor, Tensor], Tensor]  # (z_short, noise, alpha) -> z_hat


def contender(how: str, module: Denoiser, steps: int) -> tuple[Sampler, nn.Module]:
    """The sampler named `how` over `module`, and the module that holds the parameters it uses.

    Raises:
        ValueError: an unknown name, or "release" for a network that no release has.
    """
    if how not in RIVALS:
        raise ValueError(f"how is {how!r}; known: {', '.join(RIVALS)}")
    table = gk.ddim_table(TRAIN_TIMESTEPS, steps, window="lower")
    if how == "release":
        if not isinstance(module, PaperDenoiser):
            raise ValueError(f"how is 'release', which is about the paper's network, not {type(module).__name__}")
        maps = ReleaseDenoiser(module.out.in_features).to(module.out.weight).load(module).train(module.training)
        maps.requires_grad_(module.out.weight.requires_grad)
        scheduler = ReleaseScheduler()
        return lambda z, noise, alpha: release_sample(maps, z, noise, alpha, scheduler, steps), maps
    if how == "stepwise":
        stepwise = ReleaseScheduler()
        return lambda z, noise, alpha: stepwise_sample(module, z, noise, alpha, stepwise, steps), module
    if how in ("eager", "compiled", "graphed"):  # what is recorded as a graph is the whole call, see `cases.prepare`
        sample: Sampler = partial(_hoisted, module, table)
        return (torch.compile(sample, dynamic=False) if how == "compiled" else sample), module
    captured = gk.capture(module)
    backend, _, low = how.partition("_")
    compute_dtype = torch.bfloat16 if low else None
    return lambda z, noise, alpha: operator_sample(captured, z, noise, alpha, table, backend, compute_dtype), module


def _hoisted(module: Denoiser, table: gk.DDIMTable, z_short: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    return hoisted_sample(module, z_short, noise, alpha, table)

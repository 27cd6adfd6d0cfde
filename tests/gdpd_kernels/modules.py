"""Denoisers as people write them, and the eager loops over them that the operators have to behave as."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdpd_kernels import DDIMTable, philox_normal

FEATURES, COND, STEPS = 6, 4, 1000


class Bottleneck(nn.Module):
    """x + BN(W3 relu(BN(W2 relu(BN(W1 x)))))"""

    def __init__(self, features: int, low: int, **norm: object) -> None:
        super().__init__()
        widths = features, low, low, features
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.BatchNorm1d(b, **norm), nn.ReLU()]  # type: ignore[arg-type]
        self.body = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class PaperDenoiser(nn.Module):
    """A learned time table added to z, two bottlenecks, Linear, BatchNorm."""

    def __init__(self, features: int = FEATURES, **norm: object) -> None:
        super().__init__()
        self.time = nn.Embedding(STEPS, features)
        self.blocks = nn.Sequential(Bottleneck(features, 4, **norm), Bottleneck(features, 4, **norm))
        self.head = nn.Sequential(nn.Linear(features, features), nn.BatchNorm1d(features, **norm))  # type: ignore[arg-type]

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.head(self.blocks(z + self.time(t)))


def sinusoid(t: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angle = t[:, None].float() * frequencies
    return torch.cat([angle.sin(), angle.cos()], dim=-1).to(dtype)


class TimeMLP(nn.Module):
    """An MLP whose hidden layer takes a sinusoid of the time step through an MLP of its own."""

    def __init__(self, features: int = FEATURES, hidden: int = 9) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.inner, self.outer = nn.Linear(features, hidden), nn.Linear(hidden, features)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        h = self.inner(z) + self.time(sinusoid(t, 8, z.dtype))
        return self.outer(F.gelu(h))


class ConditionalHead(nn.Module):
    """GenDD's head in small: shift, scale and gate from time and condition."""

    def __init__(self, features: int = FEATURES, cond: int = COND, hidden: int = 10) -> None:
        super().__init__()
        self.time = nn.Linear(8, hidden)
        self.cond = nn.Linear(cond, hidden)
        self.inner, self.outer = nn.Linear(features, hidden), nn.Linear(hidden, features)
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 3 * hidden))
        self.body = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, z: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        y = self.time(sinusoid(t, 8, z.dtype)) + self.cond(cond)
        shift, scale, gate = self.modulation(y).chunk(3, dim=-1)
        x = self.inner(z)
        return self.outer(x + gate * self.body(self.norm(x) * (1 + scale) + shift))


class RawCondition(nn.Module):
    """The condition itself, scaled by a table, added to the state: nothing of it is computed beforehand."""

    def __init__(self, features: int = FEATURES) -> None:
        super().__init__()
        self.time = nn.Embedding(STEPS, features)
        self.linear, self.norm = nn.Linear(features, features), nn.RMSNorm(features, eps=1e-5)

    def forward(self, z: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.norm(self.linear(z) + self.time(t) * cond) + cond


class SharedNorm(nn.Module):
    """One BatchNorm called twice in a forward pass."""

    def __init__(self, features: int = FEATURES, **norm: object) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(features, features), nn.Linear(features, features)
        self.norm = nn.BatchNorm1d(features, **norm)  # type: ignore[arg-type]

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.norm(self.b(torch.tanh(self.norm(self.a(z)))))


class Uncapturable(nn.Module):
    """Sorts its state, which no program can say, and has a BatchNorm."""

    def __init__(self, features: int = FEATURES) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(features, features), nn.BatchNorm1d(features)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.norm(self.linear(z.sort(dim=-1).values)) * (1 + t[:, None] / STEPS)


DENOISERS: dict[str, Callable[[], nn.Module]] = {
    "paper": PaperDenoiser,
    "paper in eval mode": lambda: PaperDenoiser().eval(),
    "paper, half in eval mode": lambda: half_in_eval_mode(),
    "cumulative statistics": lambda: PaperDenoiser(momentum=None),
    "another momentum and eps": lambda: PaperDenoiser(momentum=0.3, eps=1e-2),
    "no weights in norms": lambda: PaperDenoiser(affine=False),
    "no running statistics": lambda: PaperDenoiser(track_running_stats=False),
    "no running statistics, eval mode": lambda: PaperDenoiser(track_running_stats=False).eval(),
    "shared norm": SharedNorm,
    "shared norm with cumulative statistics": lambda: SharedNorm(momentum=None),
    "time mlp": TimeMLP,
    "conditional head": ConditionalHead,
    "raw condition": RawCondition,
}


def half_in_eval_mode() -> nn.Module:
    module = PaperDenoiser()
    module.blocks[0].eval()
    return module


def make(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """A denoiser with lively parameters and statistics, and its twin."""
    torch.manual_seed(seed)
    module = DENOISERS[name]().to(dtype)
    for key, buffer in module.named_buffers():
        if key.endswith("num_batches_tracked"):
            buffer.fill_(3)
        elif key.startswith("running") or ".running" in key:
            buffer.uniform_(0.5, 1.5)
    return module, copy.deepcopy(module)


def takes_condition(module: nn.Module) -> bool:
    return isinstance(module, ConditionalHead | RawCondition)


def eager_sample(
    module: nn.Module,
    z_short: Tensor,
    table: DDIMTable,
    alpha: Tensor | float | None = None,
    noise: Tensor | None = None,
    cond: Tensor | None = None,
    seed: int | None = None,
    num_samples: int | None = None,
) -> Tensor:
    """The sampler as a trainer writes it; alpha broadcasts, noise is given or is Philox's."""
    samples, (batch, features) = num_samples or 1, z_short.shape

    def draw(step: int) -> Tensor:
        assert seed is not None
        drawn = [philox_normal(seed, batch, features, step, j, dtype=z_short.dtype) for j in range(samples)]
        return torch.cat(drawn)

    z = z_short.repeat(samples, 1)
    if alpha is not None:
        eps = draw(0) if noise is None else noise.reshape(-1, features)
        weight = torch.as_tensor(alpha, dtype=z.dtype).expand(batch, features).repeat(samples, 1)
        z = weight * z + (1 - weight) * eps
    for k, (t, (a, b, s)) in enumerate(zip(table.timesteps, table.coefficients, strict=True)):
        steps = torch.full((len(z),), t)
        prediction = module(z, steps) if cond is None else module(z, steps, cond.repeat(samples, 1))
        z = a * z + b * prediction
        if s != 0:
            z = z + s * draw(k + 1)
    return z if num_samples is None else z.view(samples, batch, features)


def eager_loss(
    module: nn.Module,
    z_long: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    prediction: str,
    cond: Tensor | None = None,
) -> Tensor:
    """The prior's loss as a trainer writes it."""
    alpha_bar = alphas_cumprod[timesteps, None].to(z_long.dtype)
    z_t = alpha_bar.sqrt() * z_long + (1 - alpha_bar).sqrt() * noise
    target = {
        "eps": noise,
        "x0": z_long,
        "v": alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * z_long,
    }[prediction]
    return F.mse_loss(module(z_t, timesteps) if cond is None else module(z_t, timesteps, cond), target)

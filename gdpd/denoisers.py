"""Denoisers eps(z_t, t) over feature vectors, in Linear layers: the networks that the reverse sampler walks.

They run row by row (but for BatchNorm's batch statistics in training mode), so `gdpd_kernels.capture` can take
them. The releases write the bottleneck with 1×1 and 3×3 convolutions on 1×1 maps; with zero padding only the
centre tap of the 3×3 kernel ever meets data there, so three Linear layers are the same function.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gdpd.registry import build

NORMS = ("batch", "layer")
TIME_EMBEDDINGS = ("sinusoidal", "learned")


class Bottleneck(nn.Module):
    """Residual bottleneck of DiffKD (arXiv 2305.15712) and GDPD: x + N(W3 relu(N(W2 relu(N(W1 x))))).

    Widths ``features → features // reduction → features // reduction → features``, biases everywhere, no
    activation after the sum. N is BatchNorm1d or LayerNorm.

    Args:
        features: width A, at least ``reduction``.
        reduction: r; the inner width is ``A // r``.
        norm: ``"batch"`` or ``"layer"``.

    Raises:
        ValueError: inner width below 1, unknown ``norm``.
    """

    def __init__(self, features: int, reduction: int = 4, norm: str = "batch") -> None:
        super().__init__()
        if reduction < 1 or features < reduction:
            raise ValueError(
                f"features={features}, reduction={reduction}: the inner width features // reduction must be 1 or "
                f"more; choose a reduction in 1..{features}"
            )
        inner = features // reduction
        make_norm = _norm_layer(norm)
        self.norm = norm
        self.body = nn.Sequential(
            nn.Linear(features, inner),
            make_norm(inner),
            nn.ReLU(),
            nn.Linear(inner, inner),
            make_norm(inner),
            nn.ReLU(),
            nn.Linear(inner, features),
            make_norm(features),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, features]`` → ``[batch, features]``; ValueError for BatchNorm in training on a batch of one."""
        _refuse_batch_of_one(self, self.norm, x)
        return x + self.body(x)


class BottleneckDenoiser(nn.Module):
    """The GDPD denoiser: h = z + E[t], bottlenecks, Linear, norm (METHOD 1.1; DiffKD's first variant).

    With ``norm="batch"`` (the release) the statistics in training mode are those of the rows in the call. So a
    batch of one cannot be normalised; and a step t that all rows share, as in the reverse sampler, has no effect
    at all: E[t] reaches every BatchNorm as a constant shift of the batch, which the batch mean takes out again. It
    acts in eval mode and where rows have different t, as in the prior's own loss. ``norm="layer"`` keeps rows
    independent and always sees t.

    Args:
        features: latent width A.
        reduction: bottleneck reduction r.
        blocks: number of bottlenecks, 1 or more.
        norm: ``"batch"`` or ``"layer"``, for every norm in the network.
        num_train_timesteps: rows of the learned time table E (1280 in the release); t must be below.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        features: int,
        reduction: int = 4,
        blocks: int = 2,
        norm: str = "batch",
        num_train_timesteps: int = 1280,
    ) -> None:
        super().__init__()
        if blocks < 1:
            raise ValueError(f"blocks={blocks} must be 1 or more")
        _check_timesteps(num_train_timesteps)
        self.features = features
        self.num_train_timesteps = num_train_timesteps
        self.norm = norm
        self.time_embedding = nn.Embedding(num_train_timesteps, features)
        self.blocks = nn.Sequential(*(Bottleneck(features, reduction, norm) for _ in range(blocks)))
        self.out = nn.Linear(features, features)
        self.out_norm = _norm_layer(norm)(features)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Predicted noise.

        Args:
            z: ``[batch, features]`` noisy latents.
            t: int64 ``[batch]``, or 0-d for one step shared by all rows; 0..num_train_timesteps-1.

        Returns:
            ``[batch, features]``.

        Raises:
            ValueError: BatchNorm in training mode on a batch of one; wrong width.
        """
        _check_input(z, self.features)
        _refuse_batch_of_one(self, self.norm, z)
        return self.out_norm(self.out(self.blocks(z + self.time_embedding(t))))


class MLPDenoiser(nn.Module):
    """A plain SiLU MLP; the time embedding is added to the first hidden layer before its activation.

    h1 = silu(W1 z + T(t)), h_{i+1} = silu(W_{i+1} h_i), eps = W_out h_n. T is a learned table, or the sinusoid
    of the diffusion literature followed by Linear–SiLU–Linear.

    Args:
        features: latent width A.
        hidden: widths of the hidden layers, one or more.
        time_embedding: ``"sinusoidal"`` or ``"learned"``.
        time_dim: width of the sinusoid, even (unused with ``"learned"``).
        num_train_timesteps: number of training steps; rows of the learned table.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (256, 256),
        time_embedding: str = "sinusoidal",
        time_dim: int = 128,
        num_train_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        widths = [features, *hidden]
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"features={features}, hidden={tuple(hidden)}: give one or more hidden widths, all ≥ 1")
        if time_embedding not in TIME_EMBEDDINGS:
            raise ValueError(f"time_embedding={time_embedding!r} is not one of {', '.join(map(repr, TIME_EMBEDDINGS))}")
        _check_timesteps(num_train_timesteps)
        self.features = features
        self.num_train_timesteps = num_train_timesteps
        self.time_embedding: nn.Module
        if time_embedding == "learned":
            self.time_embedding = nn.Embedding(num_train_timesteps, widths[1])
        else:
            self.time_embedding = nn.Sequential(
                SinusoidalEmbedding(time_dim),
                nn.Linear(time_dim, widths[1]),
                nn.SiLU(),
                nn.Linear(widths[1], widths[1]),
            )
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.out = nn.Linear(widths[-1], features)
        self.activation = nn.SiLU()

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Predicted noise ``[batch, features]`` from ``z`` ``[batch, features]`` and int64 ``t`` ``[batch]`` or 0-d."""
        _check_input(z, self.features)
        h = z
        for i, layer in enumerate(self.layers):
            h = layer(h) + self.time_embedding(t) if i == 0 else layer(h)
            h = self.activation(h)
        return self.out(h)


class SinusoidalEmbedding(nn.Module):
    """sin and cos of t at ``dim / 2`` frequencies 10000^(−2i/dim) (Vaswani et al. 2017, section 3.5).

    int64 ``[...]`` → float ``[..., dim]``, sines first. ``dim`` must be even.
    """

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"time_dim={dim} must be even and 2 or more (half sines, half cosines)")
        half = dim // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float64) / half)
        self.register_buffer("frequencies", frequencies.float(), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """Embedding ``[..., dim]`` of steps ``t`` ``[...]``, in the dtype of the module."""
        # bfloat16 cannot tell t = 999 from t = 1000: the angle is never taken below float32
        dtype = torch.promote_types(self.frequencies.dtype, torch.float32)
        angles = t.unsqueeze(-1).to(dtype) * self.frequencies.to(dtype)
        return torch.cat((angles.sin(), angles.cos()), dim=-1).to(self.frequencies.dtype)


_REGISTRY: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "bottleneck": (BottleneckDenoiser, {}),
    "mlp": (MLPDenoiser, {}),
}


def denoiser_names() -> list[str]:
    """Names that :func:`build_denoiser` takes."""
    return list(_REGISTRY)


def build_denoiser(name: str, features: int, **options: Any) -> nn.Module:
    """A denoiser by name: ``"bottleneck"`` (:class:`BottleneckDenoiser`) or ``"mlp"`` (:class:`MLPDenoiser`).

    Args:
        name: one of :func:`denoiser_names`.
        features: latent width A.
        **options: further arguments of the class.

    Returns:
        A module ``(z [batch, features], t) -> [batch, features]`` with the attributes ``features`` and
        ``num_train_timesteps``.

    Raises:
        ValueError: unknown name or option (the nearest is suggested), or an option out of range.
    """
    return build("denoiser", name, _REGISTRY, options, features=features)


def _norm_layer(norm: str) -> Callable[[int], nn.Module]:
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is not one of {', '.join(map(repr, NORMS))}")
    return nn.BatchNorm1d if norm == "batch" else nn.LayerNorm


def _refuse_batch_of_one(module: nn.Module, norm: str, x: Tensor) -> None:
    if norm == "batch" and module.training and x.shape[0] == 1:
        raise ValueError(
            f"{type(module).__name__}(norm='batch') in training mode got a batch of one row, which has no batch "
            "statistics for BatchNorm. Use batches of two or more (drop or merge a last batch of one), norm='layer', "
            "or eval()"
        )


def _check_timesteps(num_train_timesteps: int) -> None:
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps={num_train_timesteps} must be 1 or more")


def _check_input(z: Tensor, features: int) -> None:
    if z.ndim != 2 or z.shape[1] != features:
        raise ValueError(f"z has shape {list(z.shape)}; this denoiser takes [batch, {features}]")

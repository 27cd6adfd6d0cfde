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


class WideDenoiser(nn.Module):
    """DiffKD's second denoiser (arXiv 2305.15712): h = z + E[t], widened and narrowed twice.

    A → rA → A → rA → A by Linear layers with biases; a norm after each but the last, ReLU after the widening ones. With
    ``norm="batch"`` in training mode, what is said of `BottleneckDenoiser` holds here too: a step that all rows share
    does not get past the first norm.

    Args:
        features: latent width A.
        expansion: r, 1 or more; 4 in DiffKD.
        norm: ``"batch"`` or ``"layer"``.
        num_train_timesteps: rows of the learned time table E (1280 in the release); t must be below.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, features: int, expansion: int = 4, norm: str = "batch", num_train_timesteps: int = 1280) -> None:
        super().__init__()
        if expansion < 1:
            raise ValueError(f"expansion={expansion} must be 1 or more")
        _check_timesteps(num_train_timesteps)
        wide = expansion * features
        make_norm = _norm_layer(norm)
        self.features = features
        self.num_train_timesteps = num_train_timesteps
        self.norm = norm
        self.time_embedding = nn.Embedding(num_train_timesteps, features)
        self.body = nn.Sequential(
            nn.Linear(features, wide),
            make_norm(wide),
            nn.ReLU(),
            nn.Linear(wide, features),
            make_norm(features),
            nn.Linear(features, wide),
            make_norm(wide),
            nn.ReLU(),
            nn.Linear(wide, features),
        )

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Prediction ``[batch, features]``; arguments and errors as `BottleneckDenoiser.forward`."""
        _check_input(z, self.features)
        _refuse_batch_of_one(self, self.norm, z)
        return self.body(z + self.time_embedding(t))


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


class AdaLNDenoiser(nn.Module):
    """GenDD's head: an MLP over tokens, modulated by time, condition and token index (arXiv 2507.14503).

    With y = time MLP(sinusoid(t)) + Linear(c) + E[token]: x = W_in z; per block, (shift, scale, gate) = Linear(silu(y))
    and x ← x + gate · MLP((1 + scale) · LN(x) + shift), MLP = Linear–SiLU–Linear; at the end (shift, scale) once more,
    LN and Linear to the predicted noise and, beside it, the interpolation of the variance (Nichol & Dhariwal, 2021).
    LN has no weights of its own. The modulation and the output start at zero, so the first prediction is zero.

    A call takes one tensor beside z and t, so the condition and the token's index travel together: `condition` joins
    them. Calls return the noise alone, which is what a sampler walks on; a loss on the variance asks
    `noise_and_variance`.

    Args:
        features: width of a token.
        cond_features: width C of the condition.
        tokens: how many tokens a feature vector is cut in, 1 or more; one token needs no index.
        hidden: width of the blocks.
        blocks: how many, 1 or more.
        time_dim: width of the sinusoid, even.
        num_train_timesteps: number of training steps.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        features: int = 64,
        cond_features: int = 512,
        tokens: int = 1,
        hidden: int = 1024,
        blocks: int = 3,
        time_dim: int = 256,
        num_train_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        sizes = {"features": features, "cond_features": cond_features, "tokens": tokens, "hidden": hidden}
        for name, value in (sizes | {"blocks": blocks}).items():
            if value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")
        _check_timesteps(num_train_timesteps)
        self.features = features
        self.cond_features = cond_features
        self.tokens = tokens
        self.num_train_timesteps = num_train_timesteps
        self.time_embedding = nn.Sequential(
            SinusoidalEmbedding(time_dim), nn.Linear(time_dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
        )
        self.cond_embedding = nn.Linear(cond_features, hidden)
        self.token_embedding = nn.Parameter(0.02 * torch.randn(tokens, hidden))
        self.inner = nn.Linear(features, hidden)
        self.blocks = nn.ModuleList(_AdaLNBlock(hidden) for _ in range(blocks))
        self.norm = nn.LayerNorm(hidden, eps=1e-6, elementwise_affine=False)
        self.modulation = _zero(nn.Linear(hidden, 2 * hidden))
        self.out = _zero(nn.Linear(hidden, 2 * features))
        self.activation = nn.SiLU()

    def condition(self, c: Tensor, token: Tensor | None = None) -> Tensor:
        """What a call takes as `cond`.

        Args:
            c: ``[batch, cond_features]``.
            token: int64 ``[batch]``, each row's token index in 0..tokens-1; None for denoisers of one token.

        Returns:
            ``[batch, cond_features + tokens]``: c, and the index as a one-hot row, which picks its embedding.

        Raises:
            ValueError: wrong shapes, an index out of range, no index where there are several tokens.
        """
        if c.ndim != 2 or c.shape[1] != self.cond_features:
            raise ValueError(f"c has shape {list(c.shape)}; this denoiser takes [batch, {self.cond_features}]")
        if token is None:
            if self.tokens > 1:
                raise ValueError(f"token is None; with {self.tokens} tokens every row needs the index of its own")
            return torch.cat([c, c.new_ones(len(c), 1)], dim=1)
        if token.shape != c.shape[:1] or token.dtype != torch.int64:
            raise ValueError(f"token has shape {list(token.shape)}, {token.dtype}; expected int64 [{len(c)}]")
        if len(token) and not 0 <= int(token.min()) <= int(token.max()) < self.tokens:
            raise ValueError(f"token has values {int(token.min())}..{int(token.max())}; expected 0..{self.tokens - 1}")
        return torch.cat([c, nn.functional.one_hot(token, self.tokens).to(c.dtype)], dim=1)

    def condition_tokens(self, c: Tensor) -> Tensor:
        """`condition` of every token of every row, in order: ``[batch, C]`` → ``[batch · tokens, C + tokens]``."""
        index = torch.eye(self.tokens, dtype=c.dtype, device=c.device)
        rows = c[:, None].expand(-1, self.tokens, -1), index.expand(len(c), -1, -1)
        return torch.cat(rows, dim=2).flatten(0, 1)

    def forward(self, z: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Predicted noise ``[batch, features]``, from ``z`` ``[batch, features]``, int64 ``t`` ``[batch]`` or 0-d, and
        what `condition` returns."""
        return self.noise_and_variance(z, t, cond)[:, : self.features]

    def noise_and_variance(self, z: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """``[batch, 2 · features]``: the predicted noise, then the interpolation of the log variance. As `forward`."""
        _check_input(z, self.features)
        if cond.ndim != 2 or cond.shape[1] != self.cond_features + self.tokens:
            raise ValueError(
                f"cond has shape {list(cond.shape)}; this denoiser takes [batch, {self.cond_features + self.tokens}], "
                "which condition(c, token) returns"
            )
        c, token = cond.split([self.cond_features, self.tokens], dim=1)
        return self.from_embedding(z, t, self.cond_embedding(c) + token @ self.token_embedding)

    def from_embedding(self, z: Tensor, t: Tensor, given: Tensor) -> Tensor:
        """`noise_and_variance` with Linear(c) + E[token], ``[batch, hidden]``, in the place of `cond`."""
        y = self.activation(self.time_embedding(t) + given)
        x = self.inner(z)
        for block in self.blocks:
            x = block(x, y)
        shift, scale = self.modulation(y).chunk(2, dim=1)
        return self.out((1 + scale) * self.norm(x) + shift)


class _AdaLNBlock(nn.Module):
    """x + gate · MLP((1 + scale) · LN(x) + shift), the three from a Linear of y (AdaLN-Zero: Peebles & Xie, 2023)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden, eps=1e-6, elementwise_affine=False)
        self.modulation = _zero(nn.Linear(hidden, 3 * hidden))
        self.mlp = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(y).chunk(3, dim=1)
        return x + gate * self.mlp((1 + scale) * self.norm(x) + shift)


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


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
    "wide": (WideDenoiser, {}),
    "mlp": (MLPDenoiser, {}),
}


def denoiser_names() -> list[str]:
    """Names that `build_denoiser` takes."""
    return list(_REGISTRY)


def build_denoiser(name: str, features: int, **options: Any) -> nn.Module:
    """A denoiser by name: ``"bottleneck"`` (`BottleneckDenoiser`), ``"wide"`` (`WideDenoiser`) or ``"mlp"``
    (`MLPDenoiser`).

    Args:
        name: one of `denoiser_names`.
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

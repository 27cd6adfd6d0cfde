"""The diffusion prior over teacher features: the space it lives in, its denoiser, and its stage-one losses."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gdpd_kernels as gk
from gdpd.consistency import ConsistencyLoss

TARGET_SPACES = ("autoencoder", "identity")


class FeatureAutoencoder(nn.Module):
    """Code of the teacher's feature: encoder Linear + BatchNorm, decoder Linear.

    Args:
        teacher_dim: width of z_long.
        latent_dim: width A of the code.
    """

    def __init__(self, teacher_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(teacher_dim, latent_dim), nn.BatchNorm1d(latent_dim))
        self.decoder = nn.Linear(latent_dim, teacher_dim)

    def forward(self, z_long: Tensor) -> tuple[Tensor, Tensor]:
        """(code [batch, latent_dim], reconstruction [batch, teacher_dim]) of `z_long` [batch, teacher_dim]."""
        code = self.encoder(z_long)
        return code, self.decoder(code)


class FeaturePrior(nn.Module):
    """A denoiser of z_t at t, trained on teacher features, in their autoencoder's code space or as they are.

    Args:
        denoiser: module (z [batch, A], t int64 [batch]) -> [batch, A].
        teacher_dim: width of the teacher's feature z_long.
        latent_dim: width A of the space that the denoiser works in: the student head's input width.
        target_space: "autoencoder", or "identity" where both widths are equal.
        prediction: what the denoiser predicts: "eps", "x0" or "v".
        num_train_timesteps, beta_schedule, beta_start, beta_end: the diffusion, as in `gdpd_kernels.alphas_cumprod`.
        consistency_steps: 0, or the steps of a grid along whose paths a second denoiser, of the same kind, is distilled
            beside the first (`gdpd.consistency`); it is the one that samples then, in one or a few steps.
        timestep_spacing: of that grid.
        backend: backend of the loss, as in `gdpd_kernels.prior_loss`.

    Raises:
        ValueError: an unknown target space, or "identity" between different widths.
    """

    alphas_cumprod: Tensor

    def __init__(
        self,
        denoiser: nn.Module,
        teacher_dim: int,
        latent_dim: int,
        *,
        target_space: str = "autoencoder",
        prediction: str = "eps",
        num_train_timesteps: int = 1000,
        beta_schedule: str = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        consistency_steps: int = 0,
        timestep_spacing: str = "leading",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if consistency_steps < 0:
            raise ValueError(f"consistency_steps={consistency_steps} is below 0. 0 leaves the prior as it is.")
        if target_space not in TARGET_SPACES:
            raise ValueError(f"target_space={target_space!r} is not known. One of: {', '.join(TARGET_SPACES)}.")
        if target_space == "identity" and teacher_dim != latent_dim:
            raise ValueError(
                "target_space='identity' needs teacher and student heads of one width, and the teacher's feature "
                f"has {teacher_dim} dimensions where the student's head reads {latent_dim}. Use "
                "target_space='autoencoder', which maps one onto the other, or networks of the same width."
            )
        self.denoiser = denoiser
        self.autoencoder = FeatureAutoencoder(teacher_dim, latent_dim) if target_space == "autoencoder" else None
        self.prediction = prediction
        self.backend = backend
        self.few_step = copy.deepcopy(denoiser) if consistency_steps else None
        if consistency_steps:
            grid = gk.ddim_table(
                num_train_timesteps, consistency_steps, beta_schedule, prediction=prediction, beta_start=beta_start,
                beta_end=beta_end, timestep_spacing=timestep_spacing,
            )  # fmt: skip
            self.consistency = ConsistencyLoss(grid)
        alphas_cumprod = gk.alphas_cumprod(beta_schedule, num_train_timesteps, beta_start, beta_end)
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)

    @property
    def sampler(self) -> nn.Module:
        """The denoiser that the reverse process walks by."""
        return self.denoiser if self.few_step is None else self.few_step

    def encode(self, z_long: Tensor) -> Tensor:
        """Where `z_long` [batch, teacher_dim] lies in the prior's space: [batch, A]."""
        return z_long if self.autoencoder is None else self.autoencoder.encoder(z_long)

    def losses(self, z_long: Tensor, distil: bool = True) -> dict[str, Tensor]:
        """Stage-one losses of teacher features `z_long` [batch, teacher_dim], 0-d tensors by name.

        "noise": MSE of the prediction (Ho et al., 2020, eq. 14), t uniform, on the detached code;
        "autoencoder": MSE of the reconstruction (absent in the identity space);
        "consistency": of the second denoiser, where there is one and `distil` is set. A prior that has learned
        nothing yet has nothing to distil.
        """
        return self.losses_and_code(z_long, distil)[0]

    def losses_and_code(self, z_long: Tensor, distil: bool = True) -> tuple[dict[str, Tensor], Tensor]:
        """`losses`, and the detached code [batch, A] that they come from."""
        z_long = z_long.detach()
        code, losses = z_long, {}
        if self.autoencoder is not None:
            code, reconstruction = self.autoencoder(z_long)
            code = code.detach()
            losses["autoencoder"] = F.mse_loss(reconstruction, z_long)
        losses = {"noise": self._noise_loss(code), **losses}
        if self.few_step is not None and distil:
            losses["consistency"] = self.consistency(self.denoiser, self.few_step, code)
        return losses, code

    def _noise_loss(self, code: Tensor) -> Tensor:
        # Drawn here and not by the operator, whose own draw is the same numbers on every backend and ten times slower.
        timesteps = torch.randint(len(self.alphas_cumprod), (len(code),), device=code.device)
        return gk.prior_loss(
            self.denoiser,
            code,
            alphas_cumprod=self.alphas_cumprod,
            timesteps=timesteps,
            prediction=self.prediction,
            backend=self.backend,
        )

"""What GDPD and DiffKD share: a prior over teacher features, and the reverse process from the student's feature."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import gdpd_kernels as gk
from gdpd.consistency import consistency_table
from gdpd.denoisers import build_denoiser
from gdpd.distillers.base import Batch, Distiller, taught
from gdpd.fusion import NoiseFusion
from gdpd.models import Classifier
from gdpd.prior import FeaturePrior
from gdpd.sampler import noise_fused_init, trajectory
from gdpd_kernels.ranges import span


class ReverseDistiller(Distiller):
    """Base class of methods that denoise the student's feature by a prior: all but their loss.

    Args:
        student: the network to train, a `gdpd.models.Classifier`; A is its head's input width.
        teacher_dim: width of the teacher's feature z_long.
        loss_ratio: r, weight of every loss beside the cross-entropy.
        alpha: "per_sample", "per_dimension" or a number in [0, 1], see `gdpd.fusion.NoiseFusion`.
        target_space: "autoencoder" or "identity", see `gdpd.prior.FeaturePrior`.
        denoiser: a name for `gdpd.denoisers.build_denoiser`, or a module (z [batch, A], t int64 [batch]) -> [batch, A].
        denoiser_options: keyword options of a denoiser given by name.
        prediction: what the denoiser predicts: "eps", "x0" or "v".
        num_train_timesteps, beta_schedule, beta_start, beta_end: the diffusion, as in `gdpd_kernels.ddim_table`.
        num_inference_steps, window, timestep_spacing, eta: the sampler's steps, likewise.
        consistency_steps: 0, or the steps of the grid from which a denoiser for few steps is distilled, see
            `gdpd.prior.FeaturePrior`; the sampler's steps have to be among the grid's.
        backend: backend of both operators.

    Raises:
        ValueError: an option outside its limits; widths that cannot meet.
    """

    def __init__(
        self,
        student: Classifier,
        teacher_dim: int,
        *,
        loss_ratio: float = 1.0,
        alpha: str | float = "per_sample",
        target_space: str = "autoencoder",
        denoiser: str | nn.Module = "bottleneck",
        denoiser_options: Mapping[str, Any] | None = None,
        prediction: str = "eps",
        num_train_timesteps: int = 1000,
        num_inference_steps: int = 5,
        window: str = "lower",
        timestep_spacing: str = "leading",
        beta_schedule: str = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        eta: float = 0.0,
        consistency_steps: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__(student, loss_ratio=loss_ratio)
        width = student.head.in_features
        diffusion: dict[str, Any] = {
            "num_train_timesteps": num_train_timesteps,
            "beta_schedule": beta_schedule,
            "beta_start": beta_start,
            "beta_end": beta_end,
        }
        self.table = gk.ddim_table(
            num_inference_steps=num_inference_steps,
            window=window,
            timestep_spacing=timestep_spacing,
            eta=eta,
            prediction=prediction,
            **diffusion,
        )
        if isinstance(denoiser, str):
            options = {"num_train_timesteps": num_train_timesteps, **(denoiser_options or {})}
            denoiser = build_denoiser(denoiser, width, **options)
        self.prior = FeaturePrior(
            denoiser,
            teacher_dim,
            width,
            target_space=target_space,
            prediction=self.table.prediction,
            consistency_steps=consistency_steps,
            timestep_spacing=timestep_spacing,
            backend=backend,
            **diffusion,
        )
        if consistency_steps and not set(self.table.timesteps) <= set(self.prior.consistency.steps.tolist()):
            raise ValueError(
                f"consistency_steps={consistency_steps} makes a grid without some of the sampler's steps "
                f"{self.table.timesteps}. Take a multiple of num_inference_steps, of twice as many with window='lower'."
            )
        if consistency_steps:
            self.table = consistency_table(self.table)
        self.trans = nn.Linear(student.feature_dim, width)
        self.fusion = NoiseFusion(width, alpha)
        self.proj = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
        self.teacher_dim = teacher_dim
        self.backend = backend

    def denoised(self, z_short: Tensor, num_samples: int = 1) -> tuple[Tensor, Tensor]:
        """proj(z_hat) [num_samples · batch, A] of student features [batch, feature_dim], and alpha."""
        with span("fusion"):
            z = self.trans(z_short)
            alpha = self.fusion(z)
        with span("sampler"):
            z_hat = self.reverse(z, alpha, num_samples)
        return self.proj(z_hat), alpha

    def reverse(self, z: Tensor, alpha: Tensor, num_samples: int) -> Tensor:
        """z_hat [num_samples · batch, A], where the reverse process from alpha z + (1 - alpha) eps ends."""
        samples = None if num_samples == 1 else num_samples
        z_hat = gk.reverse_sample(
            self.prior.sampler, z, table=self.table, alpha=alpha, num_samples=samples, backend=self.backend
        )
        return z_hat if samples is None else z_hat.flatten(0, 1)

    def teacher_features(self, batch: Batch) -> Tensor:
        """z_long [batch, teacher_dim] of a batch; ValueError where it is missing or of another width."""
        return taught(batch, "z_long", self.teacher_dim)

    def prior_runs_in_training(self) -> bool:
        """Whether BatchNorms of the denoiser use the batch's statistics in the reverse process."""
        return True

    @torch.no_grad()
    def trajectory(self, x_prefix: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """The reverse process from the features of some prefixes, state by state, for looking at.

        The denoiser runs as it does in training (BatchNorm with the statistics of these trajectories, unless the
        prior is frozen), on a copy, so that nothing of the module changes.

        Args:
            x_prefix: [batch, channels, time], two series or more.
            lengths: int64 [batch], or None.

        Returns:
            z_short [batch, A] (after trans), alpha [batch, 1 or A], z_k [K + 1, batch, A], z_hat [batch, A]
            (the last of z_k), timesteps int64 [K].

        Raises:
            ValueError: a sampler with eta above 0.
        """
        module = copy.deepcopy(self).eval()
        z_short = module.trans(module.student(x_prefix, lengths)[0])
        alpha = module.fusion(z_short)
        module.prior.sampler.train(self.prior_runs_in_training())
        start = noise_fused_init(z_short, alpha, torch.randn_like(z_short))
        z_k = trajectory(module.prior.sampler, start, self.table)
        steps = torch.tensor(self.table.timesteps)
        alpha = alpha.expand(len(z_short), -1)
        return {"z_short": z_short, "alpha": alpha, "z_k": z_k, "z_hat": z_k[-1], "timesteps": steps}

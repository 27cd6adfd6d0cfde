"""GDPD: distillation through the reverse process of a diffusion prior over teacher features (arXiv 2605.11414)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import gdpd_kernels as gk
from gdpd.denoisers import build_denoiser
from gdpd.distillers.base import Batch, Distiller, hinton_loss
from gdpd.fusion import NoiseFusion
from gdpd.models import Classifier
from gdpd.prior import FeaturePrior
from gdpd.sampler import noise_fused_init, trajectory
from gdpd_kernels.ranges import span


class GDPD(Distiller):
    """Two-stage GDPD: learn the prior, then ask that the student's feature, denoised by it, is classified correctly.

    With z_short the student's feature, A its width, r the loss ratio:

    - epochs before `warmup_epochs`: CE(student(x_e), y) + r (MSE_noise + MSE_autoencoder);
    - after: CE(student(x_e), y) + r CE(student_head(proj(z_hat)), y), with z_hat the reverse process's end from
      alpha trans(z_short) + (1 - alpha) eps; the mean over `num_samples` draws of eps;
    - with `hinton`, r T² KL(teacher ‖ student) is added to both.

    The student runs once a step. For a loop of your own::

        distiller = GDPD(student, teacher_dim=100, warmup_epochs=300)
        optimizer = torch.optim.Adam(distiller.parameters())
        loss, parts = distiller.loss(Batch(x_prefix, y, z_long=z_long, teacher_logits=logits), epoch)

    Args:
        student: the network to train, a `gdpd.models.Classifier` (`gdpd.models.wrap_model` makes one of any module).
        teacher_dim: width of the teacher's feature z_long.
        warmup_epochs: epochs of the first stage.
        loss_ratio: r.
        hinton: add Hinton's distillation loss (the authors' release does, the paper's formula does not).
        temperature: T of that loss.
        freeze_prior: keep denoiser and autoencoder as they are after the warm-up, BatchNorm in eval mode, so that the
            prior is the function that was learned. trans, fusion and proj learn on: no loss of the first stage
            reaches them. False lets the denoiser learn from the classification loss, as the release does.
        num_samples: J, draws of eps per series and step.
        alpha: "per_sample", "per_dimension" or a number in [0, 1], see `gdpd.fusion.NoiseFusion`.
        target_space: "autoencoder" or "identity", see `gdpd.prior.FeaturePrior`.
        denoiser: a name for `gdpd.denoisers.build_denoiser`, or a module (z [batch, A], t int64 [batch]) -> [batch, A].
        denoiser_options: keyword options of a denoiser given by name.
        num_train_timesteps, beta_schedule, beta_start, beta_end: the diffusion, as in `gdpd_kernels.ddim_table`.
        num_inference_steps, window, eta: the sampler's steps, likewise.
        backend: backend of both operators.

    Raises:
        ValueError: an option outside its limits; widths that cannot meet.
    """

    def __init__(
        self,
        student: Classifier,
        teacher_dim: int,
        *,
        warmup_epochs: int,
        loss_ratio: float = 1.0,
        hinton: bool = True,
        temperature: float = 2.0,
        freeze_prior: bool = False,
        num_samples: int = 1,
        alpha: str | float = "per_sample",
        target_space: str = "autoencoder",
        denoiser: str | nn.Module = "bottleneck",
        denoiser_options: Mapping[str, Any] | None = None,
        num_train_timesteps: int = 1000,
        num_inference_steps: int = 5,
        window: str = "lower",
        beta_schedule: str = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        eta: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(student, loss_ratio=loss_ratio, warmup_epochs=warmup_epochs)
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} is below 1. It is the number of noise draws per series.")
        width = student.head.in_features
        diffusion: dict[str, Any] = {
            "num_train_timesteps": num_train_timesteps,
            "beta_schedule": beta_schedule,
            "beta_start": beta_start,
            "beta_end": beta_end,
        }
        self.table = gk.ddim_table(num_inference_steps=num_inference_steps, window=window, eta=eta, **diffusion)
        if isinstance(denoiser, str):
            options = {"num_train_timesteps": num_train_timesteps, **(denoiser_options or {})}
            denoiser = build_denoiser(denoiser, width, **options)
        self.prior = FeaturePrior(denoiser, teacher_dim, width, target_space=target_space, backend=backend, **diffusion)
        self.trans = nn.Linear(student.feature_dim, width)
        self.fusion = NoiseFusion(width, alpha)
        self.proj = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
        self.teacher_dim = teacher_dim
        self.hinton = hinton
        self.temperature = temperature
        self.freeze_prior = freeze_prior
        self.num_samples = num_samples
        self.backend = backend

    def loss(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of `batch` in epoch `epoch`, counted from 0; see the class.

        Raises:
            ValueError: z_long or teacher_logits missing or of the wrong shape.
        """
        z_short, logits, ce = self.student_cross_entropy(batch)
        losses = {"kd": hinton_loss(logits, batch.teacher_logits, self.temperature)} if self.hinton else {}
        seen: dict[str, Tensor] = {}
        if self.freeze_prior:
            self._move_prior(epoch < self.warmup_epochs)
        if epoch < self.warmup_epochs:
            with span("prior"):
                losses.update(self.prior.losses(self._teacher_features(batch)))
        else:
            losses["ce_hat"], seen["alpha"] = self._sampled_cross_entropy(z_short, batch.y)
        total = ce + self.loss_ratio * functools.reduce(torch.add, losses.values())
        parts = {"ce": ce, **losses, **seen}
        return total, {name: part.detach() for name, part in parts.items()}

    def _sampled_cross_entropy(self, z_short: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over the draws of CE(student_head(proj(z_hat)), y), and alpha."""
        with span("fusion"):
            z = self.trans(z_short)
            alpha = self.fusion(z)
        samples = None if self.num_samples == 1 else self.num_samples
        with span("sampler"):
            z_hat = gk.reverse_sample(
                self.prior.denoiser, z, table=self.table, alpha=alpha, num_samples=samples, backend=self.backend
            )  # [batch, A], or [num_samples, batch, A]
        with span("losses"):
            logits = self.student.classify(self.proj(z_hat if samples is None else z_hat.flatten(0, 1)))
            return self.cross_entropy(logits, y if samples is None else y.repeat(samples)), alpha

    def _move_prior(self, moves: bool) -> None:
        """Let the prior learn, or hold it still: parameters and the statistics of its BatchNorms."""
        for parameter in self.prior.parameters():
            parameter.requires_grad_(moves)
        self.prior.train(moves and self.training)

    def _teacher_features(self, batch: Batch) -> Tensor:
        z_long, expected = batch.z_long, (len(batch.y), self.teacher_dim)
        if z_long is None or tuple(z_long.shape) != expected:
            found = "None" if z_long is None else f"of shape {tuple(z_long.shape)}"
            raise ValueError(
                f"batch.z_long is {found}. The prior learns from teacher features {list(expected)} "
                f"([batch, teacher_dim={self.teacher_dim}]): fill them in, or give GDPD the teacher's width."
            )
        return z_long

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
        module.prior.denoiser.train(not self.freeze_prior)
        start = noise_fused_init(z_short, alpha, torch.randn_like(z_short))
        z_k = trajectory(module.prior.denoiser, start, self.table)
        steps = torch.tensor(self.table.timesteps)
        alpha = alpha.expand(len(z_short), -1)
        return {"z_short": z_short, "alpha": alpha, "z_k": z_k, "z_hat": z_k[-1], "timesteps": steps}

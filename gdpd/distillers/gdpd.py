"""GDPD: distillation through the reverse process of a diffusion prior over teacher features (arXiv 2605.11414)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gdpd.distillers.base import Batch, hinton_loss
from gdpd.distillers.reverse import ReverseDistiller
from gdpd.likelihood import guided_reverse
from gdpd.models import Classifier
from gdpd.options import nearest
from gdpd.sampler import noise_fused_init
from gdpd_kernels.ranges import span

CONDITIONINGS = ("fusion", "guidance", "start")


class GDPD(ReverseDistiller):
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
        learn_prior: False is a control: the first stage has no loss of the prior, whose networks know nothing of the
            teacher's features then.
        conditioning: how z_short enters the reverse process: "fusion" (the start above), or "guidance", an ablation:
            from pure noise, every step is drawn to trans(z_short) by likelihood guidance (`gdpd.likelihood`). That
            takes window="full" and eta=0, runs step by step in Python, and is slow. "start" is a control: z_hat is
            the start itself, and no reverse process runs.
        guidance_scale: step size of "guidance".
        alpha: "per_sample", "per_dimension" or a number in [0, 1], see `gdpd.fusion.NoiseFusion`.
        target_space: "autoencoder" or "identity", see `gdpd.prior.FeaturePrior`.
        denoiser: a name for `gdpd.denoisers.build_denoiser`, or a module (z [batch, A], t int64 [batch]) -> [batch, A].
        denoiser_options: keyword options of a denoiser given by name.
        prediction: what the denoiser predicts: "eps", "x0" or "v".
        num_train_timesteps, beta_schedule, beta_start, beta_end: the diffusion, as in `gdpd_kernels.ddim_table`;
            beta_schedule="flow" with prediction="v" is a flow-matching prior.
        num_inference_steps, window, timestep_spacing, eta: the sampler's steps, likewise.
        consistency_steps: 0, or the steps of the grid from which a denoiser for few steps is distilled in the second
            half of the warm-up (`gdpd.consistency`); it takes the place of the prior's in the reverse process. It wants
            a learning rate of about 3e-4 (docs/method.md).
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
        learn_prior: bool = True,
        num_samples: int = 1,
        conditioning: str = "fusion",
        guidance_scale: float = 1.0,
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
        super().__init__(
            student,
            teacher_dim,
            loss_ratio=loss_ratio,
            alpha=alpha,
            target_space=target_space,
            denoiser=denoiser,
            denoiser_options=denoiser_options,
            prediction=prediction,
            num_train_timesteps=num_train_timesteps,
            num_inference_steps=num_inference_steps,
            window=window,
            timestep_spacing=timestep_spacing,
            beta_schedule=beta_schedule,
            beta_start=beta_start,
            beta_end=beta_end,
            eta=eta,
            consistency_steps=consistency_steps,
            backend=backend,
        )
        self._warm_up_for(warmup_epochs)
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} is below 1. It is the number of noise draws per series.")
        if conditioning not in CONDITIONINGS:
            known = ", ".join(CONDITIONINGS)
            raise ValueError(
                f"conditioning={conditioning!r} is not known{nearest(conditioning, CONDITIONINGS)}: {known}."
            )
        if conditioning == "guidance" and (window != "full" or eta or consistency_steps):
            raise ValueError(
                f"conditioning='guidance' with window={window!r}, eta={eta}, consistency_steps={consistency_steps}: "
                "guidance starts at pure noise, draws none on the way and guides the prior's own steps. Use "
                "window='full' and eta=0, consistency_steps=0."
            )
        if not learn_prior and consistency_steps:
            raise ValueError(
                f"learn_prior={learn_prior} with consistency_steps={consistency_steps}: a denoiser for few steps is "
                "distilled from a prior that is learned. Use learn_prior=True, or consistency_steps=0."
            )
        if not guidance_scale >= 0:
            raise ValueError(f"guidance_scale={guidance_scale} is not a number of at least 0.")
        self.conditioning = conditioning
        self.guidance_scale = guidance_scale
        self.hinton = hinton
        self.temperature = temperature
        self.freeze_prior = freeze_prior
        self.learn_prior = learn_prior
        self.num_samples = num_samples

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
        if epoch >= self.warmup_epochs:
            losses["ce_hat"], seen["alpha"] = self._sampled_cross_entropy(z_short, batch.y)
        elif self.learn_prior:
            with span("prior"):
                losses.update(self.prior.losses(self.teacher_features(batch), distil=self._distils(epoch)))
        total = ce + self.loss_ratio * functools.reduce(torch.add, losses.values()) if losses else ce
        parts = {"ce": ce, **losses, **seen}
        return total, {name: part.detach() for name, part in parts.items()}

    def _sampled_cross_entropy(self, z_short: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over the draws of CE(student_head(proj(z_hat)), y), and alpha."""
        denoised, alpha = self.denoised(z_short, self.num_samples)
        with span("losses"):
            logits = self.student.classify(denoised)
            return self.cross_entropy(logits, y if self.num_samples == 1 else y.repeat(self.num_samples)), alpha

    def reverse(self, z: Tensor, alpha: Tensor, num_samples: int) -> Tensor:
        """z_hat [num_samples · batch, A], by fusion or by guidance, or the start as it is."""
        if self.conditioning == "fusion":
            return super().reverse(z, alpha, num_samples)
        z = z.repeat(num_samples, 1)
        if self.conditioning == "start":
            alpha = alpha if len(alpha) == 1 else alpha.repeat(num_samples, 1)
            return noise_fused_init(z, alpha, torch.randn_like(z))
        return guided_reverse(self.prior.sampler, z, torch.randn_like(z), self.table, self.guidance_scale)

    def phase(self, epoch: int) -> str:
        """The warm-up has two halves where a denoiser is distilled."""
        return "distil" if epoch < self.warmup_epochs and self._distils(epoch) else super().phase(epoch)

    def _distils(self, epoch: int) -> bool:
        return self.prior.few_step is not None and epoch >= self.warmup_epochs // 2

    def prior_runs_in_training(self) -> bool:
        """Unless the prior is frozen."""
        return not self.freeze_prior

    def _move_prior(self, moves: bool) -> None:
        """Let the prior learn, or hold it still: parameters and the statistics of its BatchNorms."""
        for parameter in self.prior.parameters():
            parameter.requires_grad_(moves)
        self.prior.train(moves and self.training)

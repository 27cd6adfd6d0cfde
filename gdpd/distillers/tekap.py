"""TeKAP: one teacher seen as several, by noise on its logits (Hossain et al., ICLR 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

from gdpd.distillers.base import Batch, Distiller, StudentRun, class_logits, hinton_loss
from gdpd.models import Classifier


class TeKAP(Distiller):
    """CE(student(x_e), y) + r [KD(l_t) + w sum over n teachers of KD((1 - s) l_t + s eps)].

    KD(l) = T² KL(l ‖ student), l_t the teacher's logits, eps normal noise drawn anew for each of the n perturbed
    teachers in every step, from torch's generator.

    Args:
        student: the network to train.
        loss_ratio: r.
        perturbations: n; the usual 3.
        perturbed_weight: w; the usual 0.8.
        noise_share: s in [0, 1]; the usual 0.1.
        temperature: T; 4 in the paper's comparisons on images.

    Raises:
        ValueError: no perturbed teacher, or a share outside [0, 1].
    """

    def __init__(
        self,
        student: Classifier,
        *,
        loss_ratio: float = 1.0,
        perturbations: int = 3,
        perturbed_weight: float = 0.8,
        noise_share: float = 0.1,
        temperature: float = 2.0,
    ) -> None:
        if perturbations < 1:
            raise ValueError(f"perturbations={perturbations} is below 1. Without any, use method kd.")
        if not 0 <= noise_share <= 1:
            raise ValueError(f"noise_share={noise_share} is outside [0, 1].")
        super().__init__(student, loss_ratio=loss_ratio)
        self.perturbations = perturbations
        self.noise_share = noise_share
        self.temperature = temperature
        self.term_weights = {"perturbed": perturbed_weight}

    def terms(self, batch: Batch, student: StudentRun, epoch: int) -> dict[str, Tensor]:
        """Hinton's loss "kd", and the sum over perturbed teachers "perturbed"."""
        l_t = class_logits(batch, student.logits)
        noise = torch.randn((self.perturbations, *l_t.shape), device=l_t.device, dtype=l_t.dtype)
        teachers = (1 - self.noise_share) * l_t + self.noise_share * noise  # [n, batch, classes]
        pupils = student.logits.repeat(self.perturbations, 1)
        every = hinton_loss(pupils, teachers.flatten(0, 1), self.temperature)  # their mean: rows are equally many
        return {
            "kd": hinton_loss(student.logits, l_t, self.temperature),
            "perturbed": self.perturbations * every,
        }

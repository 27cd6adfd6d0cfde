"""Base-KD: Hinton's distillation of the teacher's softened classes (arXiv 1503.02531)."""

from __future__ import annotations

from torch import Tensor

from gdpd.distillers.base import Batch, Distiller, hinton_loss
from gdpd.models import Classifier


class KD(Distiller):
    """Cross-entropy plus loss_ratio times Hinton's distillation loss.

    Args:
        student: the network to train.
        loss_ratio: weight r of the distillation loss.
        temperature: T of the distillation loss.
    """

    def __init__(self, student: Classifier, *, loss_ratio: float = 1.0, temperature: float = 2.0) -> None:
        super().__init__(student)
        self.loss_ratio = loss_ratio
        self.temperature = temperature

    def loss(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """CE(student(x_e), y) + r T² KL(teacher(x) ‖ student(x_e))."""
        _, logits, ce = self.student_cross_entropy(batch)
        kd = hinton_loss(logits, batch.teacher_logits, self.temperature)
        return ce + self.loss_ratio * kd, {"ce": ce.detach(), "kd": kd.detach()}

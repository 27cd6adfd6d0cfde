"""Base-KD: Hinton's distillation of the teacher's softened classes (arXiv 1503.02531)."""

from __future__ import annotations

from torch import Tensor

from gdpd.distillers.base import Batch, Distiller, StudentRun, hinton_loss
from gdpd.models import Classifier


class KD(Distiller):
    """CE(student(x_e), y) + r T² KL(teacher(x) ‖ student(x_e)).

    Args:
        student: the network to train.
        loss_ratio: weight r of the distillation loss.
        temperature: T of the distillation loss.
    """

    def __init__(self, student: Classifier, *, loss_ratio: float = 1.0, temperature: float = 2.0) -> None:
        super().__init__(student, loss_ratio=loss_ratio)
        self.temperature = temperature

    def terms(self, batch: Batch, student: StudentRun, epoch: int) -> dict[str, Tensor]:
        """Hinton's loss, "kd"."""
        return {"kd": hinton_loss(student.logits, batch.teacher_logits, self.temperature)}

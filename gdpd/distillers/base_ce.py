"""Base: cross-entropy alone. The comparison's floor, and the loss by which teachers are trained."""

from __future__ import annotations

from torch import Tensor

from gdpd.distillers.base import Batch, Distiller
from gdpd.models import Classifier


class Base(Distiller):
    """Cross-entropy of the student on the prefix; no teacher.

    Args:
        student: the network to train.
    """

    uses_teacher = False

    def __init__(self, student: Classifier) -> None:
        super().__init__(student)

    def loss(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """CE(student(x_e), y)."""
        _, _, ce = self.student_cross_entropy(batch)
        return ce, {"ce": ce.detach()}

"""Base: cross-entropy alone. The comparison's floor, and the loss by which teachers are trained."""

from __future__ import annotations

from torch import Tensor

from gdpd.distillers.base import Batch, Distiller, StudentRun
from gdpd.models import Classifier


class Base(Distiller):
    """CE(student(x_e), y): cross-entropy of the student on the prefix; no teacher.

    Args:
        student: the network to train.
    """

    uses_teacher = False

    def __init__(self, student: Classifier) -> None:
        super().__init__(student)

    def terms(self, batch: Batch, student: StudentRun, epoch: int) -> dict[str, Tensor]:
        """None."""
        return {}

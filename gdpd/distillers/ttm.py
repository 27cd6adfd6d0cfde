"""TTM and WTTM: transformed teacher matching (Zheng and Yang, arXiv 2402.11148)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gdpd.distillers.base import Batch, Distiller, StudentRun, class_logits
from gdpd.models import Classifier


class TTM(Distiller):
    """CE(student(x_e), y) + r weight mean KL(p_t^g / sum p_t^g ‖ p_s): the teacher is softened, the student is not.

    p_t^g normalised is softmax(g l_t), temperature 1 / g.

    Args:
        student: the network to train.
        loss_ratio: r.
        weight: weight of the term before r; the usual 45.
        gamma: g, above 0; the usual 0.1.

    Raises:
        ValueError: gamma not above 0.
    """

    weighted = False

    def __init__(
        self, student: Classifier, *, loss_ratio: float = 1.0, weight: float = 45.0, gamma: float = 0.1
    ) -> None:
        if not gamma > 0:
            raise ValueError(f"gamma={gamma} is not above 0. It is the power of the teacher's probabilities.")
        super().__init__(student, loss_ratio=loss_ratio)
        self.gamma = gamma
        self.term_weights = {"ttm": weight}

    def terms(self, batch: Batch, student: StudentRun, epoch: int) -> dict[str, Tensor]:
        """The divergence, "ttm"."""
        l_t = class_logits(batch, student.logits)
        p_s, p_t = F.log_softmax(student.logits, dim=1), F.log_softmax(self.gamma * l_t, dim=1)
        divergence = F.kl_div(p_s, p_t, reduction="none", log_target=True).sum(dim=1)  # [batch]
        if self.weighted:
            divergence = divergence * (self.gamma * F.log_softmax(l_t, dim=1)).exp().sum(dim=1)
        return {"ttm": divergence.mean()}


class WTTM(TTM):
    """TTM with each series' divergence weighted by sum p_t^g, which is largest where the teacher is least certain.

    Arguments and errors are those of `TTM`.
    """

    weighted = True

"""PLD: Plackett-Luce distillation (Bassam et al., arXiv 2506.12542): the classes ranked as the teacher sees them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gdpd.distillers.base import Batch, Distiller, StudentRun, class_logits
from gdpd.models import Classifier


class PLD(Distiller):
    """r mean sum over ranks k of q_k [logsumexp(s_k, ..., s_C) - s_k]: no cross-entropy beside it.

    Classes are ranked: the label first, then the others by the teacher's confidence. s_k is the student's logit of rank
    k, q_k the teacher's probability of it, softmax(l_t / T). At rank 1 stands the cross-entropy, weighted by what the
    teacher gives to the label. The run's class weights apply to a series' whole sum.

    Args:
        student: the network to train.
        loss_ratio: r.
        cross_entropy: weight of a plain cross-entropy beside it; the paper has none.
        ranking_temperature: T, of the weights q alone.

    Raises:
        ValueError: a temperature that is not above 0.
    """

    def __init__(
        self,
        student: Classifier,
        *,
        loss_ratio: float = 1.0,
        cross_entropy: float = 0.0,
        ranking_temperature: float = 1.0,
    ) -> None:
        if not ranking_temperature > 0:
            raise ValueError(f"ranking_temperature={ranking_temperature} is not above 0.")
        super().__init__(student, loss_ratio=loss_ratio)
        self.plain_weight = cross_entropy
        self.ranking_temperature = ranking_temperature

    def ce_weight(self, epoch: int) -> float:
        """None, unless asked for."""
        return self.plain_weight

    def terms(self, batch: Batch, student: StudentRun, epoch: int) -> dict[str, Tensor]:
        """The ranking's weighted -log likelihood, "pld"."""
        l_t = class_logits(batch, student.logits)
        label = torch.arange(l_t.shape[1], device=l_t.device) == batch.y.unsqueeze(1)
        ranked = l_t.masked_fill(label, torch.inf).argsort(dim=1, descending=True, stable=True)
        s = student.logits.gather(1, ranked)
        q = F.softmax(l_t / self.ranking_temperature, dim=1).gather(1, ranked)
        remaining = s.flip(1).logcumsumexp(dim=1).flip(1)  # over the ranks from k on
        each = (q * (remaining - s)).sum(dim=1)
        if self.class_weights is not None:
            each = each * self.class_weights[batch.y]
        return {"pld": each.mean()}

"""AT: attention transfer on hidden sequences (Zagoruyko and Komodakis, arXiv 1612.03928, equation 2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gdpd.distillers.base import Batch, Distiller, StudentRun, taught
from gdpd.distillers.sequences import aligned, check_alignment, mean_over_steps, valid_steps
from gdpd.models import Classifier


class AT(Distiller):
    """CE(student(x_e), y) + r weight mean (Q_s - Q_t)², Q what a network attends to over time.

    Q is the mean over the units of a hidden sequence of their squares, a number for each step, divided by its l2 norm
    over the steps of the prefix; the mean is over valid steps. Widths may differ.

    Args:
        student: the network to train.
        loss_ratio: r.
        weight: weight of the term before r; the usual 1000.
        align: which of the teacher's steps a step of the prefix is compared with, "stretch" or "steps", see
            `gdpd.distillers.sequences.aligned`.

    Raises:
        ValueError: an option outside its limits.
    """

    uses_sequences = True

    def __init__(
        self, student: Classifier, *, loss_ratio: float = 1.0, weight: float = 1000.0, align: str = "stretch"
    ) -> None:
        super().__init__(student, loss_ratio=loss_ratio)
        self.align = check_alignment(align)
        self.term_weights = {"at": weight}

    def terms(self, batch: Batch, student: StudentRun, epoch: int) -> dict[str, Tensor]:
        """The mean squared difference of the attention maps, "at"."""
        own = student.hidden()
        h_t = taught(batch, "teacher_sequence", None, None)
        h_t = aligned(h_t, batch.teacher_lengths, own, batch.lengths, self.align)
        q_s, q_t = (attention(sequence, batch.lengths) for sequence in (own, h_t))
        return {"at": mean_over_steps((q_s - q_t).square(), batch.lengths)}


def attention(sequence: Tensor, lengths: Tensor | None) -> Tensor:
    """Q [batch, time] of a hidden sequence [batch, time, width]: of norm 1, zero past a series' end."""
    power = sequence.square().mean(dim=2)
    if lengths is not None:
        power = power.where(valid_steps(sequence, lengths), 0)
    return F.normalize(power, dim=1)

"""DT2W: soft-DTW between the hidden sequences of student and teacher (Qiao et al., ICASSP 2023)."""

from __future__ import annotations

from torch import Tensor, nn

from gdpd.distillers.base import Batch, Distiller, StudentRun, taught
from gdpd.distillers.soft_dtw import soft_dtw
from gdpd.models import Classifier


class DT2W(Distiller):
    """CE(student(x_e), y), and after the warm-up + r weight mean soft-DTW(W h_s, h_t).

    Soft-DTW finds for itself which steps of the prefix go with which of the full series, so nothing is aligned before:
    the student's sequence has the prefix' steps, the teacher's all of its own. W is learned with the student where the
    widths differ, and left out where they are the same.

    Args:
        student: the network to train.
        teacher_dim: width of the teacher's feature.
        warmup_epochs: epochs of cross-entropy alone before.
        teacher_sequence_dim: width of the teacher's hidden sequence; `teacher_dim` when None.
        loss_ratio: r.
        weight: weight of the term before r; the usual 0.01. Soft-DTW sums over the steps of a path.
        gamma: smoothing of the minimum; 1.2 in the time-series setting, 1 in the method's paper.

    Raises:
        ValueError: gamma not above 0, or a negative warm-up.
    """

    uses_sequences = True

    def __init__(
        self,
        student: Classifier,
        teacher_dim: int,
        *,
        warmup_epochs: int,
        teacher_sequence_dim: int | None = None,
        loss_ratio: float = 1.0,
        weight: float = 0.01,
        gamma: float = 1.2,
    ) -> None:
        if not gamma > 0:
            raise ValueError(f"gamma={gamma} is not above 0. It smooths soft-DTW's minimum.")
        super().__init__(student, loss_ratio=loss_ratio, warmup_epochs=warmup_epochs)
        self.width = teacher_sequence_dim or teacher_dim
        self.gamma = gamma
        same = student.sequence_dim == self.width
        self.regressor: nn.Module = nn.Identity() if same else nn.Linear(student.sequence_dim, self.width)
        self.term_weights = {"dtw": weight}

    def terms(self, batch: Batch, student: StudentRun, epoch: int) -> dict[str, Tensor]:
        """Soft-DTW, "dtw", in the epochs that have it; it may be negative."""
        if epoch < self.warmup_epochs:
            return {}
        h_t = taught(batch, "teacher_sequence", None, self.width)
        h_s = self.regressor(student.hidden())
        return {"dtw": soft_dtw(h_s, h_t, self.gamma, batch.lengths, batch.teacher_lengths).mean()}

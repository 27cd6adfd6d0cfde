"""Fits: hints from the teacher's hidden sequence (FitNets, Romero et al., arXiv 1412.6550)."""

from __future__ import annotations

from torch import Tensor, nn

from gdpd.distillers.base import Batch, Distiller, StudentRun, taught
from gdpd.distillers.sequences import aligned, check_alignment, mean_over_steps
from gdpd.models import Classifier

HINTS = ("sequence", "feature")
SCHEDULES = ("stages", "joint")


class Fits(Distiller):
    """The student's hidden sequence, through a learned linear map, is brought near the teacher's.

    With h_s, h_t the sequences and W learned with the student, hint = mean (W h_s - h_t)² over valid steps and units:

    - schedule "stages", the time-series setting and that of the paper: r hint alone in epochs before `warmup_epochs`,
      CE(student(x_e), y) alone after;
    - schedule "joint": CE(student(x_e), y) + r hint in all epochs. Comparisons on images use r = 100.

    A prefix has fewer steps than the series that the teacher read; which of the teacher's steps is meant is said by
    `align`, see `gdpd.distillers.sequences.aligned`.

    Args:
        student: the network to train.
        teacher_dim: width of the teacher's feature.
        warmup_epochs: epochs of the first stage; not used by "joint".
        teacher_sequence_dim: width of the teacher's hidden sequence; `teacher_dim` when None.
        loss_ratio: weight r.
        hint: "sequence", or "feature" to compare z_short with z_long alone.
        align: "stretch" or "steps".
        schedule: "stages" or "joint".

    Raises:
        ValueError: an option outside its limits.
    """

    def __init__(
        self,
        student: Classifier,
        teacher_dim: int,
        *,
        warmup_epochs: int,
        teacher_sequence_dim: int | None = None,
        loss_ratio: float = 1.0,
        hint: str = "sequence",
        align: str = "stretch",
        schedule: str = "stages",
    ) -> None:
        for name, value, known in (("hint", hint, HINTS), ("schedule", schedule, SCHEDULES)):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, known))}.")
        if schedule == "stages" and warmup_epochs == 0:
            raise ValueError("warmup_epochs=0 leaves no epoch for the hint. Give some, or use schedule='joint'.")
        super().__init__(student, loss_ratio=loss_ratio, warmup_epochs=warmup_epochs if schedule == "stages" else 0)
        self.uses_sequences = hint == "sequence"
        self.align = check_alignment(align)
        self.schedule = schedule
        self.width = (teacher_sequence_dim or teacher_dim) if self.uses_sequences else teacher_dim
        own = student.sequence_dim if self.uses_sequences else student.feature_dim
        self.regressor = nn.Linear(own, self.width)

    def ce_weight(self, epoch: int) -> float:
        """None in the first stage."""
        return 0.0 if epoch < self.warmup_epochs else 1.0

    def terms(self, batch: Batch, student: StudentRun, epoch: int) -> dict[str, Tensor]:
        """The mean squared difference, "hint", in the epochs that have one."""
        if self.schedule == "stages" and epoch >= self.warmup_epochs:
            return {}
        if student.sequence is None:
            z_long = taught(batch, "z_long", self.width)
            return {"hint": (self.regressor(student.z_short) - z_long).square().mean()}
        h_t = taught(batch, "teacher_sequence", None, self.width)
        h_t = aligned(h_t, batch.teacher_lengths, student.sequence, batch.lengths, self.align)
        return {"hint": mean_over_steps((self.regressor(student.sequence) - h_t).square(), batch.lengths)}

"""What every training method is: a module that holds the student and turns a batch into a loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from gdpd.models import Classifier
from gdpd_kernels.ranges import span


@dataclass
class Batch:
    """One step's data.

    Attributes:
        x_prefix: what the student reads, [batch, channels, time] float.
        y: class numbers, int64 [batch].
        lengths: valid steps of each prefix, int64 [batch]; None when all have `time`.
        index: place of each series in the training set, int64 [batch], for methods that keep something per series.
        z_long: the teacher's feature of the full series, [batch, teacher_dim]; None where no teacher is used.
        teacher_logits: the teacher's logits of the full series, [batch, classes]; likewise.
    """

    x_prefix: Tensor
    y: Tensor
    lengths: Tensor | None = None
    index: Tensor | None = None
    z_long: Tensor | None = None
    teacher_logits: Tensor | None = None


class Distiller(nn.Module):
    """Base class of the methods: a method is its loss. The student is trained in place and is all that is deployed.

    Attributes:
        student: the network that is trained, a `gdpd.models.Classifier`.
        warmup_epochs: epochs before the method's own phase; weights of these are not selected.
        uses_teacher: whether `loss` reads the batch's `z_long` or `teacher_logits`.
    """

    uses_teacher = True

    def __init__(self, student: Classifier, *, warmup_epochs: int = 0) -> None:
        super().__init__()
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs={warmup_epochs} is below 0. Give the number of warm-up epochs, or 0.")
        self.student = student
        self.warmup_epochs = warmup_epochs

    def prepare(self, teacher: Classifier, z_long: Tensor, y: Tensor) -> None:
        """Take what the method needs of the teacher beside the batches; called once before training.

        Args:
            teacher: the trained teacher, frozen; not to be kept, since it is no part of the method's state.
            z_long: its features of all training series, [n, teacher_dim]; maybe on the host.
            y: their class numbers, int64 [n].
        """

    def loss(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch in epoch `epoch` (counted from 0).

        Returns:
            (loss, parts): the 0-d loss to differentiate, and detached parts by name: 0-d losses before weighting, or
            a vector [batch] or matrix whose distribution is worth a look, such as alpha.
        """
        raise NotImplementedError

    def student_cross_entropy(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The student's feature and logits of a batch, and their cross-entropy: its one run in a step."""
        with span("student"):
            z_short, logits = self.student(batch.x_prefix, batch.lengths)
        with span("losses"):
            return z_short, logits, F.cross_entropy(logits, batch.y)

    def phase(self, epoch: int) -> str:
        """Name of what the loss depends on beside the batch: in epochs of one phase it is the same function.

        A method whose loss changes from epoch to epoch (a weight that is turned up, say) returns another name each.
        """
        return "warmup" if epoch < self.warmup_epochs else "main"

    def forward(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """`loss`, so that wrappers of modules (DDP, autocast) apply to it."""
        return self.loss(batch, epoch)


def hinton_loss(student_logits: Tensor, teacher_logits: Tensor | None, temperature: float) -> Tensor:
    """T² KL(teacher ‖ student) of the softened classes, mean over the batch (Hinton et al., 2015, section 2).

    Args:
        student_logits: [batch, classes].
        teacher_logits: [batch, classes].
        temperature: T.

    Raises:
        ValueError: no teacher logits, or of another shape.
    """
    if teacher_logits is None:
        raise ValueError("batch.teacher_logits is None. This method learns from the teacher's logits: fill them in.")
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"the teacher's logits have shape {tuple(teacher_logits.shape)} and the student's "
            f"{tuple(student_logits.shape)}. Both must classify the same series into the same classes."
        )
    with span("losses"):
        log_student = F.log_softmax(student_logits / temperature, dim=1)
        log_teacher = F.log_softmax(teacher_logits / temperature, dim=1)
        return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)

"""What every training method is: a module that holds the student and turns a batch into a loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

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
        teacher_sequence: the teacher's hidden sequence of the full series, [batch, full time, teacher_sequence_dim],
            zero past a series' end; None where the method does not ask for it.
        teacher_lengths: valid steps of that sequence, int64 [batch]; None when all have `full time`.
    """

    x_prefix: Tensor
    y: Tensor
    lengths: Tensor | None = None
    index: Tensor | None = None
    z_long: Tensor | None = None
    teacher_logits: Tensor | None = None
    teacher_sequence: Tensor | None = None
    teacher_lengths: Tensor | None = None


class StudentRun(NamedTuple):
    """What the student made of a batch: feature [batch, width], logits [batch, classes], hidden sequence or None."""

    z_short: Tensor
    logits: Tensor
    sequence: Tensor | None

    def hidden(self) -> Tensor:
        """The hidden sequence.

        Raises:
            ValueError: the method did not ask for it.
        """
        if self.sequence is None:
            raise ValueError("the student's hidden sequence was not asked for: set uses_sequences on the method.")
        return self.sequence


class Distiller(nn.Module):
    """Base class of the methods: a method is its loss. The student is trained in place and is all that is deployed.

    Most methods add terms to the cross-entropy and write `terms` alone; the loss is then
    CE + loss_ratio × the sum of weight × term. Others write `loss`.

    Attributes:
        student: the network that is trained, a `gdpd.models.Classifier`.
        loss_ratio: weight r of all terms together.
        warmup_epochs: epochs before the method's own phase; weights of these are not selected.
        uses_teacher: whether `loss` reads what the batch holds of the teacher.
        uses_sequences: whether it reads the hidden sequences of teacher and student.
        term_weights: the method's own weight of each term, by its name; 1 where there is none.
        class_weights: weights of the classes in the cross-entropy, [classes]; None for equal ones.
    """

    uses_teacher = True
    uses_sequences = False
    term_weights: Mapping[str, float] = MappingProxyType({})
    class_weights: Tensor | None

    def __init__(self, student: Classifier, *, loss_ratio: float = 1.0, warmup_epochs: int = 0) -> None:
        super().__init__()
        self.student = student
        self.loss_ratio = loss_ratio
        self._warm_up_for(warmup_epochs)
        self.register_buffer("class_weights", None, persistent=False)

    def _warm_up_for(self, epochs: int) -> None:
        if epochs < 0:
            raise ValueError(f"warmup_epochs={epochs} is below 0. Give the number of warm-up epochs, or 0.")
        self.warmup_epochs = epochs

    def terms(self, batch: Batch, student: StudentRun, epoch: int) -> dict[str, Tensor]:
        """What the method adds to the cross-entropy: 0-d losses by name, before weighting.

        Args:
            batch: one step's data.
            student: what the student made of it, in its one run of this step.
            epoch: counted from 0.
        """
        raise NotImplementedError(f"{type(self).__name__} has to write terms() or loss().")

    def ce_weight(self, epoch: int) -> float:
        """Weight of the cross-entropy in epoch `epoch`; the term is left out where it is 0."""
        return 1.0

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
        run = self.run_student(batch)
        with span("losses"):
            ce = self.cross_entropy(run.logits, batch.y)
            parts = {"ce": ce, **self.terms(batch, run, epoch)}
            weights = {name: self.loss_ratio * self.term_weights.get(name, 1.0) for name in parts}
            weights["ce"] = self.ce_weight(epoch)
            weighted = [weights[name] * part for name, part in parts.items() if weights[name]]
            total = sum(weighted[1:], weighted[0]) if weighted else 0 * ce
        return total, {name: part.detach() for name, part in parts.items()}

    def run_student(self, batch: Batch) -> StudentRun:
        """The student's one run in a step."""
        with span("student"):
            found = self.student(batch.x_prefix, batch.lengths, **({"sequence": True} if self.uses_sequences else {}))
        return StudentRun(found[0], found[1], found[2] if self.uses_sequences else None)

    def cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean over the batch of -w_y log p_y, with w the `class_weights`.

        Not divided by the sum of the batch's weights: balanced weights have mean 1 over the training set, so the term
        keeps its scale beside others, and a series counts the same in whatever batch it comes.
        """
        if self.class_weights is None:
            return F.cross_entropy(logits, y)
        return F.cross_entropy(logits, y, self.class_weights, reduction="none").mean()

    def student_cross_entropy(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The student's feature and logits of a batch, and their cross-entropy: its one run in a step."""
        z_short, logits, _ = self.run_student(batch)
        with span("losses"):
            return z_short, logits, self.cross_entropy(logits, batch.y)

    def phase(self, epoch: int) -> str:
        """Name of what the loss depends on beside the batch: in epochs of one phase it is the same function.

        A method whose loss changes from epoch to epoch (a weight that is turned up, say) returns another name each.
        """
        return "warmup" if epoch < self.warmup_epochs else "main"

    def forward(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """`loss`, so that wrappers of modules (DDP, autocast) apply to it."""
        return self.loss(batch, epoch)


def taught(batch: Batch, name: str, *shape: int | None) -> Tensor:
    """What the batch holds of the teacher under `name`, after a look at its shape.

    Args:
        batch: one step's data.
        name: field of `Batch`, such as "z_long".
        *shape: sizes after that of the batch; None for any.

    Raises:
        ValueError: it is None, or of another shape.
    """
    value: Tensor | None = getattr(batch, name)
    expected = (len(batch.y), *shape)
    told = "[" + ", ".join("any" if size is None else str(size) for size in expected) + "]"
    if value is None:
        raise ValueError(f"batch.{name} is None. This method learns from the teacher's: fill in {told}.")
    fits = value.ndim == len(expected) and all(
        size in (None, found) for size, found in zip(expected, value.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"batch.{name} is of shape {tuple(value.shape)}; expected {told}, from this method's teacher.")
    return value.detach()


def class_logits(batch: Batch, student_logits: Tensor) -> Tensor:
    """The teacher's logits of the batch, detached, for a student with logits [batch, classes].

    Raises:
        ValueError: no teacher logits, or of another shape.
    """
    return _checked_logits(batch.teacher_logits, student_logits)


def hinton_loss(student_logits: Tensor, teacher_logits: Tensor | None, temperature: float) -> Tensor:
    """T² KL(teacher ‖ student) of the softened classes, mean over the batch (Hinton et al., 2015, section 2).

    Args:
        student_logits: [batch, classes].
        teacher_logits: [batch, classes].
        temperature: T.

    Raises:
        ValueError: no teacher logits, or of another shape.
    """
    teacher_logits = _checked_logits(teacher_logits, student_logits)
    with span("losses"):
        log_student = F.log_softmax(student_logits / temperature, dim=1)
        log_teacher = F.log_softmax(teacher_logits / temperature, dim=1)
        return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def _checked_logits(teacher_logits: Tensor | None, student_logits: Tensor) -> Tensor:
    if teacher_logits is None:
        raise ValueError("batch.teacher_logits is None. This method learns from the teacher's logits: fill them in.")
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"the teacher's logits have shape {tuple(teacher_logits.shape)} and the student's "
            f"{tuple(student_logits.shape)}. Both must classify the same series into the same classes."
        )
    return teacher_logits.detach()

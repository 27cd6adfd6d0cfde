"""LELP: subclasses from linear projections of teacher features (Loo et al., arXiv 2409.20449), for few classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdpd.distillers.base import Batch, Distiller, StudentRun, hinton_loss, taught
from gdpd.models import Classifier


class LELP(Distiller):
    """CE(student(x_e), y) + r T² KL(teacher ‖ student) over subclasses: S of each class, found in teacher features.

    Of two classes a teacher says one number. How its features vary *within* a class says more: for each class, the
    principal directions of its features, outside the span of the teacher's classifier, so that nothing is said twice.
    The S projections on them, of variance 1 over the class, are the logits of S subclasses:

        p(c, s) = p(c) p(s | c),   p(c) = softmax(l_t / T),   p(s | c) = softmax(projections of class c / T_s)

    The student's p(c) is that of its own head, which is all that is deployed, and p(s | c) that of a head of C · S
    outputs on the same feature, for training only; together they can be any distribution over the C · S subclasses, as
    the paper's single head can. By the chain rule the divergence is the sum of two terms, "kd" over classes and
    "subclasses", sum over c of p(c) KL(p(s | c) ‖ student's).

    For a loop of your own, `prepare(teacher, z_long, y)` comes before the first step.

    Args:
        student: the network to train.
        teacher_dim: width of the teacher's feature.
        loss_ratio: r.
        temperature: T.
        subclasses: S, 2 or more. A class whose features span fewer directions gives the rest equal logits.
        subclass_temperature: T_s, above 0.
        subclass_weight: weight of the second term before r.

    Raises:
        ValueError: an option outside its limits; as many classes as features, which leave no direction outside the
            classifier's span.
    """

    directions: Tensor
    offsets: Tensor

    def __init__(
        self,
        student: Classifier,
        teacher_dim: int,
        *,
        loss_ratio: float = 1.0,
        temperature: float = 2.0,
        subclasses: int = 4,
        subclass_temperature: float = 1.0,
        subclass_weight: float = 1.0,
    ) -> None:
        if subclasses < 2 or not subclass_temperature > 0:
            raise ValueError(
                f"subclasses={subclasses}, subclass_temperature={subclass_temperature}: needed are 2 subclasses or "
                "more, and a temperature above 0."
            )
        if student.num_classes >= teacher_dim:
            raise ValueError(
                f"{student.num_classes} classes span all {teacher_dim} dimensions of the teacher's feature: there is "
                "no room for subclasses. LELP is made for few classes; use kd."
            )
        super().__init__(student, loss_ratio=loss_ratio)
        self.teacher_dim = teacher_dim
        self.temperature = temperature
        self.subclass_temperature = subclass_temperature
        self.term_weights = {"subclasses": subclass_weight}
        self.prepared = False
        classes = student.num_classes
        self.head = nn.Linear(student.feature_dim, classes * subclasses)
        self.register_buffer("directions", torch.zeros(classes, subclasses, teacher_dim))
        self.register_buffer("offsets", torch.zeros(classes, subclasses))

    @torch.no_grad()
    def prepare(self, teacher: Classifier, z_long: Tensor, y: Tensor) -> None:
        """Find each class's directions in the teacher's features of the training series.

        Raises:
            ValueError: features of another width than the method was made for.
        """
        if z_long.shape[1:] != (self.teacher_dim,):
            raise ValueError(f"z_long has shape {tuple(z_long.shape)}; expected [n, teacher_dim={self.teacher_dim}].")
        features = z_long.detach().double().cpu()
        weight = teacher.head.weight.detach().double().cpu()
        outside = torch.eye(self.teacher_dim, dtype=torch.float64) - torch.linalg.pinv(weight) @ weight
        self.directions.zero_()
        for c in range(len(self.directions)):
            rows = features[(y == c).cpu()]
            if len(rows) < 2:
                continue
            scaled = principal_directions((rows - rows.mean(dim=0)) @ outside, len(self.directions[c]))
            self.directions[c, : len(scaled)] = scaled.to(self.directions)
            self.offsets[c] = (self.directions[c] @ rows.mean(dim=0).to(self.directions)).to(self.offsets)
        self.prepared = True

    def subclass_logits(self, z_long: Tensor) -> Tensor:
        """The teacher's logits of the subclasses within each class, [batch, classes, S], of z_long [batch, D]."""
        with torch.autocast(z_long.device.type, enabled=False):  # a difference of numbers of like size
            z = z_long.to(self.directions.dtype)
            return torch.einsum("bd,csd->bcs", z, self.directions) - self.offsets

    def terms(self, batch: Batch, student: StudentRun, epoch: int) -> dict[str, Tensor]:
        """The terms "kd" and "subclasses".

        Raises:
            RuntimeError: `prepare` was not called.
        """
        if not self.prepared:
            raise RuntimeError("LELP knows no subclasses. Call prepare(teacher, z_long, y) before training.")
        kd = hinton_loss(student.logits, batch.teacher_logits, self.temperature)
        l_t = taught(batch, "teacher_logits", student.logits.shape[1])
        within = self.subclass_logits(taught(batch, "z_long", self.teacher_dim))
        log_t = F.log_softmax(within / self.subclass_temperature, dim=2)
        log_s = F.log_softmax(self.head(student.z_short).view(within.shape), dim=2)
        each = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim=2)  # [batch, classes]
        share = F.softmax(l_t / self.temperature, dim=1)
        return {"kd": kd, "subclasses": self.temperature**2 * (share * each).sum(dim=1).mean()}


def principal_directions(centred: Tensor, most: int) -> Tensor:
    """Up to `most` directions of largest variance of rows [n, D], each divided by the standard deviation along it.

    Directions along which nothing varies are left out. Of the two signs, the one whose largest entry is positive.
    """
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    varies = singular > 1e-6 * singular[0].clamp(min=1e-3)
    directions, deviation = directions[varies][:most], singular[varies][:most] / len(centred) ** 0.5
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    return directions * largest.sign() / deviation.unsqueeze(1)

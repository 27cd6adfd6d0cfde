"""TAID: a teacher that moves from the student to itself (Shing et al., arXiv 2501.16937)."""

from __future__ import annotations

import torch
from torch import Tensor

from gdpd.distillers.base import Batch, Distiller, StudentRun, class_logits, hinton_loss
from gdpd.models import Classifier


class TAID(Distiller):
    """CE(student(x_e), y) + r J, J = T² KL(p_t ‖ student), p_t of the logits (1 - t) stop(student) + t teacher.

    t goes from `start` to `end`, at least linearly with the epochs, and faster while J falls: after each step, with
    delta = (J_before - J) / J_before and m <- momentum m + (1 - momentum) delta,

        t <- min(end, t + step_size sigmoid(m) (1 - t))

    Args:
        student: the network to train.
        epochs: epochs of the training, over which t goes to `end`.
        loss_ratio: r.
        temperature: T.
        start, end: of t, 0 <= start <= end <= 1; the paper's 0.4 and 1.
        step_size: the paper's 5e-4.
        momentum: the paper's 0.99.

    Raises:
        ValueError: an option outside its limits.
    """

    t: Tensor
    average: Tensor
    before: Tensor

    def __init__(
        self,
        student: Classifier,
        *,
        epochs: int,
        loss_ratio: float = 1.0,
        temperature: float = 2.0,
        start: float = 0.4,
        end: float = 1.0,
        step_size: float = 5e-4,
        momentum: float = 0.99,
    ) -> None:
        if not 0 <= start <= end <= 1:
            raise ValueError(f"start={start}, end={end}: needed is 0 <= start <= end <= 1.")
        if epochs < 1 or not step_size >= 0 or not 0 <= momentum < 1:
            raise ValueError(
                f"epochs={epochs}, step_size={step_size}, momentum={momentum}: needed are at least 1 epoch, a step of "
                "at least 0, and a momentum in [0, 1)."
            )
        super().__init__(student, loss_ratio=loss_ratio)
        self.epochs = epochs
        self.temperature = temperature
        self.start, self.end = start, end
        self.step_size = step_size
        self.momentum = momentum
        self.register_buffer("t", torch.tensor(start))
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("before", torch.zeros(()))  # J of the step before; 0 at the start

    def phase(self, epoch: int) -> str:
        """The least t is another in each epoch, so a recorded step (`graph_step`) is recorded anew in each."""
        return f"epoch{epoch}"

    def least(self, epoch: int) -> float:
        """Where t is at least in epoch `epoch`."""
        return self.start + (self.end - self.start) * min(1.0, epoch / max(1, self.epochs - 1))

    def terms(self, batch: Batch, student: StudentRun, epoch: int) -> dict[str, Tensor]:
        """J, "taid"; in training, t moves on."""
        l_t = class_logits(batch, student.logits)
        t = self.t.clamp(min=self.least(epoch))
        between = torch.lerp(student.logits.detach(), l_t.to(student.logits.dtype), t.to(student.logits.dtype))
        loss = hinton_loss(student.logits, between, self.temperature)
        if self.training:
            self._move(t, loss.detach().to(self.t.dtype))
        return {"taid": loss}

    @torch.no_grad()
    def _move(self, t: Tensor, loss: Tensor) -> None:
        delta = torch.where(self.before > 0, (self.before - loss) / self.before.clamp(min=1e-12), 0)
        self.average.mul_(self.momentum).add_((1 - self.momentum) * delta)
        self.t.copy_((t + self.step_size * self.average.sigmoid() * (1 - t)).clamp(max=self.end))
        self.before.copy_(loss)

"""DKD: decoupled knowledge distillation (Zhao et al., arXiv 2203.08679)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gdpd.distillers.base import Batch, Distiller, StudentRun, class_logits
from gdpd.models import Classifier


class DKD(Distiller):
    """CE(student(x_e), y) + r ramp (w_t TCKD + w_n NCKD): Hinton's loss in two parts with weights of their own.

    With p softened by T:

    - TCKD: T² KL between (p_y, 1 - p_y) of teacher and student, the class of the label against all others;
    - NCKD: T² KL between the others among themselves, p_c / (1 - p_y) for c ≠ y.

    ramp grows linearly to 1 over the first `ramp_epochs` epochs. **Of two classes there is one other**, whose share is
    1 for both networks: NCKD is 0 and TCKD is Hinton's loss. DKD is then KD with weight w_t, and nothing is divided by
    0.

    Args:
        student: the network to train.
        loss_ratio: r.
        target_weight, other_weight: w_t and w_n; the usual 1 and 8.
        temperature: T.
        ramp_epochs: epochs until the full weight; 0 or 1 for none. The usual 20.

    Raises:
        ValueError: a ramp below 0.
    """

    def __init__(
        self,
        student: Classifier,
        *,
        loss_ratio: float = 1.0,
        target_weight: float = 1.0,
        other_weight: float = 8.0,
        temperature: float = 2.0,
        ramp_epochs: int = 20,
    ) -> None:
        if ramp_epochs < 0:
            raise ValueError(f"ramp_epochs={ramp_epochs} is below 0. Give the number of epochs, or 0.")
        super().__init__(student, loss_ratio=loss_ratio)
        self.term_weights = {"tckd": target_weight, "nckd": other_weight}
        self.temperature = temperature
        self.ramp_epochs = ramp_epochs

    def phase(self, epoch: int) -> str:
        """Each epoch of the ramp has a weight of its own."""
        return f"ramp{epoch}" if epoch + 1 < self.ramp_epochs else "main"

    def ramp(self, epoch: int) -> float:
        """Share of the full weight in epoch `epoch`, in (0, 1]."""
        return min(1.0, (epoch + 1) / max(1, self.ramp_epochs))

    def terms(self, batch: Batch, student: StudentRun, epoch: int) -> dict[str, Tensor]:
        """The terms "tckd" and "nckd", with the ramp's weight."""
        l_t = class_logits(batch, student.logits)
        target_s, others_s = self._parts(student.logits, batch.y)
        target_t, others_t = self._parts(l_t, batch.y)
        scale = self.ramp(epoch) * self.temperature**2

        def divergence(log_s: Tensor, log_t: Tensor) -> Tensor:
            return scale * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)

        return {"tckd": divergence(target_s, target_t), "nckd": divergence(others_s, others_t)}

    def _parts(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """log (p_y, 1 - p_y) [batch, 2] and log of the others' shares [batch, classes - 1]."""
        softened = logits / self.temperature
        classes = logits.shape[1]
        others = softened.gather(1, (y.unsqueeze(1) + torch.arange(1, classes, device=y.device)) % classes)
        both = torch.cat([softened.gather(1, y.unsqueeze(1)), others.logsumexp(dim=1, keepdim=True)], dim=1)
        return F.log_softmax(both, dim=1), F.log_softmax(others, dim=1)

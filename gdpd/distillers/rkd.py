"""RKD: distances and angles between the features of a batch (Park et al., arXiv 1904.05068)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gdpd.distillers.base import Batch, Distiller, StudentRun, taught
from gdpd.models import Classifier


class RKD(Distiller):
    """CE(student(x_e), y) + r (w_d distance + w_a angle), of features related to one another within a batch.

    - distance: smooth-L1 between the distances of all pairs, each network's divided by their mean over pairs that lie
      apart; mean over all batch² pairs;
    - angle: smooth-L1 between the cosines of the angles at i between j and k; mean over all batch³ triples.

    Widths may differ. A batch of one series has no relations, and both terms are 0.

    Args:
        student: the network to train.
        loss_ratio: r.
        distance_weight, angle_weight: w_d and w_a; the usual 25 and 50.
    """

    def __init__(
        self,
        student: Classifier,
        *,
        loss_ratio: float = 1.0,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
    ) -> None:
        super().__init__(student, loss_ratio=loss_ratio)
        self.term_weights = {"distance": distance_weight, "angle": angle_weight}

    def terms(self, batch: Batch, student: StudentRun, epoch: int) -> dict[str, Tensor]:
        """The terms "distance" and "angle"."""
        (d_s, a_s), (d_t, a_t) = (relations(z) for z in (student.z_short, taught(batch, "z_long", None)))
        return {"distance": F.smooth_l1_loss(d_s, d_t), "angle": F.smooth_l1_loss(a_s, a_t)}


def relations(z: Tensor) -> tuple[Tensor, Tensor]:
    """Of z [batch, A]: distances over their mean [batch, batch], cosines [batch, batch, batch] at the first index."""
    with torch.autocast(z.device.type, enabled=False):  # differences of features are small beside them
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        apart = z.unsqueeze(0) - z.unsqueeze(1)  # [i, j]: from i to j
        distance = torch.linalg.vector_norm(apart, dim=2)
        mean = distance.sum() / (distance > 0).sum().clamp(min=1)
        direction = F.normalize(apart, dim=2)
        return distance / mean.clamp(min=1e-12), direction @ direction.transpose(1, 2)

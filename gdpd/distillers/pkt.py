"""PKT: probabilistic knowledge transfer (Passalis and Tefas, arXiv 1803.10837)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gdpd.distillers.base import Batch, Distiller, StudentRun, taught
from gdpd.models import Classifier

_LEAST = 1e-7  # no probability is taken to be smaller


class PKT(Distiller):
    """CE(student(x_e), y) + r weight mean p_t log(p_t / p_s), p how likely each series is another's neighbour.

    p_ij = k_ij / sum over j of k_ij with k = (cos + 1) / 2 of the features of series i and j of a batch. The mean is
    over all batch² pairs, for which the usual weight is meant. Widths may differ.

    Args:
        student: the network to train.
        loss_ratio: r.
        weight: weight of the term before r; the usual 30000.
    """

    def __init__(self, student: Classifier, *, loss_ratio: float = 1.0, weight: float = 30000.0) -> None:
        super().__init__(student, loss_ratio=loss_ratio)
        self.term_weights = {"pkt": weight}

    def terms(self, batch: Batch, student: StudentRun, epoch: int) -> dict[str, Tensor]:
        """The divergence of the neighbourhoods, "pkt"."""
        p_s, p_t = (neighbourhood(z) for z in (student.z_short, taught(batch, "z_long", None)))
        return {"pkt": (p_t * (p_t.log() - p_s.log())).mean()}


def neighbourhood(z: Tensor) -> Tensor:
    """p [batch, batch] of features z [batch, A]; rows sum to 1."""
    with torch.autocast(z.device.type, enabled=False):  # chances differ by less than what bfloat16 tells apart
        direction = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)
        kernel = (direction @ direction.T + 1) / 2
        return (kernel / kernel.sum(dim=1, keepdim=True)).clamp(min=_LEAST)

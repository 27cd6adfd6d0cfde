"""VID: variational information distillation (Ahn et al., arXiv 1904.05835)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdpd.distillers.base import Batch, Distiller, StudentRun, taught
from gdpd.models import Classifier

_LEAST = 1e-5  # variances stay above


class VID(Distiller):
    """CE(student(x_e), y) + r weight mean ½ [(mu(z_short) - z_long)² / v + log v], a Gaussian's -log likelihood.

    mu is a network of two hidden layers of the teacher's width (the paper's three 1×1 convolutions); v, one number for
    each of the teacher's dimensions, is learned through softplus. Both are for training only.

    Args:
        student: the network to train.
        teacher_dim: width of the teacher's feature.
        loss_ratio: r.
        weight: weight of the term before r.
        initial_variance: v at the start.

    Raises:
        ValueError: a variance that is not above 1e-5.
    """

    def __init__(
        self,
        student: Classifier,
        teacher_dim: int,
        *,
        loss_ratio: float = 1.0,
        weight: float = 1.0,
        initial_variance: float = 5.0,
    ) -> None:
        if not _LEAST < initial_variance < math.inf:
            raise ValueError(f"initial_variance={initial_variance} is not a finite number above {_LEAST}.")
        super().__init__(student, loss_ratio=loss_ratio)
        self.teacher_dim = teacher_dim
        self.term_weights = {"vid": weight}
        self.mean = nn.Sequential(
            nn.Linear(student.feature_dim, teacher_dim),
            nn.ReLU(),
            nn.Linear(teacher_dim, teacher_dim),
            nn.ReLU(),
            nn.Linear(teacher_dim, teacher_dim),
        )
        start = initial_variance - _LEAST
        self.scale = nn.Parameter(
            torch.full((teacher_dim,), start + math.log(-math.expm1(-start)))
        )  # softplus inverted

    def terms(self, batch: Batch, student: StudentRun, epoch: int) -> dict[str, Tensor]:
        """The Gaussian's -log likelihood, "vid"; it may be negative."""
        z_long = taught(batch, "z_long", self.teacher_dim)
        v = F.softplus(self.scale) + _LEAST
        return {"vid": ((self.mean(student.z_short) - z_long).square() / v + v.log()).mean() / 2}

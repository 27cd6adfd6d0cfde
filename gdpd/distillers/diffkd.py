"""DiffKD (arXiv 2305.15712): the student's feature, denoised by a prior over teacher features, is to meet one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gdpd.distillers.base import Batch, StudentRun
from gdpd.distillers.reverse import ReverseDistiller


class DiffKD(ReverseDistiller):
    """Prior and student learn together, in one stage, every weight 1:

        CE(student(x_e), y) + r (MSE_noise + MSE_autoencoder + MSE(proj(z_hat), stop(code)))

    with code the encoder's output for z_long (z_long itself in the identity space) and z_hat where the reverse process
    ends that starts at alpha trans(z_short) + (1 - alpha) eps. Arguments as `ReverseDistiller`; the paper's two
    denoisers are "bottleneck" and "wide".
    """

    def terms(self, batch: Batch, student: StudentRun, epoch: int) -> dict[str, Tensor]:
        """MSE of the noise and the autoencoder, and the distance of the denoised feature."""
        losses, code = self.prior.losses_and_code(self.teacher_features(batch))
        denoised, _ = self.denoised(student.z_short)
        return {**losses, "distance": F.mse_loss(denoised, code)}

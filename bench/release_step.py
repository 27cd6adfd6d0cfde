"""The training step of the GDPD paper's public release in eager PyTorch, written from docs/method.md: the step to beat.

The student runs twice (once for its logits, once for the feature that the sampler starts from), the teacher runs live
on the full series, the sampler walks a network of convolutions on 1 × 1 maps, the LSTMs are torch.nn.LSTM, Adam is
torch's default. It takes over the weights of a `GDPD` distiller, and computes the same loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdpd.distillers import GDPD
from gdpd.models import LSTMClassifier
from gdpd_kernels.benchmark.rivals import ReleaseBottleneck, ReleaseDenoiser, ReleaseScheduler, centre, release_sample


class ReleaseLSTM(nn.Module):
    """Stacked torch.nn.LSTM, last time step, linear head; takes the state of an `LSTMClassifier`."""

    def __init__(self, like: LSTMClassifier) -> None:
        super().__init__()
        layers, width = like.lstm.num_layers, like.lstm.hidden_size
        self.lstm = nn.LSTM(like.in_channels, width, num_layers=layers, batch_first=True)
        self.head = nn.Linear(width, like.num_classes)
        self.load_state_dict(like.state_dict())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        outputs, _ = self.lstm(x.transpose(1, 2))
        return outputs[:, -1], self.head(outputs[:, -1])


class ReleaseStep(nn.Module):
    """A stage-two step of the release, around the weights of `mine`.

    Args:
        mine: a distiller with the release's options: bottleneck denoiser, alpha per sample, Hinton's loss.
        teacher: its teacher.
        steps: of the sampler.
    """

    def __init__(self, mine: GDPD, teacher: LSTMClassifier, steps: int = 5) -> None:
        super().__init__()
        width = mine.trans.out_features
        self.student = ReleaseLSTM(mine.student)  # type: ignore[arg-type]
        self.teacher = ReleaseLSTM(teacher).eval().requires_grad_(False)
        self.trans = nn.Linear(width, width)
        self.denoiser = ReleaseDenoiser(width)
        self.fusion = nn.Sequential(ReleaseBottleneck(width, 8), nn.Conv2d(width, 2, 1))
        self.proj = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
        self.temperature, self.loss_ratio = mine.temperature, mine.loss_ratio
        self.steps, self.scheduler = steps, ReleaseScheduler()
        self.trans.load_state_dict(mine.trans.state_dict())
        self.proj.load_state_dict(mine.proj.state_dict())
        with torch.no_grad():
            for maps, flat in ((self.denoiser, mine.prior.denoiser), (self.fusion, mine.fusion)):
                for ours, theirs in zip(maps.parameters(), flat.parameters(), strict=True):
                    centre(ours).copy_(theirs)
        learned = [p for name, p in self.named_parameters() if not name.startswith("teacher")]
        self.optimizer = torch.optim.Adam(learned, lr=1e-3, weight_decay=1e-5)

    def loss(self, x_prefix: Tensor, x: Tensor, y: Tensor, noise: Tensor | None = None) -> Tensor:
        """CE + r (CE of the sampled logits + T² KL), from prefixes and full series [batch, channels, time]."""
        with torch.no_grad():
            _, teacher_logits = self.teacher(x)
        _, logits = self.student(x_prefix)
        z_short, _ = self.student(x_prefix)
        z = self.trans(z_short)
        alpha = self.fusion(z[:, :, None, None]).flatten(1).softmax(1)[:, :1]
        noise = torch.randn_like(z) if noise is None else noise
        z_hat = release_sample(self.denoiser, z, noise, alpha, self.scheduler, self.steps)
        sampled = F.cross_entropy(self.student.head(self.proj(z_hat)), y)
        kd = F.kl_div(
            F.log_softmax(logits / self.temperature, 1), F.softmax(teacher_logits / self.temperature, 1),
            reduction="batchmean",
        )  # fmt: skip
        return F.cross_entropy(logits, y) + self.loss_ratio * (sampled + self.temperature**2 * kd)

    def step(self, x_prefix: Tensor, x: Tensor, y: Tensor) -> None:
        """Train on a batch."""
        self.optimizer.zero_grad()
        self.loss(x_prefix, x, y).backward()
        self.optimizer.step()

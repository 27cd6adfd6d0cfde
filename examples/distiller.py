"""A distiller in the manner of mdistiller and torchdistill: forward_train(image, target) -> logits, losses."""

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import nn

from gdpd.sampler import DDIMPipeline  # the one import that changes


class Denoiser(nn.Module):
    """Maps [batch, C, H, W] and a time step, in convolutions, as the trainers of this family write it."""

    def __init__(self, channels):
        super().__init__()
        self.time = nn.Embedding(1280, channels)
        self.net = nn.Sequential(
            *(nn.Conv2d(channels, 4 * channels, 1), nn.BatchNorm2d(4 * channels), nn.ReLU()),
            *(nn.Conv2d(4 * channels, channels, 3, padding=1), nn.BatchNorm2d(channels)),
        )

    def forward(self, z, t):
        return self.net(z + self.time(t)[..., None, None])


class Adapter(nn.Module):
    """How much of the feature the start keeps, from 0 to 1 for each sample."""

    def __init__(self, channels):
        super().__init__()
        self.score = nn.Linear(channels, 1)

    def forward(self, feat):
        return torch.sigmoid(self.score(feat.mean(dim=(2, 3))))


class DenoisingKD(nn.Module):
    """Student features are denoised by a diffusion model of the teacher's, and compared with those."""

    def __init__(self, student, teacher, channels, weight=1.0):
        super().__init__()
        self.student, self.teacher, self.weight = student, teacher.eval().requires_grad_(False), weight
        self.denoiser, self.adapter = Denoiser(channels), Adapter(channels)
        self.scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False, beta_schedule="linear")
        self.pipeline = DDIMPipeline(self.denoiser, self.scheduler, self.adapter)

    def forward_train(self, image, target):
        """Logits of the student, and its losses by name; `student` and `teacher` return logits and a feature map."""
        logits, feat = self.student(image)
        teacher_feat = self.teacher(image)[1]
        noise, t = torch.randn_like(teacher_feat), torch.randint(1000, (len(image),), device=image.device)
        noisy = self.scheduler.add_noise(teacher_feat, noise, t)
        z_hat = self.pipeline(len(feat), feat.device, feat.dtype, feat.shape[1:], feat, num_inference_steps=5)
        return logits, {
            "loss_ce": F.cross_entropy(logits, target),
            "loss_kd": self.weight * F.mse_loss(z_hat, teacher_feat),
            "loss_diffusion": F.mse_loss(self.denoiser(noisy, t), noise),
        }

"""Hugging Face diffusers: its DDIMScheduler and a model of its kind, handed straight in."""

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DModel

from gdpd.sampler import DDIMPipeline

CHANNELS = 16


def main(steps=60, width=32):
    """Returns the losses of training a projection through the frozen model's reverse process, a list."""
    torch.manual_seed(0)
    scheduler = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)
    model = UNet2DModel(
        sample_size=1,  # a feature vector is a map of one pixel
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        layers_per_block=1,
        block_out_channels=(width,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,  # attention over one pixel does nothing
        norm_num_groups=1,
    )
    target = torch.randn(64, CHANNELS, 1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):  # the prior, as diffusers' own training examples write it
        noise, t = torch.randn_like(target), torch.randint(1000, (len(target),))
        loss = F.mse_loss(model(scheduler.add_noise(target, noise, t), t).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.requires_grad_(False).eval()
    pipeline = DDIMPipeline(model, scheduler)
    x = target.flatten(1)[:, :4]
    student = torch.nn.Linear(4, CHANNELS)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        feat = student(x)[:, :, None, None]
        z_hat = pipeline(len(feat), feat.device, feat.dtype, feat.shape[1:], feat, num_inference_steps=5)
        loss = F.mse_loss(z_hat, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"{losses[0]:.3f} -> {losses[-1]:.3f}")

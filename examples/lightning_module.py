"""A LightningModule: a student trained through the reverse process of a diffusion prior, in Lightning's own loop."""

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gdpd_kernels as gk
from gdpd.denoisers import MLPDenoiser
from gdpd.fusion import NoiseFusion


class DenoisedStudent(pl.LightningModule):
    """Half of the epochs learn the prior, the other half ask that the denoised feature is classified correctly."""

    def __init__(self, inputs, features, classes, warmup_epochs):
        super().__init__()
        self.student = nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, features))
        self.head = nn.Linear(features, classes)
        self.denoiser = MLPDenoiser(features, hidden=(64,))
        self.fusion = NoiseFusion(features)
        self.warmup_epochs = warmup_epochs
        self.table = gk.ddim_table(num_inference_steps=5, window="lower")
        self.register_buffer("alphas_cumprod", gk.alphas_cumprod(), persistent=False)

    def training_step(self, batch, _):
        x, z_long, labels = batch
        z_short = self.student(x)
        loss = F.cross_entropy(self.head(z_short), labels)
        if self.current_epoch < self.warmup_epochs:
            second = gk.prior_loss(self.denoiser, z_long, alphas_cumprod=self.alphas_cumprod)
        else:
            z_hat = gk.reverse_sample(self.denoiser, z_short, table=self.table, alpha=self.fusion(z_short))
            second = F.cross_entropy(self.head(z_hat), labels)
        self.log_dict({"classification": loss, "prior or denoised": second}, on_epoch=True, on_step=False)
        return loss + second

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def main(epochs=20, **trainer_options):
    """Returns the trained module and the trainer's last metrics."""
    pl.seed_everything(0)
    labels = torch.randint(4, (256,))
    z_long = 2 * torch.randn(4, 32)[labels] + 0.3 * torch.randn(256, 32)
    data = TensorDataset(z_long[:, :8] + 0.5 * torch.randn(256, 8), z_long, labels)
    module = DenoisedStudent(inputs=8, features=32, classes=4, warmup_epochs=epochs // 2)
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"} | trainer_options
    trainer = pl.Trainer(max_epochs=epochs, **options)
    trainer.fit(module, DataLoader(data, batch_size=64, shuffle=True))
    return module, {name: float(value) for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    print(main()[1])

"""How much the time embedding changes what the reverse sampler gives: `python -m bench.time_embedding` (half a minute).

In training mode a BatchNorm takes out whatever is added to all rows alike; in the sampler all rows share one t. Here
a prior of each kind learns a mixture of Gaussians; then the same start is walked with its time embedding and without
(zeros), with batch statistics and with the running ones. Printed is the norm of the difference over that of z_hat.
"""

from __future__ import annotations

import torch

import gdpd_kernels as gk
from gdpd.denoisers import build_denoiser
from gdpd.prior import FeaturePrior

WIDTH, ROWS, STEPS = 100, 64, 400
DENOISERS = (
    ("bottleneck", {}),
    ("wide", {}),
    ("bottleneck", {"norm": "layer"}),
    ("mlp", {"time_embedding": "learned"}),
)


def features(rows: int) -> torch.Tensor:
    """Draws of a mixture of three Gaussians, [rows, WIDTH]."""
    centres = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(7))
    return centres[torch.randint(3, (rows,))] + 0.3 * torch.randn(rows, WIDTH)


def trained(name: str, options: dict[str, str]) -> FeaturePrior:
    """A prior after STEPS steps of Adam on them."""
    torch.manual_seed(0)
    made = FeaturePrior(build_denoiser(name, WIDTH, **options), WIDTH, WIDTH, target_space="identity")
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        made.losses(features(ROWS))["noise"].backward()
        optimizer.step()
    return made


@torch.no_grad()
def effect(prior: FeaturePrior, start: torch.Tensor, training: bool) -> float:
    """The relative difference that the embedding makes to z_hat, [rows, WIDTH], from `start`."""
    denoiser = prior.denoiser.double().train(training)
    table = gk.ddim_table(num_inference_steps=5, window="lower")
    kept = denoiser.time_embedding.weight.clone()
    known = {name: value.clone() for name, value in denoiser.state_dict().items()}
    found = gk.reverse_sample(denoiser, start, table=table, backend="reference")
    denoiser.load_state_dict(known)
    denoiser.time_embedding.weight.zero_()
    without = gk.reverse_sample(denoiser, start, table=table, backend="reference")
    denoiser.load_state_dict(known)
    assert torch.equal(denoiser.time_embedding.weight, kept)
    return float((found - without).norm() / found.norm())


def main() -> None:
    """Print a row per denoiser."""
    print("| denoiser | batch statistics | running statistics |\n| --- | --- | --- |")
    for name, options in DENOISERS:
        prior = trained(name, options)
        torch.manual_seed(1)
        start = (0.5 * features(ROWS) + 0.5 * torch.randn(ROWS, WIDTH)).double()
        training, running = (effect(prior, start, mode) for mode in (True, False))
        told = ", ".join([name, *(f"{key} {value}" for key, value in options.items())])
        print(f"| {told} | {training:.1e} | {running:.1e} |")


if __name__ == "__main__":
    main()

"""How fast a prior over a teacher's features is learned: `python -m bench.prior_learning` (a few minutes).

A teacher is trained as in the recorded comparison; then priors of several kinds learn its features alone, by the loss
of GDPD's first stage. Printed is the noise loss, a mean over the last 20 updates: 1 is what predicting zero gives.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.tables import Rows, markdown
from gdpd.config import RunConfig
from gdpd.denoisers import build_denoiser
from gdpd.prior import FeaturePrior
from gdpd.training.run_folder import load_data, prepare_on, training_context
from gdpd.training.stages import Session, train_teacher
from gdpd.training.teacher_outputs import teacher_outputs
from gdpd.training.tensors import batches

MARKS = (150, 300, 1000, 3000)  # updates; 300 and 150 are the whole warm-up of 600 and 300 epochs of one batch


def bottleneck(width: int) -> nn.Module:
    """The release's denoiser: batch statistics, time embedding drawn from N(0, 1)."""
    return build_denoiser("bottleneck", width)


def without_start(width: int) -> nn.Module:
    """The same with the time embedding at zero to begin with."""
    made = build_denoiser("bottleneck", width)
    nn.init.zeros_(made.time_embedding.weight)
    return made


def with_layer_norm(width: int) -> nn.Module:
    """The same with LayerNorm."""
    made = build_denoiser("bottleneck", width, norm="layer")
    nn.init.zeros_(made.time_embedding.weight)
    return made


def mlp(width: int) -> nn.Module:
    """A plain MLP with a sinusoidal time embedding."""
    return build_denoiser("mlp", width)


KINDS: dict[str, tuple[Callable[[int], nn.Module], float, int]] = {  # name -> denoiser, learning rate, repetitions
    "`bottleneck`, as in the release": (bottleneck, 1e-3, 1),
    "the same, learning rate 1e-2": (bottleneck, 1e-2, 1),
    "the same, each feature 16 times a batch": (bottleneck, 1e-3, 16),
    "time embedding begins at zero": (without_start, 1e-3, 1),
    "that, and `norm: layer`": (with_layer_norm, 1e-3, 1),
    "`mlp`": (mlp, 1e-3, 1),
}


def teacher_features(dataset: str, epochs: int) -> Tensor:
    """z_long [n, 100] of the training series, by an LSTM3-100 as in results/comparison.yaml."""
    config = RunConfig(dataset=dataset, teacher_model="lstm3-100", normalisation="train", teacher_epochs=epochs)
    with training_context(config) as fabric:
        session = Session(config, prepare_on(fabric, load_data(config), config), fabric)
        teacher = train_teacher(session)
        return teacher_outputs(teacher.model, session.prepared.full_train, limit=2**30)[0]


def learn(features: Tensor, make: Callable[[int], nn.Module], learning_rate: float, repeat: int) -> list[float]:
    """The noise loss of a prior over `features` [n, width] at each of `MARKS`."""
    torch.manual_seed(0)
    width = features.shape[1]
    prior = FeaturePrior(make(width), width, width)
    optimizer = torch.optim.Adam(prior.parameters(), lr=learning_rate, weight_decay=1e-5)
    order = torch.Generator().manual_seed(0)
    losses: list[Tensor] = []
    while len(losses) < max(MARKS):
        for rows in batches(len(features), 64, order):
            found = prior.losses(features[rows].repeat(repeat, 1))
            optimizer.zero_grad()
            (found["noise"] + found["autoencoder"]).backward()
            optimizer.step()
            losses.append(found["noise"].detach())
    return [float(torch.stack(losses[mark - 20 : mark]).mean()) for mark in MARKS]


def main() -> None:
    """Print a table per data set."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("datasets", nargs="*", default=["GunPoint", "ACSF1"])
    parser.add_argument("--epochs", type=int, default=300, help="epochs of the teacher")
    asked = parser.parse_args()
    rows: Rows = [("data set", "denoiser", *(f"{mark} updates" for mark in MARKS))]
    for dataset in asked.datasets:
        features = teacher_features(dataset, asked.epochs)
        for number, (name, how) in enumerate(KINDS.items()):
            rows.append(("" if number else dataset, name, *(f"{loss:.2f}" for loss in learn(features, *how))))
    print(markdown(rows))


if __name__ == "__main__":
    main()

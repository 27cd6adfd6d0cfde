"""What priors make of one, two, five and twenty steps: `python -m bench.few_step_priors [--data NAME] [--steps N]`.

A teacher learns the data set, and four priors learn its features of the training series for equally many steps of
Adam, with the same denoiser: DDIM on the linear schedule, with noise and with v prediction; flow matching (v prediction
on the schedule of straight paths); and this with consistency distillation in the second half, at the learning rate of
all else and at a lower one. Each samples from pure noise on trailing grids. Printed is the energy distance (Székely &
Rizzo, 2013) between 500 samples and the features of up to 500 test series, whose own distance from the training
features stands last (an estimate without bias may be below zero); medians over seeds, least and most in brackets.
Features are standardised by the training set.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gdpd_kernels as gk
from gdpd.config import RunConfig
from gdpd.consistency import consistency_table
from gdpd.denoisers import build_denoiser
from gdpd.prior import FeaturePrior
from gdpd.training.run_folder import load_data, prepare_on, training_context
from gdpd.training.stages import Session, train_teacher
from gdpd.training.tensors import outputs

STEPS = (1, 2, 5, 20)
KINDS: dict[str, dict[str, Any]] = {
    "DDIM, eps": {"beta_schedule": "linear", "prediction": "eps"},
    "DDIM, v": {"beta_schedule": "linear", "prediction": "v"},
    "flow matching": {"beta_schedule": "flow", "prediction": "v"},
    "consistency of the flow": {"beta_schedule": "flow", "prediction": "v", "consistency_steps": 20},
}
SLOWER = 3e-4  # learning rate of the distilled denoiser in a further row; 1e-3 is that of all else


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of two samples [n, features] and [m, features], without the zero diagonals."""

    def within(x: Tensor) -> Tensor:
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))

    return float(2 * torch.cdist(x, y).mean() - within(x) - within(y))


def teacher_features(name: str) -> tuple[Tensor, Tensor]:
    """Features of the training and of the test series, standardised by the training set's."""
    config = RunConfig(dataset=name, method="kd", teacher_epochs=200)
    with training_context(config) as fabric:
        session = Session(config, prepare_on(fabric, load_data(config), config), fabric)
        teacher = train_teacher(session)
        train, test = (
            outputs(teacher.model, series)[0] for series in (session.prepared.full_train, session.prepared.full_test)
        )
    mean, deviation = train.mean(dim=0), train.std(dim=0) + 1e-3
    return (train - mean) / deviation, (test[:500] - mean) / deviation


def distances(
    features: Tensor, test: Tensor, options: dict[str, Any], steps: int, seed: int, distilled_rate: float = 1e-3
) -> list[float]:
    """Energy distance after each number of sampling steps, of one prior trained for `steps` steps."""
    torch.manual_seed(seed)
    width = features.shape[1]
    made = FeaturePrior(
        build_denoiser("mlp", width), width, width, target_space="identity", timestep_spacing="trailing", **options
    )
    distilled = [] if made.few_step is None else list(made.few_step.parameters())
    others = [p for p in made.parameters() if all(p is not own for own in distilled)]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": distilled, "lr": distilled_rate}]
    optimizer = torch.optim.Adam(groups[: 1 + bool(distilled)], lr=1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        rows = features[torch.randint(len(features), (128,))]
        sum(made.losses(rows, distil=2 * step >= steps).values(), torch.zeros(())).backward()
        optimizer.step()
    found = []
    for count in STEPS:
        table = gk.ddim_table(
            1000, count, options["beta_schedule"], prediction=options["prediction"],
            timestep_spacing="trailing",
        )  # fmt: skip
        if made.few_step is not None:
            table = consistency_table(table)
        with torch.no_grad():
            z_hat = gk.reverse_sample(made.sampler, torch.randn(500, width), table=table)
        found.append(energy_distance(z_hat, test))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="ItalyPowerDemand")
    parser.add_argument("--steps", type=int, default=1000, help="steps of Adam")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    features, test = teacher_features(arguments.data)
    print(f"| {arguments.data} | " + " | ".join(f"{count} step{'s' * (count > 1)}" for count in STEPS) + " |")
    print("| --- " * (len(STEPS) + 1) + "|")
    rows = [(kind, options, 1e-3) for kind, options in KINDS.items()]
    for kind, options, rate in [*rows, (f"the same, learned at {SLOWER:g}", rows[-1][1], SLOWER)]:
        runs = np.array(
            [distances(features, test, options, arguments.steps, seed, rate) for seed in range(arguments.seeds)]
        )
        cells = (f"{statistics.median(column):.3f} ({min(column):.3f}–{max(column):.3f})" for column in runs.T)
        print(f"| {kind} | " + " | ".join(cells) + " |", flush=True)
    print(f"| training features | {energy_distance(features, test):.3f} |" + " |" * (len(STEPS) - 1))


if __name__ == "__main__":
    main()

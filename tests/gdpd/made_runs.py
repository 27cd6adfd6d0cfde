"""Run folders as training leaves them, made up in milliseconds, for the tests of summaries and reports."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from gdpd.config import RunConfig
from gdpd.experiments.grid import run_name

GAINS = {"base": 0.0, "kd": 4.0, "gdpd": 6.0}


def make_run(root: Path, **options: object) -> Path:
    """A finished run folder below `root`, with scores that depend on its options in a known way."""
    config = RunConfig.from_dict({"epochs": 40, **options})
    random = np.random.default_rng(config.seed)
    folder = root / run_name(config)
    folder.mkdir(parents=True)
    score = 60 + 30 * config.earliness + GAINS[config.method] + config.seed % 5
    metrics = {
        "auc_prc": score,
        "accuracy": score / 100 - 0.05,
        "fidelity": score / 100 - 0.1,
        "seconds": 3.0 + config.seed % 5,
        "teacher": {"auc_prc": 95.0 + config.seed % 5 / 10, "accuracy": 0.93, "seconds": 5.0},
    }
    history = [{"stage": "teacher", "candidate": 0, "epoch": 0, "phase": "main", "val": {"auc_prc": 50.0}}]
    for epoch in range(config.epochs):
        warm = config.method == "gdpd" and epoch < config.warmup
        record = {
            "stage": "student",
            "epoch": epoch,
            "phase": "warmup" if warm else "main",
            "train": {"loss": 1.0, "ce": 0.7 * np.exp(-epoch / 20)},
            "val": {"ce": 0.6, "accuracy": 0.7, "auc_prc": score - 20 * np.exp(-epoch / 8) + random.normal()},
            "lr": 1e-3,
            "seconds": 0.01,
        }
        if warm:
            record["train"] |= {"noise": 1 / (epoch + 1), "autoencoder": 0.5 / (epoch + 1)}
        elif config.method == "gdpd":
            record["train"]["ce_hat"] = 0.6
            mean = 0.5 + 0.01 * (epoch - config.warmup)
            quantiles = {"q05": -0.2, "q25": -0.1, "q50": 0.0, "q75": 0.1, "q95": 0.2}
            record["alpha"] = {"mean": mean, **{name: mean + shift for name, shift in quantiles.items()}}
        history.append(record)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "versions.json").write_text(json.dumps({"torch": "2.13.0", "python": "3.11.7"}))
    (folder / "history.jsonl").write_text("".join(json.dumps(record) + "\n" for record in history))
    if config.method == "gdpd":
        labels = np.arange(40) % 2
        features = random.normal(size=(40, 6)) + 3 * labels[:, None]
        z_short = random.normal(size=(12, 6)) + 1.5
        z_hat = features[:12]
        z_k = np.stack([z_short + (z_hat - z_short) * k / 5 + 0.5 * (k == 0) for k in range(6)])
        np.savez(
            folder / "trajectory.npz",
            teacher_features=features,
            teacher_labels=labels,
            labels=labels[:12],
            z_short=z_short,
            z_k=z_k,
        )
    return folder


def make_grid(root: Path, seeds: tuple[int, ...] = (1, 2, 3)) -> Path:
    """A folder of finished runs: two datasets, two earliness values, three methods."""
    for dataset in ("GunPoint", "ItalyPowerDemand"):
        for earliness in (0.2, 0.5):
            for method in GAINS:
                for seed in seeds:
                    make_run(root, dataset=dataset, earliness=earliness, method=method, seed=seed)
    return root

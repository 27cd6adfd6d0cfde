"""Run records of a whole grid, made up, for the tests and the looks of comparisons. They are nobody's results."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gdpd.config import RunConfig
from gdpd.experiments import RunRecord

DATASETS = (
    "ItalyPowerDemand", "GunPoint", "ArrowHead", "OSULeaf", "ACSF1", "PickupGestureWiimoteZ", "Coffee", "Trace",
    "PigCVP", "BasicMotions", "JapaneseVowels", "Covid3Month_disc",
)  # fmt: skip
EARLINESS = (0.2, 0.4, 0.6, 0.8)
METHODS = ("base", "kd", "fits", "gdpd", "gendd")
SEEDS = (1, 24, 300)


def make_records(
    datasets: tuple[str, ...] = DATASETS,
    earliness: tuple[float, ...] = EARLINESS,
    methods: tuple[str, ...] = METHODS,
    seeds: tuple[int, ...] = SEEDS,
) -> list[RunRecord]:
    """Every run of a grid, with scores that grow with earliness and a little from method to method."""
    options = RunConfig(epochs=300, teacher_dir="teachers").to_dict()
    records = []
    for number, dataset in enumerate(datasets):
        random = np.random.default_rng(number)
        level, growth = random.uniform(35, 85), random.uniform(5, 25)
        chance = random.normal(size=(len(methods), len(seeds)))
        for share in earliness:
            for place, method in enumerate(methods):
                for seed_place, seed in enumerate(seeds):
                    gain = 1.6 * place * (1.1 - share) * random.uniform(0, 2)
                    noise = 2 * chance[place, seed_place] + random.normal()
                    score = float(np.clip(level + growth * share + gain + noise, 5, 100))
                    metrics = {
                        "auc_prc": score,
                        "accuracy": score / 100 - 0.04,
                        "roc_auc": min(1.0, score / 100 + 0.03),
                        "calibration_error": float(0.25 - 0.2 * score / 100 + 0.01 * random.random()),
                        "fidelity": min(1.0, score / 100 + 0.02 * place / len(methods)),
                        "kl": float(2.5 - 2.3 * score / 100),
                        "seconds": 20 + 4 * place + random.random(),
                        "seconds_per_epoch": (20 + 4 * place) / 300,
                        "cpu_seconds": 25 + 4 * place + random.random(),
                        "peak_memory": 380.0 + 9 * place,
                        "teacher": {"auc_prc": min(100.0, level + growth + 3), "accuracy": 0.9, "weak": False},
                    }
                    config = {**options, "dataset": dataset, "earliness": share, "method": method, "seed": seed}
                    folder = Path("runs") / f"{dataset}-e{share:g}-{method}-s{seed}"
                    records.append(RunRecord(folder, config, metrics, {"torch": "2.13.0"}, []))
    return records


def write_records(root: Path, records: list[RunRecord]) -> Path:
    """The records as run folders below `root`."""
    import json

    for record in records:
        folder = root / record.folder.name
        folder.mkdir(parents=True)
        for name in ("config", "metrics", "versions"):
            (folder / f"{name}.json").write_text(json.dumps(getattr(record, name)))
    return root

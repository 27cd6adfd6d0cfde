"""`python -m bench.lstm_accuracy`: test accuracy after training with the native LSTM and with torch's, on bundled data.

The same seeds give both the same initial weights and batches, so what differs is rounding alone, which training
amplifies. The p-value is that of the exact sign-flip test of the paired differences: small if one is better.
"""

from __future__ import annotations

import argparse
import itertools
import warnings

import numpy as np
import torch
from torch import nn

from gdpd.data import FutureLeakWarning, load_dataset
from gdpd.data.load import TimeSeriesData
from gdpd.models import LSTMClassifier

DATA = ("GunPoint", "ItalyPowerDemand")
BATCH = 16


def accuracy(data: TimeSeriesData, native: bool, seed: int, epochs: int) -> float:
    """Test accuracy of LSTM2-32 after `epochs` of Adam."""
    torch.manual_seed(seed)
    x, y = torch.from_numpy(data.X_train).float(), torch.from_numpy(data.y_train).long()
    model = LSTMClassifier(x.shape[1], len(data.classes), hidden=32, layers=2, forget_bias=1.0)
    if not native:
        model.lstm.native = lambda input: False  # type: ignore[method-assign]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            loss = nn.functional.cross_entropy(model(x[rows])[1], y[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    with torch.no_grad():
        found = model(torch.from_numpy(data.X_test).float())[1].argmax(1)
    return float((found == torch.from_numpy(data.y_test)).double().mean())


def sign_flip_p(differences: np.ndarray) -> float:
    """Two-sided p-value of the exact sign-flip test that paired differences have mean zero."""
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(differences))))
    means = np.abs(signs @ differences)
    return float((means >= abs(differences.sum()) - 1e-12).mean())


def main(arguments: list[str] | None = None) -> int:
    """Print a table; exit code 1 if the accuracies differ at the 1 % level."""
    parser = argparse.ArgumentParser(prog="python -m bench.lstm_accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="runs per data set and LSTM (default 10)")
    parser.add_argument("--epochs", type=int, default=60, help="epochs of each run (default 60)")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore", FutureLeakWarning)
    torch.set_num_threads(1)  # a second one gains nothing at this size
    print("| data set | native | torch | mean difference | p |\n| --- | --- | --- | --- | --- |")
    differ = False
    for name in DATA:
        data = load_dataset(name)
        ours, theirs = (
            np.array([accuracy(data, native, seed, options.epochs) for seed in range(options.seeds)])
            for native in (True, False)
        )
        p = sign_flip_p(ours - theirs)
        differ |= p < 0.01
        columns = [f"{100 * a.mean():.1f} ± {100 * a.std(ddof=1):.1f} %" for a in (ours, theirs)]
        print(f"| {name} | {' | '.join(columns)} | {100 * (ours - theirs).mean():+.2f} points | {p:.2f} |", flush=True)
    return int(differ)


if __name__ == "__main__":
    raise SystemExit(main())

"""Gains are paired, and what goes with them is asked once per data set."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from gdpd.experiments.explain import associations, gains
from made_results import made_result


def rows(datasets: int = 6, seeds: int = 3):
    """GDPD gains over Base-KD by the number of training series, and by luck in each seed."""
    luck = np.random.default_rng(0)
    for place in range(datasets):
        for seed in range(seeds):
            about = {"dataset": f"Set{place}", "seed": seed, "n_train": 100 - 10 * place, "teacher_auc_prc": 90.0}
            yield made_result(method="base", auc_prc=70.0, **about)
            yield made_result(method="kd", auc_prc=75.0, **about)
            gained = 76 + place + luck.normal(scale=0.1)
            yield made_result(method="gdpd", auc_prc=gained, parts={"main.alpha": float(luck.random())}, **about)


def test_gains_are_paired_by_dataset_earliness_and_seed():
    made = list(rows())
    kept = [row for row in made if not (row.method == "kd" and row.seed == 1)]
    found = gains(kept, "gdpd", "kd")
    assert len(found) == 12
    assert all(gain.mine.key[:2] == gain.theirs.key[:2] and gain.mine.seed == gain.theirs.seed for gain in found)
    assert [gain.points for gain in found] == [gain.mine.auc_prc - 75 for gain in found]
    assert gains(kept, "gdpd", "fits") == []
    assert [gain.base for gain in gains([row for row in made if row.method != "base"], "gdpd", "kd")] == [None] * 18


def test_what_goes_with_a_gain_is_ranked_over_datasets_and_adjusted():
    found = gains(rows(), "gdpd", "kd")
    told = {association.cause: association for association in associations(found)}
    assert "teacher's AUC-PRC" not in told  # the same everywhere
    series = told["training series"]
    assert (series.datasets, series.rho) == (6, pytest.approx(-1.0))
    points = [np.mean([gain.points for gain in found if gain.mine.dataset == f"Set{i}"]) for i in range(6)]
    alpha = [np.mean([gain.mine.parts["main.alpha"] for gain in found if gain.mine.dataset == f"Set{i}"])
             for i in range(6)]  # fmt: skip
    expected = spearmanr(alpha, points)
    assert told["alpha after training"].rho == pytest.approx(expected.statistic)
    assert told["alpha after training"].p >= expected.pvalue
    assert [abs(a.rho) for a in associations(found)] == sorted((abs(a.rho) for a in associations(found)), reverse=True)


def test_three_datasets_say_nothing():
    assert associations(gains(rows(datasets=3), "gdpd", "kd")) == []

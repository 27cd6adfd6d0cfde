"""Metrics against scikit-learn, hand-computed values, and their documented edge cases."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from gdpd.metrics import accuracy, auc_prc, calibration_error, classification_metrics, fidelity, roc_auc


def random_case(seed: int, n: int, classes: int, decimals: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Classes and scores; few `decimals` make ties."""
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(classes), rng.integers(0, classes, n)])
    return y, rng.dirichlet(np.ones(classes), len(y)).round(decimals)


@given(st.integers(0, 1000), st.integers(1, 60), st.integers(2, 6), st.sampled_from([1, 2, 16]))
@settings(max_examples=60, deadline=None)
def test_scores_agree_with_scikit_learn(seed: int, n: int, classes: int, decimals: int) -> None:
    y, proba = random_case(seed, n, classes, decimals)
    onehot = np.eye(classes)[y]
    assert auc_prc(y, proba) == pytest.approx(
        100 * sklearn.metrics.average_precision_score(onehot, proba, average="macro")
    )
    assert roc_auc(y, proba) == sklearn.metrics.roc_auc_score(onehot, proba, average="macro")
    assert accuracy(y, proba) == pytest.approx(sklearn.metrics.accuracy_score(y, proba.argmax(1)))
    trapezoid = []
    for c in range(classes):
        precision, recall, _ = sklearn.metrics.precision_recall_curve(y == c, proba[:, c])
        trapezoid.append(sklearn.metrics.auc(recall, precision))
    assert auc_prc(y, proba, method="trapezoid") == pytest.approx(100 * np.mean(trapezoid))


def test_average_precision_of_a_small_case_worked_by_hand() -> None:
    y = np.array([1, 0, 1, 0])
    score = np.array([0.9, 0.8, 0.7, 0.1])
    # class 1, ranks +-+-: 1/2·1 + 1/2·2/3 = 5/6; class 0, ranks -+-+ from the other end: the same
    assert auc_prc(y, np.stack([1 - score, score], axis=1)) == pytest.approx(100 * 5 / 6)
    assert auc_prc(y, np.eye(2)[y]) == 100.0


def test_a_constant_classifier_scores_the_prevalence_and_the_trapezoid_flatters_it() -> None:
    y, proba = np.array([0, 1] * 10), np.full((20, 2), 0.5)
    assert auc_prc(y, proba) == pytest.approx(50.0)
    assert auc_prc(y, proba, method="trapezoid") == pytest.approx(75.0)
    assert roc_auc(y, proba) == pytest.approx(0.5)


def test_classes_absent_from_y_are_left_out_and_named() -> None:
    y, proba = random_case(0, 30, 4)
    keep = y != 2
    with pytest.warns(UserWarning, match=r"auc_prc: class\(es\) 2 .* left out"):
        score = auc_prc(y[keep], proba[keep])
    per_class = [sklearn.metrics.average_precision_score(y[keep] == c, proba[keep, c]) for c in (0, 1, 3)]
    assert score == pytest.approx(100 * np.mean(per_class))
    with pytest.warns(UserWarning, match=r"roc_auc: class\(es\) 2"):
        assert 0 <= roc_auc(y[keep], proba[keep]) <= 1
    with pytest.warns(UserWarning, match=r"class\(es\) 1"):
        assert np.isnan(roc_auc(np.zeros(5, int), np.full((5, 2), 0.5)))


def test_labels_are_looked_up_in_classes_of_any_order_and_type() -> None:
    y, proba = random_case(1, 20, 3)
    names = np.array(["walk", "run", "sit"])
    for metric in (auc_prc, roc_auc, accuracy, calibration_error):
        assert metric(names[y], proba, names) == pytest.approx(metric(y, proba))
    with pytest.raises(ValueError, match=r"y has the class .*'fly'"):
        accuracy(["fly"], proba[:1], names)
    with pytest.raises(ValueError, match=r"classes has shape \(2,\); proba has 3 columns"):
        accuracy(names[y], proba, names[:2])


def test_bad_input_is_named() -> None:
    proba = np.full((3, 2), 0.5)
    with pytest.raises(ValueError, match=r"y has shape \(2,\); expected \(3,\)"):
        auc_prc([0, 1], proba)
    with pytest.raises(ValueError, match=r"class .*2.* not among"):
        auc_prc([0, 1, 2], proba)
    with pytest.raises(ValueError, match=r"class .*-1.* not among"):
        auc_prc([0, 1, -1], proba)
    with pytest.raises(ValueError, match=r"proba has shape \(3,\)"):
        accuracy([0, 1, 0], proba[:, 0])
    with pytest.raises(ValueError, match="nan at row 1, class 0"):
        accuracy([0, 1, 0], np.array([[0.5, 0.5], [np.nan, 1], [0.5, 0.5]]))
    with pytest.raises(ValueError, match="method='simpson'"):
        auc_prc([0, 1, 0], proba, method="simpson")
    with pytest.raises(ValueError, match="apply softmax"):
        fidelity(proba * 3, proba)
    with pytest.raises(ValueError, match="they must match"):
        fidelity(proba, np.full((3, 4), 0.25))
    with pytest.raises(ValueError, match="bins=0"):
        calibration_error([0, 1, 0], proba, bins=0)


def test_fidelity_of_a_copy_is_perfect_and_kl_is_that_of_the_definition() -> None:
    _, p = random_case(2, 25, 3)
    _, q = random_case(3, 25, 3)
    assert fidelity(p, p) == (1.0, 0.0)
    agreement, kl = fidelity(q, p)
    assert agreement == pytest.approx((p.argmax(1) == q.argmax(1)).mean())
    assert kl == pytest.approx((p * np.log(p / q)).sum(1).mean())  # teacher p against student q, in this order
    assert fidelity(p, q).kl != pytest.approx(kl)


def test_kl_stays_finite_for_a_sure_and_wrong_student() -> None:
    result = fidelity(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]))
    assert result.agreement == 0.0
    assert result.kl == pytest.approx(-np.log(1e-12))


def test_calibration_error_of_cases_worked_by_hand() -> None:
    proba = np.array([[0.8, 0.2]] * 10)
    assert calibration_error([0] * 8 + [1] * 2, proba) == pytest.approx(0.0)
    assert calibration_error([0] * 5 + [1] * 5, proba) == pytest.approx(0.3)
    assert calibration_error([0, 1], np.array([[1.0, 0.0], [1.0, 0.0]])) == pytest.approx(0.5)
    # two bins whose gaps of opposite sign must not cancel
    proba = np.array([[0.6, 0.4], [0.9, 0.1]])
    assert calibration_error([0, 1], proba, bins=10) == pytest.approx((0.4 + 0.9) / 2)


def test_all_scores_at_once_warn_once_and_add_fidelity_with_a_teacher() -> None:
    y, proba = random_case(4, 30, 3)
    scores = classification_metrics(y, proba)
    assert set(scores) == {"auc_prc", "accuracy", "roc_auc", "calibration_error"}
    assert scores["auc_prc"] == auc_prc(y, proba)
    scores = classification_metrics(y, proba, proba)
    assert (scores["fidelity"], scores["kl"]) == (1.0, 0.0)
    assert all(isinstance(value, float) for value in scores.values())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        classification_metrics(y[y != 1], proba[y != 1])
    assert len(caught) == 1


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r'pip install "gdpd-kernels\[data\]"'):
        auc_prc([0, 1], np.eye(2), method="trapezoid")
    assert accuracy([0, 1], np.eye(2)) == 1.0
    assert auc_prc([0, 1], np.eye(2)) == 100.0
    assert roc_auc([0, 1], np.eye(2)) == 1.0

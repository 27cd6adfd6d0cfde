"""Scores of class probabilities: how well the student does, and how closely it follows its teacher.

Units: `auc_prc` is in percent (0..100), as the literature on GDPD prints it; every other score is a fraction
(0..1), except KL, which is in nats.

`auc_prc` is the macro mean over classes of the one-vs-rest **average precision**, AP = sum_n (R_n − R_{n−1}) P_n
(scikit-learn's `average_precision_score`). The other reading of "area under the precision–recall curve",
`auc(*precision_recall_curve(...))`, joins the points of the curve by straight lines. That area is not attainable
by thresholding (Davis and Goadrich 2006) and flatters coarse scores: a classifier that gives every series the same
probability gets (1 + p)/2 for a class of prevalence p, that is 75 for two equal classes, where average precision
gets p, 50. On scores without ties the two differ by little. ``method="trapezoid"`` computes the second for
comparison with papers that use it; no result of this project does.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np


class Fidelity(NamedTuple):
    """How closely a student follows its teacher.

    Attributes:
        agreement: share of series on which both predict the same class, 0..1.
        kl: mean over series of KL(teacher ‖ student), in nats, 0 or more.
    """

    agreement: float
    kl: float


def auc_prc(y: Any, proba: Any, classes: Any = None, *, method: str = "average_precision") -> float:
    """Macro one-vs-rest area under the precision–recall curve, in percent (do not multiply by 100 again).

    A class that ``y`` does not hold has no recall, hence no area: the mean goes over the classes present, and a
    warning names those left out. Two classes are treated as any number: both one-vs-rest areas count.

    Args:
        y: ``(n,)`` true classes: column numbers of ``proba``, or labels out of ``classes``.
        proba: ``(n, C)`` probabilities (or scores that rank likewise within a column).
        classes: ``(C,)`` labels of the columns, or None when ``y`` holds column numbers.
        method: ``"average_precision"``, or ``"trapezoid"`` (see the module's text).

    Returns:
        Percent, 0..100.

    Raises:
        ValueError: shapes that do not fit, NaN, a label outside the classes, an unknown method.
        ImportError: ``method="trapezoid"`` without scikit-learn.
    """
    codes, proba = _checked(y, proba, classes)
    if method == "average_precision":
        area = average_precision
    elif method == "trapezoid":
        sklearn_metrics = _sklearn_metrics()

        def area(positive: np.ndarray, score: np.ndarray) -> float:
            precision, recall, _ = sklearn_metrics.precision_recall_curve(positive, score)
            return float(sklearn_metrics.auc(recall, precision))
    else:
        raise ValueError(f"method={method!r} is not 'average_precision' or 'trapezoid'")
    present = _present(codes, proba.shape[1], "auc_prc")
    return 100.0 * float(np.mean([area(codes == c, proba[:, c]) for c in present]))


def average_precision(positive: np.ndarray, score: np.ndarray) -> float:
    """Average precision AP = sum_n (R_n − R_{n−1}) P_n over the thresholds of ``score``, 0..1.

    scikit-learn's function of that name takes milliseconds to look at its arguments, more than a training step of a
    small network, and training asks for this score after every epoch.

    Args:
        positive: bool ``(n,)`` with at least one True.
        score: ``(n,)``, higher for positives; equal scores share one threshold.
    """
    found, thresholds = _found(positive, score)
    return float((np.diff(found, prepend=0) * (found / (thresholds + 1.0))).sum() / found[-1])


def _found(positive: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """True positives at each threshold of `score`, from the highest, and the place of its last series in that order."""
    order = np.argsort(-score, kind="stable")
    ranked = score[order]
    thresholds = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
    return np.cumsum(positive[order])[thresholds], thresholds


def roc_auc(y: Any, proba: Any, classes: Any = None) -> float:
    """Macro one-vs-rest area under the ROC curve, 0..1 (0.5 is chance).

    Over the classes that ``y`` holds, the others named in a warning; NaN when ``y`` holds one class only, since no
    series is then negative. Arguments and errors as `auc_prc`.
    """
    codes, proba = _checked(y, proba, classes)
    present = _present(codes, proba.shape[1], "roc_auc")
    if len(present) < 2:
        return float("nan")
    return float(np.mean([_roc_area(codes == c, proba[:, c]) for c in present]))


def _roc_area(positive: np.ndarray, score: np.ndarray) -> float:
    """Area under one ROC curve, to the last bit scikit-learn's, whose import takes longer than most evaluations."""
    found, thresholds = _found(positive, score)
    false = 1 + thresholds - found
    # Points on a straight line between their neighbours are left out, as scikit-learn does: the sum rounds alike.
    corner = np.ones(len(found), dtype=bool)
    corner[1:-1] = (np.diff(false, 2) != 0) | (np.diff(found, 2) != 0)
    x, y = (np.append(0, counts[corner]) / counts[-1] for counts in (false, found))
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2.0).sum())


def accuracy(y: Any, proba: Any, classes: Any = None) -> float:
    """Share of series whose largest probability is at their class, 0..1; ties go to the first column."""
    codes, proba = _checked(y, proba, classes)
    return float(np.mean(proba.argmax(axis=1) == codes))


def fidelity(student_proba: Any, teacher_proba: Any) -> Fidelity:
    """Agreement of student (prefix) and teacher (full series), and mean KL(teacher ‖ student).

    Student probabilities are taken as at least 1e-12, which bounds the KL of a student that is sure and wrong.

    Args:
        student_proba: ``(n, C)`` probabilities.
        teacher_proba: ``(n, C)`` probabilities of the same series.

    Raises:
        ValueError: different shapes, NaN, or rows that are not probabilities.
    """
    student, teacher = _proba(student_proba, "student_proba"), _proba(teacher_proba, "teacher_proba")
    if student.shape != teacher.shape:
        raise ValueError(f"student_proba has shape {student.shape} and teacher_proba {teacher.shape}: they must match")
    _check_rows(student, "student_proba")
    _check_rows(teacher, "teacher_proba")
    log_ratio = np.log(np.maximum(teacher, 1e-300)) - np.log(np.maximum(student, 1e-12))
    kl = np.where(teacher > 0, teacher * log_ratio, 0.0).sum(axis=1)
    # rows sum to one only up to rounding, which may leave a hair below zero
    return Fidelity(float(np.mean(student.argmax(axis=1) == teacher.argmax(axis=1))), max(float(kl.mean()), 0.0))


def calibration_error(y: Any, proba: Any, classes: Any = None, *, bins: int = 15) -> float:
    """Expected calibration error of the predicted class (Guo et al. 2017, equation 3), 0..1.

    Predictions are put in ``bins`` intervals of equal width by their confidence; the error is the mean over
    series of |accuracy − mean confidence| of their bin.

    Args:
        y: as `auc_prc`.
        proba: ``(n, C)`` probabilities.
        classes: as `auc_prc`.
        bins: number of intervals of (0, 1], 1 or more.

    Raises:
        ValueError: as `auc_prc`; rows that are not probabilities; ``bins`` below 1.
    """
    codes, proba = _checked(y, proba, classes)
    if bins < 1:
        raise ValueError(f"bins={bins} must be 1 or more")
    _check_rows(proba, "proba")
    confidence, correct = proba.max(axis=1), proba.argmax(axis=1) == codes
    # intervals are open below and closed above, as in the paper
    index = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gap = np.bincount(index, weights=correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(codes))


def classification_metrics(y: Any, proba: Any, teacher_proba: Any = None, classes: Any = None) -> dict[str, float]:
    """All scores at once.

    Returns:
        ``auc_prc`` (percent), ``accuracy``, ``roc_auc``, ``calibration_error``; with ``teacher_proba`` ``(n, C)``
        also ``fidelity`` (agreement) and ``kl`` (nats).
    """
    scores = {
        "auc_prc": auc_prc(y, proba, classes),
        "accuracy": accuracy(y, proba, classes),
        "calibration_error": calibration_error(y, proba, classes),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # absent classes: auc_prc has just said so
        scores["roc_auc"] = roc_auc(y, proba, classes)
    if teacher_proba is not None:
        agreement, kl = fidelity(proba, teacher_proba)
        scores.update(fidelity=agreement, kl=kl)
    return scores


def _sklearn_metrics() -> Any:
    try:
        import sklearn.metrics as metrics
    except ImportError as error:
        raise ImportError(
            'the trapezoid AUC-PRC needs scikit-learn; install it with: pip install "gdpd-kernels[data]"'
        ) from error
    return metrics


def _proba(proba: Any, name: str) -> np.ndarray:
    array = np.asarray(proba, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] < 2:
        raise ValueError(f"{name} has shape {array.shape}; expected (n, classes) with n ≥ 1 and two or more classes")
    if not np.isfinite(array).all():
        row, column = np.argwhere(~np.isfinite(array))[0]
        raise ValueError(f"{name} is {array[row, column]} at row {row}, class {column}: the model's output broke")
    return array


def _check_rows(proba: np.ndarray, name: str) -> None:
    bad = np.flatnonzero((proba.min(axis=1) < 0) | (np.abs(proba.sum(axis=1) - 1) > 1e-3))
    if len(bad):
        raise ValueError(
            f"{name}, row {bad[0]}, sums to {proba[bad[0]].sum():.4g} with smallest entry {proba[bad[0]].min():.4g}; "
            "expected probabilities (apply softmax to logits)"
        )


def _checked(y: Any, proba: Any, classes: Any) -> tuple[np.ndarray, np.ndarray]:
    """Column number of each series' class (n,) and proba (n, C) in float64."""
    proba = _proba(proba, "proba")
    labels = np.asarray(y)
    if labels.shape != (len(proba),):
        raise ValueError(f"y has shape {labels.shape}; expected ({len(proba)},), one class per row of proba")
    columns = np.arange(proba.shape[1]) if classes is None else np.asarray(classes)
    if columns.shape != (proba.shape[1],):
        raise ValueError(f"classes has shape {columns.shape}; proba has {proba.shape[1]} columns")
    order = np.argsort(columns)
    place = np.minimum(np.searchsorted(columns, labels, sorter=order), len(columns) - 1)
    codes = order[place]
    unknown = columns[codes] != labels
    if unknown.any():
        raise ValueError(f"y has the class {labels[unknown][0]!r}, which is not among {columns.tolist()}")
    return codes, proba


def _present(codes: np.ndarray, n_classes: int, metric: str) -> np.ndarray:
    counts = np.bincount(codes, minlength=n_classes)
    present, absent = np.flatnonzero(counts), np.flatnonzero(counts == 0)
    if len(absent):
        warnings.warn(
            f"{metric}: class(es) {', '.join(map(str, absent))} (column numbers) have no series in y and are left out "
            "of the mean",
            UserWarning,
            stacklevel=3,
        )
    return present

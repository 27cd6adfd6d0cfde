"""Class labels: from what a file or a user writes to the integers 0..C-1, and stratified splits of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np


def canonical_labels(labels: Sequence[Any] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bring labels of different file formats to one form.

    Whole numbers, however written (``1``, ``"1"``, ``1.0``, ``"1.0000e+00"``), become int64 and are ordered
    by value; if a single label is anything else, all labels are strings, ordered as strings.

    Args:
        labels: ``(n,)`` labels of any type.

    Returns:
        ``(labels, classes)``: ``(n,)`` canonical labels and the sorted ``(C,)`` distinct ones, both int64 or str.
    """
    array = np.asarray(labels)
    if array.dtype.kind in "iub":
        array = array.astype(np.int64)
    else:
        try:
            numbers = array.astype(np.float64)
            whole = bool(np.all(np.isfinite(numbers) & (numbers == np.round(numbers))))
        except (TypeError, ValueError):
            whole = False
        array = numbers.astype(np.int64) if whole else np.asarray([str(item) for item in array])
    return array, np.unique(array)


def encode_labels(
    train: Sequence[Any] | np.ndarray, test: Sequence[Any] | np.ndarray | None = None, *, name: str = "the data set"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number the classes of the training labels 0..C-1 and encode both splits with them.

    Args:
        train: ``(n_train,)`` labels of the training series.
        test: ``(n_test,)`` labels of the test series, or None.
        name: what to call the data in error messages.

    Returns:
        ``(y_train, y_test, classes)``: int64 ``(n_train,)``, int64 ``(n_test,)`` and the ``(C,)`` original
        labels, so that ``classes[y]`` gives a series' label back.

    Raises:
        ValueError: fewer than two classes, or a class that the test split has and train has not. (A class
            that only train has is fine: the metrics leave it out and say so.)
    """
    test = np.asarray([] if test is None else test)
    both, _ = canonical_labels([*np.asarray(train).tolist(), *test.tolist()])
    n_train = len(np.asarray(train))
    labels_train, labels_test = both[:n_train], both[n_train:]
    classes = np.unique(labels_train)
    if len(classes) < 2:
        found = "no label" if not len(classes) else f"only the class {classes[0]!s}"
        raise ValueError(f"{name} has {found} among its {n_train} training series; a classifier needs two or more")
    unseen = np.setdiff1d(labels_test, classes)
    if len(unseen):
        count = int(np.isin(labels_test, unseen).sum())
        raise ValueError(
            f"{name} has {len(unseen)} class(es) in test that no training series has: "
            f"{', '.join(map(str, unseen[:10]))} ({count} test series); classes of train: "
            f"{', '.join(map(str, classes[:20]))}. Remove those series, or split the data again, stratified"
        )
    return np.searchsorted(classes, labels_train), np.searchsorted(classes, labels_test), classes


def stratified_split(y: np.ndarray, fraction: float = 0.2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Split series in two, each class in proportion, the same way for the same seed.

    ``round(fraction * n)`` series (at least 1) are held out; each class gives its share, rounded by largest
    remainder (ties drawn with the seed). Every class keeps at least one series on the training side, so a
    class with a single series is never held out: it stays in train, and a warning names it.

    Args:
        y: ``(n,)`` class of each series, any label type.
        fraction: share to hold out, in (0, 1).
        seed: seed of the draw.

    Returns:
        ``(train_idx, val_idx)``: sorted int64 indices, disjoint, together 0..n-1.

    Raises:
        ValueError: ``fraction`` outside (0, 1), fewer than two series, or every class has a single series.
    """
    y = np.asarray(y)
    if not 0.0 < float(fraction) < 1.0:
        raise ValueError(f"fraction={fraction} must lie strictly between 0 and 1 (0.2 holds out a fifth)")
    if y.ndim != 1 or len(y) < 2:
        raise ValueError(f"y has shape {y.shape}; a split needs a vector of two or more labels")
    classes, codes, counts = np.unique(y, return_inverse=True, return_counts=True)
    single = classes[counts == 1]
    if len(single) == len(classes):
        raise ValueError(
            f"each of the {len(classes)} classes has a single series: nothing can be held out and still be learned. "
            "Add series, or train without a validation split"
        )
    if len(single):
        warnings.warn(
            f"class(es) with a single series, kept in train and absent from the held-out part: "
            f"{', '.join(map(str, single[:10]))}",
            UserWarning,
            stacklevel=2,
        )
    rng = np.random.default_rng(seed)
    wanted = min(max(1, round(fraction * len(y))), int((counts - 1).sum()))
    share = counts * (wanted / len(y))
    take = np.minimum(np.floor(share).astype(np.int64), counts - 1)
    tie_break = rng.permutation(len(classes))
    while take.sum() < wanted:
        # a class that may give no more drops out; the largest unmet share gives next
        unmet = np.where(take < counts - 1, share - take, -np.inf)
        take[np.lexsort((tie_break, -unmet))[0]] += 1
    held = [rng.permutation(np.flatnonzero(codes == c))[: take[c]] for c in range(len(classes))]
    val = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(y)), val), val

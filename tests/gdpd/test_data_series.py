"""Padding, missing values, labels and stratified splits."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdpd.data import canonical_labels, encode_labels, fill_missing, pad_series, stratified_split

NAN = float("nan")


def test_series_are_padded_to_the_longest_and_their_lengths_kept() -> None:
    X, lengths = pad_series([np.ones((2, 3)), np.full((2, 5), 2.0)])
    assert X.shape == (2, 2, 5)
    assert lengths.tolist() == [3, 5]
    assert X[0, 0].tolist() == [1, 1, 1, 0, 0]
    wide, _ = pad_series([np.ones(3)], length=6)
    assert wide.shape == (1, 1, 6)
    flat, lengths = pad_series(np.ones((4, 7)))
    assert flat.shape == (4, 1, 7)
    assert lengths.tolist() == [7] * 4


def test_a_step_is_padding_only_when_every_channel_lacks_it() -> None:
    X, lengths = pad_series([np.array([[1.0, NAN, NAN], [1.0, 2.0, NAN]])])
    assert lengths.tolist() == [2]
    assert np.isnan(X[0, 0, 1])
    assert X.shape == (1, 2, 2)


def test_series_that_cannot_be_used_are_named() -> None:
    with pytest.raises(ValueError, match="no series at all"):
        pad_series([])
    with pytest.raises(ValueError, match=r"row 1 has shape \(2, 3\)"):
        pad_series([np.ones((1, 3)), np.ones((2, 3))], what="row")
    with pytest.raises(ValueError, match="series 0 has an infinite value in channel 0 at step 2"):
        pad_series([np.array([1.0, 2.0, np.inf])])
    with pytest.raises(ValueError, match="series 1 has no value at all"):
        pad_series([np.ones(3), np.full(3, NAN)])
    with pytest.raises(ValueError, match="series 0 has 4 steps, more than length=3"):
        pad_series([np.ones(4)], length=3)


def test_missing_values_are_located_or_filled() -> None:
    X, lengths = pad_series([np.array([1.0, 2.0, 3.0, 4.0]), np.array([NAN, 2.0, NAN, 6.0])])
    with pytest.raises(ValueError, match=r"series 1 .* channel 0 at step 0 .* 2 missing in 1 of 2 series"):
        fill_missing(X, lengths)
    filled, count = fill_missing(X, lengths, "interpolate")
    assert filled[1, 0].tolist() == [2.0, 2.0, 4.0, 6.0]
    assert count == 2
    assert np.isnan(X).sum() == 2  # the input is not written to
    forward, _ = fill_missing(X, lengths, "forward", channel_means=np.array([9.0]))
    assert forward[1, 0].tolist() == [9.0, 2.0, 2.0, 6.0]
    with pytest.raises(ValueError, match="missing='drop' is not one of"):
        fill_missing(X, lengths, "drop")


def test_complete_series_come_back_as_they_are() -> None:
    X, lengths = pad_series([np.ones(3), np.ones(5)])
    assert fill_missing(X, lengths) == (X, 0)


def test_a_channel_missing_in_one_series_gets_the_channels_mean() -> None:
    X, lengths = pad_series([np.array([[1.0, 3.0], [1.0, 1.0]]), np.array([[NAN, NAN], [1.0, 1.0]])])
    for missing in ("interpolate", "forward"):
        filled, _ = fill_missing(X, lengths, missing)
        assert filled[1, 0].tolist() == [2.0, 2.0]
    X, lengths = pad_series([np.array([[NAN, NAN], [1.0, 1.0]])])
    with pytest.raises(ValueError, match="channel 0 has no value in any training series"):
        fill_missing(X, lengths, "interpolate")


@given(st.integers(0, 500))
@settings(max_examples=50, deadline=None)
def test_forward_fill_uses_no_future_value(seed: int) -> None:
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(1, 1, 12))
    X[rng.random(X.shape) < 0.4] = NAN
    X[..., -1] = 1.0
    cut = int(rng.integers(1, 12))
    other = X.copy()
    other[..., cut:] = rng.normal(size=12 - cut)
    lengths, means = np.array([12]), np.array([0.5])
    first, _ = fill_missing(X, lengths, "forward", channel_means=means)
    second, _ = fill_missing(other, lengths, "forward", channel_means=means)
    np.testing.assert_array_equal(first[..., :cut], second[..., :cut])
    assert not np.isnan(first).any()


@pytest.mark.parametrize("labels", [["10", "2", "-1"], [10, 2, -1], ["10.0", "2.0", "-1e0"], [10.0, 2.0, -1.0]])
def test_whole_number_labels_are_the_same_however_written(labels: list[object]) -> None:
    values, classes = canonical_labels(labels)
    assert values.tolist() == [10, 2, -1]
    assert classes.tolist() == [-1, 2, 10]


def test_other_labels_stay_strings() -> None:
    values, classes = canonical_labels(["b", "a", "10"])
    assert values.tolist() == ["b", "a", "10"]
    assert classes.tolist() == ["10", "a", "b"]
    assert canonical_labels([0.5, 1.0])[0].tolist() == ["0.5", "1.0"]


def test_labels_are_encoded_by_the_classes_of_train() -> None:
    y_train, y_test, classes = encode_labels(["b", "a", "b"], ["a"])
    assert (y_train.tolist(), y_test.tolist(), classes.tolist()) == ([1, 0, 1], [0], ["a", "b"])
    assert y_train.dtype == np.int64
    assert encode_labels([3, 5])[1].tolist() == []
    # a class that only train has is no error
    assert encode_labels([1, 2, 3], [1])[2].tolist() == [1, 2, 3]


def test_classes_that_cannot_be_learned_are_refused() -> None:
    with pytest.raises(ValueError, match="only the class 7 among its 3 training series"):
        encode_labels([7, 7, 7])
    with pytest.raises(ValueError, match="no label"):
        encode_labels([])
    with pytest.raises(ValueError, match=r"no training series has: 9 \(2 test series\)"):
        encode_labels([1, 2], [9, 9, 1])


@given(st.lists(st.integers(0, 4), min_size=2, max_size=80), st.floats(0.05, 0.9), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_split_is_a_stratified_partition(y: list[int], fraction: float, seed: int) -> None:
    labels = np.array(y)
    counts = np.bincount(labels, minlength=5)
    if (counts <= 1).all():
        with pytest.raises(ValueError, match="single series"):
            stratified_split(labels, fraction, seed)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train, val = stratified_split(labels, fraction, seed)
        again = stratified_split(labels, fraction, seed)
    assert sorted([*train, *val]) == list(range(len(y)))
    np.testing.assert_array_equal(val, again[1])
    held = np.bincount(labels[val], minlength=5)
    assert len(val) == min(max(1, round(fraction * len(y))), int(np.maximum(counts - 1, 0).sum()))
    assert (held <= np.maximum(counts - 1, 0)).all()
    if not (np.floor(counts * len(val) / len(y)) > counts - 1).any() and (counts != 1).all():
        # nothing was capped: each class gives its share, rounded down or up, but for the cap's redistribution
        assert (held >= np.floor(counts * len(val) / len(y)) - 1e-9).all()


def test_split_of_equal_classes_is_equal_and_depends_on_the_seed() -> None:
    y = np.repeat(["a", "b"], 25)
    train, val = stratified_split(y, 0.2, seed=1)
    assert (len(train), len(val)) == (40, 10)
    assert (y[val] == "a").sum() == 5
    assert val.tolist() != stratified_split(y, 0.2, seed=2)[1].tolist()


def test_a_class_with_one_series_stays_in_train_and_is_named() -> None:
    y = np.array([0] * 10 + [1] * 10 + [2])
    with pytest.warns(UserWarning, match="single series, kept in train .*: 2$"):
        train, val = stratified_split(y, 0.5, seed=0)
    assert 20 in train
    assert len(val) == 10


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.2, 1.5, NAN])
def test_fractions_outside_their_range_are_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        stratified_split(np.array([0, 0, 1, 1]), fraction)


def test_too_few_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="two or more labels"):
        stratified_split(np.array([1]))

"""Prefix, resampling and normalisation: shapes, exact values, and that no prefix knows its future."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdpd.data import (
    FutureLeakWarning,
    is_z_normalised,
    load_dataset,
    prefix,
    prefix_length,
    resample,
    standardise,
    suffix,
    train_statistics,
    z_normalise,
)


def random_series(seed: int, n: int, channels: int, time: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, time + 1, n)
    lengths[0] = time
    X = rng.normal(3.0, 2.0, (n, channels, time))
    X[np.arange(time)[None, None, :] >= lengths[:, None, None] + np.zeros((1, channels, 1))] = 0.0
    return X, lengths


def test_raw_prefix_is_the_first_steps() -> None:
    X = np.arange(20, dtype=np.float32).reshape(2, 1, 10)
    cut, lengths = prefix(X, None, 0.35)
    assert cut.tolist() == X[:, :, :3].tolist()
    assert lengths.tolist() == [3, 3]
    assert cut.dtype == np.float32


def test_variable_lengths_are_each_cut_to_their_own_share() -> None:
    X = np.ones((2, 1, 10))
    X[1, :, 4:] = 0.0
    cut, lengths = prefix(X, np.array([10, 4]), 0.5)
    assert lengths.tolist() == [5, 2]
    assert cut[1, 0].tolist() == [1, 1, 0, 0, 0]


def test_stretched_prefix_runs_from_the_first_to_the_last_prefix_step_over_the_full_length() -> None:
    X = np.array([[[0.0, 3.0, 6.0, 100.0, 100.0, 100.0]]])
    out, lengths = prefix(X, None, 0.5, "stretch")
    np.testing.assert_allclose(out[0, 0], [0.0, 1.2, 2.4, 3.6, 4.8, 6.0])
    assert lengths.tolist() == [6]
    one_step, _ = prefix(X, None, 0.2, "stretch")
    assert one_step[0, 0].tolist() == [0.0] * 6


@given(st.integers(0, 100), st.floats(0.01, 1.0), st.sampled_from(["raw", "stretch"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_prefix_never_depends_on_later_steps(seed: int, earliness: float, mode: str, normalise: bool) -> None:
    X, lengths = random_series(seed, 4, 2, 37)
    cut = prefix_length(lengths, earliness)
    if cut.min() < 1:
        with pytest.raises(ValueError, match="a prefix of zero steps"):
            prefix(X, lengths, earliness, mode)
        return
    future = np.arange(37)[None, :] >= cut[:, None]
    other = np.where(future[:, None, :], np.nan, X)
    first, first_lengths = prefix(X, lengths, earliness, mode, normalise=normalise)
    second, second_lengths = prefix(other, lengths, earliness, mode, normalise=normalise)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first_lengths, second_lengths)
    np.testing.assert_array_equal(first_lengths, cut if mode == "raw" else lengths)
    assert not first[np.broadcast_to(np.arange(first.shape[2]) >= first_lengths[:, None, None], first.shape)].any()


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("mode", ["raw", "stretch"])
def test_a_suffix_is_the_last_steps_of_each_series(mode: str, normalise: bool) -> None:
    X, lengths = random_series(3, 5, 2, 12)
    found, cut = suffix(X, lengths, 0.5, mode, normalise=normalise)
    assert found.dtype == X.dtype
    for i, length in enumerate(lengths):
        share = int(0.5 * length)
        last = X[i : i + 1, :, length - share : length]
        if normalise:
            last = z_normalise(last, np.array([share]))
        if mode == "stretch":
            places = np.arange(length) * (share - 1) / max(length - 1, 1)
            last = np.stack([[np.interp(places, np.arange(share), channel) for channel in last[0]]])
        assert cut[i] == last.shape[2] == (share if mode == "raw" else length)
        np.testing.assert_allclose(found[i, :, : cut[i]], last[0], atol=1e-5)
        assert not found[i, :, cut[i] :].any()
    np.testing.assert_array_equal(suffix(X, lengths, 1.0)[0], prefix(X, lengths, 1.0)[0])


def test_a_suffix_refuses_what_a_prefix_refuses() -> None:
    X = np.zeros((2, 1, 4), dtype=np.float32)
    with pytest.raises(ValueError, match=r"earliness=0\.1 of series 0"):
        suffix(X, None, 0.1)
    with pytest.raises(ValueError, match="lengths must be"):
        suffix(X, np.array([4]), 0.5)
    with pytest.raises(ValueError, match="lengths must be"):
        suffix(X, np.array([9, 4]), 0.5)
    with pytest.raises(ValueError, match="expected"):
        suffix(X[0], None, 0.5)
    made = load_dataset("GunPoint", normalisation="prefix")
    with pytest.raises(ValueError, match="part='middle' is not one of"):
        made.prefixes("train", 0.5, "raw", "middle")


def test_earliness_one_changes_nothing() -> None:
    X, lengths = random_series(3, 5, 2, 20)
    for mode in ("raw", "stretch"):
        out, out_lengths = prefix(X, lengths, 1.0, mode)
        np.testing.assert_allclose(out, X)
        np.testing.assert_array_equal(out_lengths, lengths)


def test_prefix_length_forgives_rounding_of_the_product() -> None:
    assert 0.29 * 100 < 29
    assert prefix_length(np.array([100]), 0.29)[0] == 29
    for e in (0.2, 0.4, 0.5, 0.6, 0.8, 1.0):
        assert prefix_length(np.array([150]), e)[0] == round(150 * e)


@pytest.mark.parametrize("earliness", [0.0, -0.1, 1.0001, 2, float("nan"), float("inf")])
def test_earliness_outside_its_range_is_refused(earliness: float) -> None:
    with pytest.raises(ValueError, match=r"outside \(0, 1\]"):
        prefix(np.zeros((1, 1, 10)), None, earliness)


def test_bad_prefix_arguments_are_named() -> None:
    X = np.zeros((2, 1, 10))
    with pytest.raises(ValueError, match="is not a number"):
        prefix(X, None, "half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode='wide' is not one of"):
        prefix(X, None, 0.5, "wide")
    with pytest.raises(ValueError, match=r"expected \(n, channels, time\)"):
        prefix(X[0], None, 0.5)
    with pytest.raises(ValueError, match=r"lengths must be \(2,\) values in 1\.\.10"):
        prefix(X, np.array([11, 3]), 0.5)
    with pytest.raises(ValueError, match=r"earliness=0\.2 of series 1 with 3 steps .* at least 0\.3334"):
        prefix(X, np.array([10, 3]), 0.2)


def test_the_smallest_earliness_that_the_error_names_works() -> None:
    for length in range(1, 60):
        X = np.ones((1, 1, length))
        with pytest.raises(ValueError, match="zero steps") as error:
            prefix(X, None, 0.5 / length)
        smallest = float(str(error.value).split("at least ")[1].split(" ")[0])
        assert prefix(X, None, smallest)[1].tolist() == [1]


def test_resampling_reads_a_line_exactly_and_keeps_both_ends() -> None:
    X = np.linspace(0, 149, 150)[None, None, :]
    out, lengths = resample(X, np.array([150]), 100)
    np.testing.assert_allclose(out[0, 0], np.linspace(0, 149, 100))
    assert lengths.tolist() == [100]


def test_short_series_are_left_alone() -> None:
    X, lengths = random_series(0, 3, 1, 100)
    out, out_lengths = resample(X, lengths, 100)
    assert out is X
    assert out_lengths is lengths


@given(st.integers(0, 200), st.integers(2, 40), st.integers(41, 90))
@settings(max_examples=60, deadline=None)
def test_resampling_keeps_one_time_scale_for_all_lengths(seed: int, to: int, time: int) -> None:
    _, lengths = random_series(seed, 5, 1, time)
    X = np.where(np.arange(time) < lengths[:, None], np.arange(time) + 1.0, 0.0)[:, None, :]
    out, new = resample(X, lengths, to)
    grid = np.arange(to) * (time - 1) / (to - 1) + 1.0
    assert out.shape == (5, 1, to)
    assert new[0] == to
    for i in range(5):
        np.testing.assert_allclose(out[i, 0, : new[i]], grid[: new[i]], rtol=1e-9)
        assert not out[i, 0, new[i] :].any()
        assert new[i] >= 1
        assert grid[new[i] - 1] <= lengths[i] + 1e-6


@given(st.integers(0, 50), st.sampled_from([0.2, 0.33, 0.4, 0.5, 0.8, 0.97]), st.integers(101, 400))
@settings(max_examples=40, deadline=None)
def test_a_resampled_prefix_looks_at_most_one_original_step_ahead(seed: int, earliness: float, time: int) -> None:
    X = np.random.default_rng(seed).normal(size=(1, 1, time))
    other = X.copy()
    other[:, :, int(earliness * time) + 1 :] += 5.0
    lengths = np.array([time])
    first, _ = prefix(*resample(X, lengths, 100), earliness)
    second, _ = prefix(*resample(other, lengths, 100), earliness)
    np.testing.assert_array_equal(first, second)


def test_new_data_are_resampled_on_the_grid_of_train() -> None:
    X = np.arange(40.0)[None, None, :]
    out, lengths = resample(X, np.array([40]), 10, longest=19)  # train: 19 steps onto 10, every second one
    np.testing.assert_allclose(out[0, 0, :20], np.arange(0, 40, 2))
    assert lengths.tolist() == [20]
    with pytest.raises(ValueError, match="resample_to=1 must be 2 or more"):
        resample(X, np.array([40]), 1)


def test_z_normalised_prefix_has_mean_0_and_deviation_1_per_channel() -> None:
    X, lengths = random_series(1, 6, 3, 30)
    lengths[1:] = np.maximum(lengths[1:], 10)
    X, _ = random_series(1, 6, 3, 30)
    out, cut = prefix(X, np.full(6, 30), 0.5, normalise=True)
    np.testing.assert_allclose(out.mean(axis=2), 0, atol=1e-12)
    np.testing.assert_allclose(out[0].std(axis=1), 1)
    assert cut.tolist() == [15] * 6


def test_a_constant_channel_becomes_zero_and_not_nan() -> None:
    X = np.full((1, 1, 8), 0.1, dtype=np.float32)
    assert z_normalise(X, np.array([8])).tolist() == np.zeros((1, 1, 8)).tolist()
    mean, std = train_statistics(X, np.array([8]))
    assert std.tolist() == [1.0]
    assert not standardise(X, np.array([8]), mean, std).any()


@given(st.floats(0.1, 50), st.floats(-20, 20), st.sampled_from([0.3, 0.5, 1.0]))
@settings(max_examples=30, deadline=None)
def test_prefix_normalisation_undoes_any_shift_and_scale(scale: float, shift: float, earliness: float) -> None:
    X = np.random.default_rng(0).normal(size=(3, 2, 40))
    lengths = np.full(3, 40)
    plain, _ = prefix(X, lengths, earliness, normalise=True)
    moved, _ = prefix(scale * X + shift, lengths, earliness, normalise=True)
    np.testing.assert_allclose(plain, moved, atol=1e-6)


def test_train_statistics_leave_out_padding_and_test() -> None:
    X, lengths = random_series(5, 8, 2, 25)
    values = [np.concatenate([X[i, c, : lengths[i]] for i in range(8)]) for c in range(2)]
    mean, std = train_statistics(X, lengths)
    np.testing.assert_allclose(mean, [v.mean() for v in values])
    np.testing.assert_allclose(std, [v.std() for v in values])
    out = standardise(X, lengths, mean, std)
    assert not out[1, :, lengths[1] :].any()

    data = load_dataset("JapaneseVowels", normalisation="train")
    mean, std = train_statistics(data.X_train.astype(np.float64), data.lengths_train)
    np.testing.assert_allclose(mean, 0, atol=1e-6)
    np.testing.assert_allclose(std, 1, atol=1e-5)
    assert len(data.meta["channel_mean"]) == 12
    mean, _ = train_statistics(data.X_test.astype(np.float64), data.lengths_test)
    assert np.abs(mean).max() > 1e-3  # test was scaled by train, not by itself


@pytest.mark.parametrize("ddof", [0, 1])
def test_full_series_z_normalisation_is_recognised(ddof: int) -> None:
    X = np.random.default_rng(0).normal(5, 3, size=(20, 1, 24))
    lengths = np.full(20, 24)
    assert not is_z_normalised(X, lengths)
    z = (X - X.mean(axis=2, keepdims=True)) / X.std(axis=2, keepdims=True, ddof=ddof)
    assert is_z_normalised(z, lengths)
    z[0] = 0.0  # a constant series says nothing either way
    assert is_z_normalised(z, lengths)
    z[1:4] += 0.5
    assert not is_z_normalised(z, lengths)
    assert not is_z_normalised(np.zeros((3, 1, 10)), np.full(3, 10))


def test_z_normalised_input_warns_unless_prefixes_are_normalised() -> None:
    for normalisation in ("none", "train"):
        with pytest.warns(FutureLeakWarning, match="GunPoint: each series is already z-normalised"):
            data = load_dataset("GunPoint", normalisation=normalisation)
        assert data.meta["z_normalised"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_dataset("GunPoint", normalisation="prefix")
        load_dataset("BasicMotions")
    assert data.meta["z_normalised"]
    X, lengths = data.prefixes("test", 0.4)
    assert X.shape == (150, 1, 40)
    assert lengths.tolist() == [40] * 150
    np.testing.assert_allclose(X.mean(axis=2), 0, atol=1e-5)
    np.testing.assert_allclose(X.std(axis=2), 1, atol=1e-4)


def test_prefixes_of_a_loaded_set_follow_its_normalisation() -> None:
    data = load_dataset("BasicMotions", normalisation="train")
    X, lengths = data.prefixes("train", 0.5, "stretch")
    expected, _ = prefix(data.X_train, data.lengths_train, 0.5, "stretch")
    np.testing.assert_array_equal(X, expected)
    assert X.dtype == np.float32
    assert lengths.tolist() == [100] * 40
    with pytest.raises(ValueError, match="split='val'"):
        data.prefixes("val")  # type: ignore[arg-type]

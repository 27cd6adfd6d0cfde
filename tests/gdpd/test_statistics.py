"""Statistics over data sets: against published examples, definitions written out, scipy and aeon."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats

from gdpd.experiments import statistics

# AUC of four variants of C4.5 on 14 data sets: table 6 of Demšar (2006), with the average ranks that he prints.
DEMSAR = np.array(
    [
        [0.763, 0.768, 0.771, 0.798], [0.599, 0.591, 0.590, 0.569], [0.954, 0.971, 0.968, 0.967],
        [0.628, 0.661, 0.654, 0.657], [0.882, 0.888, 0.886, 0.898], [0.936, 0.931, 0.916, 0.931],
        [0.661, 0.668, 0.609, 0.685], [0.583, 0.583, 0.563, 0.625], [0.775, 0.838, 0.866, 0.875],
        [1.000, 1.000, 1.000, 1.000], [0.940, 0.962, 0.965, 0.962], [0.619, 0.666, 0.614, 0.669],
        [0.972, 0.981, 0.975, 0.973], [0.957, 0.978, 0.946, 0.970],
    ]
)  # fmt: skip
DEMSAR_RANKS = (3.143, 2.000, 2.893, 1.964)


def random_scores(n_datasets: int, n_methods: int, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return 70 + random.normal(size=(n_datasets, n_methods)) + spread * np.arange(n_methods)


def test_average_ranks_of_a_published_example() -> None:
    assert statistics.average_ranks(DEMSAR) == pytest.approx(DEMSAR_RANKS, abs=5e-4)
    assert statistics.ranks(DEMSAR)[9].tolist() == [2.5] * 4
    assert statistics.ranks([[3, 2, 2, 1]]).tolist() == [[1, 2.5, 2.5, 4]]


def test_first_places_are_shared_by_ties_and_add_up() -> None:
    assert statistics.first_places([[2, 1, 0], [2, 2, 0], [1, 1, 1], [0, 1, 3]]) == pytest.approx(
        [1 + 1 / 2 + 1 / 3, 1 / 2 + 1 / 3, 1 / 3 + 1]
    )
    assert statistics.first_places(DEMSAR).sum() == pytest.approx(len(DEMSAR))


def test_wins_ties_and_losses_are_counted() -> None:
    assert statistics.win_tie_loss([3, 2, 1, 5], [1, 2, 2, 4]) == (2, 1, 1)


def signed_rank_by_enumeration(difference: np.ndarray) -> float:
    """Share of all assignments of signs whose rank sum is at least as far from its mean."""
    ranks = scipy.stats.rankdata(np.abs(difference))
    centre = ranks.sum() / 2
    seen = abs(ranks[difference > 0].sum() - centre)
    signs = itertools.product((0, 1), repeat=len(ranks))
    return float(np.mean([abs(np.dot(sign, ranks) - centre) >= seen - 1e-12 for sign in signs]))


@pytest.mark.parametrize("seed", range(4))
def test_wilcoxon_is_the_exact_test(seed: int) -> None:
    scores = random_scores(9, 2, seed, spread=0.7)
    p = statistics.wilcoxon(scores[:, 0], scores[:, 1])
    assert p == pytest.approx(signed_rank_by_enumeration(scores[:, 0] - scores[:, 1]), rel=1e-12)
    assert p == statistics.wilcoxon(scores[:, 1], scores[:, 0])


def test_wilcoxon_leaves_ties_out_and_has_a_floor() -> None:
    mine = np.arange(1.0, 7.0) ** 1.3
    assert statistics.wilcoxon(mine, np.zeros(6)) == pytest.approx(2**-5)
    assert statistics.wilcoxon([*mine, 4, 4], [0, 0, 0, 0, 0, 0, 4, 4]) == pytest.approx(2**-5)
    assert statistics.wilcoxon([1, 2], [1, 2]) == 1.0


def test_holm_by_hand() -> None:
    # Sorted .005 .01 .03 .04, times 4 3 2 1, and never below the one before.
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02], rel=1e-15)
    assert statistics.holm([0.5, 0.6]).tolist() == [1.0, 1.0]
    assert statistics.holm([]).tolist() == []


def test_friedman_is_aeons_and_scipys() -> None:
    from aeon.benchmarking.stats import check_friedman

    for scores in (DEMSAR, random_scores(12, 5, spread=0.3)):
        p = statistics.friedman(scores)
        assert p == pytest.approx(check_friedman(statistics.ranks(scores)), rel=1e-10)
        assert p == pytest.approx(scipy.stats.friedmanchisquare(*scores.T).pvalue, rel=1e-12)
    assert statistics.friedman(np.ones((4, 3))) == 1.0


def test_pairs_are_aeons_wilcoxon_two_sided_with_holm() -> None:
    from aeon.benchmarking.stats import wilcoxon_test

    scores = random_scores(12, 5, seed=3, spread=0.6)
    order = np.argsort(statistics.average_ranks(scores))  # aeon's test is one-sided, in the order of ranks
    upper = np.triu_indices(5, 1)
    one_sided = wilcoxon_test(scores[:, order], list("abcde"))[upper]
    expected = statistics.holm(np.minimum(2 * np.minimum(one_sided, 1 - one_sided), 1))
    found = statistics.critical_difference(scores).p_values[np.ix_(order, order)]
    assert found[upper] == pytest.approx(expected, rel=1e-9)
    assert np.array_equal(found, found.T)
    assert np.all(np.diag(found) == 1)


def groups_by_definition(order: list[int], differs: np.ndarray) -> set[tuple[int, ...]]:
    """Runs of neighbours without a pair that differs, of two or more, that are in no other."""
    runs = [tuple(order[i:j]) for i, j in itertools.combinations(range(len(order) + 1), 2) if j - i > 1]
    alike = [run for run in runs if not any(differs[a, b] for a, b in itertools.combinations(run, 2))]
    return {run for run in alike if not any(run != other and set(run) <= set(other) for other in alike)}


@pytest.mark.parametrize("seed", range(30))
def test_groups_are_the_largest_without_a_pair_that_differs(seed: int) -> None:
    random = np.random.default_rng(seed)
    n = int(random.integers(2, 8))
    mean_ranks = random.permutation(np.arange(n, dtype=float))
    differs = np.triu(random.random((n, n)) < random.random(), 1)
    differs = differs | differs.T
    found = statistics._groups(mean_ranks, differs)
    assert len(set(found)) == len(found)
    assert set(found) == groups_by_definition(np.argsort(mean_ranks).tolist(), differs)


def test_no_pair_differs_where_friedmans_test_finds_nothing() -> None:
    scores = random_scores(12, 4, seed=1, spread=0.0)
    tested = statistics.critical_difference(scores)
    assert tested.friedman_p is not None
    assert tested.friedman_p > 0.05
    assert tested.groups == (tuple(np.argsort(tested.average_ranks).tolist()),)
    clear = statistics.critical_difference(random_scores(12, 4, spread=20))
    assert clear.groups == ()
    assert clear.average_ranks.tolist() == [4, 3, 2, 1]


def test_two_methods_need_no_friedman_test() -> None:
    tested = statistics.critical_difference(random_scores(12, 2, spread=9))
    assert tested.friedman_p is None
    assert tested.p_values[0, 1] == pytest.approx(2**-11)


def test_bootstrap_has_the_variance_of_its_two_stages() -> None:
    random = np.random.default_rng(0)
    n_datasets, n_seeds = 15, 4
    values = 70 + 5 * random.normal(size=(n_datasets, 1)) + 3 * random.normal(size=(n_datasets, n_seeds))
    interval = statistics.bootstrap_mean(values, resamples=20000)
    between, within = values.mean(axis=1).var(), values.var(axis=1).mean() / n_seeds
    expected = np.sqrt((between + within) / (n_datasets - 1))  # resamples vary by n: the expanded percentiles undo that
    assert interval.mean == pytest.approx(values.mean())
    t = scipy.stats.t.isf(0.025, n_datasets - 1)
    assert (interval.high - interval.low) / (2 * t) == pytest.approx(expected, rel=0.03)
    assert (interval.high + interval.low) / 2 == pytest.approx(values.mean(), abs=0.1)


@pytest.mark.parametrize(("n_datasets", "least"), [(6, 0.92), (12, 0.93)])
def test_intervals_cover_the_mean_of_few_data_sets(n_datasets: int, least: float) -> None:
    random = np.random.default_rng(0)
    columns = random.normal(size=(n_datasets, 1, 1000)) + random.normal(size=(n_datasets, 3, 1000))
    for values in (columns, columns[:, :1]):  # three seeds and one; each column is a study of its own
        interval = statistics.bootstrap_mean(values)
        covered = np.mean((interval.low <= 0) & (interval.high >= 0))
        assert least < covered < 0.98


def test_bootstrap_pairs_its_columns_and_repeats() -> None:
    random = np.random.default_rng(1)
    values = 70 + 9 * random.normal(size=(12, 3, 1)) + np.array([0.0, 2.0])
    interval = statistics.bootstrap_mean(values)
    again = statistics.bootstrap_mean(values)
    assert all(np.array_equal(a, b) for a, b in zip(interval, again, strict=True))
    assert np.diff(interval.low) == pytest.approx(2)
    assert statistics.bootstrap_mean(np.diff(values, axis=2)).low == pytest.approx(2)
    assert not np.array_equal(interval.low, statistics.bootstrap_mean(values, seed=1).low)


def test_bootstrap_draws_only_seeds_that_are_there() -> None:
    values = np.full((2, 3), np.nan)
    values[0, 1], values[1, [0, 2]] = 10.0, [30.0, 40.0]
    interval = statistics.bootstrap_mean(values, level=0.999)
    assert interval.mean == pytest.approx((10 + 35) / 2)
    assert (interval.low, interval.high) == (10.0, 40.0)
    alone = statistics.bootstrap_mean([[5.0]])
    assert alone.mean == 5
    assert np.isnan(alone.low)
    assert np.isnan(alone.high)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: statistics.ranks(np.empty((0, 3))), "at least one of each"),
        (lambda: statistics.ranks([1.0, 2.0]), r"shape \(2,\)"),
        (lambda: statistics.average_ranks([[1, 2], [3, np.nan]]), "NaN for data set 1, method 1"),
        (lambda: statistics.first_places([[np.nan, 1]]), "NaN for data set 0, method 0"),
        (lambda: statistics.wilcoxon([1, 2], [1]), r"shape \(2,\) and theirs \(1,\)"),
        (lambda: statistics.win_tie_loss([1, np.nan], [1, 2]), "NaN for data set 1"),
        (lambda: statistics.holm([0.5, np.nan]), "outside 0..1"),
        (lambda: statistics.holm([1.5]), "outside 0..1"),
        (lambda: statistics.friedman(np.ones((5, 2))), "5 data sets and 2 methods"),
        (lambda: statistics.critical_difference(np.ones((1, 3))), "1 data sets and 3 methods"),
        (lambda: statistics.critical_difference(np.ones((4, 1))), "4 data sets and 1 methods"),
        (lambda: statistics.critical_difference(np.ones((4, 3)), level=5), "level=5"),
        (lambda: statistics.bootstrap_mean([1.0]), r"shape \(1,\)"),
        (lambda: statistics.bootstrap_mean([[1.0], [np.nan]]), "each data set needs a seed"),
        (lambda: statistics.bootstrap_mean([[[1.0, np.nan]]]), "all columns"),
    ],
)
def test_bad_input_is_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_least_p_is_what_a_perfect_order_reaches() -> None:
    perfect = np.arange(3) * 10.0 + np.arange(6)[:, None] * np.array([1, 1.3, 1.7])
    tested = statistics.critical_difference(perfect)
    assert tested.p_values[~np.eye(3, dtype=bool)] == pytest.approx(tested.least_p)
    assert tested.least_p == 3 * 2**-5
    assert tested.groups == ((2, 1, 0),)  # 0.09: six data sets are too few for three pairs

"""PrefixClassifier: scikit-learn's rules for estimators, arrays of every accepted shape, and files."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

import toy
from gdpd import PrefixClassifier
from gdpd.preprocessing import Preprocessing, as_series
from gdpd.training import atomic

pytestmark = pytest.mark.filterwarnings("ignore::gdpd.training.WeakTeacherWarning")

SMALL: dict[str, Any] = {
    "teacher_model": "lstm",
    "student_model": "lstm",
    "teacher_options": {"layers": 1, "hidden": 12},
    "student_options": {"layers": 1, "hidden": 8},
    "epochs": 4,
    "teacher_epochs": 3,
    "batch_size": 16,
    "learning_rate": 0.02,
    "options": {"teacher_retries": 0},
    "random_state": 0,
}
X, Y = toy.series(40)
LABELS = np.array(["low", "high"])[Y]


def classifier(**params: Any) -> PrefixClassifier:
    return PrefixClassifier(**{**SMALL, **params})


@pytest.fixture(scope="module")
def fitted() -> PrefixClassifier:
    return classifier(epochs=30, teacher_epochs=30).fit(X, LABELS)


@pytest.mark.parametrize("method", ["base", "kd", "gdpd"])
def test_every_method_learns_the_toy_set(method: str) -> None:
    made = classifier(method=method, epochs=40, teacher_epochs=40).fit(X[:30], LABELS[:30])
    assert made.score(X[30:], LABELS[30:]) >= 0.8
    assert (made.teacher_ is None) == (method == "base")
    assert {line["stage"] for line in made.history_} == ({"student"} if method == "base" else {"teacher", "student"})


def test_what_was_learned_has_a_trailing_underscore_and_parameters_stay_as_given(fitted: PrefixClassifier) -> None:
    assert fitted.classes_.tolist() == ["high", "low"]
    assert (fitted.n_channels_in_, fitted.n_timepoints_in_, fitted.n_timepoints_prefix_) == (1, 16, 8)
    assert fitted.get_params()["student_options"] is SMALL["student_options"]
    assert fitted.config_.seed == 0
    assert not fitted.student_.training
    assert is_classifier(fitted)


def test_probabilities_are_rows_that_sum_to_one_and_predict_is_their_label(fitted: PrefixClassifier) -> None:
    proba = fitted.predict_proba(X)
    assert proba.shape == (40, 2)
    assert proba.dtype == np.float64
    np.testing.assert_allclose(proba.sum(1), 1, atol=1e-12)
    assert (fitted.predict(X) == fitted.classes_[proba.argmax(1)]).all()


def test_one_seed_one_result(fitted: PrefixClassifier) -> None:
    again = clone(fitted).fit(X, LABELS)
    np.testing.assert_array_equal(again.predict_proba(X), fitted.predict_proba(X))
    other = clone(fitted).set_params(random_state=1).fit(X, LABELS)
    assert not np.array_equal(other.predict_proba(X), fitted.predict_proba(X))


def test_random_state_may_be_a_generator_or_none() -> None:
    first = classifier(random_state=np.random.RandomState(3)).fit(X, Y).predict_proba(X)
    again = classifier(random_state=np.random.RandomState(3)).fit(X, Y).predict_proba(X)
    np.testing.assert_array_equal(first, again)
    assert classifier(random_state=None).fit(X, Y).config_.seed >= 0


def test_fitting_again_forgets_the_first_fit() -> None:
    made = classifier().fit(X, LABELS)
    three, labels = toy.series(30, length=12, classes=3, channels=2)
    made.fit(three, labels)
    assert made.classes_.tolist() == [0, 1, 2]
    assert (made.n_channels_in_, made.n_timepoints_in_) == (2, 12)
    assert made.predict_proba(three).shape == (30, 3)


def test_future_of_a_series_is_not_looked_at(fitted: PrefixClassifier) -> None:
    spoilt = X.copy()
    spoilt[:, :, fitted.n_timepoints_prefix_ :] = np.nan
    expected = fitted.predict_proba(X)
    np.testing.assert_array_equal(fitted.predict_proba(spoilt), expected)
    np.testing.assert_array_equal(fitted.predict_proba(X[:, :, : fitted.n_timepoints_prefix_]), expected)


def test_two_dimensions_are_one_channel(fitted: PrefixClassifier) -> None:
    np.testing.assert_array_equal(fitted.predict_proba(X[:, 0]), fitted.predict_proba(X))
    again = clone(fitted).fit(X[:, 0].tolist(), LABELS.tolist())
    np.testing.assert_array_equal(again.predict_proba(X), fitted.predict_proba(X))


@pytest.mark.parametrize("mode", ["raw", "stretch"])
@pytest.mark.parametrize("normalisation", ["none", "prefix", "train"])
def test_new_series_are_prepared_as_the_training_series_were(mode: str, normalisation: str) -> None:
    """What the student reads of a training series is the same when it comes again to be predicted."""
    long, _ = toy.series(12, length=50, channels=2)
    options = {
        "earliness": 0.43, "prefix_mode": mode, "normalisation": normalisation, "resample_to": 30, "missing": "error",
    }  # fmt: skip
    made, values, lengths = Preprocessing.learn(long, **options)
    from gdpd.data import prefix

    expected, _ = prefix(values, lengths, 0.43, mode, normalise=normalisation == "prefix")
    for given in (long, long[:, :, : made.n_timepoints_prefix]):
        found, no_lengths = made.prefixes(given)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert no_lengths is None


@pytest.mark.parametrize("length", [16, 101, 150, 333])
@pytest.mark.parametrize("earliness", [0.1, 0.2, 0.5, 0.99, 1.0])
def test_prefix_of_a_resampled_series_needs_at_most_one_time_point_more(length: int, earliness: float) -> None:
    made, _, _ = Preprocessing.learn(
        np.random.default_rng(0).normal(size=(4, 1, length)),
        earliness=earliness, prefix_mode="raw", normalisation="none", resample_to=100, missing="error",
    )  # fmt: skip
    assert 1 <= made.n_timepoints_prefix <= min(int(earliness * length + 1e-9) + 1, length)


def test_series_of_different_lengths_end_in_nan_or_come_in_a_list() -> None:
    padded, pieces = X.astype(np.float64), []
    for i, row in enumerate(padded):
        steps = 16 - i % 4
        row[:, steps:] = np.nan
        pieces.append(row[:, :steps])
    one, other = classifier().fit(padded, Y), classifier().fit(pieces, Y)
    np.testing.assert_array_equal(one.predict_proba(padded), other.predict_proba(pieces))


def test_missing_values_are_an_error_or_filled() -> None:
    gap = X.copy()
    gap[3, 0, 2] = np.nan
    with pytest.raises(ValueError, match="series 3"):
        classifier().fit(gap, Y)
    made = classifier(missing="interpolate").fit(gap, Y)
    assert np.isfinite(made.predict_proba(gap)).all()
    with pytest.raises(ValueError, match="series 3"):
        classifier().fit(X, Y).predict(gap)


@pytest.mark.parametrize(
    ("params", "data", "told"),
    [
        ({"earliness": 0.0}, (X, Y), r"earliness=0.0 is outside \(0, 1\]"),
        ({"earliness": 0.01}, (X, Y), "prefix of zero steps"),
        ({"method": "gpdp"}, (X, Y), "did you mean 'gdpd'"),
        ({"options": {"num_sample": 3}}, (X, Y), "'num_sample' is not one .did you mean 'num_samples'"),
        ({"options": {"epochs": 3}}, (X, Y), "'epochs' is a parameter of its own"),
        ({"options": {"dataset": "GunPoint"}}, (X, Y), "'dataset' is not one of an early classifier, but of a run"),
        ({"options": {"target_space": "identity"}}, (X, Y), "student's head reads 8"),
        ({}, (X, np.zeros(40)), r"1 class\(es\)"),
        ({}, (X, Y[:30]), r"y has shape \(30,\); expected \(40,\)"),
        ({}, (X[0, 0], Y), r"X has shape \(16,\).*a single series is X\[None\]"),
        ({}, (X[:0], Y[:0]), r"X has shape \(0, 1, 16\)"),
        ({}, (np.where(X > 1, np.inf, X), Y), "infinite"),
        ({}, ([["a", "b"]] * 40, Y), "cannot be read as numbers"),
        ({}, (X.astype(complex), Y), "real and imaginary part as two channels"),
        ({}, (X, None), "target y is None"),
        ({}, (X, Y + 0.5), "Unknown label type"),
    ],
)
def test_bad_input_is_refused_before_training(
    params: dict[str, Any], data: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gdpd.training import stages

    def trained(*_: Any, **__: Any) -> None:
        raise AssertionError("a stage was trained")

    monkeypatch.setattr(stages, "fit", trained)
    with pytest.raises(ValueError, match=told):
        classifier(**params).fit(*data)


def test_new_series_that_do_not_fit_are_refused(fitted: PrefixClassifier) -> None:
    with pytest.raises(ValueError, match=r"2 channel\(s\); the classifier was fitted on 1"):
        fitted.predict(np.zeros((3, 2, 16)))
    with pytest.raises(ValueError, match=r"series 0 has 7 time points; earliness=0.5 of the 16 .* takes 8"):
        fitted.predict(X[:, :, :7])


def test_predicting_and_saving_before_fit_is_an_error(tmp_path: Path) -> None:
    for call in (lambda: classifier().predict(X), lambda: classifier().save(tmp_path / "x")):
        with pytest.raises(NotFittedError):
            call()


def test_clone_and_set_params_follow_scikit_learn(fitted: PrefixClassifier) -> None:
    copied = clone(fitted)
    assert not hasattr(copied, "classes_")
    assert copied.get_params() == fitted.get_params()
    assert copied.set_params(earliness=0.25).earliness == 0.25
    with pytest.raises(ValueError, match="Invalid parameter"):
        copied.set_params(earlines=0.25)


def test_pickle_and_deepcopy_predict_alike(fitted: PrefixClassifier) -> None:
    for other in (pickle.loads(pickle.dumps(fitted)), copy.deepcopy(fitted)):
        np.testing.assert_array_equal(other.predict_proba(X), fitted.predict_proba(X))


def test_cross_validation_grid_search_and_pipelines_work() -> None:
    values = cross_val_score(classifier(method="base", epochs=20), X, LABELS, cv=2)
    assert values.shape == (2,)
    assert np.isfinite(values).all()
    search = GridSearchCV(classifier(method="base"), {"earliness": [0.25, 1.0]}, cv=2).fit(X, LABELS)
    assert search.best_params_["earliness"] in (0.25, 1.0)
    pipeline = make_pipeline(FunctionTransformer(lambda values: 2 * values), classifier(method="base"))
    assert pipeline.fit(X, LABELS).predict(X).shape == (40,)


@pytest.mark.parametrize(
    "labels", [LABELS, Y, Y.astype(float) + 1, Y.astype(bool)], ids=["str", "int", "float", "bool"]
)
def test_saved_classifier_predicts_alike(tmp_path: Path, labels: np.ndarray) -> None:
    made = classifier(normalisation="train", resample_to=10).fit(X, labels)
    made.save(tmp_path / "model.safetensors")
    loaded = PrefixClassifier.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(loaded.predict_proba(X), made.predict_proba(X))
    assert loaded.classes_.dtype == made.classes_.dtype
    np.testing.assert_array_equal(loaded.predict(X), made.predict(X))
    assert loaded.get_params() == made.get_params()
    assert loaded.teacher_ is None
    np.testing.assert_array_equal(clone(loaded).fit(X, labels).predict_proba(X), made.predict_proba(X))


def test_a_file_that_is_cut_off_or_another_s_is_refused(fitted: PrefixClassifier, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    fitted.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"not a whole file of PrefixClassifier.save"):
        PrefixClassifier.load(path)
    atomic.write_tensors(path, {"w": next(fitted.student_.parameters())})
    with pytest.raises(ValueError, match=r"not a whole file of PrefixClassifier.save"):
        PrefixClassifier.load(path)
    with pytest.raises(FileNotFoundError, match="is not there"):
        PrefixClassifier.load(tmp_path / "none")


def test_fit_leaves_arrays_and_generators_as_they_were() -> None:
    values, labels = X.copy(), LABELS.copy()
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classifier(missing="interpolate", normalisation="train").fit(values, labels)
    np.testing.assert_array_equal(values, X)
    np.testing.assert_array_equal(labels, LABELS)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_verbose_shows_progress(capsys: pytest.CaptureFixture[str]) -> None:
    classifier(verbose=True, method="base").fit(X, Y)
    assert "student" in capsys.readouterr().out


def test_arrays_are_read_as_channels_and_time() -> None:
    assert as_series(X[:, 0]).shape == (40, 1, 16)  # type: ignore[union-attr]
    assert isinstance(as_series([np.zeros(3), np.zeros(4)]), list)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_s_own_checks_of_estimators_pass() -> None:
    from sklearn.utils.estimator_checks import check_estimator

    tiny = {"layers": 1, "hidden": 4}
    made = classifier(method="base", earliness=1.0, teacher_options=tiny, student_options=tiny, epochs=2)
    not_meant = {
        "check_n_features_in": "series have channels and time points, not features",
        "check_n_features_in_after_fitting": "likewise",
        "check_estimators_empty_data_messages": "likewise, in the message",
        "check_classifiers_train": "asks for accuracy, which takes more than two epochs",
    }
    results = check_estimator(made, expected_failed_checks=not_meant, on_skip=None)
    assert sum(result["status"] == "passed" for result in results) >= 45

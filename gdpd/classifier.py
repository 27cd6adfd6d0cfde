"""`PrefixClassifier`: the two-stage training behind scikit-learn's estimator interface, on arrays."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d

from gdpd.config import RunConfig
from gdpd.data import TimeSeriesData
from gdpd.distillers import distiller_class
from gdpd.models import build_model
from gdpd.options import nearest
from gdpd.preprocessing import Preprocessing
from gdpd.training.atomic import plain, write_bytes
from gdpd.training.progress import RichProgress
from gdpd.training.run_folder import prepare_on, training_context
from gdpd.training.stages import Session, rehearse, train_student, train_teacher
from gdpd.training.tensors import Series, outputs

_FORMAT = 1
_PREPARING = ("earliness", "prefix_mode", "normalisation", "resample_to", "missing")
# Options of a run in a folder, or given by other means here.
_CLOSED = {
    "dataset", "data_dir", "seed", "teacher_dir", "checkpoint_every", "clean_checkpoints", "tensorboard", "devices",
    "strategy", "student_part", "student_channels",
}  # fmt: skip


class PrefixClassifier(ClassifierMixin, BaseEstimator):
    """Early classifier of time series: learns from whole series, predicts from their first part.

    `fit` trains a teacher on the whole series and then, by `method`, a student that reads only the first
    ``int(earliness * n_timepoints)`` time points. `predict` runs the plain student.

    Args:
        method: name of a training method, one of `gdpd.distillers.distiller_names()`, such as "base" (no teacher), "kd"
            or "gdpd"; or a class of your own as "package.module:Class".
        earliness: share of the series that predictions may use, in (0, 1].
        prefix_mode: read the prefix "raw", or "stretch" it back to full length by linear interpolation.
        normalisation: "none", "prefix" (each prefix by its own mean and deviation) or "train" (by those of the
            training series).
        resample_to: series longer than this many time points are resampled to it; None leaves them.
        missing: NaN inside series: "error", "interpolate" or "forward".
        teacher_model, student_model: names of networks, see `gdpd.models.build_model`.
        teacher_options, student_options: their keyword options, or None.
        epochs: epochs of the student, the warm-up included.
        warmup_epochs: epochs of the first stage of methods that have one (GDPD learns its prior); None: half of
            `epochs`.
        teacher_epochs: epochs of the teacher.
        batch_size: series per step.
        learning_rate: of Adam.
        loss_ratio: weight r of every loss beside the cross-entropy.
        validation_fraction: share of the series given to `fit` that is held out to select on.
        selection: which weights are kept: "best_val", "last" or "average".
        options: any further options of `gdpd.RunConfig` by name, such as {"num_samples": 4}; None for none.
        random_state: seed, generator or None, as everywhere in scikit-learn. With a whole number, `fit` gives the
            same weights every time on the same machine.
        verbose: show progress bars.

    Attributes:
        classes_: (n_classes,) labels, as given to `fit`.
        n_channels_in_: channels of the series.
        n_timepoints_in_: time points of the longest training series.
        n_timepoints_prefix_: first time points of a series of that length that predictions use.
        student_: the trained student, a `gdpd.models.Classifier` in eval mode.
        teacher_: the teacher, or None for a method without one, and after `load`.
        history_: one dictionary per epoch, teacher's and student's.
        config_: the `gdpd.RunConfig` that `fit` used.

    Example:
        >>> classifier = PrefixClassifier(earliness=0.5, epochs=100, random_state=0)  # doctest: +SKIP
        >>> classifier.fit(X_train, y_train).score(X_test, y_test)  # doctest: +SKIP
    """

    def __init__(
        self,
        method: str = "gdpd",
        earliness: float = 0.5,
        *,
        prefix_mode: str = "raw",
        normalisation: str = "none",
        resample_to: int | None = 100,
        missing: str = "error",
        teacher_model: str = "lstm3-100",
        student_model: str = "lstm3-100",
        teacher_options: Mapping[str, Any] | None = None,
        student_options: Mapping[str, Any] | None = None,
        epochs: int = 600,
        warmup_epochs: int | None = None,
        teacher_epochs: int = 300,
        batch_size: int = 64,
        learning_rate: float = 1e-3,
        loss_ratio: float = 1.0,
        validation_fraction: float = 0.2,
        selection: str = "best_val",
        options: Mapping[str, Any] | None = None,
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        self.method = method
        self.earliness = earliness
        self.prefix_mode = prefix_mode
        self.normalisation = normalisation
        self.resample_to = resample_to
        self.missing = missing
        self.teacher_model = teacher_model
        self.student_model = student_model
        self.teacher_options = teacher_options
        self.student_options = student_options
        self.epochs = epochs
        self.warmup_epochs = warmup_epochs
        self.teacher_epochs = teacher_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.loss_ratio = loss_ratio
        self.validation_fraction = validation_fraction
        self.selection = selection
        self.options = options
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any) -> PrefixClassifier:
        """Train teacher and student.

        Args:
            X: (n_cases, n_channels, n_timepoints), or (n_cases, n_timepoints) for one channel; whole series. Shorter
                series may end in NaN, or come in a list of (n_channels, n_timepoints_i) arrays.
            y: (n_cases,) labels.

        Returns:
            The classifier itself.

        Raises:
            ValueError: an option or the data cannot be used; found before any training.
        """
        config = self._config()
        preprocessing, values, lengths = Preprocessing.learn(X, **{name: getattr(config, name) for name in _PREPARING})
        labels = self._labels(y, len(values))
        classes, codes = np.unique(labels, return_inverse=True)
        empty, none = np.zeros((0, *values.shape[1:]), dtype=np.float32), np.zeros(0, dtype=np.int64)
        data = TimeSeriesData(
            name="X",
            X_train=values,
            y_train=codes.astype(np.int64),
            X_test=empty,
            y_test=none,
            classes=classes,
            lengths_train=lengths,
            lengths_test=none,
            meta={"normalisation": config.normalisation},
        )
        with training_context(config) as fabric:
            session = Session(config, prepare_on(fabric, data, config), fabric)
            session.progress = RichProgress() if self.verbose else None
            rehearse(session)
            teacher = train_teacher(session) if distiller_class(config.method).uses_teacher else None
            distiller, selection = train_student(session, teacher)
        distiller.student.load_state_dict(selection.weights)
        self.student_ = distiller.student.cpu().float().eval()
        self.teacher_ = None if teacher is None else teacher.model.cpu().float()
        self.history_ = session.history.records
        self._learned(classes, preprocessing, config)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Class probabilities, (n_cases, n_classes) float64, columns as `classes_`, from the series' first part.

        Args:
            X: as in `fit`. Where all training series had one length, what comes after the first
                `n_timepoints_prefix_` time points is not looked at and may be left out; where lengths differed, whole
                series are needed, since the prefix is a share of each.

        Raises:
            NotFittedError: before `fit`.
            ValueError: another number of channels, too few time points, NaN with missing="error".
        """
        check_is_fitted(self)
        values, lengths = self._preprocessing.prefixes(X)
        series = Series(
            torch.from_numpy(np.ascontiguousarray(values)),
            torch.zeros(len(values), dtype=torch.int64),
            None if lengths is None else torch.from_numpy(lengths),
        )
        return outputs(self.student_, series)[1].double().softmax(1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Most probable label of each series, (n_cases,). Arguments and errors as `predict_proba`."""
        best = self.predict_proba(X).argmax(axis=1)
        return self.classes_[best]

    def save(self, path: str | Path) -> None:
        """Write the fitted classifier (the student and all that prediction needs) into one safetensors file.

        Raises:
            NotFittedError: before `fit`.
            OSError: the file could not be written; nothing half-written is left.
        """
        check_is_fitted(self)
        params = self.get_params()
        if not isinstance(params["random_state"], (int, np.integer)):
            params["random_state"] = None  # a generator's state has no place in a file of weights
        about = {
            "format": _FORMAT,
            "params": params,
            "config": self.config_.to_dict(),
            "preprocessing": dataclasses.asdict(self._preprocessing),
            "classes": self.classes_.tolist(),
            "classes_dtype": self.classes_.dtype.str,
        }
        tensors = {name: value.contiguous() for name, value in self.student_.state_dict().items()}
        write_bytes(Path(path), save(tensors, metadata={"gdpd": json.dumps(plain(about))}))

    @classmethod
    def load(cls, path: str | Path) -> PrefixClassifier:
        """Read a classifier that `save` wrote; it predicts, and is not meant to be fitted on. `teacher_` is None.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is truncated, or was not written by `save`.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is not there. Give the path that PrefixClassifier.save was given.")
        try:
            with safe_open(str(path), framework="pt") as file:
                about = json.loads((file.metadata() or {})["gdpd"])
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path} is not a whole file of PrefixClassifier.save ({error}). Was it cut off while it was copied?"
            ) from error
        made = cls(**about["params"])
        classes = np.array(about["classes"], dtype=np.dtype(about["classes_dtype"]))
        preparing: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in about["preprocessing"].items()
        }
        made._learned(classes, Preprocessing(**preparing), RunConfig.from_dict(about["config"]))
        student = build_model(
            made.config_.student_model,
            in_channels=made.n_channels_in_,
            num_classes=len(classes),
            **made.config_.student_options,
        )
        student.load_state_dict(weights)
        made.student_, made.teacher_, made.history_ = student.eval(), None, []
        return made

    @staticmethod
    def _labels(y: Any, n_cases: int) -> np.ndarray:
        if y is None:
            raise ValueError("PrefixClassifier requires y to be passed, but the target y is None.")
        labels = column_or_1d(y, warn=True)
        if len(labels) != n_cases:
            raise ValueError(f"y has shape {labels.shape}; expected ({n_cases},), one label per series of X.")
        check_classification_targets(labels)
        return labels

    def _learned(self, classes: np.ndarray, preprocessing: Preprocessing, config: RunConfig) -> None:
        self.classes_ = classes
        self.config_ = config
        self.n_channels_in_ = preprocessing.n_channels
        self.n_timepoints_in_ = preprocessing.n_timepoints
        self.n_timepoints_prefix_ = preprocessing.n_timepoints_prefix
        self._preprocessing = preprocessing

    def _config(self) -> RunConfig:
        """The options of a run that the parameters stand for."""
        given = self.get_params(deep=False)
        further = dict(given.pop("options") or {})
        fields = {row["name"] for row in RunConfig.describe()}
        own = {name: value for name, value in given.items() if name in fields}
        open_names = sorted(fields - own.keys() - _CLOSED)
        for name in further:
            if name not in open_names:
                told = f"is not one{nearest(name, open_names)}"
                if name in own:
                    told = "is a parameter of its own"
                elif name in _CLOSED:
                    told = "is not one of an early classifier, but of a run (gdpd.training.run, gdpd distill)"
                raise ValueError(f"options: {name!r} {told}. Known are: {', '.join(open_names)}.")
        for name in ("teacher_options", "student_options"):
            own[name] = dict(own[name] or {})
        return RunConfig.from_dict({**own, **further, "dataset": "X", "seed": self._seed()})

    def _seed(self) -> int:
        if isinstance(self.random_state, (int, np.integer)):
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(2**31 - 1))

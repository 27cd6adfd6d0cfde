"""The two stages on prepared data: a teacher on full series, then a student on prefixes with what the teacher knows."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gdpd.config import RunConfig
from gdpd.distillers import Base, Distiller, build_distiller
from gdpd.models import Classifier, build_model
from gdpd.training.checkpoint import CheckpointStore
from gdpd.training.devices import Devices
from gdpd.training.history import History, Progress
from gdpd.training.loop import derived_seed, fit, scores_of
from gdpd.training.selection import Selection
from gdpd.training.teacher_outputs import teacher_outputs
from gdpd.training.tensors import Prepared, Series, TrainingSet, outputs

CHANCE_LEVEL = 0.05  # of the permutation test that a teacher has to pass
PERMUTATIONS = 2000


class WeakTeacherWarning(UserWarning):
    """The best teacher is not clearly better than chance; what is distilled from it will suffer."""


class WeakTeacherError(RuntimeError):
    """The same, with `weak_teacher="error"`."""


@dataclass
class Session:
    """What both stages need of the run around them.

    Attributes:
        config: the run's options.
        prepared: the data, on the training device.
        fabric: launched.
        history: gets a record per epoch.
        store: checkpoints, or None.
        progress: told of every epoch, or None.
        rehearsed: the student inside its method, as it was built, once `rehearse` has run it: what was found out
            about it there (the sampler's capture of its denoiser) need not be found out again.
        teacher_home: folder that runs share with this one's teacher, or None.
    """

    config: RunConfig
    prepared: Prepared
    fabric: Devices
    history: History = field(default_factory=History)
    store: CheckpointStore | None = None
    progress: Progress | None = None
    rehearsed: Distiller | None = None
    teacher_home: Path | None = None

    def build(self, name: str, options: dict[str, Any], read: Series, *seed: Any) -> Classifier:
        """A network by name for the channels of what it reads, its weights drawn from the run's seed and `seed`."""
        torch.manual_seed(derived_seed(self.config.seed, *seed))
        return build_model(name, in_channels=read.x.shape[1], num_classes=self.prepared.num_classes, **options)

    def fit(self, distiller: Distiller, train: TrainingSet, validation: Any, **options: Any) -> None:
        """`gdpd.training.loop.fit` within this session."""
        fit(
            distiller, train, validation, config=self.config, fabric=self.fabric, history=self.history,
            store=self.store, progress=self.progress, **options,
        )  # fmt: skip


@dataclass
class Teacher:
    """A trained teacher: the network (frozen, eval mode) and what is known of its training, as plain values."""

    model: Classifier
    about: dict[str, Any]


def build_teacher(session: Session, candidate: int = 0) -> Classifier:
    """The teacher's network with the first weights of the given candidate."""
    config, read = session.config, session.prepared.full_train
    return session.build(config.teacher_model, config.teacher_options, read, "teacher", candidate)


def build_student(session: Session, teacher: Classifier) -> Distiller:
    """The student inside its method. Its first weights depend on the seed alone, so methods start from the same ones.

    Of the teacher only the widths matter.

    Raises:
        ValueError: unknown network, method or option; widths that cannot meet.
    """
    config = session.config
    student = session.build(config.student_model, config.student_options, session.prepared.prefix_train, "student")
    torch.manual_seed(derived_seed(config.seed, "method"))
    shared = {**config.to_dict(), "warmup_epochs": config.warmup, "teacher_sequence_dim": teacher.sequence_dim}
    distiller = build_distiller(config.method, student, teacher.feature_dim, shared, **config.method_options)
    distiller.class_weights = _class_weights(session)
    return distiller


def _class_weights(session: Session) -> Tensor | None:
    """Weights of the classes in every cross-entropy of the run, [classes]; None where all count the same."""
    if session.config.class_weight == "none":
        return None
    y, classes = session.prepared.full_train.y, session.prepared.num_classes
    return len(y) / (classes * torch.bincount(y, minlength=classes).clamp(min=1).to(torch.float32))


def rehearse(session: Session) -> None:
    """Run the loss of every phase once, so that what cannot work is found before anything is trained.

    Raises:
        ValueError: batches of one series where a BatchNorm would see them; and whatever the networks, the method, the
            sampler or its backend refuse.
    """
    config, prepared = session.config, session.prepared
    teacher = build_teacher(session)
    distiller = build_student(session, teacher)
    smallest = min(config.batch_size, len(prepared.prefix_train)) // session.fabric.world_size
    for role, module in (("teacher", teacher), ("student or its method", distiller)):
        if smallest < 2 and any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules()):
            raise ValueError(
                f"batch_size={config.batch_size} with {len(prepared.prefix_train)} training series on "
                f"{session.fabric.world_size} device(s) makes batches of one series, which the BatchNorm in the {role} "
                "cannot normalise. Use batches of at least two series per device, or networks without BatchNorm."
            )
    values = prepared.prefix_train.x
    rows = torch.arange(min(4, len(values)), device=values.device)
    teacher.to(values).eval()
    distiller.to(values).train()
    built = copy.deepcopy(distiller.state_dict())
    with torch.no_grad(), session.fabric.autocast():
        full, prefix = (TrainingSet(series).batch(rows) for series in (prepared.full_train, prepared.prefix_train))
        known = teacher(full.x_prefix, full.lengths, **({"sequence": True} if distiller.uses_sequences else {}))
        prefix.z_long, prefix.teacher_logits, *further = known
        if distiller.uses_sequences:
            prefix.teacher_sequence, prefix.teacher_lengths = further[0], full.lengths
        distiller.prepare(teacher, prefix.z_long, prefix.y)
        for epoch in (0, distiller.warmup_epochs):
            distiller.loss(prefix, epoch)
    distiller.load_state_dict(built)  # the running statistics of BatchNorms have moved
    session.rehearsed = distiller


def train_teacher(session: Session) -> Teacher:
    """Stage one: teachers on full series; the best on validation data is kept.

    `teacher_candidates` are trained in any case, up to `teacher_retries` more while the best is not clearly better
    than chance: a permutation test of the mean probability of the true class on the validation series, at 5 %.

    Raises:
        WeakTeacherError: with `weak_teacher="error"`, the best is not clearly better than chance.

    Warns:
        WeakTeacherWarning: with `weak_teacher="warn"`, the same.
    """
    config, prepared = session.config, session.prepared
    teachers: list[Teacher] = []
    while True:
        teachers.append(_train_candidate(session, len(teachers)))
        best = min(teachers, key=lambda teacher: _rank(config, teacher))
        most = config.teacher_candidates + (config.teacher_retries if best.about["weak"] else 0)
        if len(teachers) >= most:
            break
    best.about["trained"] = len(teachers)
    best.about["seconds"] = sum(line["seconds"] for line in session.history.records if line["stage"] == "teacher")
    _tell_if_weak(config, best, prepared)
    return best


def _train_candidate(session: Session, candidate: int) -> Teacher:
    config, prepared = session.config, session.prepared
    distiller = Base(build_teacher(session, candidate))
    distiller.class_weights = _class_weights(session)
    selection = Selection("best_val", config.teacher_epochs, metric=config.selection_metric)
    session.fit(
        distiller,
        TrainingSet(prepared.full_train),
        prepared.full_validation,
        stage=f"teacher{candidate}",
        epochs=config.teacher_epochs,
        selection=selection,
        about={"stage": "teacher", "candidate": candidate},
    )
    model = distiller.student
    model.load_state_dict(selection.weights)
    model.eval().requires_grad_(False)
    logits = outputs(model, prepared.full_validation)[1]
    chance = p_chance(logits.softmax(1), prepared.full_validation.y, config.seed)
    about = {
        "candidate": candidate,
        "selected_epoch": selection.epoch,
        "validation": scores_of(logits, prepared.full_validation.y),
        "p_chance": chance,
        "weak": chance > CHANCE_LEVEL,
    }
    return Teacher(model, about)


def p_chance(proba: Tensor, y: Tensor, seed: int) -> float:
    """Probability that predictions unrelated to the labels score as well: a permutation test.

    The score is the mean probability given to the true class, which balanced and unbalanced sets, two classes and
    many can share: permuting the labels keeps their frequencies, so guessing the most frequent class gains nothing.

    Args:
        proba: [n, classes].
        y: int64 [n].
        seed: seed of the permutations.

    Returns:
        (1 + permutations that score at least as well) / (1 + permutations).
    """
    table, labels = proba.double().cpu().numpy(), y.cpu().numpy()
    rng = np.random.default_rng(seed)
    rows = np.arange(len(labels))
    observed = table[rows, labels].mean()
    shuffled = np.stack([rng.permutation(labels) for _ in range(PERMUTATIONS)])
    as_good = (table[rows, shuffled].mean(axis=1) >= observed - 1e-12).sum()
    return float((1 + as_good) / (1 + PERMUTATIONS))


def _rank(config: RunConfig, teacher: Teacher) -> tuple[float, ...]:
    scores = teacher.about["validation"]
    return (scores["ce"],) if config.selection_metric == "ce" else (-scores[config.selection_metric], scores["ce"])


def _tell_if_weak(config: RunConfig, teacher: Teacher, prepared: Prepared) -> None:
    if not teacher.about["weak"]:
        return
    scores = teacher.about["validation"]
    told = (
        f"{prepared.name}, seed {config.seed}: the best of {teacher.about['trained']} teacher(s) is not clearly "
        f"better than chance on {len(prepared.full_validation)} validation series (accuracy "
        f"{scores['accuracy']:.2f}, AUC-PRC {scores['auc_prc']:.1f} %, p = {teacher.about['p_chance']:.2f}). What is "
        "distilled from it will suffer. Try more teacher_epochs, more teacher_candidates, teacher_options such as "
        "forget_bias or pooling, or another teacher_model; with very few validation series, a larger "
        "validation_fraction."
    )
    if config.weak_teacher == "error":
        raise WeakTeacherError(told)
    warnings.warn(told, WeakTeacherWarning, stacklevel=3)


def tell_if_below_student(config: RunConfig, name: str, teacher: Teacher, student: dict[str, float]) -> None:
    """Warn when the student, reading less, scores higher on validation data than the teacher (AUC-PRC)."""
    best = teacher.about["validation"]["auc_prc"]
    if config.earliness < 1 and best < student["auc_prc"]:
        warnings.warn(
            f"{name}, seed {config.seed}: on validation data the student, which reads {config.earliness:.0%} of each "
            f"series, has an AUC-PRC of {student['auc_prc']:.1f} % and the teacher, which reads all, {best:.1f} %. A "
            "teacher that knows less than its student has little to teach: try more teacher_candidates.",
            WeakTeacherWarning,
            stacklevel=3,
        )


def train_student(session: Session, teacher: Teacher | None) -> tuple[Distiller, Selection]:
    """Stage two: the student on prefixes, by the run's method.

    What the method asks of the teacher, hidden sequences among it, is computed once, before the first epoch.

    Returns:
        The distiller as it was after the last epoch, and the selection that holds the student's kept weights.
    """
    config, prepared = session.config, session.prepared
    distiller, session.rehearsed = session.rehearsed, None
    if distiller is None:
        distiller = build_student(session, build_teacher(session) if teacher is None else teacher.model)
    train = TrainingSet(prepared.prefix_train)
    if teacher is not None and distiller.uses_teacher:
        known = teacher_outputs(
            teacher.model,
            prepared.full_train,
            limit=config.teacher_memory * 2**20,
            home=session.teacher_home,
            sequence=distiller.uses_sequences,
        )
        distiller.prepare(teacher.model, known[0], prepared.full_train.y)
        train = TrainingSet.taught(prepared, known)
    selection = Selection(
        config.selection,
        config.epochs,
        metric=config.selection_metric,
        first_epoch=distiller.warmup_epochs,
        average_epochs=config.average_epochs,
    )
    session.fit(
        distiller,
        train,
        prepared.prefix_validation,
        stage="student",
        epochs=config.epochs,
        selection=selection,
        about={"stage": "student"},
    )
    return distiller, selection

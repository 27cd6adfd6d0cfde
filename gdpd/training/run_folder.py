"""One run in one folder: data, teacher, student, scores and the files that a report is made from."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gdpd.config import RunConfig
from gdpd.data import TimeSeriesData, load_dataset
from gdpd.distillers import Distiller, ReverseDistiller
from gdpd.metrics import classification_metrics
from gdpd.models import Classifier
from gdpd.training.atomic import (
    read_json,
    read_tensors,
    remove_partial_files,
    write_arrays,
    write_json,
    write_tensors,
)
from gdpd.training.checkpoint import CheckpointStore, check_same_config
from gdpd.training.denormals import flush_denormals
from gdpd.training.devices import Devices, launch
from gdpd.training.graph import check_graphs_possible
from gdpd.training.history import History, Progress
from gdpd.training.loop import derived_seed, scores_of
from gdpd.training.memory import peak_memory
from gdpd.training.nvtx_ranges import nvtx_ranges
from gdpd.training.progress import RichProgress, Several, TensorBoard
from gdpd.training.stages import (
    Session,
    Teacher,
    build_student,
    rehearse,
    tell_if_below_student,
    train_student,
    train_teacher,
)
from gdpd.training.teacher_cache import copy_teacher, load_teacher, save_teacher, shared_home, teacher_key
from gdpd.training.tensors import Prepared, outputs, prepare

TRAJECTORY_SERIES = 64  # test series whose reverse process is written down
_PACKAGES = ("gdpd-kernels", "torch", "lightning-fabric", "numpy", "scikit-learn", "aeon", "safetensors")


def run(
    config: RunConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    progress: Progress | bool | None = None,
) -> dict[str, Any]:
    """Train a teacher and a student, evaluate, and write everything into one folder.

    The folder gets config.json, versions.json, history.jsonl (a line an epoch), teacher.safetensors and teacher.json,
    student.safetensors, predictions.npz, trajectory.npz (GDPD), and at last metrics.json, which marks a finished run.
    Checkpoints lie in checkpoints/ while it trains.

    Args:
        config: the options.
        folder: the run's folder; made if need be.
        resume: go on with the run in the folder, from its last good checkpoint; a finished run is returned as it is,
            and a folder without a run is a new one. The final weights are those of a run that was never broken off,
            bit for bit on the same machine with the same number of threads.
        progress: True for progress bars, or a listener of your own.

    Returns:
        What metrics.json holds: auc_prc (percent), accuracy, roc_auc, calibration_error, fidelity (agreement with
        the teacher), kl of the student on the test series; seconds (training of the student), seconds_per_epoch
        (median), peak_memory (largest resident memory of the process while the student trained, MiB; on a CUDA device
        also peak_device_memory), selected_epoch, validation (ce, accuracy, auc_prc), parameters, n_train,
        n_validation, n_test, student_sha256; and teacher: the same scores of the teacher on full test series,
        validation, p_chance, weak, selected_epoch, candidate, trained, seconds.

    Raises:
        FileExistsError: the folder holds a run, and `resume` is False.
        FileNotFoundError, ValueError: bad input; raised before any training.
        CheckpointError: every checkpoint is damaged.
        OSError: a file could not be written; nothing half-written is left, and the run can be resumed.
    """
    folder = Path(folder)
    finished = _enter(config, folder, resume)
    if finished is not None:
        return finished
    data = load_data(config)
    with training_context(config) as fabric:
        session = Session(config, prepare_on(fabric, data, config), fabric)
        rehearse(session)
        listeners = _listeners(config, folder, progress)
        if fabric.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            remove_partial_files(folder)
            write_json(folder / "config.json", config.to_dict())
            write_json(folder / "versions.json", versions(fabric))
            session.history = History(folder / "history.jsonl")
        session.store = CheckpointStore(folder / "checkpoints", config, session.prepared.digest)
        session.teacher_home = shared_home(config, session.prepared.digest)
        session.progress = Several(listeners) if listeners and fabric.is_global_zero else None
        teacher = _teacher(session, folder)
        with peak_memory(fabric.device) as memory:
            distiller, selection = train_student(session, teacher)
        if fabric.is_global_zero:
            trajectory = _trajectory(session, distiller, teacher)
            distiller.student.load_state_dict(selection.weights)
            metrics = _write_results(session, folder, teacher, distiller.student, trajectory)
            write_json(folder / "metrics.json", {**metrics, **memory, "selected_epoch": selection.epoch})
            if config.clean_checkpoints:
                session.store.clear()
        fabric.barrier()
    return read_json(folder / "metrics.json")


def train_teacher_only(config: RunConfig, folder: str | Path) -> None:
    """Train the teacher of a run and write teacher.safetensors and teacher.json into `folder`, for runs to begin with.

    Only the options that a teacher depends on count. A sound teacher that is there already is left as it is.

    Raises:
        As `run`.
    """
    data = load_data(config)
    with training_context(config) as fabric:
        session = Session(config, prepare_on(fabric, data, config), fabric)
        _teacher(session, Path(folder))


def evaluate(folder: str | Path, *, data_dir: str | Path | None = None) -> dict[str, Any]:
    """Score the student (and the teacher) of a finished run again, from their weights, on the run's test series.

    Only the plain student runs: no prior, no sampler.

    Args:
        folder: a finished run.
        data_dir: where the data are now, if not where they were.

    Returns:
        auc_prc (percent), accuracy, roc_auc, calibration_error, fidelity, kl, and teacher with its own scores.

    Raises:
        FileNotFoundError: no finished run there.
        ValueError: the weights are damaged, or the data are not those that the run was trained on.
    """
    folder = Path(folder)
    if not (folder / "metrics.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no finished run: metrics.json is missing. Finish one with resume=True, --resume."
        )
    config = RunConfig.from_dict(read_json(folder / "config.json"))
    if data_dir is not None:
        config = config.replace(data_dir=str(data_dir))
    data = load_data(config)
    with training_context(config) as fabric:
        session = Session(config, prepare_on(fabric, data, config), fabric)
        teacher = load_teacher(session, folder, teacher_key(config, session.prepared.digest))
        if teacher is None:
            raise FileNotFoundError(f"{folder} holds no sound teacher.safetensors and teacher.json. Run it again.")
        student = build_student(session, teacher.model).student
        student.load_state_dict(
            read_tensors(folder / "student.safetensors", read_json(folder / "metrics.json")["student_sha256"])
        )
        student.to(session.prepared.prefix_test.x)
        return _scores(session, teacher, student)[0]


@contextmanager
def training_context(config: RunConfig) -> Iterator[Devices]:
    """Launched devices; within the block subnormals are flushed, and torch's generators are put back at the end."""
    with flush_denormals(config.flush_denormal), torch.random.fork_rng(), nvtx_ranges():
        fabric = launch(config)
        check_graphs_possible(config.graph_step, fabric.device, config.devices)
        yield fabric


def prepare_on(fabric: Devices, data: TimeSeriesData, config: RunConfig) -> Prepared:
    """`prepare`, on the training device and in the type of the precision."""
    dtype = torch.float64 if config.precision == "64-true" else torch.float32
    return prepare(data, config).to(fabric.device, dtype)


def versions(fabric: Devices) -> dict[str, Any]:
    """What a result depends on beside the configuration: versions, processor, device, threads."""
    found: dict[str, Any] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return {
        **found,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _processor(),
        "device": str(fabric.device),
        "threads": torch.get_num_threads(),
    }


def _enter(config: RunConfig, folder: Path, resume: bool) -> dict[str, Any] | None:
    """Check what is in the folder; the metrics if it holds the finished run."""
    if not (folder / "config.json").is_file():
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file. Give a folder for the run.")
        return None
    if not resume:
        raise FileExistsError(
            f"{folder} holds a run already. Go on with it (resume=True, --resume), give another folder, or delete it."
        )
    check_same_config(config, read_json(folder / "config.json"), str(folder))
    return read_json(folder / "metrics.json") if (folder / "metrics.json").is_file() else None


def load_data(config: RunConfig) -> TimeSeriesData:
    """The data set of a run, prepared as its options say."""
    return load_dataset(
        config.dataset,
        normalisation=config.normalisation,
        resample_to=config.resample_to,
        missing=config.missing,
        data_dir=config.data_dir,
    )


def _listeners(config: RunConfig, folder: Path, progress: Progress | bool | None) -> list[Progress]:
    listeners: list[Progress] = []
    if not isinstance(progress, bool) and progress is not None:
        listeners.append(progress)
    elif progress:
        listeners.append(RichProgress())
    if config.tensorboard:
        listeners.append(TensorBoard(folder / "tensorboard"))
    return listeners


def _teacher(session: Session, folder: Path) -> Teacher:
    """The run's teacher: from its folder, from the shared folder, or trained now and written to both."""
    key = teacher_key(session.config, session.prepared.digest)
    shared = shared_home(session.config, session.prepared.digest)
    own = load_teacher(session, folder, key)
    if own is None and shared is not None and (found := load_teacher(session, shared, key)) is not None:
        if session.fabric.is_global_zero:
            copy_teacher(shared, folder)
        return found
    if own is None:
        own = train_teacher(session)
        if session.fabric.is_global_zero:
            save_teacher(own, folder, key)
        session.fabric.barrier()
        own = load_teacher(session, folder, key) or own  # every process goes on with the weights of the first
    if shared is not None and session.fabric.is_global_zero and not (shared / "teacher.json").is_file():
        copy_teacher(folder, shared)
    return own


def _write_results(
    session: Session, folder: Path, teacher: Teacher, student: Classifier, trajectory: dict[str, np.ndarray]
) -> dict[str, Any]:
    prepared = session.prepared
    scores, arrays = _scores(session, teacher, student)
    write_arrays(folder / "predictions.npz", **arrays)
    if trajectory:
        write_arrays(folder / "trajectory.npz", **trajectory)
    seconds = [record["seconds"] for record in session.history.of("student")]
    scores["teacher"].update(teacher.about)
    validation = scores_of(outputs(student, prepared.prefix_validation)[1], prepared.prefix_validation.y)
    tell_if_below_student(session.config, prepared.name, teacher, validation)
    return {
        **scores,
        "seconds": sum(seconds),
        "seconds_per_epoch": float(np.median(seconds)),
        "validation": validation,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "n_train": len(prepared.prefix_train),
        "n_validation": len(prepared.prefix_validation),
        "n_test": len(prepared.prefix_test),
        "student_sha256": write_tensors(folder / "student.safetensors", student.state_dict()),
    }


def _scores(session: Session, teacher: Teacher, student: Classifier) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Test scores of student and teacher, and the predictions that they come from."""
    prepared = session.prepared
    y = prepared.prefix_test.y.cpu().numpy()
    proba, proba_teacher = (
        outputs(model, series)[1].softmax(1).cpu().numpy()
        for model, series in ((student, prepared.prefix_test), (teacher.model, prepared.full_test))
    )
    scores = classification_metrics(y, proba, proba_teacher)
    scores_teacher = classification_metrics(y, proba_teacher)
    return {**scores, "teacher": scores_teacher}, {"y": y, "proba_student": proba, "proba_teacher": proba_teacher}


def _trajectory(session: Session, distiller: Distiller, teacher: Teacher) -> dict[str, np.ndarray]:
    """Some test series' way from z_short to z_hat among the teacher's training features, all in the prior's space.

    As the modules were after the last epoch, whatever epoch of the student is kept: they belong together.
    """
    prepared = session.prepared
    series = prepared.prefix_test
    if not isinstance(distiller, ReverseDistiller) or distiller.table.eta or len(series) < 2:
        return {}
    rows = slice(0, TRAJECTORY_SERIES)
    torch.manual_seed(derived_seed(session.config.seed, "trajectory"))
    states = distiller.trajectory(series.x[rows], None if series.lengths is None else series.lengths[rows])
    prior = distiller.prior.eval()
    with torch.no_grad():
        features = prior.encode(outputs(teacher.model, prepared.full_train)[0])
    tensors = {
        "teacher_features": features,
        "teacher_labels": prepared.full_train.y,
        "labels": series.y[rows],
        **states,
    }
    return {name: value.cpu().numpy() for name, value in tensors.items()}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()

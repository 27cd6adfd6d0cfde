"""What a worker does for a grid: train one teacher, or carry out one job. Plain values in and out, errors as text.

A teacher travels as the bytes of its two files, so that workers on other machines need no folder in common.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gdpd import __version__
from gdpd.config import RunConfig

TEACHER_FILES = ("teacher.safetensors", "teacher.json")  # the JSON last: it marks a whole teacher
_QUIET = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


@dataclass(frozen=True)
class Done:
    """What comes back from a worker.

    Attributes:
        value: the teacher's files by name, or the columns of a `gdpd.experiments.results.Result` beside its key.
        reason: why it failed; empty if it did not.
        warnings: each once, as text: a worker's own terminal output would be lost among others'.
    """

    value: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    warnings: tuple[str, ...] = ()


def train_teacher(config: RunConfig) -> Done:
    """Train the teacher of `config` and return its files."""
    from gdpd.training import train_teacher_only

    def work() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="gdpd-") as home:
            train_teacher_only(config, home)
            return {name: (Path(home) / name).read_bytes() for name in TEACHER_FILES}

    return _told(work)


def carry_out(config: RunConfig, teacher: dict[str, bytes], folder: str | None = None, keep: bool = False) -> Done:
    """Carry out one job with its teacher and return what the results table holds of it.

    Args:
        config: the job's options.
        teacher: the teacher's files by name.
        folder: where the run lies while it goes on, so that one that was stopped goes on from its checkpoint; None: a
            temporary folder.
        keep: leave the run folder there.
    """
    import gdpd.training

    def work() -> dict[str, Any]:
        with _run_folder(folder, keep) as home:
            for name in TEACHER_FILES if not (home / TEACHER_FILES[-1]).is_file() else ():
                (home / name).write_bytes(teacher[name])
            fresh = not (home / "config.json").is_file()
            began = time.process_time()
            gdpd.training.run(config, home, resume=True)
            seconds = time.process_time() - began if fresh else None
            return {"cpu_seconds": seconds, **_columns(home)}

    return _told(work)


def _told(work: Callable[[], dict[str, Any]]) -> Done:
    value, reason = {}, ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            value = work()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
    texts = [str(warning.message) for warning in caught if not issubclass(warning.category, _QUIET)]
    return Done(value, reason, tuple(dict.fromkeys(texts)))


@contextlib.contextmanager
def _run_folder(folder: str | None, keep: bool) -> Iterator[Path]:
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="gdpd-") as made:
            yield Path(made)
        return
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    yield home
    if not keep:
        shutil.rmtree(home)


def _columns(folder: Path) -> dict[str, Any]:
    from gdpd.experiments.records import read_run
    from gdpd.training.atomic import read_json

    record = read_run(folder)
    metrics, teacher, versions = record.metrics, record.teacher, record.versions
    same = (
        "auc_prc", "accuracy", "roc_auc", "calibration_error", "fidelity", "kl", "selected_epoch", "parameters",
        "n_train", "n_validation", "n_test", "seconds", "seconds_per_epoch", "student_sha256",
    )  # fmt: skip
    told = {"gdpd": __version__, **{name: versions.get(name) for name in ("torch", "python", "threads")}}
    return {
        **{name: metrics[name] for name in same},
        "peak_memory": metrics.get("peak_memory"),
        **{f"val_{name}": metrics["validation"][name] for name in ("ce", "accuracy", "auc_prc")},
        "teacher_auc_prc": teacher["auc_prc"],
        "teacher_accuracy": teacher["accuracy"],
        "teacher_val_ce": teacher["validation"]["ce"],
        "teacher_val_auc_prc": teacher["validation"]["auc_prc"],
        "teacher_p_chance": teacher["p_chance"],
        "teacher_sha256": read_json(folder / "teacher.json")["sha256"],
        "parts": _last_parts(record.history),
        "software": ", ".join(f"{name} {value}" for name, value in told.items()),
    }


def _last_parts(history: list[dict[str, Any]]) -> dict[str, float]:
    """Parts of the loss, and alpha's mean, in the last epoch of each phase of the student."""
    last = {record["phase"]: record for record in history if record.get("stage") == "student"}
    parts: dict[str, float] = {}
    for phase, record in last.items():
        found = dict(record["train"])
        found.update(
            {name: about["mean"] for name, about in record.items() if isinstance(about, dict) and "mean" in about}
        )
        parts.update({f"{phase}.{name}": float(f"{value:.6g}") for name, value in found.items() if value is not None})
    return parts

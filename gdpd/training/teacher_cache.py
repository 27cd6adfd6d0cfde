"""Trained teachers on disk: one per (data, seed, teacher options), shared by every method and earliness."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path

from gdpd.config import RunConfig
from gdpd.training.atomic import read_json, read_tensors, write_json, write_tensors
from gdpd.training.stages import Session, Teacher, build_teacher

# Every option that a teacher's weights depend on. The data are in the key by their checksum.
TEACHER_OPTIONS = (
    "seed", "validation_fraction", "normalisation", "teacher_model", "teacher_options", "teacher_epochs",
    "teacher_candidates", "teacher_retries", "batch_size", "learning_rate", "weight_decay", "lr_schedule",
    "lr_milestones", "lr_gamma", "gradient_clip", "selection_metric", "accelerator", "devices", "precision",
    "flush_denormal", "graph_step", "class_weight",
)  # fmt: skip


def teacher_key(config: RunConfig, data_digest: str) -> str:
    """Sixteen hexadecimal digits that change with anything that a teacher's weights depend on."""
    options = config.to_dict()
    text = json.dumps([data_digest, {name: options[name] for name in TEACHER_OPTIONS}], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shared_home(config: RunConfig, data_digest: str) -> Path | None:
    """Folder of the run's teacher inside `teacher_dir`, or None where none is shared."""
    if config.teacher_dir is None:
        return None
    name = f"{Path(config.dataset).stem}-s{config.seed}-{teacher_key(config, data_digest)}"
    return Path(config.teacher_dir) / name


def save_teacher(teacher: Teacher, home: Path, key: str) -> None:
    """Write teacher.safetensors and, last, teacher.json with its checksum, into `home`."""
    sha256 = write_tensors(home / "teacher.safetensors", teacher.model.state_dict())
    write_json(home / "teacher.json", {"key": key, "sha256": sha256, "about": teacher.about})


def load_teacher(session: Session, home: Path, key: str) -> Teacher | None:
    """The teacher in `home`, frozen and in eval mode on the training device; None if there is none.

    Raises:
        ValueError: the teacher there is of other data or other options.

    Warns:
        UserWarning: the teacher there is damaged, and will be trained again.
    """
    if not (home / "teacher.json").is_file():
        return None
    try:
        found = read_json(home / "teacher.json")
        weights = read_tensors(home / "teacher.safetensors", found["sha256"])
    except (OSError, ValueError, KeyError) as error:
        warnings.warn(f"the teacher in {home} is damaged ({error}); it is trained again.", UserWarning, stacklevel=2)
        return None
    if found.get("key") != key:
        raise ValueError(
            f"the teacher in {home} was trained on other data or with other options than this run's. Restore them, or "
            "start the run again in an empty folder."
        )
    model = build_teacher(session)
    model.load_state_dict(weights)
    model.to(session.prepared.full_train.x).eval().requires_grad_(False)
    return Teacher(model, found["about"])


def copy_teacher(source: Path, target: Path) -> None:
    """Copy a teacher's two files, the JSON last."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("teacher.safetensors", "teacher.json"):
        shutil.copyfile(source / name, target / name)

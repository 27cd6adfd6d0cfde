"""Training methods by name; each is a plain `nn.Module` with `loss(batch, epoch) -> (loss, parts)`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from gdpd.distillers.base import Batch, Distiller, hinton_loss
from gdpd.distillers.base_ce import Base
from gdpd.distillers.gdpd import GDPD
from gdpd.distillers.gendd import GenDD
from gdpd.distillers.kd import KD
from gdpd.models import Classifier
from gdpd.options import nearest

__all__ = [
    "GDPD",
    "KD",
    "Base",
    "Batch",
    "Distiller",
    "GenDD",
    "build_distiller",
    "distiller_class",
    "distiller_names",
    "hinton_loss",
]

_REGISTRY: dict[str, type[Distiller]] = {"base": Base, "kd": KD, "gdpd": GDPD, "gendd": GenDD}


def distiller_names() -> list[str]:
    """Names that `build_distiller` takes."""
    return list(_REGISTRY)


def distiller_class(name: str) -> type[Distiller]:
    """The class of a method.

    Raises:
        ValueError: an unknown name (the nearest is suggested).
    """
    if name not in _REGISTRY:
        raise ValueError(f"method={name!r} is not known{nearest(name, _REGISTRY)}. One of: {', '.join(_REGISTRY)}.")
    return _REGISTRY[name]


def build_distiller(
    name: str,
    student: Classifier,
    teacher_dim: int,
    shared_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Distiller:
    """A method by name around a student.

    Args:
        name: one of `distiller_names()`.
        student: the network to train.
        teacher_dim: width of the teacher's feature; given to the methods that ask for it.
        shared_options: options of a whole run, of which the method takes those that it knows.
        **options: keyword options of this method; one that it does not know is an error.

    Raises:
        ValueError: an unknown name or option (the nearest is suggested), or an option outside its limits.
    """
    method = distiller_class(name)
    known = [key for key in inspect.signature(method).parameters if key not in ("student", "teacher_dim")]
    for key in options:
        if key not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(f"method {name!r} has no option {key!r}{nearest(key, known)}; options: {listed}")
    taken = {key: value for key, value in (shared_options or {}).items() if key in known}
    if "teacher_dim" in inspect.signature(method).parameters:
        taken["teacher_dim"] = teacher_dim
    return method(student, **{**taken, **options})

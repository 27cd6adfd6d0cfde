"""Training methods by name; each is a plain `nn.Module` with `loss(batch, epoch) -> (loss, parts)`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from gdpd.distillers.at import AT
from gdpd.distillers.base import Batch, Distiller, StudentRun, class_logits, hinton_loss, taught
from gdpd.distillers.base_ce import Base
from gdpd.distillers.diffkd import DiffKD
from gdpd.distillers.dkd import DKD
from gdpd.distillers.dt2w import DT2W
from gdpd.distillers.fits import Fits
from gdpd.distillers.gdpd import GDPD
from gdpd.distillers.gendd import GenDD
from gdpd.distillers.kd import KD
from gdpd.distillers.lelp import LELP
from gdpd.distillers.pkt import PKT
from gdpd.distillers.pld import PLD
from gdpd.distillers.reverse import ReverseDistiller
from gdpd.distillers.rkd import RKD
from gdpd.distillers.taid import TAID
from gdpd.distillers.tekap import TeKAP
from gdpd.distillers.ttm import TTM, WTTM
from gdpd.distillers.vid import VID
from gdpd.methods import METHODS
from gdpd.models import Classifier
from gdpd.options import nearest

__all__ = [
    "AT",
    "DKD",
    "DT2W",
    "GDPD",
    "KD",
    "LELP",
    "PKT",
    "PLD",
    "RKD",
    "TAID",
    "TTM",
    "VID",
    "WTTM",
    "Base",
    "Batch",
    "DiffKD",
    "Distiller",
    "Fits",
    "GenDD",
    "ReverseDistiller",
    "StudentRun",
    "TeKAP",
    "build_distiller",
    "class_logits",
    "distiller_class",
    "distiller_names",
    "hinton_loss",
    "taught",
]


def distiller_names() -> list[str]:
    """Names that `build_distiller` takes, beside those of the form "package.module:Class"."""
    return list(METHODS)


def distiller_class(name: str) -> type[Distiller]:
    """The class of a method, by its name or as "package.module:Class".

    Raises:
        ValueError: an unknown name (the nearest is suggested); a class that cannot be imported or is no `Distiller`.
    """
    where = METHODS[name].where if name in METHODS else name
    module, colon, attribute = where.partition(":")
    if not colon:
        raise ValueError(
            f"method={name!r} is not known{nearest(name, METHODS)}. One of: {', '.join(METHODS)}; or a class of your "
            "own as 'package.module:Class'."
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"method={name!r} cannot be imported: {error}. Give package.module:Class, with the package on Python's "
            "path (PYTHONPATH)."
        ) from error
    if not (isinstance(found, type) and issubclass(found, Distiller)):
        raise ValueError(f"method={name!r} is not a class derived from gdpd.distillers.Distiller.")
    return found


def build_distiller(
    name: str,
    student: Classifier,
    teacher_dim: int,
    shared_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Distiller:
    """A method by name around a student.

    Args:
        name: one of `distiller_names()`, or "package.module:Class".
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

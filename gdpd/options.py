"""How an option is declared (default, help, unit, names) and read from what YAML or a shell gives."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from typing import Any


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    group: str,
    choices: tuple[str, ...] = (),
    changes_result: bool = True,
) -> Any:
    """A dataclass field that carries its line of help, its unit, its group and its admissible names."""
    about = {"help": help, "unit": unit, "group": group, "choices": choices, "changes_result": changes_result}
    return dataclasses.field(default=default, metadata=about)


def keywords(help: str, *, group: str) -> dict[str, Any]:
    """Metadata of a field that holds keyword options for a class chosen by another option."""
    return {"help": help, "unit": "", "group": group, "choices": (), "changes_result": True}


def nearest(name: object, names: typing.Iterable[str]) -> str:
    """A parenthesis that suggests the one of `names` nearest to `name`, or nothing when none is near."""
    close = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type `hint`; `name` is for the message.

    YAML reads 1e-3 as a string, JSON makes lists of tuples, a shell hands over strings only.

    Raises:
        TypeError: `value` cannot be read as `hint`.
    """
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if types.NoneType in kinds and (value is None or (str not in kinds and value in ("null", "none"))):
        return None
    for kind in sorted(kinds, key=lambda k: k is str):  # numbers first: "0.5" for `str | float` is a number
        try:
            return _read(value, kind)
        except (TypeError, ValueError):
            continue
    wanted = " or ".join("null" if k is types.NoneType else getattr(k, "__name__", str(k)) for k in kinds)
    raise TypeError(f"{name}={value!r} cannot be read as {wanted}.")


def _read(value: Any, kind: Any) -> Any:
    if kind is bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if isinstance(value, bool):
            return value
        raise TypeError
    if isinstance(value, bool):  # True is an int in Python, but no number of epochs
        raise TypeError
    if kind is int:
        if isinstance(value, str) or int(value) == value:
            return int(value)
        raise ValueError
    if kind is float:
        if math.isnan(float(value)):
            raise ValueError
        return float(value)
    if kind is str and isinstance(value, str):
        return value
    if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        return tuple(_read(item, int) for item in value)
    if typing.get_origin(kind) is dict and isinstance(value, dict):
        return dict(value)
    raise TypeError

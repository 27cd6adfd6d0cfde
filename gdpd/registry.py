"""Classes chosen by name with keyword options: what `models` and `denoisers` share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from gdpd.options import nearest

Made = TypeVar("Made")


def build(
    what: str,
    name: str,
    registry: Mapping[str, tuple[Callable[..., Made], Mapping[str, Any]]],
    options: Mapping[str, Any],
    **required: Any,
) -> Made:
    """Call the class registered as ``name``, after checking the names of its options.

    Args:
        what: kind of thing, for messages ("model").
        name: key of ``registry``.
        registry: name → (class, preset arguments); options may override a preset.
        options: keyword options from a user.
        **required: arguments that the caller gives itself; not open to the user.

    Raises:
        ValueError: unknown name, or an option the class does not take; the nearest name is suggested.
    """
    if name not in registry:
        raise ValueError(f"{what} {name!r} is not one of {', '.join(registry)}{nearest(name, registry)}")
    make, preset = registry[name]
    allowed = [key for key in inspect.signature(make).parameters if key not in required]
    for key in options:
        if key not in allowed:
            raise ValueError(
                f"{what} {name!r} has no option {key!r}{nearest(key, allowed)}; options: {', '.join(allowed)}"
            )
    return make(**required, **{**preset, **options})

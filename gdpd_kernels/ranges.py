"""Names for stretches of time, for whoever profiles: nothing happens, and nothing is paid, while nobody listens.

`gdpd_kernels` and `gdpd` name what they do with `ranged` and `span`; a profiler (torch's, NVTX, a stopwatch) listens
for the length of a `listening` block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import ParamSpec, TypeVar

Listener = Callable[["Name"], AbstractContextManager[object]]
Fact = int | str

_listeners: list[Listener] = []
_NOBODY = nullcontext()

P = ParamSpec("P")
R = TypeVar("R")


class Name(str):
    """A name, and what is known of the block beside it.

    Args:
        facts: such as batch, steps and backend.
    """

    facts: Mapping[str, Fact]

    def __new__(cls, name: str, facts: Mapping[str, Fact]) -> Name:
        made = super().__new__(cls, name)
        made.facts = facts
        return made


def span(name: str, **facts: Fact) -> AbstractContextManager[object]:
    """A block that is known to all listeners as `name`, with `facts` about it."""
    return _told(Name(name, facts)) if _listeners else _NOBODY


def ranged(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function whose calls are known to all listeners as `name`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not _listeners:
                return function(*args, **kwargs)
            with _told(Name(name, {})):
                return function(*args, **kwargs)

        return call

    return decorate


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within the block, `listener(name)` is entered and left around everything that has a name.

    Args:
        listener: from a name to a context manager, such as `torch.profiler.record_function`. The name is a string that
            also has ``facts``.
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def _told(name: Name) -> Iterator[None]:
    with ExitStack() as stack:
        for listener in _listeners:
            stack.enter_context(listener(name))
        yield

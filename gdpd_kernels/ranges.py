"""Names for stretches of time, for whoever profiles: nothing happens, and nothing is paid, while nobody listens.

`gdpd_kernels` and `gdpd` name what they do with `ranged` and `span`; a profiler (torch's, NVTX, a stopwatch) listens
for the length of a `listening` block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import ParamSpec, TypeVar

Listener = Callable[[str], AbstractContextManager[object]]

_listeners: list[Listener] = []
_NOBODY = nullcontext()

P = ParamSpec("P")
R = TypeVar("R")


def span(name: str) -> AbstractContextManager[object]:
    """A block that is known to all listeners as `name`."""
    return _told(name) if _listeners else _NOBODY


def ranged(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function whose calls are known to all listeners as `name`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not _listeners:
                return function(*args, **kwargs)
            with _told(name):
                return function(*args, **kwargs)

        return call

    return decorate


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within the block, `listener(name)` is entered and left around everything that has a name.

    Args:
        listener: from a name to a context manager, such as `torch.profiler.record_function`.
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def _told(name: str) -> Iterator[None]:
    with ExitStack() as stack:
        for listener in _listeners:
            stack.enter_context(listener(name))
        yield

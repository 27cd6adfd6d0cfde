"""Where the time of a training step goes, part by part, the backward pass included.

Forward, the parts are the blocks that the code names (`gdpd_kernels.ranges.span`). Backward, autograd numbers its nodes
in the order in which forward made them; a part owns the nodes made within its block, and a node's time runs from its
start to the start of the next one. So what is measured is the ordinary backward pass, not a rerun in pieces: a node's
time contains the accumulation of the gradients that it completes.
"""

from __future__ import annotations

import bisect
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

BACKWARD = "backward"
ELSEWHERE = "other"


class Stopwatch:
    """Listens to the spans of a step (`gdpd_kernels.ranges.listening`) and adds up the time of each part.

    Spans within spans belong to the outer one, so that the parts add up. Backward parts are named "backward: PART";
    what no part owns is "backward: other".

    Args:
        now: a clock, in seconds.
        wait: called before the clock is read: waits for a GPU's queue.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter, wait: Callable[[], object] | None = None) -> None:
        self._now = now
        self._wait = wait
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = False
        self._made: list[tuple[int, str]] = []  # from this number of autograd's on, nodes belong to this part

    def read(self) -> float:
        """The clock."""
        if self._wait is not None:
            self._wait()
        return self._now()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """The listener: times the block, and notes which of autograd's nodes are made in it."""
        if self._inside:
            yield
            return
        self._inside = True
        self._made.append((torch.autograd._get_sequence_nr(), name))
        began = self.read()
        try:
            yield
        finally:
            self.seconds[name] += self.read() - began
            self._made.append((torch.autograd._get_sequence_nr(), ELSEWHERE))
            self._inside = False

    def backward(self, loss: Tensor, run: Callable[[], object]) -> None:
        """Run the backward pass of `loss` by `run` and add up the time of its parts.

        Args:
            loss: a 0-d tensor, made while this stopwatch listened.
            run: calls `loss.backward()` or the like.
        """
        started: list[tuple[float, str]] = []
        numbers, names = zip(*self._made, strict=True) if self._made else ((), ())

        def part(node: Any) -> str:
            place = bisect.bisect_right(numbers, node._sequence_nr()) - 1
            return names[place] if place >= 0 else ELSEWHERE

        def told(name: str) -> Callable[[Any], None]:
            return lambda _: started.append((self.read(), name))

        handles = [node.register_prehook(told(part(node))) for node in _nodes(loss.grad_fn)]
        self._inside = True  # names within backward are of its parts
        try:
            began = self.read()
            run()
            started.append((self.read(), ELSEWHERE))
        finally:
            self._inside = False
            for handle in handles:
                handle.remove()
        self.seconds[f"{BACKWARD}: {ELSEWHERE}"] += started[0][0] - began
        for (start, name), (end, _) in itertools.pairwise(started):
            self.seconds[f"{BACKWARD}: {name}"] += end - start
        self._made.clear()

    def lap(self) -> dict[str, float]:
        """The seconds by part since the last lap."""
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


def _nodes(root: Any) -> list[Any]:
    """The nodes of a graph but those that accumulate gradients, which outlive it."""
    found, waiting, seen = [], [root], {root}
    while waiting:
        node = waiting.pop()
        if type(node).__name__ != "AccumulateGrad":
            found.append(node)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found

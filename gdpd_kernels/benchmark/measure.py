"""One case: every contender is checked, then those that passed are timed in turn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from gdpd_kernels.benchmark import cases, check, clock
from gdpd_kernels.benchmark.cases import Case
from gdpd_kernels.benchmark.clock import Timing


@dataclass
class Measured:
    """Timings of one case, and why contenders are missing from them.

    Args:
        timings: by contender, of those that passed their check.
        refused: contender and the check that it failed, or why it cannot run.
        wrong: contenders that failed their check.
        passed: contender and the error found by its check.
    """

    case: Case
    timings: dict[str, Timing] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)
    passed: dict[str, str] = field(default_factory=dict)

    def ratio(self, rival: str, how: str = "native") -> float | None:
        """Median time of the rival over that of `how`; None if either is missing."""
        if rival not in self.timings or how not in self.timings:
            return None
        return self.timings[rival].median / self.timings[how].median

    def why(self, *hows: str) -> str:
        """Why a ratio of these contenders is missing."""
        return "; ".join(f"{how}: {self.refused[how]}" for how in hows if how in self.refused) or "not measured"


def measure(case: Case, hows: Iterable[str], seconds: float, device: str = "cpu") -> Measured:
    """Check every contender of a case, then time those that pass, in turn, for so many seconds together.

    On a CUDA device the time of a call is that between two events on its stream.
    """
    measured, calls = Measured(case), {}
    for how in hows:
        try:
            call = cases.prepare(case, how, device=device)
            verdict = check.check(case, how, call, device)
        except cases.Unavailable as reason:
            measured.refused[how] = str(reason)
            continue
        if verdict.ok:
            calls[how] = call
            measured.passed[how] = verdict.text
        else:
            measured.refused[how] = f"check failed, {verdict.text}"
            measured.wrong.add(how)
    if calls:
        stopwatch = clock.between_events if device.startswith("cuda") else clock.by()
        measured.timings = clock.interleave(calls, seconds, stopwatch)
    return measured

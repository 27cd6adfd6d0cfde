"""The figures that the native kernels are held to: what each compares, its target, and how it is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import gdpd_kernels as gk
from bench import memory
from bench.peak import Peak
from gdpd_kernels.benchmark import cases, check, clock, rivals
from gdpd_kernels.benchmark.cases import Case
from gdpd_kernels.benchmark.clock import times
from gdpd_kernels.benchmark.measure import Measured

PAPER = Case("paper", 64, 100, 5, "trainable")
MLP = Case("mlp", 64, 100, 10, "frozen")
MLP_LARGE = MLP.with_rows(1024)
FORWARD = tuple(Case("mlp", batch, 100, 10, "forward") for batch in (256, 1024, 4096))
BF16_FORWARD = FORWARD[1]
MEMORY = tuple(Case("mlp", 4096, 100, 50, mode) for mode in ("frozen", "trainable"))

# Contenders of each timed case; torch.compile only where a figure asks for it, since it compiles for up to minutes.
TIMED: dict[Case, tuple[str, ...]] = {
    PAPER: ("release", "eager", "reference", "native", "native_bf16"),
    MLP: ("eager", "compiled", "reference", "native", "native_bf16"),
    MLP_LARGE: ("eager", "compiled", "reference", "native", "native_bf16"),
    **dict.fromkeys(FORWARD, ("eager", "reference", "native", "native_bf16")),
}


@dataclass
class Figure:
    """One line of the table.

    Args:
        what, against: the two sides.
        target: as text.
        value: as text, or why there is none.
        met: None where there is no target or no value.
        spread: medians with 20 and 80 % quantiles.
    """

    what: str
    against: str
    target: str
    value: str
    met: bool | None
    spread: str = ""


def speedup(measured: Measured, what: str, rival: str, target: float, how: str = "native") -> Figure:
    """A ratio of medians with its target."""
    ratio, title = measured.ratio(rival, how), f"at least {target:g}×"
    if ratio is None:
        return Figure(what, rivals.RIVALS[rival], title, measured.why(rival, how), None)
    spread = f"{times(measured.timings[rival])} against {times(measured.timings[how])}"
    return Figure(what, rivals.RIVALS[rival], title, f"{ratio:.2f}×", ratio >= target, spread)


def share_of_peak(measured: Measured, peak: Peak, target: float = 0.75) -> Figure:
    """Operations of the matrix products a second, as a share of the machine's peak."""
    what = f"forward, MLP 100-256-256-100, 10 steps, batch {measured.case.batch}"
    against, title = "measured float32 FMA peak", f"at least {target:.0%}"
    timing = measured.timings.get("native")
    if timing is None:
        return Figure(what, against, title, measured.why("native"), None)
    rate = measured.case.flops / timing.median
    spread = f"{rate / 1e9:.0f} of {peak.flops / 1e9:.0f} GFLOP/s; {times(timing)}"
    return Figure(what, against, title, f"{rate / peak.flops:.0%}", rate / peak.flops >= target, spread)


def extra_memory(case: Case) -> Figure:
    """Peak extra memory of forward and backward against eager, each in a process of its own."""
    grads = "all gradients" if case.mode == "trainable" else "frozen"
    what = f"backward, MLP, {case.steps} steps, batch {case.batch}, {grads}: peak extra memory"
    against, target = "hoisted eager", 1 / 5
    reason, small = cases.unavailable("native"), case.with_rows(257)
    verdict = None if reason else check.check(small, "native")
    if verdict is None or not verdict.ok:
        return Figure(what, against, "at most 1/5", reason or f"check failed, {verdict and verdict.text}", None)
    native, eager = (memory.extra_memory(case, how) for how in ("native", "eager"))
    spread = f"{eager / 1e6:.0f} MB against {native / 1e6:.0f} MB"
    return Figure(what, against, "at most 1/5", f"1/{eager / native:.1f}", native <= target * eager, spread)


def overhead(seconds: float) -> list[Figure]:
    """A call with next to no arithmetic: batch 1, 1 step, width 32, no gradient, the module captured beforehand."""
    case, target = Case("mlp", 1, 32, 1, "forward"), 60e-6
    given, table = cases.inputs(case), gk.ddim_table(rivals.TRAIN_TIMESTEPS, 1, window="lower")
    if cases.unavailable("native"):
        return [Figure("call overhead", "absolute", "at most 60 µs", cases.unavailable("native"), None)]

    def call(learned: bool, drawn: bool, backend: str = "native") -> Callable[[], torch.Tensor]:
        torch.manual_seed(0)
        captured = gk.capture(rivals.MLPDenoiser(32, (32, 32), learned=learned))
        noise = None if drawn else given.noise
        return lambda: gk.reverse_sample(captured, given.z_short, table=table, alpha=0.5, noise=noise, backend=backend)

    variants = {
        "learned time table, noise given": call(True, False),
        "learned time table, noise drawn": call(True, True),
        "sinusoid and time MLP, noise given": call(False, False),
    }
    with torch.no_grad():
        difference = (call(True, False)() - call(True, False, "reference")()).abs().max()
        if not difference < 1e-4:
            return [Figure("call overhead", "absolute", "at most 60 µs", f"check failed, error {difference:.1e}", None)]
        timed = clock.interleave(variants, seconds)
    # The time MLP is the module's own PyTorch code, run outside the kernel: shown, but not the kernel's overhead.
    return [
        Figure(
            f"call overhead: batch 1, 1 step, width 32, {name}",
            "absolute",
            "" if number else "at most 60 µs",
            f"{timing.median * 1e6:.0f} µs",
            None if number else timing.median <= target,
            times(timing),
        )
        for number, (name, timing) in enumerate(timed.items())
    ]


def threads_together(seconds: float) -> Figure:
    """Alternating torch products and our calls against the sum of both alone: two thread pools would fight."""
    what = f"torch product 512×512 and {MLP.name} in turn, {torch.get_num_threads()} threads"
    against, title, target = "the sum of both alone", "at most 1.10×", 1.10
    if cases.unavailable("native"):
        return Figure(what, against, title, cases.unavailable("native"), None)
    verdict = check.check(MLP, "native")
    if not verdict.ok:
        return Figure(what, against, title, f"check failed, {verdict.text}", None)
    ours, a, b = cases.prepare(MLP, "native"), torch.randn(512, 512), torch.randn(512, 512)

    def product() -> None:
        torch.mm(a, b)

    def alternate() -> None:
        torch.mm(a, b)
        ours()

    timed = clock.interleave({"product": product, "ours": ours, "alternate": alternate}, seconds)
    ratio = timed["alternate"].median / (timed["product"].median + timed["ours"].median)
    spread = f"{times(timed['alternate'])} against {times(timed['product'])} + {times(timed['ours'])}"
    return Figure(what, against, title, f"{ratio:.2f}×", ratio <= target, spread)


def from_timings(found: dict[Case, Measured], peak: Peak | None) -> list[Figure]:
    """The figures that follow from the timed cases that were measured."""
    figures = []
    if PAPER in found:
        what = "paper's network, batch 64, width 100, 5 steps, forward+backward, all gradients"
        figures += [speedup(found[PAPER], what, "release", 25), speedup(found[PAPER], what, "eager", 6)]
    if MLP in found:
        what = "MLP 100-256-256-100, SiLU, 10 steps, frozen, forward+backward, batch 64"
        figures += [speedup(found[MLP], what, "eager", 4), speedup(found[MLP], what, "compiled", 2.5)]
    if MLP_LARGE in found:
        figures.append(speedup(found[MLP_LARGE], "the same MLP, batch 1024", "eager", 1.6))
    if peak is not None:
        figures += [share_of_peak(found[case], peak) for case in FORWARD if case in found]
    for case, direction in ((BF16_FORWARD, "forward"), (MLP_LARGE, "forward+backward, frozen")):
        if case in found:
            what = f"bfloat16 products, the same MLP, batch 1024, {direction}"
            figures.append(speedup(found[case], what, "native", 1.6, "native_bf16"))
    return figures

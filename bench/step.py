"""`python -m bench.step`: whole training steps against each other, checked for one loss before they are timed.

Contenders: the step of the paper's public release in eager PyTorch (`bench.release_step`), and this library's steps of
Base, Base-KD and GDPD as `gdpd distill` runs them: forward, backward, clipping, Adam. Denormals are flushed for all.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning_fabric import Fabric

from bench import tables
from bench.release_step import ReleaseStep
from gdpd.config import RunConfig
from gdpd.distillers import GDPD, Batch, build_distiller
from gdpd.models import build_model
from gdpd.training.step import TrainingStep
from gdpd_kernels import arguments
from gdpd_kernels.benchmark import cases
from gdpd_kernels.benchmark.clock import Timing, by, interleave, times
from gdpd_kernels.benchmark.rivals import TIME_ROWS, ReleaseScheduler
from gdpd_kernels.philox import philox_normal

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
HOWS = ("release", "base", "kd", "gdpd")
MAIN, WARMUP = 1, 0  # epochs of the two stages
SAME = 1e-9  # relative, in float64: what an untrained network feeds BatchNorm may vary by 1e-5 of its size, and float32
# then says little about whether two gradients are the same


@dataclass(frozen=True)
class StepCase:
    """One student and size of batch."""

    model: str = "lstm3-100"
    batch: int = 64
    length: int = 100

    @property
    def name(self) -> str:
        return f"{self.model}, batch {self.batch}, length {self.length}"


class Steps:
    """The contenders of a case, all with the same first weights and the same batch."""

    def __init__(self, case: StepCase) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(case.batch, 1, case.length, generator=generator)
        self.y = torch.randint(2, (case.batch,), generator=generator)
        torch.manual_seed(1)
        self.teacher = build_model(case.model, in_channels=1, num_classes=2).eval().requires_grad_(False)
        with torch.no_grad():
            z_long, logits = self.teacher(self.x)
        self.data = Batch(self.x, self.y, z_long=z_long, teacher_logits=logits)
        self.fabric = Fabric(accelerator="cpu", devices=1)
        self.fabric.launch()

    def distiller(self, method: str) -> torch.nn.Module:
        torch.manual_seed(2)
        student = build_model(self.case.model, in_channels=1, num_classes=2)
        options = {"warmup_epochs": 1, "denoiser_options": {"num_train_timesteps": TIME_ROWS}}
        return build_distiller(method, student, self.teacher.feature_dim, options).train()

    def contender(self, how: str, epoch: int = MAIN) -> Callable[[], object]:
        """A training step as a function of nothing."""
        if how == "release":
            release = self.release(self.distiller("gdpd"))
            return lambda: release.step(self.x, self.x, self.y)
        step = TrainingStep(self.distiller(how), RunConfig(), self.fabric)  # type: ignore[arg-type]
        return lambda: step(self.data, epoch)

    def release(self, mine: torch.nn.Module) -> ReleaseStep:
        assert isinstance(mine, GDPD)
        return ReleaseStep(mine, self.teacher).train()  # type: ignore[arg-type]

    def losses(self) -> tuple[float, float, float]:
        """The release's loss and ours in float64, on the same weights and noise, and the largest relative error of a
        gradient."""
        mine = self.distiller("gdpd")
        release = self.release(mine).double()
        release.scheduler = ReleaseScheduler(torch.float64)
        release.teacher.eval()
        mine, teacher, x = mine.double(), copy.deepcopy(self.teacher).double(), self.x.double()
        with torch.no_grad():
            z_long, logits = teacher(x)
        torch.manual_seed(3)
        ours, _ = mine(Batch(x, self.y, z_long=z_long, teacher_logits=logits), MAIN)
        torch.manual_seed(3)  # the key that our step has just drawn, and the noise that it stands for
        key = arguments.philox_key(None, x.device)
        noise = philox_normal(key, self.case.batch, mine.trans.out_features, dtype=torch.float64)
        theirs = release.loss(x, x, self.y, noise)
        ours.backward()
        theirs.backward()
        pairs = [
            (mine.student.lstm.weight_hh_l0.grad, release.student.lstm.weight_hh_l0.grad),
            (mine.trans.weight.grad, release.trans.weight.grad),
            (mine.student.head.weight.grad, release.student.head.weight.grad),
        ]
        error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        return float(theirs.detach()), float(ours.detach()), error


class TrainingStepTime:
    """Seconds per training step, for asv."""

    param_names = ("how", "model", "length")
    params = (HOWS, ("lstm3-100", "lstm2-32"), (20, 100, 500))
    timeout = 600

    def setup(self, how: str, model: str, length: int) -> None:
        if how != "release" and cases.unavailable("native"):
            raise cases.Unavailable(cases.unavailable("native"))
        torch.set_flush_denormal(True)
        self.run = Steps(StepCase(model, 64, length)).contender(how)
        for _ in range(3):
            self.run()

    def time_step(self, *_: object) -> None:
        self.run()


def measure(case: StepCase, seconds: float, now: Callable[[], float] = time.perf_counter) -> dict[str, Timing]:
    """Check that the release's step has our loss, then time all contenders in turn.

    Raises:
        RuntimeError: the losses or the gradients differ; nothing is timed then.
    """
    steps = Steps(case)
    theirs, ours, error = steps.losses()
    if not (abs(theirs - ours) <= SAME * abs(theirs) and error <= 1000 * SAME):
        raise RuntimeError(
            f"{case.name}: the release's loss is {theirs:.12f} and ours {ours:.12f}, gradients differ by {error:.1e} "
            "of their largest element: not the same step, so no time is worth anything"
        )
    contenders = {how: steps.contender(how) for how in HOWS}
    contenders["gdpd, first stage"] = steps.contender("gdpd", WARMUP)
    return interleave(contenders, seconds, by(now))


def rows(found: dict[StepCase, dict[str, Timing]]) -> tables.Rows:
    """The table: every contender's time, and the two ratios with their targets."""
    made: tables.Rows = [("student", "release", "Base", "Base-KD", "GDPD, stage one", "GDPD, stage two", "", "")]
    for case, timings in found.items():
        mine = timings["gdpd"].median
        gain, toll = timings["release"].median / mine, mine / timings["base"].median
        made.append(
            (
                case.name,
                *(times(timings[how]) for how in ("release", "base", "kd", "gdpd, first stage", "gdpd")),
                f"{gain:.2f}× the release's speed" + _verdict(case, gain >= 4, "4×"),
                f"{toll:.3f}× Base's time" + _verdict(case, toll <= 1.15, "1.15×"),
            )
        )
    return made


def _verdict(case: StepCase, met: bool, target: str) -> str:
    return f" (target {target}: {'met' if met else 'missed'})" if case == StepCase() else ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=40.0, help="time per case (default %(default)g)")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch (default: torch's own choice)")
    parser.add_argument("--quick", action="store_true", help="the case of the targets alone")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread, for busy machines")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    options = parser.parse_args(argv)
    if options.write and (options.quick or options.cpu_time):
        parser.error("--write is for a whole run by the wall clock; leave out --quick and --cpu-time")
    torch.set_flush_denormal(True)
    if options.cpu_time:
        torch.set_num_threads(1)
    elif options.threads:
        torch.set_num_threads(options.threads)
    reason = cases.unavailable("native")
    if reason:
        print(f"native kernels are not usable here: {reason}", file=sys.stderr)
        return 1
    chosen = [StepCase()]
    if not options.quick:
        chosen += [
            StepCase(length=20),
            StepCase(length=500),
            StepCase("lstm2-32", 64, 20),
            StepCase("lstm2-32", 64, 100),
        ]
    now = time.thread_time if options.cpu_time else time.perf_counter
    found: dict[StepCase, dict[str, Timing]] = {}
    for case in chosen:
        print(f"{case.name} ...", file=sys.stderr, flush=True)
        found[case] = measure(case, options.seconds, now)
    tables.show_timings(rows(found), options.cpu_time, PAGE if options.write else None, "steps")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m bench.methods`: a training step of every method on a prefix, in turn, as a ratio to Base's."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lightning_fabric import Fabric

from bench import tables
from gdpd.config import RunConfig
from gdpd.distillers import Batch, build_distiller, distiller_names
from gdpd.methods import method_title
from gdpd.models import build_model
from gdpd.training.step import TrainingStep
from gdpd_kernels.benchmark.clock import Timing, by, interleave, times

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
STAGES = (0, 100)  # an epoch of the warm-up, and one after every ramp


def contenders(
    model: str = "lstm3-100", batch: int = 64, length: int = 100, read: int = 50
) -> dict[str, Callable[[], object]]:
    """Steps by method and stage, of a student that reads `read` of `length` steps, with all that a teacher can say."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(batch, 1, length, generator=generator), torch.arange(batch) % 2
    torch.manual_seed(1)
    teacher = build_model(model, in_channels=1, num_classes=2).eval().requires_grad_(False)
    z_long, logits, sequence = teacher(x, sequence=True)
    data = Batch(x[:, :, :read].contiguous(), y, None, torch.arange(batch), z_long, logits, sequence)
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    made: dict[str, Callable[[], object]] = {}
    shared = {**RunConfig().to_dict(), "warmup_epochs": 1, "teacher_sequence_dim": teacher.sequence_dim}
    for name in distiller_names():
        torch.manual_seed(2)
        student = build_model(model, in_channels=1, num_classes=2)
        distiller = build_distiller(name, student, teacher.feature_dim, shared).train()
        distiller.prepare(teacher, z_long, y)
        step = TrainingStep(distiller, RunConfig(), fabric)
        for epoch in STAGES if distiller.warmup_epochs else STAGES[1:]:
            stage = ", warm-up" if epoch == 0 else ""
            made[f"{method_title(name)}{stage}"] = lambda step=step, epoch=epoch: step(data, epoch)  # type: ignore[misc]
    return made


def rows(timings: dict[str, Timing]) -> tables.Rows:
    """The table: every method's time, and its ratio to Base's."""
    base = timings["Base"].median
    return [
        ("method", "a step", "times Base"),
        *((name, times(found), f"{found.median / base:.2f}") for name, found in timings.items()),
    ]


def main(argv: list[str] | None = None) -> int:
    """Time, print, and with --write put the table into docs/performance.md."""
    parser = argparse.ArgumentParser(prog="python -m bench.methods", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="time for all together (default %(default)g)")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread, for busy machines")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    options = parser.parse_args(argv)
    torch.set_flush_denormal(True)
    if options.cpu_time:
        torch.set_num_threads(1)
    timings = interleave(contenders(), options.seconds, by(time.thread_time if options.cpu_time else time.perf_counter))
    tables.show_timings(rows(timings), options.cpu_time, PAGE if options.write else None, "methods")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

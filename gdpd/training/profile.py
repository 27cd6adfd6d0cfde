"""`gdpd profile`: where the time of a training step goes, as a table, as JSON, and as a trace for Perfetto."""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdpd.config import RunConfig
from gdpd.distillers import Distiller
from gdpd.training.devices import Devices
from gdpd.training.loop import derived_seed, seed_device
from gdpd.training.run_folder import load_data, prepare_on, training_context
from gdpd.training.stages import Session, build_student, build_teacher
from gdpd.training.step import TrainingStep
from gdpd.training.stopwatch import BACKWARD, ELSEWHERE, Stopwatch
from gdpd.training.tensors import TrainingSet, batches, outputs
from gdpd_kernels.ranges import listening, span

WARMUP_STEPS = 5
TRACED_STEPS = 5
_FORWARD = ("data", "student", "fusion", "sampler", "prior", "losses")


class TimedStep(TrainingStep):
    """A training step whose backward pass runs under a stopwatch."""

    def __init__(self, distiller: Distiller, config: RunConfig, fabric: Devices, stopwatch: Stopwatch) -> None:
        super().__init__(distiller, config, fabric)
        self.stopwatch = stopwatch
        self.timed = False

    def backward(self, loss: Tensor) -> None:
        """As `TrainingStep.backward`, part by part where it is timed."""
        if self.timed:
            self.stopwatch.backward(loss, lambda: self.fabric.backward(loss))
        else:
            super().backward(loss)


def profile(config: RunConfig, *, steps: int = 50, trace: Path | None = None) -> dict[str, Any]:
    """Time the parts of a student's training step, in every phase of its method.

    The teacher is not trained: what it knows makes no difference to the time. Steps are real ones, on batches of the
    training set, of an optimizer that is thrown away.

    Args:
        config: data, networks, method and machine.
        steps: timed steps of each phase; the time of a part is its median over them.
        trace: Chrome trace to write (JSON, for ui.perfetto.dev); with two phases, one file for each, the phase's name
            appended. None writes none.

    Returns:
        "phases": for each phase, in order, "phase", "step" (seconds of a step as training runs it, median), "timed"
        (the same with the stopwatch running) and "parts": name, "seconds" (median) and "share" of the sum of all.
        "batch_size", "steps", "device", "threads", "traces".

    Raises:
        ValueError: steps below 1, more than one device, and whatever a run refuses.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} is below 1. Give the number of steps to time.")
    if config.devices > 1:
        raise ValueError(f"devices={config.devices}: a profile is of one device. Use devices=1.")
    phases: list[dict[str, Any]] = []
    traces: list[str] = []
    data = load_data(config)
    with training_context(config) as fabric:
        session = Session(config, prepare_on(fabric, data, config), fabric)
        teacher = build_teacher(session).to(session.prepared.full_train.x)
        rehearsed = build_student(session, teacher)
        known = outputs(teacher, session.prepared.full_train, sequence=rehearsed.uses_sequences)
        train = TrainingSet.taught(session.prepared, known)
        warmup = rehearsed.warmup_epochs
        for epoch in (0, warmup) if warmup else (0,):
            distiller = build_student(session, teacher)
            name = distiller.phase(epoch)
            path = None
            if trace is not None:
                path = trace.with_name(f"{trace.stem}-{name}{trace.suffix}") if warmup else trace
                traces.append(str(path))
            phases.append({"phase": name, **_phase(distiller, train, config, fabric, epoch, steps, path)})
        sizes = min(config.batch_size, len(train))
        about = {"device": str(fabric.device), "threads": torch.get_num_threads()}
    return {"phases": phases, "batch_size": sizes, "steps": steps, **about, "traces": traces}


def _phase(
    distiller: Distiller,
    train: TrainingSet,
    config: RunConfig,
    fabric: Devices,
    epoch: int,
    steps: int,
    trace: Path | None,
) -> dict[str, Any]:
    wait = torch.cuda.synchronize if fabric.device.type == "cuda" else None
    watch = Stopwatch(wait=wait)
    step = TimedStep(distiller, config, fabric, watch)
    distiller.train()
    seed_device(fabric.device, derived_seed(config.seed, "profile"))
    rows = _endless_batches(len(train), config)

    def run() -> None:
        with span("data"):
            batch = train.batch(next(rows))
        step(batch, epoch)

    def timed() -> float:
        began = watch.read()
        run()
        return watch.read() - began

    for _ in range(WARMUP_STEPS):
        run()
    plain: list[float] = []
    watched: list[float] = []
    laps: list[dict[str, float]] = []
    for _ in range(steps):  # in turn, so that a slow moment of the machine slows both alike
        plain.append(timed())
        step.timed = True
        with listening(watch):
            watched.append(timed())
        step.timed = False
        laps.append(watch.lap())
    for lap, took in zip(laps, watched, strict=True):
        lap[ELSEWHERE] = took - sum(lap.values())
    names = sorted({name for lap in laps for name in lap}, key=_place)
    medians = {name: statistics.median(lap.get(name, 0.0) for lap in laps) for name in names}
    if trace is not None:
        _write_trace(run, trace)
    step.release()
    return {
        "step": statistics.median(plain),
        "timed": statistics.median(watched),
        "parts": [
            {"name": name, "seconds": took, "share": took / sum(medians.values())} for name, took in medians.items()
        ],
    }


def _endless_batches(n: int, config: RunConfig) -> Iterator[Tensor]:
    """Batches of whole size (what is left over at the end of a pass would be another step)."""
    size = min(config.batch_size, n)
    for number in itertools.count():
        order = torch.Generator().manual_seed(derived_seed(config.seed, "profile", number))
        yield from (rows for rows in batches(n, config.batch_size, order) if len(rows) == size or n < 2 * size)


def _place(name: str) -> tuple[int, int, str]:
    """Where a part stands in the table: forward, backward in the order in which it runs, the update, the rest."""
    inner = name.removeprefix(f"{BACKWARD}: ")
    place = _FORWARD.index(inner) if inner in _FORWARD else len(_FORWARD)
    if inner != name:
        return 1, -place, name
    return {"optimizer": 2, ELSEWHERE: 3}.get(name, 0), place, name


def _write_trace(run: Any, path: Path) -> None:
    """A few steps under torch's profiler, with the parts as ranges; the file appears whole or not at all."""
    from torch.profiler import ProfilerActivity, record_function

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with torch.profiler.profile(activities=activities) as profiler, listening(record_function):
        for _ in range(TRACED_STEPS):
            with record_function("step"):
                run()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as beside:
        written = Path(beside) / path.name
        profiler.export_chrome_trace(str(written))
        os.replace(written, path)


def renderables(found: dict[str, Any]) -> list[Any]:
    """What `profile` returns, for a rich console: of each phase a heading, a table and a note."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made: list[Any] = []
    for phase in found["phases"]:
        table = Table(header_style="bold", box=box.SIMPLE, pad_edge=False, show_footer=True)
        table.add_column("part", "step", no_wrap=True)
        table.add_column("ms", f"{1e3 * phase['timed']:.3f}", justify="right", no_wrap=True)
        table.add_column("%", "100.0", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for part in phase["parts"]:
            share = part["share"]
            bar = "█" * round(30 * share)
            table.add_row(part["name"], f"{1e3 * part['seconds']:.3f}", f"{100 * share:.1f}", f"[cyan]{bar}[/]")
        threads = f"{found['threads']} thread{'s' * (found['threads'] != 1)}"
        made += [
            Text(f"Phase {phase['phase']}, batch {found['batch_size']}, {found['device']}, {threads}", style="bold"),
            table,
            Text(
                f"Medians of {found['steps']} steps. Without the stopwatch a step takes {1e3 * phase['step']:.3f} ms.\n"
            ),
        ]
    return made

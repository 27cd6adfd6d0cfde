"""The training step as one CUDA graph: recorded once per phase and shape of batch, then replayed in a single launch.

A step of a small network is some thousand short kernels, and launching them takes a GPU's host longer than running
them. What can be recorded must not wait for the device and must have the same shapes every time; `TrainingStep` is
written so, and tests/gdpd/test_no_sync.py holds it to that on machines without a GPU.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gdpd.distillers import Batch
from gdpd.training.step import TrainingStep

EAGER_STEPS = 3  # run as usual before a recording: libraries choose their algorithms, Adam makes its averages

Outputs = dict[str, Tensor]
Record = Callable[[Callable[[], Outputs]], tuple[Callable[[], object], Outputs]]


def record_cuda_graph(run: Callable[[], Outputs]) -> tuple[Callable[[], object], Outputs]:
    """Record what `run` launches, without running it: a function that replays it, and the tensors it fills."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph.replay, outputs


class GraphedStep:
    """Calls a `TrainingStep`, the first times in a phase as it is, then as a recording.

    Args:
        step: built with `graphed=True`.
        record: records a function; `record_cuda_graph`.
    """

    def __init__(self, step: TrainingStep, record: Record = record_cuda_graph) -> None:
        self.step = step
        self._record = record
        self._phase = ""
        self._calls: Counter[Any] = Counter()
        self._recordings: dict[Any, tuple[Batch, Callable[[], object], Outputs]] = {}

    def __call__(self, batch: Batch, epoch: int) -> Outputs:
        """As `TrainingStep.__call__`."""
        key = tuple((name, tuple(value.shape)) for name, value in _tensors(batch).items())
        phase = self.step.distiller.phase(epoch)
        if phase != self._phase:  # phases do not come back, and each may be an epoch: a graph holds memory of its own
            self._phase = phase
            self._calls.clear()
            self._recordings.clear()
        self._calls[key] += 1
        if self._calls[key] <= EAGER_STEPS:
            return self._aside(batch, epoch)
        if key not in self._recordings:
            kept = dataclasses.replace(batch, **{name: value.clone() for name, value in _tensors(batch).items()})
            self._recordings[key] = (kept, *self._record(lambda: self.step(kept, epoch)))
        kept, replay, outputs = self._recordings[key]
        for name, value in _tensors(batch).items():
            getattr(kept, name).copy_(value)
        replay()
        return {name: value.clone() for name, value in outputs.items()}

    def _aside(self, batch: Batch, epoch: int) -> Outputs:
        """An ordinary step, on a stream of its own where there are streams, as a recording needs it beforehand."""
        if batch.x_prefix.device.type != "cuda":
            return self.step(batch, epoch)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = self.step(batch, epoch)
        torch.cuda.current_stream().wait_stream(stream)
        return outputs


def check_graphs_possible(wanted: bool, device: torch.device, devices: int) -> None:
    """Raise ValueError where steps cannot be recorded though the run asks for it."""
    if wanted and (device.type != "cuda" or devices > 1):
        where = f"{devices} devices" if devices > 1 else f"the device {str(device)!r}"
        raise ValueError(
            f"graph_step=True, and this run is on {where}: a CUDA graph needs one CUDA device. Leave graph_step out, "
            "or use accelerator='cuda' and devices=1."
        )


def _tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}

"""`python -m bench.lstm`: the native LSTM against torch.nn.LSTM, checked before it is timed; and benchmarks for asv.

Two processes, since flushing denormals has to be switched on before torch's first parallel operation: one that calls
``torch.set_flush_denormal(True)`` first, one with default settings. Within each, contenders are timed in turn. The case
is training: the gradients of all weights from that of the last output; x takes none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import gdpd_kernels as gk
from bench import tables
from gdpd_kernels.benchmark.cases import Unavailable, unavailable
from gdpd_kernels.benchmark.clock import by, interleave

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
HOWS = ("torch", "native", "native_bf16")
MODES = ("forward", "both")
COMPUTE = {"native": None, "native_bf16": torch.bfloat16}


@dataclass(frozen=True)
class LstmCase:
    """A stacked LSTM on one channel, whose last output is wanted; forward alone or with the weights' gradients."""

    batch: int
    steps: int
    hidden: int = 100
    layers: int = 3
    mode: str = "both"

    @property
    def name(self) -> str:
        return f"LSTM{self.layers}-{self.hidden} batch {self.batch}, T = {self.steps}, {self.mode}"

    @property
    def flops(self) -> float:
        """Operations of the matrix products, two per multiply-add. Backward makes as many for inputs and weights each,
        but none for the gradient of x."""
        inner = self.hidden * (2 * self.layers - 1)
        macs = self.batch * self.steps * 4 * self.hidden
        return 2.0 * macs * ((1 + inner) + (inner + 1 + inner if self.mode == "both" else 0))


PAPER, LONG = LstmCase(64, 100), LstmCase(64, 500)
# (case, denormals flushed for torch, target against torch or None)
FIGURES = (
    (PAPER, True, 2.5),
    (LONG, False, 10.0),
    (LONG, True, None),
    *((LstmCase(batch, 100), True, None) for batch in (1, 16, 256)),
    *((LstmCase(64, 100, hidden), True, None) for hidden in (32, 128, 256)),
    *((LstmCase(batch, 100, mode="forward"), True, None) for batch in (1, 16, 64, 256)),
)


def prepare(case: LstmCase, how: str, dtype: torch.dtype = torch.float32) -> Callable[[], list[Tensor]]:
    """A call that returns the last output and, unless it is forward alone, the gradients of all weights.

    Raises:
        Unavailable: the contender cannot run here.
    """
    if how != "torch" and (reason := unavailable(how)):
        raise Unavailable(reason)
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.LSTM(1, case.hidden, case.layers, batch_first=True).to(dtype)
    x = torch.randn(case.batch, case.steps, 1, generator=generator).to(dtype)
    grad = torch.randn(case.batch, case.hidden, generator=generator).to(dtype)
    params = list(module.parameters())

    def last() -> Tensor:
        if how == "torch":
            return module(x)[0][:, -1]
        return gk.lstm(x, params, batch_first=True, output="last", backend="native", compute_dtype=COMPUTE[how])[0]

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [last()]

    def both() -> list[Tensor]:
        output = last()
        return [output.detach(), *torch.autograd.grad(output, params, grad)]

    return forward if case.mode == "forward" else both


def wrong(case: LstmCase) -> dict[str, str]:
    """Native contenders that are further from torch in float64 than they may be, with their error: twice that of torch
    in float32 plus rounding, or for bfloat16 products 2 % of all gradients together."""
    exact = prepare(case, "torch", torch.float64)()

    def error(how: str) -> float:
        found = prepare(case, how)()
        squares = [float((a.double() - b).square().sum()) for a, b in zip(found, exact, strict=True)]
        sizes = [float(b.square().sum()) for b in exact]
        parts = [(squares[0] / sizes[0]) ** 0.5]
        if len(squares) > 1:
            parts.append((sum(squares[1:]) / sum(sizes[1:])) ** 0.5)
        return max(parts)

    limits = {"native": 2 * error("torch") + 4 * torch.finfo(torch.float32).eps, "native_bf16": 0.02}
    found = {}
    for how, limit in limits.items():
        try:
            size = error(how)
        except Unavailable:
            continue
        if not size <= limit:
            found[how] = f"error {size:.1e}, limit {limit:.1e}"
    return found


def measure(case: LstmCase, seconds: float, processor: bool) -> dict[str, object]:
    """Medians, quantiles and failures of one case, in this process."""
    refused = wrong(LstmCase(min(case.batch, 64), min(case.steps, 200), case.hidden, case.layers, case.mode))
    calls = {}
    for how in HOWS:
        if how in refused:
            continue
        try:
            calls[how] = prepare(case, how)
        except Unavailable as reason:
            refused[how] = str(reason)
    timed = interleave(calls, seconds, by(time.thread_time if processor else time.perf_counter))
    return {"refused": refused, "timings": {how: (t.median, t.low, t.high) for how, t in timed.items()}}


def _child(options: argparse.Namespace) -> None:
    if options.child == "flushed":
        torch.set_flush_denormal(True)
        warnings.filterwarnings("ignore", "The value of the smallest subnormal")  # numpy finds it to be zero
    if options.threads:
        torch.set_num_threads(options.threads)
    for case, flushed, _ in FIGURES:
        if flushed == (options.child == "flushed") and options.case in case.name:
            print(json.dumps(measure(case, options.seconds, options.cpu_time)), flush=True)


def _line(case: LstmCase, flushed: bool, target: float | None, found: dict) -> tuple[str, bool]:
    """A line of the table, and whether a contender of this library failed its check."""
    times = found["timings"]
    torch_time = times["torch"][0]
    columns = [case.name, "flushed" if flushed else "default", f"{1e3 * torch_time:.2f} ms"]
    for how in HOWS[1:]:
        if how not in times:
            columns += [found["refused"][how], ""]
            continue
        median, low, high = times[how]
        rate = case.flops / median / 1e9
        columns += [f"{1e3 * median:.2f} ms ({1e3 * low:.2f} to {1e3 * high:.2f}), {rate:.0f} GFLOP/s"]
        columns += [f"{torch_time / median:.2f}×"]
    met = (
        ""
        if target is None or "native" not in times
        else ("met" if torch_time / times["native"][0] >= target else "missed")
    )
    columns += [f"{target:g}×, {met}" if target else ""]
    return "| " + " | ".join(columns) + " |", any("error" in reason for reason in found["refused"].values())


def main(arguments: list[str] | None = None) -> int:
    """Check, measure and print every figure; exit code 1 if a contender of this library failed its check."""
    parser = argparse.ArgumentParser(prog="python -m bench.lstm", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="time per case, in seconds (default 6)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time of one thread: for a machine that others use too"
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument("--child", choices=("flushed", "default"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.cpu_time:
        options.threads = 1
    if options.child:
        _child(options)
        return 0
    if options.write and options.case:
        parser.error("--write takes the whole table, without --case")
    clock = "processor time" if options.cpu_time else "wall clock"
    about = f"{options.threads or torch.get_num_threads()} threads, torch {torch.__version__}, {clock}"
    table = [
        "| case | denormals | torch | native | ratio | bfloat16 products | ratio | target |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join([about, *table]))
    bad = False
    for child in ("flushed", "default"):
        command = [sys.executable, "-m", "bench.lstm", "--child", child, "--seconds", str(options.seconds)]
        command += ["--case", options.case, *(["--cpu-time"] if options.cpu_time else [])]
        command += ["--threads", str(options.threads)] if options.threads else []
        wanted = [figure for figure in FIGURES if figure[1] == (child == "flushed") and options.case in figure[0].name]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for figure, text in zip(wanted, process.stdout, strict=False):
                line, failed = _line(*figure, json.loads(text))
                bad |= failed
                table.append(line)
                print(line, flush=True)
        if process.returncode:
            return process.returncode
    if options.write and not bad:
        quantiles = f"Medians (20 to 80 %), {about}; contenders in turn, {options.seconds:g} seconds a case."
        tables.write_between_markers(PAGE, "lstm", "\n".join([*table, "", quantiles]))
    return int(bad)


class Lstm:
    """Seconds per call of training and of forward alone, in a process with default settings."""

    param_names = ("how", "mode", "batch", "hidden", "steps")
    params = (HOWS, MODES, (1, 16, 64, 256), (32, 100, 128, 256), (100, 500))
    timeout = 600

    def setup(self, how: str, mode: str, batch: int, hidden: int, steps: int) -> None:
        if batch * hidden**2 * steps > 64 * 256**2 * 100:
            raise NotImplementedError
        self.call = prepare(LstmCase(batch, steps, hidden, mode=mode), how)

    def time_lstm(self, *_: object) -> None:
        self.call()


if __name__ == "__main__":
    raise SystemExit(main())

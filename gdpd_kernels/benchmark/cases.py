"""What is measured: cases by name, their inputs, the arithmetic they need, and a callable for every contender."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

import gdpd_kernels as gk
from gdpd_kernels.backends import load, native_backend
from gdpd_kernels.benchmark import rivals

NETWORKS = {"paper": "two bottlenecks, BatchNorm in training mode", "mlp": "SiLU MLP with two hidden layers of 256"}
# Forward alone; with the gradients of z_short and alpha; with those of every parameter too.
MODES = ("forward", "frozen", "trainable")
# Products per multiply-add of the forward pass: backward makes one more for inputs, and one more for weights.
_PRODUCTS = {"forward": 1, "frozen": 2, "trainable": 3}

BATCHES = (1, 32, 64, 256, 1024, 4096)
WIDTHS = (32, 100, 256, 512)
STEPS = (1, 5, 10, 50)

_NAME = re.compile(rf"({'|'.join(NETWORKS)})-(\d+)x(\d+)-(\d+)-({'|'.join(MODES)})")


class Unavailable(NotImplementedError):
    """A contender that cannot run on this machine; asv skips it, and so does the smoke run."""


@dataclass(frozen=True)
class Case:
    """One sampler at one size.

    Args:
        network: a key of `NETWORKS`.
        batch, width, steps: rows, features of the state, steps of the sampler.
        mode: one of `MODES`.
    """

    network: str
    batch: int
    width: int
    steps: int
    mode: str

    @property
    def name(self) -> str:
        return f"{self.network}-{self.batch}x{self.width}-{self.steps}-{self.mode}"

    @staticmethod
    def parse(name: str) -> Case:
        """The case of a `name`. Raises ValueError if it is none."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"case is {name!r}; expected NETWORK-BATCHxWIDTH-STEPS-MODE, such as paper-64x100-5-trainable"
            )
        network, batch, width, steps, mode = match.groups()
        return Case(network, int(batch), int(width), int(steps), mode)

    @property
    def sensible(self) -> bool:
        """BatchNorm in training mode has no statistics of one row."""
        return not (self.network == "paper" and self.batch == 1)

    def with_rows(self, batch: int) -> Case:
        """The same with another batch."""
        return replace(self, batch=batch)

    @cached_property
    def program(self) -> gk.DenoiserProgram:
        return gk.capture(denoiser(self)).program

    @property
    def flops(self) -> float:
        """Floating-point operations of the matrix products, two per multiply-add; the rest is not counted."""
        return 2.0 * self.program.macs * self.batch * self.steps * _PRODUCTS[self.mode]

    @property
    def compulsory_bytes(self) -> float:
        """float32 bytes that must be read or written once whatever the plan: inputs, parameters, results."""
        state, params = self.batch * self.width, sum(math.prod(shape) for shape in self.program.params)
        numbers = 3 * state + self.batch + params + self.steps * sum(self.program.tables)  # z_short, noise, z_hat, ...
        if self.mode != "forward":
            numbers += 2 * state + self.batch  # the incoming gradient, and those of z_short and alpha
        if self.mode == "trainable":
            numbers += params + self.steps * sum(self.program.tables)
        return 4.0 * numbers


def denoiser(case: Case, seed: int = 0) -> rivals.Denoiser:
    """The network of a case, in training mode; its parameters ask for gradients where the case is trainable."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = rivals.PaperDenoiser(case.width) if case.network == "paper" else rivals.MLPDenoiser(case.width)
    return made.train().requires_grad_(case.mode == "trainable")


@dataclass
class Inputs:
    """z_short, noise and the gradient of z_hat [batch, width]; alpha [batch, 1], one weight per sample as in GDPD."""

    z_short: Tensor
    noise: Tensor
    grad: Tensor
    alpha: Tensor


def inputs(case: Case, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Inputs:
    """Inputs of a case, the same on every device; those of float64 are the float32 ones, widened."""
    generator = torch.Generator().manual_seed(seed + 1)
    shape = case.batch, case.width
    z_short, noise, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    alpha = torch.rand(case.batch, 1, generator=generator).to(device, dtype)
    ask = case.mode != "forward"
    return Inputs(z_short.requires_grad_(ask), noise, grad, alpha.requires_grad_(ask))


Call = Callable[[], list[Tensor]]


def prepare(case: Case, how: str, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Call:
    """A call of contender `how`: it returns z_hat and the gradients that the case asks for, always in the same order.

    Raises:
        Unavailable: the contender cannot run here, or has no such network.
    """
    reason = unavailable(how, case, device)
    if reason:
        raise Unavailable(reason)
    given = inputs(case, seed, dtype, device)
    sample, holder = rivals.contender(how, denoiser(case, seed).to(device, dtype), case.steps)
    call = bind(case, given, sample, list(holder.parameters()))
    return _replayed(call) if how == "graphed" else call


def _replayed(call: Call) -> Call:
    """The call recorded as a CUDA graph; its results lie at the same addresses every time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay


def bind(case: Case, given: Inputs, sample: rivals.Sampler, params: list[Tensor]) -> Call:
    """One forward pass, or one forward and backward pass, as a function of nothing."""
    wanted = [given.z_short, given.alpha, *(params if case.mode == "trainable" else [])]

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [sample(given.z_short, given.noise, given.alpha)]

    def forward_backward() -> list[Tensor]:
        z_hat = sample(given.z_short, given.noise, given.alpha)
        return [z_hat.detach(), *torch.autograd.grad(z_hat, wanted, given.grad)]

    return forward if case.mode == "forward" else forward_backward


def unavailable(how: str, case: Case | None = None, device: str = "cpu") -> str:
    """Why a contender cannot run here, or '' if it can."""
    if case is not None and how == "release" and case.network != "paper":
        return "the releases have the paper's network only"
    backend, kind = how.partition("_")[0], torch.device(device).type
    if backend in ("native", "triton"):
        entry = next(entry for entry in gk.backends() if entry["name"] == backend)
        if not entry["usable"]:
            return "; ".join(map(str, entry["reasons"]))  # type: ignore[call-overload]
        runs_on = load(backend).CAPABILITIES.devices
        if kind not in runs_on:
            return f"it runs on {', '.join(runs_on)}, not on {kind}"
    if how == "native_bf16" and not native_backend.instruction_set().endswith("bf16"):
        return f"no bfloat16 products on this processor (instruction set {native_backend.instruction_set()})"
    if how == "compiled" and kind == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler"
    if how == "graphed" and kind != "cuda":
        return f"CUDA graphs are of CUDA devices, not of {kind}"
    return ""


def full_grid() -> list[Case]:
    """Every sensible combination of network, batch, width, steps and mode."""
    cases = (
        Case(network, batch, width, steps, mode)
        for network in NETWORKS
        for batch in BATCHES
        for width in WIDTHS
        for steps in STEPS
        for mode in MODES
    )
    return [case for case in cases if case.sensible]


def short_grid() -> list[Case]:
    """The part of the grid that `python -m bench.compare` has time for: lines through it, not all of it."""
    mlp = [Case("mlp", b, w, 10, mode) for mode in MODES for w in (32, 100, 256, 512) for b in (1, 64, 256, 1024, 4096)]
    mlp += [Case("mlp", b, 100, k, mode) for mode in MODES for k in (1, 5, 50) for b in (64, 1024)]
    paper = [
        Case("paper", b, w, 5, mode) for mode in ("forward", "trainable") for w in WIDTHS for b in (32, 64, 256, 1024)
    ]
    paper += [Case("paper", 64, 100, k, mode) for mode in ("forward", "trainable") for k in (1, 10, 50)]
    return mlp + paper

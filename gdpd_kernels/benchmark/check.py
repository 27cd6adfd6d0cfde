"""Whether a contender computes what it should, before its time is worth anything."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gdpd_kernels.benchmark import cases, rivals
from gdpd_kernels.benchmark.cases import Case

# A rounding that flips a ReLU changes a gradient by more than all other roundings together, in one draw of inputs and
# not in the next: errors are medians over draws. Three were too few: of a thousand rows, two draws of three had a flip.
_DRAWS = 5
# Above so much arithmetic the check uses fewer rows of the case than the timing does: less time, and fewer flips.
_FLOPS_LIMIT = 4e9
_MIN_ROWS = 257
# "Plus rounding": what two orders of summation may differ by where plain PyTorch happens to be nearly exact.
_ROUNDING_BF16 = 1e-3
_ROUNDING_FLOAT32 = 2e-6
# A gradient this small beside the largest, in float64, is zero in exact arithmetic.
_ZERO = 1e-9
# Rivals are not held to anything but computing the same function, in the precision that products have on the device.
_SAME_FUNCTION = 1e-3


@dataclass(frozen=True)
class Verdict:
    """Outcome of a check.

    Args:
        ok: the contender may be timed.
        text: the error found and the error allowed, for the tensor that comes nearest to its limit.
    """

    ok: bool
    text: str


def check(case: Case, how: str, call: cases.Call | None = None, device: str = "cpu") -> Verdict:
    """Compare contender `how` with the float64 reference.

    The library's own backends must stay within twice the error of plain PyTorch (the reference backend, with the same
    compute dtype and on the same device), plus rounding; rivals must compute the same function. The float64 reference
    is computed on the CPU, whatever the device.

    Args:
        case, how: what is checked; with fewer rows where the case is very large.
        call: the contender prepared with seed 0; one that is compiled or recorded is checked by it, with all rows.
    """
    at_hand = call if how in ("compiled", "graphed") else None
    case = reduced(case) if at_hand is None else case
    found = []
    draws = _DRAWS if at_hand is None else 1
    for seed in range(draws):
        run = at_hand or cases.prepare(case, how, seed, device=device)
        found.append(_errors([rivals.centre(tensor).cpu() for tensor in run()], _exact(case, seed)))
    errors, low = _medians(found), how.endswith("bf16")
    plain = _medians([_plain(case, low, seed, device) for seed in range(draws)])
    limits = [2 * error + (_ROUNDING_BF16 if low else _ROUNDING_FLOAT32) for error in plain]
    if how not in rivals.OWN:
        limits = [max(limit, _SAME_FUNCTION) for limit in limits]
    shares = [error / limit if error == error else float("inf") for error, limit in zip(errors, limits, strict=True)]
    worst = max(range(len(shares)), key=shares.__getitem__)
    text = f"{_label(case, worst)}: error {errors[worst]:.1e}, allowed {limits[worst]:.1e}"
    return Verdict(shares[worst] <= 1, text)


def reduced(case: Case) -> Case:
    """The case with as many rows as the check has time for."""
    rows = max(_MIN_ROWS, int(case.batch * _FLOPS_LIMIT / case.flops))
    return case if case.batch <= rows else case.with_rows(rows)


def _label(case: Case, index: int) -> str:
    parameters = [name for name, _ in cases.denoiser(case).named_parameters()]
    return ["z_hat", *(f"gradient of {name}" for name in ("z_short", "alpha", *parameters))][index]


def _errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Root mean square error of each tensor: relative to its size and a hundredth of the largest gradient's.

    Some gradients are zero but for rounding (a bias ahead of BatchNorm), and how much rounding is left of them is a
    matter of luck, not of accuracy: theirs is relative to the largest gradient.
    """
    if [x.shape for x in found] != [y.shape for y in exact]:
        raise ValueError(
            f"results are {[list(x.shape) for x in found]}, the reference's {[list(y.shape) for y in exact]}"
        )
    sizes = [_rms(tensor) for tensor in exact]
    largest = max(sizes[1:], default=0.0)
    scales = [sizes[0], *(size + 1e-2 * largest if size > _ZERO * largest else largest for size in sizes[1:])]
    return [_rms(x.double() - y) / (scale or 1.0) for x, y, scale in zip(found, exact, scales, strict=True)]


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def _medians(draws: list[list[float]]) -> list[float]:
    return [statistics.median(errors) for errors in zip(*draws, strict=True)]


@lru_cache(maxsize=2 * _DRAWS)
def _exact(case: Case, seed: int) -> list[Tensor]:
    return cases.prepare(case, "reference", seed, torch.float64)()


@lru_cache(maxsize=2 * _DRAWS)
def _plain(case: Case, low: bool, seed: int, device: str) -> list[float]:
    """Errors of the reference backend in float32, or with products in bfloat16."""
    module, given = cases.denoiser(case, seed).to(device), cases.inputs(case, seed, device=device)
    captured = rivals.gk.capture(module)
    table = rivals.gk.ddim_table(rivals.TRAIN_TIMESTEPS, case.steps, window="lower")
    dtype = torch.bfloat16 if low else None

    def sample(z_short: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
        return rivals.operator_sample(captured, z_short, noise, alpha, table, "reference", dtype)

    run = cases.bind(case, given, sample, list(module.parameters()))
    return _errors([tensor.cpu() for tensor in run()], _exact(case, seed))

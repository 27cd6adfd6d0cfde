"""Tensors between guards of NaN, to see that a kernel writes all of its results and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gdpd_kernels.backends import load
from gdpd_kernels.ops import SAVE_NOTHING, SAVE_VALUES
from problem import Problem, Result

_GUARD = 257  # numbers on either side: odd, so that what lies between them is aligned to a number and no more
_MAKERS = {
    torch.Tensor.new_empty,
    torch.empty,
    torch.empty_like,
    torch.frombuffer,
    torch.Tensor.new_full,
    torch.zeros_like,
}


def _bits(x: Tensor) -> Tensor:
    return x.view({8: torch.int64, 4: torch.int32}[x.element_size()])


class Guards(TorchFunctionMode):
    """While active, every floating tensor that Python code makes lies between guards; empty ones begin as NaN.

    `place` puts an input between guards. `check` raises if a guard or an input has changed by a single bit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[str, Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _MAKERS and made.is_floating_point():
            empty = func not in (torch.Tensor.new_full, torch.zeros_like)
            return self._between("result", torch.full_like(made, torch.nan) if empty else made)
        return made

    def _between(self, name: str, x: Tensor) -> Tensor:
        around = torch.full((x.numel() + 2 * _GUARD,), torch.nan, dtype=x.dtype)
        inside = around[_GUARD:-_GUARD].view(x.shape)
        inside.copy_(x)
        for guard in (around[:_GUARD], around[-_GUARD:]):
            self.kept.append((f"a guard of {name} {list(x.shape)}", guard, guard.clone()))
        return inside

    def place(self, name: str, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            inside = self._between(name, x)
            self.kept.append((name, inside, inside.clone()))
        return inside

    def check(self) -> None:
        with torch._C.DisableTorchFunction():
            for name, now, before in self.kept:
                assert torch.equal(_bits(now), _bits(before)), f"{name} was written"


def run_between_guards(problem: Problem, save: int, compute: torch.dtype, name: str = "native") -> Result:
    """Forward and backward of the backend itself, every tensor between guards and every result NaN at first."""
    backend, p = load(name), problem
    with Guards() as guards:
        z, grad = guards.place("z", p.z), guards.place("grad", p.grad)
        alpha, noise = (None if x is None else guards.place("input", x) for x in (p.alpha, p.noise))
        rows, tables, params = ([guards.place("input", x) for x in xs] for xs in (p.rows, p.tables, p.params))
        wanted = [i for i, x in enumerate([z, alpha, *rows, *tables]) if x is not None]
        wanted += [2 + len(rows) + len(tables) + i for i in range(len(params)) if i not in p.program.buffer_params]
        inputs = (p.program, z, alpha, noise, p.seed, rows, tables, params)
        if p.signal is not None and p.sigma is not None:
            signal, sigma = guards.place("signal", p.signal), guards.place("sigma", p.sigma)
            inputs = (p.program, z, noise, p.seed, signal, sigma, rows, tables, params)  # type: ignore[assignment]
            loss, stats, gradients = backend.prior_loss(
                *inputs,
                p.prediction,
                compute,
                [max(i - 1, 0) for i in wanted],  # type: ignore[arg-type, call-arg]
            )
            results = [loss, stats, *(g * p.grad for g in gradients)]
        else:
            rest = (list(p.coefficients), p.samples, compute, save)
            z_hat, stats, saved = backend.reverse_sample(*inputs, *rest)
            results = [z_hat, stats]
            if save != SAVE_NOTHING:
                results += backend.reverse_sample_backward(grad, *inputs, stats, saved, *rest, wanted)
    guards.check()
    named = list(p.run(name, compute, save if save != SAVE_NOTHING else SAVE_VALUES))
    return dict(zip(named, results, strict=False))

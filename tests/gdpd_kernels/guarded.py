"""Tensors between guards of NaN, to see that a kernel writes all of its results and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_GUARD = 257  # numbers on either side: odd, so that what lies between them is aligned to a number and no more
_MAKERS = {torch.Tensor.new_empty, torch.empty, torch.empty_like, torch.Tensor.new_full, torch.zeros_like}


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

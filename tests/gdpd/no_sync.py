"""Refuses what makes the host wait for a GPU, on machines without one, and writes down what a step runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gdpd_kernels import lstm_ops, ops


class HostSync(AssertionError):
    """The host would wait for the device, or a shape would depend on values."""


_METHODS = ("item", "tolist", "cpu", "numpy", "nonzero", "unique", "masked_select", "__bool__", "__float__", "__int__")
_METHODS = (*_METHODS, "__index__", "__contains__", "equal", "allclose", "is_nonzero", "argwhere")
_OPERATORS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_static", "masked_select",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "argwhere", "bincount", "histc",
}  # fmt: skip


class _Methods(TorchFunctionMode):
    """What Python calls: on the CPU some of it, such as `.cpu()`, never becomes an operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _METHODS:
            raise HostSync(f"{name} of a tensor")
        if name == "repeat_interleave" and "output_size" not in (kwargs or {}):
            raise HostSync("repeat_interleave without output_size")
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    """What runs, also from C++ and in backward; looks into the sampler's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in _OPERATORS:
            raise HostSync(f"operator {name}")
        if name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            raise HostSync("indexing by a boolean mask")
        tensors = torch.utils._pytree.tree_leaves((args, kwargs))
        self.ran.append((name, *(tuple(x.shape) for x in tensors if isinstance(x, Tensor))))
        if func.namespace == "gdpd_kernels":
            with self:
                return (vars(lstm_ops) | vars(ops))[f"_{name}"](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def no_sync() -> Iterator[list[tuple[Any, ...]]]:
    """Within the block, `HostSync` is raised as soon as the host would wait; yields the operators and their shapes."""
    operators = _Operators()
    with _Methods(), operators:
        yield operators.ran

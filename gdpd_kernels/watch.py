"""Notices, at every call and within microseconds, whether a module is still what it was when it was captured.

A capture holds as long as the submodules, their modes and plain attributes, their hooks, and the shapes and dtypes of
their tensors are the same. The values of tensors may change: they are read anew at every call.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from operator import getitem, is_
from typing import Any

import torch
from torch import Tensor, nn

from gdpd_kernels.tracing import Leaf

_PLAIN = (bool, int, float, str, type(None), torch.dtype, types.FunctionType, types.BuiltinFunctionType, type)
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
# Plain attributes of torch's own layers that their forward passes do not read (or, momentum, that is read live).
_DESCRIPTIVE = frozenset(
    [
        "in_features",
        "out_features",
        "in_channels",
        "out_channels",
        "num_features",
        "num_channels",
        "num_embeddings",
        "embedding_dim",
        "affine",
        "elementwise_affine",
        "inplace",
        "momentum",
        "transposed",
        "output_padding",
    ]
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Hooks of every module there is, as tools register them that count modules or operations.
_GLOBAL_HOOKS: tuple[dict[Any, Any], ...] = tuple(getattr(torch.nn.modules.module, f"_global{name}") for name in _HOOKS)
# Pre-hooks of torch's own that only compute a weight from parameters, which capture reads like any other arithmetic.
_WEIGHT_HOOKS = ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm", "torch.nn.utils.prune")


def hook_obstacles(module: nn.Module) -> list[str]:
    """The hooks on a module's calls that a captured program, which makes none, would leave out: a line for each."""
    everywhere = [name for name, store in zip(_HOOKS, _GLOBAL_HOOKS, strict=True) if store]
    found = [f"every module: has a global {_readable(name)}" for name in everywhere]
    for path, submodule in module.named_modules():
        for name in _HOOKS:
            for hook in vars(submodule)[name].values():
                if type(hook).__module__ not in _WEIGHT_HOOKS:
                    place = f"{path or 'the module'} ({type(submodule).__name__})"
                    found.append(f"{place}: has a {_readable(name)}, which is called only where the module itself runs")
    return found


def _readable(store: str) -> str:
    """`_forward_pre_hooks` as people write it."""
    return store.strip("_").removesuffix("s").replace("_", " ")


class Reader:
    """Reads tensors from where a module keeps them. Holds the stores, not the module."""

    def __init__(self, module: nn.Module, leaves: Sequence[Leaf]) -> None:
        modules = dict(module.named_modules())
        self.stores = [
            vars(modules[leaf.path])
            if leaf.store == "__dict__"
            else vars(modules[leaf.path])[leaf.store]
            if leaf.store
            else {leaf.key: leaf.constant}
            for leaf in leaves
        ]
        self.keys = [leaf.key for leaf in leaves]

    def read(self) -> list[Tensor]:
        return list(map(getitem, self.stores, self.keys))


class Watch:
    """What of a module is compared before a capture is used again.

    Args:
        module: the module.
        ignored: plain attributes ``(path, name)`` that its own forward pass changes, such as a counter of calls.
    """

    def __init__(self, module: nn.Module, ignored: Iterable[tuple[str, str]] = ()) -> None:
        named = list(module.named_modules())
        spaces = [vars(submodule) for _, submodule in named]
        # The loops over these run in C: they are on the way of every call of the sampler.
        self.stores = [
            space[store]
            for (_, submodule), space in zip(named, spaces, strict=True)
            for store in ("_modules", "_parameters", "_buffers")
            if (space[store] or not _is_torch(submodule)) and not _is_statistics(submodule, store)
        ]
        self.content = tuple(chain.from_iterable(map(dict.values, self.stores)))
        self.hook_stores = [*(space[hooks] for space in spaces for hooks in _HOOKS), *_GLOBAL_HOOKS]
        self.hooked = any(self.hook_stores)
        self.hooks = self._hooks()
        ignored = set(ignored)
        attributes = [
            (space, key, f"{path}.{key}".lstrip("."))
            for (path, submodule), space in zip(named, spaces, strict=True)
            for key, value in space.items()
            if isinstance(value, _PLAIN)
            and key not in _INTERNAL
            and (path, key) not in ignored
            and not (_is_torch(submodule) and key in _DESCRIPTIVE)
        ]
        self.attribute_stores = [space for space, _, _ in attributes]
        self.attribute_keys = [key for _, key, _ in attributes]
        self.attribute_names = [name for _, _, name in attributes]
        self.attributes = tuple(map(getitem, self.attribute_stores, self.attribute_keys))
        loose = [(space, key) for space in spaces for key, value in space.items() if isinstance(value, Tensor)]
        self.loose_stores = [space for space, _ in loose]
        self.loose_keys = [key for _, key in loose]
        self.loose = list(map(getitem, self.loose_stores, self.loose_keys))
        self.first = next(((store, key) for store, key in _floating(self.stores)), None)
        self.kind = self._kind()

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        try:
            content = tuple(chain.from_iterable(map(dict.values, self.stores)))
            if (
                tuple(map(getitem, self.attribute_stores, self.attribute_keys)) != self.attributes
                or (self._hooks() != self.hooks if self.hooked else any(self.hook_stores))
                or len(content) != len(self.content)
            ):
                return False
            same = all(map(is_, content, self.content)) and all(
                map(is_, map(getitem, self.loose_stores, self.loose_keys), self.loose)
            )
            return (same or self._adopt(content)) and self._kind() == self.kind
        except KeyError:
            return False

    def _hooks(self) -> tuple[Any, ...]:
        return tuple(chain.from_iterable(map(dict.values, self.hook_stores)))

    def _adopt(self, content: tuple[Any, ...]) -> bool:
        """Take other tensors for the old ones, if they have the same shapes, dtypes, devices and ties."""
        loose = list(map(getitem, self.loose_stores, self.loose_keys))
        if _profile((*content, *loose)) != _profile((*self.content, *self.loose)):
            return False
        self.content, self.loose = content, loose
        return True

    def _kind(self) -> tuple[torch.dtype, torch.device] | None:
        """Dtype and device of the first floating tensor: `.to(...)` moves them all, in place."""
        if self.first is None:
            return None
        tensor = self.first[0][self.first[1]]
        return tensor.dtype, tensor.device

    def differences(self) -> list[str]:
        """Names of the plain attributes that are not what they were, for a message."""
        now = [store.get(key) for store, key in zip(self.attribute_stores, self.attribute_keys, strict=True)]
        changed = zip(self.attribute_names, now, self.attributes, strict=True)
        return [name for name, value, before in changed if value != before]


def _is_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules.") and not isinstance(module, _CONTAINERS)


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def _is_statistics(module: nn.Module, store: str) -> bool:
    """BatchNorm's own buffers: written by the sampler, and read wherever they are."""
    return store == "_buffers" and isinstance(module, nn.modules.batchnorm._BatchNorm)


def _floating(stores: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
    for store in stores:
        for key, value in store.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                yield store, key


def _profile(content: tuple[Any, ...]) -> list[Any]:
    """Of tensors the form, and which of them are one and the same; of everything else the identity."""
    first: dict[int, int] = {}
    return [
        (x.shape, x.dtype, x.device, first.setdefault(id(x), i)) if isinstance(x, Tensor) else id(x)
        for i, x in enumerate(content)
    ]

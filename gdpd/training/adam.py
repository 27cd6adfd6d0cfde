"""Adam for many small tensors on a CPU: a handful of calls a step, however many parameters there are.

A small network has some sixty parameters of a few hundred numbers. torch's fused Adam takes 10 µs for each, most of it
to look at them, and clipping takes as much again: together a millisecond, more than the forward pass of the student.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 16  # numbers: every parameter begins at a cache line, as it would in memory of its own


@dataclass
class _Group:
    """The parameters of a group, end to end in one tensor each for values and for Adam's two averages.

    `absent` tells which parameters had no gradient in the last step. For the others, `gradient` is where their
    gradients are put end to end (`slots`, one each), and `runs` are the stretches that are updated as one tensor.
    """

    params: list[nn.Parameter]
    values: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    bounds: list[int]  # where each parameter begins, and the end; what is between them is zero and stays zero
    absent: list[bool] = field(default_factory=list)
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    slots: list[Tensor] = field(default_factory=list)
    runs: list[_Run] = field(default_factory=list)

    def places(self) -> Iterator[tuple[nn.Parameter, int, int]]:
        """Every parameter with where it begins and ends."""
        return ((p, begin, begin + p.numel()) for p, begin in zip(self.params, self.bounds, strict=False))


@dataclass
class _Run:
    """Neighbours that have taken equally many steps."""

    value: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


class FlatAdam(torch.optim.Adam):
    """`torch.optim.Adam` with clipping by group, on parameters that are laid end to end in memory.

    Each parameter becomes a view into one tensor per group, until `release`. Parameters whose gradient is None are
    left alone, as by torch. `state_dict` and `load_state_dict` are torch's.

    Args:
        groups: lists of parameters, all of one dtype, on the CPU. Groups are clipped apart; other options are common.
        lr, weight_decay: as in `torch.optim.Adam`.
        max_norm: largest l2 norm of a group's gradient, as in `torch.nn.utils.clip_grad_norm_`; None does not clip.
            Clipped is a copy: the parameters' `.grad` stay as they are.

    Raises:
        ValueError: parameters of several dtypes, or not on the CPU.
    """

    def __init__(
        self, groups: Iterable[Sequence[nn.Parameter]], *, lr: float, weight_decay: float, max_norm: float | None
    ) -> None:
        super().__init__([{"params": list(group)} for group in groups], lr=lr, weight_decay=weight_decay, fused=True)
        self.max_norm = max_norm
        kinds = {f"{p.dtype} on {p.device.type}" for group in self.param_groups for p in group["params"]}
        if len(kinds) > 1 or not kinds.pop().endswith("cpu"):
            raise ValueError("groups: FlatAdam takes parameters of one dtype on the CPU. Use torch.optim.Adam.")
        self._laid = [_lay(group["params"]) for group in self.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients: what the next loss does not reach has none then, and is not updated.

        Raises:
            ValueError: `set_to_none` is False.
        """
        if not set_to_none:
            raise ValueError("set_to_none=False would have parameters updated that the loss does not reach.")
        for group in self._laid:
            for param in group.params:
                param.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step from the parameters' gradients.

        Raises:
            ValueError: a closure.
        """
        if closure is not None:
            raise ValueError("closure: compute the gradients before the step.")
        runs: list[_Run] = []
        for group in self._laid:
            grads = [param.grad for param in group.params]
            absent = [grad is None for grad in grads]
            if absent != group.absent:
                self._plan(group, absent)
            if not group.runs:
                continue
            torch._foreach_copy_(group.slots, [grad for grad in grads if grad is not None])
            if self.max_norm is not None:
                norm = torch.linalg.vector_norm(group.gradient)
                group.gradient.mul_((self.max_norm / (norm + 1e-6)).clamp_(max=1.0))
            runs += group.runs
        if not runs:
            return
        options = self.param_groups[0]
        counters = [run.step for run in runs]
        torch._foreach_add_(counters, 1)
        # What torch.optim.Adam comes down to, without its sorting of tensors by device and dtype, which takes as long.
        torch._fused_adam_(
            [run.value for run in runs],
            [run.gradient for run in runs],
            [run.exp_avg for run in runs],
            [run.exp_avg_sq for run in runs],
            [],
            counters,
            lr=options["lr"],
            beta1=options["betas"][0],
            beta2=options["betas"][1],
            weight_decay=options["weight_decay"],
            eps=options["eps"],
            amsgrad=False,
            maximize=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Adam.load_state_dict`."""
        super().load_state_dict(state_dict)
        for group in self._laid:
            group.absent, group.runs = [], []
            for param, begin, end in group.places():
                for name, store in (("exp_avg", group.exp_avg), ("exp_avg_sq", group.exp_avg_sq)):
                    if param in self.state:
                        store[begin:end].copy_(self.state[param][name].reshape(-1))
                        self.state[param][name] = store[begin:end].view_as(param)

    def release(self) -> None:
        """Give every parameter memory of its own again. The optimizer is of no use afterwards."""
        for group in self._laid:
            for param in group.params:
                param.data = param.data.clone()
        self._laid = []

    def _plan(self, group: _Group, absent: list[bool]) -> None:
        """Divide what has a gradient into runs."""
        for (param, begin, end), none in zip(group.places(), absent, strict=True):
            if not none and param not in self.state:
                self.state[param] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": group.exp_avg[begin:end].view_as(param),
                    "exp_avg_sq": group.exp_avg_sq[begin:end].view_as(param),
                }
        taken = [
            None if none else float(self.state[param]["step"]) for param, none in zip(group.params, absent, strict=True)
        ]
        sizes = [end - begin for begin, end in itertools.pairwise(group.bounds)]
        size = sum(size for size, none in zip(sizes, absent, strict=True) if not none)
        group.absent, group.runs, group.slots, group.gradient = absent, [], [], group.values.new_zeros(size)
        used = 0
        for steps, places in itertools.groupby(range(len(taken)), key=taken.__getitem__):
            if steps is None:
                continue
            members = list(places)
            begin, end = group.bounds[members[0]], group.bounds[members[-1] + 1]
            gradient = group.gradient[used : used + end - begin]
            used += end - begin
            for member, room in zip(members, gradient.split([sizes[member] for member in members]), strict=True):
                param = group.params[member]
                group.slots.append(room[: param.numel()].view(param.shape))
            counter = torch.tensor(steps)  # one for all of the run
            for member in members:
                self.state[group.params[member]]["step"] = counter
            exp_avg, exp_avg_sq = group.exp_avg[begin:end], group.exp_avg_sq[begin:end]
            group.runs.append(_Run(group.values[begin:end], gradient, exp_avg, exp_avg_sq, counter))


def _lay(params: list[nn.Parameter]) -> _Group:
    """Lay the values of `params` one after another, and make each a view of its place."""
    rooms = [-(-param.numel() // ALIGNMENT) * ALIGNMENT for param in params]
    bounds = [0, *itertools.accumulate(rooms)]
    values, exp_avg, exp_avg_sq = (params[0].new_zeros(bounds[-1]) for _ in range(3))
    group = _Group(params, values, exp_avg, exp_avg_sq, bounds)
    for param, begin, end in group.places():
        values[begin:end].copy_(param.detach().reshape(-1))
        param.data = values[begin:end].view(param.shape)
    return group

"""What the operators share: their library, how a kernel is registered, and the shortest way into one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("gdpd_kernels", "DEF")
TAGS = (torch.Tag.needs_fixed_stride_order,)
DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


def is_plain(tensor: Any) -> bool:
    """Whether an operator call on `tensor` would reach its kernel as it is: an eager call that no mode, functorch
    transform or profiler watches. Such a call may skip the dispatcher, which takes as long as a small sampler to carry
    thirty parameters there and back."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not transformed()
        and not torch.autograd._profiler_enabled()
    )


def transformed() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp, ...) or forward-mode differentiation is active, which see
    through plain PyTorch only."""
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """What `function.apply` ends in, for plain calls (`is_plain`). On its way there it looks at every argument in
    Python, for what transforms of functorch may have left behind; here that look is taken in C."""
    enter = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    unwrap = torch._C._functorch.unwrap_if_dead

    def apply(plain: bool, *arguments: Any) -> Any:
        return enter(plain, *[unwrap(x) if isinstance(x, Tensor) else x for x in arguments])

    return apply


def implement(name: str) -> Any:
    """Register a function as the kernel of the operator `name`, on every device, below autograd."""

    def register(function: Any) -> Any:
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return function

    return register


def differentiable_gradients(output: Tensor, inputs: list[Tensor], grad: Tensor | None) -> list[Tensor]:
    """Gradients of `output` by `inputs` that can be differentiated again; zeros where it does not depend on one."""
    found = torch.autograd.grad(output, inputs, grad, create_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]

"""Whether a capture computes what its module does: both run on random numbers, after `lowering` and before use."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from gdpd_kernels.backends import reference
from gdpd_kernels.lowering import CaptureError
from gdpd_kernels.prologue import Prologue
from gdpd_kernels.tracing import Trace, prediction_of

if TYPE_CHECKING:
    from gdpd_kernels.capture import CapturedDenoiser

_ROWS = 8
_STEPS = 2
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-2, torch.bfloat16: 0.5, torch.float16: 0.2}


def check_agreement(captured: CapturedDenoiser, traced: Trace, cond_features: int | None, map_input: bool) -> None:
    """Raise CaptureError if program and module differ.

    The copy of the module that was traced runs, not the module. In float64 where it can, so that a difference is one
    of meaning, not of rounding.
    """
    device = traced.z.meta["val"].device
    generator = torch.Generator().manual_seed(0)
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        z = torch.randn(_ROWS, captured.program.features, generator=generator, dtype=torch.float64)
        cond = None
        if cond_features is not None:
            cond = torch.randn(_ROWS, cond_features, generator=generator, dtype=torch.float64)
        steps = torch.arange(_ROWS) % _STEPS if traced.t_per_row else torch.ones(_ROWS).long()
        for dtype in (torch.float64, traced.dtype):
            numbers = _Numbers(dtype, generator)
            inputs = [x if x is None else x.to(device, dtype) for x in (z, cond)]
            try:
                expected = _run_shadow(captured, traced, inputs, steps.to(device), map_input, numbers)
                found = _run_program(captured, inputs, steps.to(device), numbers)
            except Exception:
                # A module may insist on its own dtype; one that runs in neither says so itself when it is used.
                continue
            difference, scale = (found - expected).abs().max(), expected.abs().max()
            if scale.isfinite() and difference > _TOLERANCE[dtype] * scale:
                raise CaptureError(
                    [
                        f"the module: what was captured differs from it by {float(difference / scale):.1e} of the "
                        "largest value, so its forward does something that the capture did not see"
                    ]
                )
            return


class _Numbers:
    """Tensors in another dtype; for those without data, which torch.export puts in a module's place, random ones."""

    def __init__(self, dtype: torch.dtype, generator: torch.Generator) -> None:
        self._dtype, self._generator = dtype, generator
        self._made: dict[int, Tensor] = {}

    def of(self, tensor: Tensor) -> Tensor:
        from torch._subclasses.fake_tensor import is_fake

        if is_fake(tensor):
            if id(tensor) not in self._made:
                shape = [int(size) for size in tensor.shape]
                drawn = torch.rand(shape, generator=self._generator, dtype=torch.float64) + 0.5
                self._made[id(tensor)] = drawn.to(tensor.device, tensor.dtype)
            tensor = self._made[id(tensor)]
        return tensor.detach().to(self._dtype) if tensor.is_floating_point() else tensor.detach()


def _run_shadow(
    captured: CapturedDenoiser,
    traced: Trace,
    inputs: list[Tensor | None],
    steps: Tensor,
    map_input: bool,
    numbers: _Numbers,
) -> Tensor:
    module, (z, cond) = captured.module, inputs
    assert z is not None
    assert traced.shadow is not None
    named = *module.named_parameters(), *module.named_buffers()
    tensors = {name: numbers.of(tensor).clone() for name, tensor in named}
    modules: dict[str, nn.Module] = dict(traced.shadow.named_modules())
    for leaf in traced.leaves.values():
        if leaf.store == "__dict__":
            setattr(modules[leaf.path], leaf.key, numbers.of(leaf.find(module)).clone())
    arguments = [z[:, :, None, None] if map_input else z, steps if traced.t_per_row else steps[0]]
    if cond is not None:
        arguments.append(cond)
    output = torch.func.functional_call(traced.shadow, tensors, tuple(arguments))
    found: Tensor = prediction_of(output)
    return found.flatten(1)


def _run_program(captured: CapturedDenoiser, inputs: list[Tensor | None], steps: Tensor, numbers: _Numbers) -> Tensor:
    z, cond = inputs
    assert z is not None

    def leaves(prologue: Prologue) -> list[Tensor]:
        return [numbers.of(x) for x in captured._leaves(prologue)]

    def cast(parts: Any) -> Tensor:
        whole = torch.cat(parts)
        return whole.to(z.dtype) if whole.is_floating_point() else whole

    lowered = captured._recipe.lowered
    params = lowered.params.run(0, None, leaves(lowered.params))
    # Step by step and row by row: what couples them would give something else than in the module.
    table_leaves, row_leaves = leaves(lowered.tables), leaves(lowered.rows)
    by_step = [captured._tables(torch.full_like(steps[:1], step), table_leaves) for step in range(_STEPS)]
    tables = [cast(parts)[steps] for parts in zip(*by_step, strict=True)]
    by_row = [lowered.rows.run(1, row[None], row_leaves) for row in cond] if cond is not None else []
    rows = [cast(parts) for parts in zip(*by_row, strict=True)]
    return reference.denoise(captured.program, z, rows, tables, params, z.dtype)

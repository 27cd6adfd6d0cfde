"""Arguments of the public functions: what each has to look like, said by name, and the one form in which it goes on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gdpd_kernels.capture import CapturedDenoiser
from gdpd_kernels.library import transformed
from gdpd_kernels.program import DenoiserProgram

_COMPUTE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def precision(name: str, z: Tensor, compute_dtype: torch.dtype | None) -> tuple[Tensor, torch.dtype]:
    """The state in the dtype in which it is kept, and the dtype of matrix products."""
    check_tensor(name, z, "[batch, features]")
    if z.dim() != 2 or not z.is_floating_point():
        raise ValueError(f"{name} has shape {tuple(z.shape)}, {z.dtype}; expected floating [batch, features]")
    if z.shape[0] < 1 or z.shape[1] < 1:
        raise ValueError(f"{name} has shape {tuple(z.shape)}; batch and features must be at least 1")
    if z.layout != torch.strided:
        raise ValueError(f"{name} is laid out as {z.layout}; expected a dense tensor, such as {name}.to_dense()")
    autocast = _autocast(z)
    if autocast and z.dtype in (torch.bfloat16, torch.float16):
        z = z.float()
    if compute_dtype is None:
        low = autocast and z.dtype == torch.float32
        return z, torch.get_autocast_dtype(z.device.type) if low else z.dtype
    if compute_dtype not in _COMPUTE_DTYPES or compute_dtype.itemsize > z.dtype.itemsize:
        raise ValueError(
            f"compute_dtype is {compute_dtype}; it must be a floating dtype no wider than the state's {z.dtype}"
        )
    return z, compute_dtype


def _autocast(z: Tensor) -> bool:
    device = z.device.type
    # Every tensor of these two has it; for other devices asking costs more, and torch 2.9 cannot compile the question.
    return (z.is_cpu or z.is_cuda or torch.amp.is_autocast_available(device)) and torch.is_autocast_enabled(device)


def mixing_weights(alpha: Tensor | float | None, z_short: Tensor) -> Tensor | None:
    """alpha as a 2-D tensor that broadcasts to [batch, features]."""
    if alpha is None:
        return None
    if not isinstance(alpha, Tensor):
        try:
            value = float(alpha)
        except (TypeError, ValueError):
            raise TypeError(f"alpha: expected None, a number or a tensor, got {type(alpha).__name__}") from None
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"alpha is {value}; a mixing weight lies in [0, 1]")
        return z_short.new_full((1, 1), value)
    batch, features = z_short.shape
    if not alpha.is_floating_point() or alpha.device != z_short.device:
        raise ValueError(
            f"alpha is {alpha.dtype} on {alpha.device}; expected a floating tensor on z_short's {z_short.device}"
        )
    alpha = alpha if alpha.dtype == z_short.dtype else alpha.to(z_short.dtype)
    if alpha.numel() == 1:
        return alpha.reshape(1, 1)
    if alpha.dim() == 1 and batch == features and alpha.shape[0] == batch:
        raise ValueError(
            f"alpha has shape [{batch}], and z_short is [{batch}, {features}]: per sample or per feature? "
            f"Pass [{batch}, 1] or [1, {features}]"
        )
    if alpha.dim() == 1 and alpha.shape[0] == features:
        return alpha[None, :]
    if alpha.dim() == 1 and alpha.shape[0] == batch:
        return alpha[:, None]
    if alpha.dim() == 2 and alpha.shape[0] in (1, batch) and alpha.shape[1] in (1, features):
        return alpha
    raise ValueError(
        f"alpha has shape {tuple(alpha.shape)}; expected a number, [{features}], [{batch}] or [{batch}, {features}]"
    )


def start_noise(noise: Tensor | None, z: Tensor, num_samples: int | None) -> Tensor | None:
    """The start's noise as [num_samples, batch, features]."""
    if noise is None:
        return None
    check_tensor("noise", noise, "[batch, features]")
    batch, features = z.shape
    expected = (batch, features) if num_samples is None else (num_samples, batch, features)
    if tuple(noise.shape) != expected or noise.device != z.device or not noise.is_floating_point():
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}, {noise.dtype} on {noise.device}; "
            f"expected floating {list(expected)} on {z.device}"
        )
    if noise.requires_grad:
        raise ValueError("noise requires grad, but no gradient is computed for it; pass noise.detach()")
    noise = noise if noise.dtype == z.dtype else noise.to(z.dtype)
    return noise[None] if num_samples is None else noise


def philox_key(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The Philox key as an int64 tensor []."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise ValueError(f"seed has shape {tuple(seed.shape)}, {seed.dtype}; expected an int or one int64")
        return seed.reshape(()).to(device)
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed!r}; expected an integer of 64 bits")
    return torch.full((), seed if seed < 2**63 else seed - 2**64, dtype=torch.int64, device=device)


def condition(cond: Tensor | None, z: Tensor) -> Tensor | None:
    """The condition, in the dtype of the state where autocast may have made it another."""
    if cond is None:
        return None
    check_tensor("cond", cond, "[batch, width]")
    if cond.dim() != 2 or cond.shape[0] != z.shape[0] or cond.device != z.device:
        raise ValueError(
            f"cond has shape {tuple(cond.shape)} on {cond.device}; expected [{z.shape[0]}, width] on {z.device}"
        )
    if cond.dtype == z.dtype:
        return cond
    if not cond.is_floating_point() or not _autocast(z):
        raise ValueError(f"cond is {cond.dtype}, the state {z.dtype}; pass cond.to({z.dtype})")
    return cond.to(z.dtype)


def check_timesteps(timesteps: Tensor, z: Tensor) -> None:
    """One training step per row of `z` [batch, features]; raises ValueError or TypeError if not."""
    check_tensor("timesteps", timesteps, "[batch]")
    batch = z.shape[0]
    if timesteps.shape != (batch,) or timesteps.dtype not in (torch.int64, torch.int32) or timesteps.device != z.device:
        raise ValueError(
            f"timesteps has shape {tuple(timesteps.shape)}, {timesteps.dtype} on {timesteps.device}; "
            f"expected int64 [{batch}] on {z.device}"
        )


def check_tensor(name: str, x: object, form: str) -> None:
    """Raises TypeError unless `x` is a tensor; `form` is the shape to name in the message."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor {form}, got {type(x).__name__}")


def check_range(name: str, x: Tensor, low: int, high: int, why: str) -> None:
    """Looks at the numbers themselves, so only where that makes nobody wait and there are any: not on a GPU, not in a
    compiled graph, not under vmap."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type != "cpu" or transformed():
        return
    least, most = torch.aminmax(x)
    if not (least >= low and most <= high):  # also of NaN
        raise ValueError(f"{name} has values from {least.item()} to {most.item()}; expected {low} to {high}: {why}")


def check_fit(captured: CapturedDenoiser, z: Tensor, cond: Tensor | None, rows: int) -> None:
    """The state [batch, features] and the condition fit the captured denoiser, and BatchNorm has rows enough."""
    program = captured.program
    if program.features != z.shape[1]:
        raise ValueError(f"the state has {z.shape[1]} features, the denoiser takes {program.features}")
    takes = captured.cond_features
    if cond is None and takes is not None:
        raise ValueError(f"cond: the denoiser was captured with a condition of width {takes}, but none is given")
    if cond is not None and takes is None:
        raise ValueError("cond: the denoiser was captured without a condition; capture(module, cond_features=...)")
    if cond is not None and cond.shape[1] != takes:
        raise ValueError(f"cond has width {cond.shape[1]}, the denoiser was captured with {takes}")
    if program.batch_norms and rows < 2:
        raise ValueError(
            f"batch: BatchNorm in training mode needs at least 2 rows, got {rows}; call denoiser.eval(), drop the last "
            "incomplete batch, or use a denoiser with LayerNorm"
        )


def check_parameters(program: DenoiserProgram, params: Sequence[Tensor], z: Tensor) -> None:
    """The capture answers for the shapes; dtype and device are those of the state or the call fails."""
    if {p.dtype for p in params} <= {z.dtype} and {p.device for p in params} <= {z.device}:
        return
    for index, param in enumerate(params):
        if param.dtype != z.dtype or param.device != z.device:
            name = program.names[index] if program.names else f"p{index}"
            raise ValueError(
                f"parameter {name} is {param.dtype} on {param.device}, the state {z.dtype} on {z.device}; "
                "move the denoiser with .to(...)"
            )

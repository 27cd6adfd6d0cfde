"""The Triton kernels as a backend for GPU tensors: checks tensors, chooses tile and plan, launches.

Nothing of Triton is imported before the first call on a GPU. With TRITON_INTERPRET=1 in the environment the kernels run
in Triton's interpreter, slowly, and take CPU tensors: that is how they are tested where there is no GPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from gdpd_kernels.backends import Capabilities, saved_numel
from gdpd_kernels.backends.triton import tiling
from gdpd_kernels.backends.triton.kernels import backward_source, forward_source, prior_source
from gdpd_kernels.backends.triton.module import Recipe, Source
from gdpd_kernels.backends.triton.tensors import alpha_strides, check_alpha, check_seed, dense, dense_all
from gdpd_kernels.program import KINDS, DenoiserProgram

_SAVES = ("", "values", "states", "inputs")  # by the numbers of `gdpd_kernels.ops`
_FLOAT32 = torch.float32
_REDUCTION_BLOCK = 1024
_OLDEST_CUDA = (8, 0)  # tensor cores that take tf32 and bfloat16
_HIP = ("gfx90a", "gfx942", "gfx950")


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "") == "1"


@cache
def _obstacles() -> tuple[str, ...]:
    why = []
    if importlib.util.find_spec("triton") is None:
        why.append('the package triton is missing; install it with pip install "gdpd-kernels[triton]"')
    if _interpreted():
        return tuple(why)
    if not torch.cuda.is_available():
        why.append("torch sees no GPU")
    elif not why:
        why += [f"GPU {i} {told}" for i in range(torch.cuda.device_count()) if (told := _unsupported(i))]
    return tuple(why)


def _unsupported(index: int) -> str:
    """Why a GPU cannot be used, '' if it can."""
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
        return "" if name in _HIP else f"is {name}; supported are {', '.join(_HIP)}; hide it with HIP_VISIBLE_DEVICES"
    capability = torch.cuda.get_device_capability(index)
    if capability >= _OLDEST_CUDA:
        return ""
    held = ".".join(map(str, capability))
    return f"is of compute capability {held}; the oldest is 8.0; hide it with CUDA_VISIBLE_DEVICES"


def _architecture() -> str:
    return "hip" if torch.version.hip is not None else "cuda"


def _precision(compute_dtype: torch.dtype) -> str:
    """Of matrix products, as `tiles.dot` names it. float32 means what it means to torch.matmul on this device."""
    if compute_dtype is not _FLOAT32:
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}[compute_dtype]
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" and not _interpreted() else "ieee"


@lru_cache(maxsize=256)
def _pinned(coefficients: tuple[float, ...]) -> Tensor:
    # Kept for as long as the process lives, up to so many: a captured CUDA graph copies from it at every replay.
    return torch.tensor(coefficients, dtype=_FLOAT32).pin_memory()


def _coefficients(coefficients: Sequence[float], device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.tensor(coefficients, dtype=_FLOAT32)
    return _pinned(tuple(coefficients)).to(device, non_blocking=True)


class _Call:
    """One call under way: what its launches have in common."""

    def __init__(
        self, program: DenoiserProgram, total: int, batch: int, steps: int, compute_dtype: torch.dtype
    ) -> None:
        self.precision = _precision(compute_dtype)
        self.tile, self.fused = tiling.tile(program, total, self.precision, _architecture())
        self.program, self.total, self.steps = program, total, steps
        self.tiles = -(-total // self.tile.rows)
        self.arguments: dict[str, Any] = {
            "total": total, "batch": batch, "steps": steps, "tiles": self.tiles, "k": 0,
        }  # fmt: skip

    def recipe(self, **more: Any) -> Recipe:
        return Recipe(self.program, self.tile.chunk, self.precision, self.fused, **more)

    def operands(self, rows: Sequence[Tensor], tables: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        for letter, tensors in (("r", rows), ("t", tables), ("p", params)):
            self.arguments |= {f"{letter}{i}": x for i, x in enumerate(tensors)}

    def launch(self, source: Source, kernel: str, programs: int | None = None, **more: Any) -> None:
        from gdpd_kernels.backends.triton.launch import launch

        given = self.arguments | more
        launch(source, kernel, (self.tiles if programs is None else programs,), given, self.tile.rows, self.tile.warps)

    def shares(self, source: Source, like: Tensor, programs: int, wanted_tables: int) -> None:
        stride = source.shares["tables"] + self.steps * wanted_tables
        room = like.new_empty(programs, max(stride, 1))
        self.arguments |= {"shares": room, "share_stride": stride, "programs": programs}

    def pack(self, source: Source, recipe: Recipe, like: Tensor) -> None:
        """Lay the weights out in padded blocks."""
        from gdpd_kernels.backends.triton.launch import launch

        self.arguments["packed"] = like.new_empty(recipe.layout.packed_size)
        if "pack" in source.arguments:
            launch(source, "pack", (len(recipe.layout.packed),), self.arguments, self.tile.rows, self.tile.warps)

    def reduce(self, source: Source) -> None:
        """Add up the programs' shares."""
        from gdpd_kernels.backends.triton.launch import launch

        if "reduce" not in source.arguments:
            return
        outputs = [x for name in source.arguments["reduce"] if name.startswith("grad_") or name == "loss"
                   for x in (self.arguments[name],)]  # fmt: skip
        parts, largest = source.reductions
        grid = (-(-max(largest, *(x.numel() for x in outputs)) // _REDUCTION_BLOCK), parts)
        launch(source, "reduce", grid, self.arguments, _REDUCTION_BLOCK, 4)


class TritonBackend:
    """One launch forward, one and a reduction backward; more for BatchNorm over large batches (`kernels`)."""

    CAPABILITIES = Capabilities(
        devices=("cuda", "cpu") if _interpreted() else ("cuda",),
        dtypes=(_FLOAT32,),
        compute_dtypes=(torch.bfloat16, torch.float16),
        operations=tuple(KINDS),
        max_width=tiling.MAX_WIDTH,
        fuses_prior_gradient=True,
    )

    def unusable(self) -> list[str]:
        return list(_obstacles())

    def saved_shape(self, program: DenoiserProgram, dtype: torch.dtype, save: int) -> tuple[int, int, int]:
        return _saved_width(program, _SAVES[save]), 1, 0

    def reverse_sample(
        self,
        program: DenoiserProgram,
        z_short: Tensor,
        alpha: Tensor | None,
        noise: Tensor | None,
        seed: Tensor | None,
        rows: Sequence[Tensor],
        tables: Sequence[Tensor],
        params: Sequence[Tensor],
        coefficients: Sequence[float],
        num_samples: int,
        compute_dtype: torch.dtype,
        save: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from gdpd_kernels.backends.triton.launch import on_device

        batch, features = z_short.shape
        total, steps = num_samples * batch, len(coefficients) // 3
        call = _sampler_call(
            program, z_short, alpha, noise, seed, rows, tables, params, coefficients, num_samples, compute_dtype
        )
        z_hat = z_short.new_empty(total, features)
        stats = z_short.new_empty(steps, program.stats_width)
        saved = z_short.new_empty(saved_numel(self.saved_shape(program, _FLOAT32, save), steps, total))
        eta = any(coefficients[2::3])
        recipe = call.recipe(alpha=alpha is not None, drawn=noise is None, eta=eta, save=_SAVES[save])
        source = forward_source(recipe)
        call.arguments |= {"z_hat": z_hat, "stats": stats, "saved": saved}
        with on_device(z_short):
            call.arguments["coefficients"] = _coefficients(coefficients, z_short.device)
            call.pack(source, recipe, z_short)
            if call.fused:
                call.launch(source, "forward")
            else:
                _split_sample(call, source, recipe, z_hat, saved)
        return z_hat, stats, saved

    def reverse_sample_backward(
        self,
        grad: Tensor,
        program: DenoiserProgram,
        z_short: Tensor,
        alpha: Tensor | None,
        noise: Tensor | None,
        seed: Tensor | None,
        rows: Sequence[Tensor],
        tables: Sequence[Tensor],
        params: Sequence[Tensor],
        stats: Tensor,
        saved: Tensor,
        coefficients: Sequence[float],
        num_samples: int,
        compute_dtype: torch.dtype,
        save: int,
        wanted: Sequence[int],
    ) -> list[Tensor]:
        from gdpd_kernels.backends.triton.launch import on_device

        batch, features = z_short.shape
        total, steps, device = num_samples * batch, len(coefficients) // 3, z_short.device
        call = _sampler_call(
            program, z_short, alpha, noise, seed, rows, tables, params, coefficients, num_samples, compute_dtype
        )
        kept = saved_numel(self.saved_shape(program, _FLOAT32, save), steps, total)
        names = ["z", "alpha", *_names(program)]
        asked = frozenset(names[i] for i in wanted)
        if _SAVES[save] == "inputs" and any(name[0] == "p" for name in asked):
            raise ValueError("save: parameter gradients are wanted, but forward kept only what inputs need")
        call.arguments |= {
            "grad": dense("grad", grad, (total, features), _FLOAT32, device),
            "stats": dense("stats", stats, (steps, program.stats_width), _FLOAT32, device),
            "saved": dense("saved", saved, (kept,), _FLOAT32, device),
            "scratch": None,
        }
        recipe = call.recipe(alpha=alpha is not None, drawn=noise is None, save=_SAVES[save], wanted=asked)
        source = backward_source(recipe)
        inputs = dict(zip(names, [z_short, alpha, *rows, *tables, *params], strict=True))
        shapes = {name: x.shape for name, x in inputs.items() if x is not None}
        # Gradients of what is shared by the samples, and of an alpha that is broadcast, are summed below.
        made: dict[str, Tensor] = {}
        for name in asked:
            x = inputs[name]
            assert x is not None
            if name[0] in "zar":
                width = features if name[0] in "za" else x.shape[1]
                made[name] = grad.new_empty(total, width)
            else:
                made[name] = torch.empty_like(x, memory_format=torch.contiguous_format)
            if name not in source.written:
                made[name] = torch.zeros_like(made[name])
            call.arguments[f"grad_{name}"] = made[name]
        for name in ("z", "alpha"):
            call.arguments.setdefault(f"grad_{name}", None)
        programs = min(call.tiles, tiling.MAX_SHARES)
        tables_width = sum(w for i, w in enumerate(program.tables) if f"t{i}" in asked)
        with on_device(z_short):
            call.shares(source, grad, programs, tables_width)
            call.pack(source, recipe, z_short)
            call.arguments["coefficients"] = _coefficients(coefficients, device)
            if not call.fused:
                _split_sample_backward(call, source, recipe, programs, saved)
            else:
                if recipe.save == "states":
                    call.arguments["scratch"] = grad.new_empty(programs * call.tile.rows, recipe.kept.width)
                call.launch(source, "backward", programs)
            call.reduce(source)
            return [_summed(made[names[i]], shapes[names[i]], num_samples) for i in wanted]

    def prior_loss(
        self,
        program: DenoiserProgram,
        z_long: Tensor,
        noise: Tensor | None,
        seed: Tensor | None,
        signal: Tensor,
        sigma: Tensor,
        rows: Sequence[Tensor],
        tables: Sequence[Tensor],
        params: Sequence[Tensor],
        prediction: str,
        compute_dtype: torch.dtype,
        wanted: Sequence[int],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        from gdpd_kernels.backends.triton.launch import on_device

        batch = z_long.shape[0]
        device, shape = z_long.device, (batch, program.features)
        z_long = dense("z_long", z_long, shape, _FLOAT32, device)
        noise = None if noise is None else dense("noise", noise, shape, _FLOAT32, device)
        signal, sigma = (
            dense(name, x, (batch,), _FLOAT32, device) for name, x in (("signal", signal), ("sigma", sigma))
        )
        rows, tables, params = dense_all(program, rows, tables, params, batch, batch, _FLOAT32, device)
        check_seed(seed, noise is None, device)
        call = _Call(program, batch, batch, 1, compute_dtype)
        call.operands(rows, tables, params)
        names = ["z", *_names(program)]
        inputs = dict(zip(names, [z_long, *rows, *tables, *params], strict=True))
        asked = frozenset(names[i] for i in wanted)
        recipe = call.recipe(drawn=noise is None, wanted=asked, prediction=prediction)
        source = prior_source(recipe)
        stats, loss = z_long.new_empty(1, program.stats_width), z_long.new_empty(())
        made = {
            name: torch.empty_like(inputs[name]) if name in source.written else torch.zeros_like(inputs[name])
            for name in asked
        }
        call.arguments |= {f"grad_{name}": x for name, x in made.items()}
        call.arguments.setdefault("grad_z", None)
        call.arguments |= {
            "z_long": z_long, "noise": noise, "seed": seed, "signal": signal, "sigma": sigma, "stats": stats,
            "loss": loss,
        }  # fmt: skip
        programs = min(call.tiles, tiling.MAX_SHARES) if call.fused else call.tiles
        with on_device(z_long):
            call.shares(source, z_long, programs, 0)
            call.pack(source, recipe, z_long)
            if call.fused:
                width = recipe.kept.width if asked else 0
                call.arguments["kept"] = z_long.new_empty(programs * call.tile.rows, width)
                call.launch(source, "prior", programs)
            else:
                _split_prior(call, source, recipe, z_long)
            call.reduce(source)
        return loss, stats, [made[names[i]] for i in wanted]

    def update_running_stats(
        self,
        means: Sequence[Tensor],
        variances: Sequence[Tensor],
        counters: Sequence[Tensor],
        stats: Tensor,
        widths: Sequence[int],
        momenta: Sequence[float],
        rows: int,
    ) -> None:
        # What a step adds is known on the device alone, and counters stay there: nothing waits for the GPU.
        unbiased = rows / (rows - 1)
        columns = torch.split(stats, [size for width in widths for size in (width, width)], dim=1)
        for k in range(len(stats)):
            for i, (mean, var, counter, momentum) in enumerate(zip(means, variances, counters, momenta, strict=True)):
                if mean.numel() == 0:
                    continue
                counter += 1
                share = momentum if momentum >= 0 else 1.0 / counter.to(mean.dtype)
                mean.mul_(1 - share).add_(share * columns[2 * i][k].to(mean.dtype))
                var.mul_(1 - share).add_(share * unbiased * columns[2 * i + 1][k].to(var.dtype))


def _names(program: DenoiserProgram) -> list[str]:
    """Names of rows, tables and parameters, in the operators' order."""
    lists = (("r", program.rows), ("t", program.tables), ("p", program.params))
    return [f"{letter}{i}" for letter, items in lists for i in range(len(items))]


@lru_cache(maxsize=256)
def _saved_width(program: DenoiserProgram, save: str) -> int:
    if save == "states":
        return program.features
    return Recipe(program, 64, "ieee", True, save=save).kept.width if save else 0


def _summed(gradient: Tensor, shape: torch.Size, samples: int) -> Tensor:
    """A gradient per trajectory, summed over samples and to the shape of what was broadcast."""
    if gradient.shape == shape:
        return gradient
    if samples > 1:
        gradient = gradient.view(samples, -1, gradient.shape[1]).sum(0)
    return gradient.sum_to_size(shape).contiguous()


def _sampler_call(
    program: DenoiserProgram,
    z_short: Tensor,
    alpha: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    rows: Sequence[Tensor],
    tables: Sequence[Tensor],
    params: Sequence[Tensor],
    coefficients: Sequence[float],
    num_samples: int,
    compute_dtype: torch.dtype,
) -> _Call:
    """Checks what forward and backward have in common."""
    batch, features = z_short.shape
    total, steps, device = num_samples * batch, len(coefficients) // 3, z_short.device
    z_short = dense("z_short", z_short, (batch, program.features), _FLOAT32, device)
    noise = None if noise is None else dense("noise", noise, (num_samples, batch, features), _FLOAT32, device)
    rows, tables, params = dense_all(program, rows, tables, params, batch, steps, _FLOAT32, device)
    check_alpha(alpha, batch, features, _FLOAT32, device)
    check_seed(seed, any(coefficients[2::3]) or (alpha is not None and noise is None), device)
    call = _Call(program, total, batch, steps, compute_dtype)
    call.operands(rows, tables, params)
    row, col = alpha_strides(alpha)
    call.arguments |= {
        "z_short": z_short, "alpha": alpha, "alpha_row": row, "alpha_col": col, "noise": noise, "seed": seed,
    }  # fmt: skip
    return call


# --- the split plan's launches --------------------------------------------------------------------------------------


def _split_sample(call: _Call, source: Source, recipe: Recipe, z_hat: Tensor, saved: Tensor) -> None:
    total, features, steps = call.total, call.program.features, call.steps
    layout, n = recipe.layout, len(recipe.layout.segments)
    if recipe.save == "states":
        states = list(saved.view(steps, total, features))
    else:
        pair = z_hat.new_empty(2, total, features)
        states = [pair[k % 2] for k in range(steps)]
    states.append(z_hat)
    call.arguments |= {
        "moments": z_hat.new_empty(call.tiles, call.program.stats_width),
        "crossing": z_hat.new_empty(total, layout.crossing.width),
        "kept": None,
    }
    call.launch(source, "start", next_state=states[0])
    values = saved.view(steps, total, -1) if recipe.save in ("values", "inputs") else [None] * steps
    for k in range(steps):
        for s in range(n):
            call.launch(source, f"forward_{s}", state=states[k], next_state=states[k + 1], kept=values[k], k=k)


def _split_sample_backward(call: _Call, source: Source, recipe: Recipe, programs: int, saved: Tensor) -> None:
    total, features, steps = call.total, call.program.features, call.steps
    layout, n = recipe.layout, len(recipe.layout.segments)
    grad = call.arguments["grad"]
    pair = grad.new_empty(2, total, features)
    call.arguments |= {
        "sums": grad.new_empty(call.tiles, call.program.stats_width),
        "gradients": grad.new_empty(total, layout.gradients.width),
    }
    again = recipe.save == "states"
    values = [grad.new_empty(total, recipe.kept.width)] * steps if again else saved.view(steps, total, -1)
    grad_state = grad
    for k in reversed(range(steps)):
        if again:
            state = saved.view(steps, total, features)[k]
            call.launch(source, "recompute", state=state, kept=values[k], k=k)
        for s in reversed(range(n)):
            ends = {"grad_state": grad_state, "next_grad_state": pair[k % 2]}
            call.launch(source, f"backward_{s}", programs, kept=values[k], k=k, **ends)
        grad_state = pair[k % 2]
    if "finish" in source.arguments:
        call.launch(source, "finish", grad_state=grad_state)


def _split_prior(call: _Call, source: Source, recipe: Recipe, z_long: Tensor) -> None:
    total, layout = call.total, recipe.layout
    call.arguments |= {
        "state": z_long.new_empty(total, call.program.features),
        "residuals": z_long.new_empty(total, call.program.features),
        "moments": z_long.new_empty(call.tiles, call.program.stats_width),
        "sums": z_long.new_empty(call.tiles, call.program.stats_width),
        "crossing": z_long.new_empty(total, layout.crossing.width),
        "gradients": z_long.new_empty(total, layout.gradients.width),
        "kept": z_long.new_empty(total, recipe.kept.width if recipe.wanted else 0),
    }
    call.launch(source, "start", next_state=call.arguments["state"])
    for s in range(len(layout.segments)):
        call.launch(source, f"forward_{s}")
    for s in reversed(range(len(layout.segments))):
        if recipe.wanted:
            call.launch(source, f"backward_{s}")


BACKEND = TritonBackend()

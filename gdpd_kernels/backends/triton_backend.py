"""The Triton kernels as a backend for GPU tensors: checks tensors, chooses tile and plan, launches.

Nothing of Triton is imported before the first call on a GPU. With TRITON_INTERPRET=1 in the environment the kernels run
in Triton's interpreter, slowly, and take CPU tensors: that is how they are tested where there is no GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from gdpd_kernels.backends import Capabilities, saved_numel
from gdpd_kernels.backends.triton import tiling
from gdpd_kernels.backends.triton.call import (
    Call,
    interpreted,
    on_device_coefficients,
    split_prior,
    split_sample,
    split_sample_backward,
)
from gdpd_kernels.backends.triton.kernels import backward_source, forward_source, prior_source
from gdpd_kernels.backends.triton.module import MEMORY, REGISTERS, SPLIT, Recipe
from gdpd_kernels.backends.triton.tensors import alpha_strides, check_alpha, check_seed, dense, dense_all
from gdpd_kernels.program import KINDS, DenoiserProgram

_SAVES = ("", "values", "states", "inputs")  # by the numbers of `gdpd_kernels.ops`
_FLOAT32 = torch.float32
_OLDEST_CUDA = (8, 0)  # tensor cores that take tf32 and bfloat16
_HIP = ("gfx90a", "gfx942", "gfx950")


@cache
def _obstacles() -> tuple[str, ...]:
    why = []
    if importlib.util.find_spec("triton") is None:
        why.append('the package triton is missing; install it with pip install "gdpd-kernels[triton]"')
    if interpreted():
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


class TritonBackend:
    """One launch forward, one and a reduction backward; more for BatchNorm over large batches (`kernels`)."""

    CAPABILITIES = Capabilities(
        devices=("cuda", "cpu") if interpreted() else ("cuda",),
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

        def run() -> None:
            call.pack(source, recipe, z_short)
            programs = min(call.tiles, tiling.MAX_FORWARD_PROGRAMS) if call.plan == MEMORY else call.tiles
            call.room(source, z_short, programs)
            if call.plan == SPLIT:
                split_sample(call, source, recipe, z_short)
            else:
                call.launch(source, "forward", programs)

        with on_device(z_short):
            call.arguments["coefficients"] = on_device_coefficients(coefficients, z_short.device)
            call.tune(run)
            run()
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
        programs = call.programs
        tables_width = sum(w for i, w in enumerate(program.tables) if f"t{i}" in asked)
        with on_device(z_short):
            call.shares(source, grad, programs, tables_width)
            call.pack(source, recipe, z_short)
            call.arguments["coefficients"] = on_device_coefficients(coefficients, device)
            call.room(source, grad, programs)
            if recipe.save == "states":
                call.arguments["scratch"] = call.scratch(recipe.kept.width, grad, programs)
            if call.plan == SPLIT:
                split_sample_backward(call, source, recipe, grad)
            else:
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
        call = Call(program, batch, batch, 1, compute_dtype, device)
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
        programs = call.programs
        with on_device(z_long):
            call.shares(source, z_long, programs, 0)
            call.pack(source, recipe, z_long)
            call.room(source, z_long, programs)
            call.arguments["kept"] = call.scratch(recipe.kept.width if asked else 0, z_long, programs)
            if call.plan == SPLIT:
                split_prior(call, source, recipe, z_long)
            else:
                call.launch(source, "prior", programs)
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
    return Recipe(program, 64, "ieee", REGISTERS, save=save).kept.width if save else 0


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
) -> Call:
    """Checks what forward and backward have in common."""
    batch, features = z_short.shape
    total, steps, device = num_samples * batch, len(coefficients) // 3, z_short.device
    z_short = dense("z_short", z_short, (batch, program.features), _FLOAT32, device)
    noise = None if noise is None else dense("noise", noise, (num_samples, batch, features), _FLOAT32, device)
    rows, tables, params = dense_all(program, rows, tables, params, batch, steps, _FLOAT32, device)
    check_alpha(alpha, batch, features, _FLOAT32, device)
    check_seed(seed, any(coefficients[2::3]) or (alpha is not None and noise is None), device)
    call = Call(program, total, batch, steps, compute_dtype, device)
    call.operands(rows, tables, params)
    row, col = alpha_strides(alpha)
    call.arguments |= {
        "z_short": z_short, "alpha": alpha, "alpha_row": row, "alpha_col": col, "noise": noise, "seed": seed,
    }  # fmt: skip
    return call


BACKEND = TritonBackend()

"""The native CPU kernels as a backend: hands addresses of checked tensors to the compiled module.

GDPD_KERNELS_ISA names an instruction set (baseline, avx2, avx512, avx512_bf16) to use in place of the fastest one.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gdpd_kernels.backends import Capabilities, saved_numel
from gdpd_kernels.program import KINDS, DenoiserProgram

# The order is that of `enum class Kind` in csrc/plan.h.
_KINDS = (
    "linear",
    "batch_norm",
    "batch_norm_eval",
    "layer_norm",
    "rms_norm",
    "relu",
    "leaky_relu",
    "silu",
    "gelu",
    "gelu_tanh",
    "tanh",
    "sigmoid",
    "elu",
    "softplus",
    "add",
    "mul",
    "affine",
    "slice",
    "concat",
)
_INTERFACE = 2  # of the compiled module, see csrc/bindings.cpp
_PREDICTIONS = {"eps": 0, "x0": 1, "v": 2}
# Below so many multiply-adds in a call, forming a team of threads costs more than it saves.
_MACS_PER_THREAD = 100_000
_REUSED_FROM = 2**16  # bytes: what the C library keeps at hand itself


@cache
def _load() -> ModuleType | str:
    """The compiled module, or why there is none."""
    try:
        from gdpd_kernels import _native  # type: ignore[attr-defined]
    except ImportError as error:
        return (
            f"the compiled module is missing ({error}); install with a C++17 compiler at hand, "
            "GDPD_KERNELS_BUILD=1 shows what fails"
        )
    if (found := getattr(_native, "INTERFACE", 1)) != _INTERFACE:
        return (
            f"the compiled module has interface {found}, these sources need {_INTERFACE}: it was built from others; "
            "install again, or run: python setup.py build_ext --inplace"
        )
    _share_openmp(_native)
    if hasattr(os, "register_at_fork"):
        # The team's threads do not survive a fork, and OpenMP in the child would wait for them: it gets its own.
        os.register_at_fork(after_in_child=partial(_native.use_openmp, 0, 0, 0))
    usable = [name for name, ok in _native.instruction_sets() if ok]
    wanted = _forced_isa()
    if wanted and wanted not in usable:
        return f"GDPD_KERNELS_ISA={wanted}: not usable on this processor, which has {', '.join(usable)}"
    return _native


def _forced_isa() -> str:
    return os.environ.get("GDPD_KERNELS_ISA", "")


def _share_openmp(native: ModuleType) -> None:
    """Give the module torch's own OpenMP runtime, so that both use one team of threads."""
    for library in _openmp_libraries():
        try:
            runtime = ctypes.CDLL(library, mode=getattr(os, "RTLD_NOLOAD", 0) | getattr(os, "RTLD_LAZY", 1))
            entries = [runtime.GOMP_parallel, runtime.omp_get_thread_num, runtime.omp_get_num_threads]
        except (OSError, AttributeError):
            continue
        native.use_openmp(*(ctypes.cast(entry, ctypes.c_void_p).value for entry in entries))
        return


def _openmp_libraries() -> list[str]:
    """OpenMP runtimes that this process has loaded, those in torch's own folder first."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    found = dict.fromkeys(re.findall(r"(/\S*lib(?:gomp|iomp5|omp)[^/\s]*\.so\S*)", maps))
    home = str(Path(torch.__file__).parent)
    return sorted(found, key=lambda path: not path.startswith(home))


@cache
def instruction_set() -> str:
    """Name of the instruction set in use, '' where the module is missing."""
    native = _load()
    if isinstance(native, str):
        return ""
    return _forced_isa() or [name for name, ok in native.instruction_sets() if ok][-1]


@lru_cache(maxsize=256)
def _program(program: DenoiserProgram, isa: str) -> Any:
    """The program decoded by the compiled module; its code is read by `Plan::decode` in csrc/plan.cpp."""
    ids = {"z": 0}
    ids |= {f"r{i}": 1 + i for i in range(len(program.rows))}
    ids |= {f"t{i}": 1 + len(program.rows) + i for i in range(len(program.tables))}
    code = [program.features, len(program.rows), len(program.tables), *program.rows, *program.tables]
    code.append(len(program.params))
    for shape in program.params:
        code += [shape[0], shape[1] if len(shape) == 2 else 0]
    code.append(len(program.ops))
    numbers: list[float] = []
    for number, op in enumerate(program.ops, start=1):
        code += [_KINDS.index(op.kind), program.widths[f"%{number}"], len(op.inputs)]
        code += [ids[operand] for operand in op.inputs]
        named = dict(zip(KINDS[op.kind].params, op.params, strict=True))
        code += [-1 if (index := named.get(name)) is None else index for name in ("weight", "bias", "mean", "var")]
        numbers += [*op.attrs, 0.0, 0.0][:2]
        ids[f"%{number}"] = len(ids)
    code.append(ids[program.output])
    native = _load()
    assert not isinstance(native, str)
    return native.Program(code, numbers, isa)


@lru_cache(maxsize=256)
def _saved_shape(program: DenoiserProgram, isa: str, f64: bool, save: int) -> tuple[int, int, int]:
    shape: tuple[int, int, int] = _program(program, isa).saved_shape(f64, save)
    return shape


def _team(macs: int) -> int:
    """Threads for a call of so many multiply-adds."""
    return max(1, min(torch.get_num_threads(), 1 + macs // _MACS_PER_THREAD))


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What all calls of a program on so many rows and steps have in common.

    Args:
        plan: the program, decoded.
        shapes: of rows, tables and params, one after another.
        counts: of rows and tables.
        kept: numbers that forward keeps for backward.
        macs: about how many multiply-adds a call is worth.
    """

    plan: Any
    shapes: tuple[tuple[int, ...], ...]
    counts: tuple[int, int]
    kept: int
    macs: int


@lru_cache(maxsize=256)
def _sizes(
    program: DenoiserProgram, isa: str, batch: int, samples: int, steps: int, table_rows: int, f64: bool, save: int
) -> _Sizes:
    plan = _program(program, isa)
    shapes = (
        *((batch, width) for width in program.rows),
        *((table_rows, width) for width in program.tables),
        *program.params,
    )
    # What is not a product counts as twenty multiply-adds per number.
    macs = (program.macs + 20 * sum(program.widths.values())) * samples * batch * steps
    kept = saved_numel(_saved_shape(program, isa, f64, save), steps, samples * batch)
    return _Sizes(plan, shapes, (len(program.rows), len(program.tables)), kept, macs)


def _dense(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor, row after row in memory. An address tells a kernel nothing of what lies there: it is checked here."""
    if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_cpu:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, {tensor.dtype} on {tensor.device}; "
            f"expected {list(shape)}, {dtype} on cpu"
        )
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _operands(
    sizes: _Sizes, rows: Sequence[Tensor], tables: Sequence[Tensor], params: Sequence[Tensor], dtype: torch.dtype
) -> tuple[tuple[list[int], list[int], list[int]], list[Tensor]]:
    """Addresses of rows, tables and params, and all of them dense, to be held for as long as the addresses are used."""
    tensors = [*rows, *tables, *params]
    ends = sizes.counts[0], sum(sizes.counts)
    if (len(rows), len(tables)) != sizes.counts or len(tensors) != len(sizes.shapes):
        counts = {"rows": sizes.counts[0], "tables": sizes.counts[1], "params": len(sizes.shapes) - ends[1]}
        for (name, takes), given in zip(counts.items(), (rows, tables, params), strict=True):
            if len(given) != takes:
                raise ValueError(f"{name}: {len(given)} tensors; the program takes {takes}")
    addresses: list[int] | None = _load().dense_addresses(tensors, sizes.shapes, dtype)  # type: ignore[union-attr]
    if addresses is None:
        names = ["rows"] * ends[0] + ["tables"] * sizes.counts[1] + ["params"] * len(params)
        tensors = [_dense(*given, dtype) for given in zip(names, tensors, sizes.shapes, strict=True)]
        addresses = [x.data_ptr() for x in tensors]
    return (addresses[: ends[0]], addresses[ends[0] : ends[1]], addresses[ends[1] :]), tensors


def _mixing(alpha: Tensor | None, batch: int, features: int, dtype: torch.dtype) -> Tensor | None:
    """alpha, checked; a column stride of 0 tells the kernels that there is one weight per row."""
    if alpha is None:
        return None
    if (
        alpha.dim() != 2
        or alpha.shape[0] not in (1, batch)
        or alpha.shape[1] not in (1, features)
        or alpha.dtype is not dtype
        or not alpha.is_cpu
    ):
        raise ValueError(
            f"alpha has shape {list(alpha.shape)}, {alpha.dtype} on {alpha.device}; "
            f"expected what broadcasts to {[batch, features]}, {dtype} on cpu"
        )
    return alpha.contiguous() if alpha.shape[1] > 1 and alpha.stride(1) == 0 else alpha


def reused(numel: int, dtype: torch.dtype) -> Tensor:
    """An empty tensor in memory that the module hands out again when the tensor is gone. What forward keeps would else
    be fresh pages at every call, which the system takes longer to bring than the kernels to fill."""
    if numel * dtype.itemsize < _REUSED_FROM:
        return torch.empty(numel, dtype=dtype)
    memory = _load().Memory(numel * dtype.itemsize)  # type: ignore[union-attr]
    return torch.frombuffer(memory, dtype=dtype, count=numel)


def _check_seed(seed: Tensor | None, draws: bool) -> None:
    if draws and seed is None:
        raise ValueError("seed: noise must be drawn, but neither noise nor seed is given")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _seed(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed) & (2**64 - 1)


def _alpha_strides(alpha: Tensor | None) -> tuple[int, int]:
    if alpha is None:
        return 0, 0
    row, col = alpha.stride()
    return (0 if alpha.shape[0] == 1 else row), (0 if alpha.shape[1] == 1 else col)


class NativeBackend:
    """One call forward and one call backward, on all threads that torch would use."""

    CAPABILITIES = Capabilities(
        devices=("cpu",),
        dtypes=(torch.float32, torch.float64),
        compute_dtypes=(torch.bfloat16,),
        operations=_KINDS,
        max_width=16384,
        fuses_prior_gradient=True,
    )

    def unusable(self) -> list[str]:
        native = _load()
        return [native] if isinstance(native, str) else []

    def saved_shape(self, program: DenoiserProgram, dtype: torch.dtype, save: int) -> tuple[int, int, int]:
        return _saved_shape(program, instruction_set(), dtype == torch.float64, save)

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
        batch, features = z_short.shape
        total, steps = num_samples * batch, len(coefficients) // 3
        dtype = z_short.dtype
        f64 = dtype == torch.float64
        sizes = _sizes(program, instruction_set(), batch, num_samples, steps, steps, f64, save)
        z_short = _dense("z_short", z_short, (batch, program.features), dtype)
        noise = None if noise is None else _dense("noise", noise, (num_samples, batch, features), dtype)
        operands, _held = _operands(sizes, rows, tables, params, dtype)
        alpha = _mixing(alpha, batch, features, dtype)
        _check_seed(seed, draws=any(coefficients[2::3]) or (alpha is not None and noise is None))
        z_hat = z_short.new_empty(total, features)
        stats = z_short.new_empty(steps, program.stats_width)
        saved = reused(sizes.kept, dtype)
        _load().forward(  # type: ignore[union-attr]
            sizes.plan,
            f64,
            batch,
            num_samples,
            coefficients,
            _address(z_short),
            _address(alpha),
            *_alpha_strides(alpha),
            _address(noise),
            _seed(seed),
            *operands,
            compute_dtype == torch.bfloat16,
            save,
            _team(sizes.macs),
            _address(z_hat),
            _address(stats),
            _address(saved),
        )
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
        batch, features = z_short.shape
        total, steps, dtype = num_samples * batch, len(coefficients) // 3, z_short.dtype
        f64 = dtype == torch.float64
        sizes = _sizes(program, instruction_set(), batch, num_samples, steps, steps, f64, save)
        z_short = _dense("z_short", z_short, (batch, program.features), dtype)
        noise = None if noise is None else _dense("noise", noise, (num_samples, batch, features), dtype)
        operands, held = _operands(sizes, rows, tables, params, dtype)
        alpha = _mixing(alpha, batch, features, dtype)
        grad = _dense("grad", grad, (total, features), dtype)
        stats = _dense("stats", stats, (steps, program.stats_width), dtype)
        saved = _dense("saved", saved, (sizes.kept,), dtype)
        inputs = [z_short, alpha, *held]
        ends = 2 + sizes.counts[0], 2 + sum(sizes.counts)
        # The kernels write row after row. All inputs lie so by now but alpha.
        gradients = [
            torch.empty_like(inputs[i]) if i != 1 else alpha.new_empty(alpha.shape)  # type: ignore[arg-type,union-attr]
            for i in wanted
        ]
        addresses = [0] * len(inputs)
        for i, address in zip(wanted, map(Tensor.data_ptr, gradients), strict=True):
            addresses[i] = address
        summed: dict[int, Tensor] = {}  # gradients that the kernels give per trajectory, and that are summed below
        for at, i in enumerate(wanted):
            if i < ends[0] and gradients[at].shape[0] != total:
                width = features if i == 0 else program.rows[i - 2] if i > 1 else gradients[at].shape[1]
                summed[at] = z_short.new_empty(num_samples, batch, width)
                addresses[i] = summed[at].data_ptr()
        _load().backward(  # type: ignore[union-attr]
            sizes.plan,
            f64,
            batch,
            num_samples,
            coefficients,
            _address(z_short),
            _address(alpha),
            *_alpha_strides(alpha),
            _address(noise),
            _seed(seed),
            *operands,
            compute_dtype == torch.bfloat16,
            save,
            _team(sizes.macs),
            _address(stats),
            _address(saved),
            _address(grad),
            addresses[0],
            addresses[1],
            addresses[2 : ends[0]],
            addresses[ends[0] : ends[1]],
            addresses[ends[1] :],
        )
        for at, parts in summed.items():
            gradients[at] = parts.sum(0).sum_to_size(gradients[at].shape)
        return gradients

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
        batch, dtype = z_long.shape[0], z_long.dtype
        sizes = _sizes(program, instruction_set(), batch, 1, 1, batch, dtype == torch.float64, 0)
        z_long = _dense("z_long", z_long, (batch, program.features), dtype)
        noise = None if noise is None else _dense("noise", noise, (batch, program.features), dtype)
        signal, sigma = _dense("signal", signal, (batch,), dtype), _dense("sigma", sigma, (batch,), dtype)
        operands, held = _operands(sizes, rows, tables, params, dtype)
        _check_seed(seed, draws=noise is None)
        inputs = [z_long, *held]
        stats = z_long.new_empty(1, program.stats_width)
        gradients = [torch.empty_like(inputs[i]) for i in wanted]
        addresses = [0] * len(inputs)
        for i, address in zip(wanted, map(Tensor.data_ptr, gradients), strict=True):
            addresses[i] = address
        ends = 1 + sizes.counts[0], 1 + sum(sizes.counts)
        value = _load().prior_loss(  # type: ignore[union-attr]
            sizes.plan,
            dtype == torch.float64,
            batch,
            _address(z_long),
            _address(noise),
            _seed(seed),
            _address(signal),
            _address(sigma),
            *operands,
            _PREDICTIONS[prediction],
            compute_dtype == torch.bfloat16,
            _team(sizes.macs),
            _address(stats),
            bool(wanted),
            addresses[0],
            addresses[1 : ends[0]],
            addresses[ends[0] : ends[1]],
            addresses[ends[1] :],
        )
        return z_long.new_full((), value), stats, gradients

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
        kept: Sequence[int] = range(len(means))
        if not all(map(Tensor.numel, means)):
            layers = zip(means, variances, counters, strict=True)
            kept = [i for i, layer in enumerate(layers) if any(x.shape != (0,) for x in layer)]
            means, variances, counters = ([some[i] for i in kept] for some in (means, variances, counters))
        dtype = means[0].dtype if kept else torch.float32
        addresses = _load().dense_addresses  # type: ignore[union-attr]
        shapes = tuple((widths[i],) for i in kept)
        running = addresses([*means, *variances], shapes + shapes, dtype)
        counts = addresses(counters, ((),) * len(kept), torch.int64)
        if dtype not in (torch.float32, torch.float64) or running is None or counts is None:
            raise ValueError(
                "running statistics: expected dense tensors of one dtype, float32 or float64, as wide as their "
                "BatchNorm, and counters int64 [], on cpu; move the denoiser with .to(...)"
            )
        found = [running[: len(kept)], running[len(kept) :], counts]
        if len(kept) < len(widths):  # address 0: keeps none
            at = dict(zip(kept, range(len(kept)), strict=True))
            found = [[some[at[i]] if i in at else 0 for i in range(len(widths))] for some in found]
        stats = _dense("stats", stats, (len(stats), 2 * sum(widths)), stats.dtype)
        _load().update_running_stats(  # type: ignore[union-attr]
            dtype == torch.float64,
            stats.dtype == torch.float64,
            *found,
            _address(stats),
            len(stats),
            widths,
            momenta,
            rows,
        )


BACKEND = NativeBackend()

"""What a step of the sampler must compute and move at the least, what that takes on two GPUs, and launches.

Nothing here was measured on a GPU: peaks are the vendor's published ones, launches are counted, not timed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from gdpd_kernels.backends.triton import tiling
from gdpd_kernels.backends.triton.kernels import backward_source, forward_source
from gdpd_kernels.backends.triton.module import SPLIT, Recipe
from gdpd_kernels.benchmark import cases
from gdpd_kernels.benchmark.cases import Case
from gdpd_kernels.benchmark.tables import Rows, markdown

# Bytes a second of the device's memory, and dense operations a second of matrix products. NVIDIA A100 Tensor Core GPU
# data sheet (2021), A100 80GB SXM; NVIDIA H100 Tensor Core GPU data sheet (2023), H100 SXM, whose figures for tensor
# cores are with sparsity: halved here.
PEAKS = {
    "A100 80 GB SXM": {"bytes": 2039e9, "tf32": 156e12, "bf16": 312e12, "fp16": 312e12, "ieee": 19.5e12},
    "H100 SXM": {"bytes": 3.35e12, "tf32": 989e12 / 2, "bf16": 1979e12 / 2, "fp16": 1979e12 / 2, "ieee": 67e12},
}
CASES = (
    "paper-64x100-5-trainable",
    "paper-1024x100-5-trainable",
    "mlp-64x100-10-frozen",
    "mlp-1024x100-10-trainable",
    "mlp-4096x256-10-trainable",
)
# What eager PyTorch launches nothing for: views, and tensors that are made but not filled.
_FREE = {
    "alias", "as_strided", "detach", "empty", "expand", "permute", "select", "slice", "split", "squeeze", "t",
    "transpose", "unbind", "unsqueeze", "view", "_unsafe_view", "_reshape_alias", "empty_like", "new_empty",
    "empty_strided", "new_empty_strided", "lift_fresh",
}  # fmt: skip


class CountOperators(TorchDispatchMode):
    """Counts the operators that reach a device, by name; each is one launch on a GPU, or more."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in _FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def eager_launches(case: Case, how: str = "eager") -> int:
    """Operators of one call of an eager contender, forward and, where the case has one, backward."""
    call = cases.prepare(case.with_rows(min(case.batch, 8)), how)  # as many operators for any batch
    call()
    with CountOperators() as counter:
        call()
    return counter.counts.total()


def recipes(case: Case, precision: str = "tf32") -> tuple[Recipe, Recipe | None]:
    """Those of forward and backward, as the backend would choose them."""
    program = case.program
    tile, plan = tiling.tile(program, case.batch, precision, "cuda")
    lists = (("t", program.tables), ("p", program.params)) if case.mode == "trainable" else ()
    names = {"z", "alpha", *(f"{letter}{i}" for letter, items in lists for i in range(len(items)))}
    wanted = frozenset(names - {f"p{i}" for i in program.buffer_params})
    save = {"forward": "", "frozen": "inputs", "trainable": "values"}[case.mode]
    forward = Recipe(program, tile.chunk, precision, plan, alpha=True, save=save)
    if case.mode == "forward":
        return forward, None
    return forward, Recipe(program, tile.chunk, precision, plan, alpha=True, save=save, wanted=wanted)


def our_launches(case: Case) -> int:
    """Kernels of one call: in the split plan those between BatchNorms run once per step."""
    forward, backward = recipes(case)
    names = [*forward_source(forward).arguments, *(backward_source(backward).arguments if backward else ())]
    per_step = [name for name in names if forward.plan == SPLIT and name.rpartition("_")[2].isdigit()]
    return len(names) - len(per_step) + case.steps * len(per_step)


def kept_bytes(case: Case) -> float:
    """What forward writes for backward, and backward reads."""
    forward, backward = recipes(case)
    return 2 * 4.0 * case.steps * case.batch * forward.kept.width if backward else 0.0


def rows(names: Iterable[str] = CASES, precision: str = "tf32") -> Rows:
    """The table."""
    made: Rows = [
        (
            "case", "MFLOP per step", "kB per step", "of which kept for backward", *(f"floor, {gpu}" for gpu in PEAKS),
            "bound by", "launches, eager", "ours",
        )
    ]  # fmt: skip
    for name in names:
        case = Case.parse(name)
        kept = kept_bytes(case)
        moved = case.compulsory_bytes + kept
        floors, bounds = [], []
        for peak in PEAKS.values():
            arithmetic, traffic = case.flops / peak[precision], moved / peak["bytes"]
            floors.append(f"{1e6 * max(arithmetic, traffic):.2g} µs")
            bounds.append("arithmetic" if arithmetic > traffic else "memory")
        made.append(
            (
                name,
                f"{case.flops / case.steps / 1e6:.3g}",
                f"{moved / case.steps / 1e3:.3g}",
                f"{kept / moved:.0%}",
                *floors,
                " / ".join(dict.fromkeys(bounds)),
                str(eager_launches(case)),
                str(our_launches(case)),
            )
        )
    return made


def page() -> str:
    """The table of docs/gpu.md."""
    return markdown(rows())

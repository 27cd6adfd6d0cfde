"""`python -m bench.threads`: what it costs that torch's products and ours take turns in one process.

Two thread pools that fight for the same cores show as a mixture that takes longer than its parts. Three contenders are
timed in turn: torch's products alone, our forward and backward alone, and both one after the other; the last is
compared with the sum of the first two. How often they change places within a sample makes no difference to the sum.
"""

from __future__ import annotations

import argparse
import sys

import torch

import gdpd_kernels as gk
from gdpd_kernels.backends import native_backend
from gdpd_kernels.benchmark.cases import Case, prepare
from gdpd_kernels.benchmark.clock import Timing, interleave

LIMIT = 1.10
CASES = ("paper-64x100-5-trainable", "mlp-256x100-5-trainable", "mlp-1024x256-5-frozen")
PRODUCT = 384  # torch's share: a matrix product of this size, about as long as our smallest case


def measure(name: str, seconds: float) -> dict[str, Timing]:
    """Times of torch alone, ours alone, and both in turn.

    Args:
        name: a case as in `gdpd_kernels.benchmark.cases`.
        seconds: time to spend.
    """
    ours = prepare(Case.parse(name), "native")
    x = torch.randn(PRODUCT, PRODUCT)

    def theirs() -> None:
        (x @ x).relu_()

    def both() -> None:
        theirs()
        ours()

    return interleave({"torch": theirs, "ours": ours, "both": both}, seconds)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.threads", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="time per case, in seconds (default 10)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    usable = {entry["name"]: entry["usable"] for entry in gk.backends()}
    if not usable["native"]:
        print("native kernels are not usable here; python -m gdpd_kernels.info says why", file=sys.stderr)
        return 1
    native = native_backend._load()
    print(f"{torch.get_num_threads()} threads, torch's OpenMP shared: {native.uses_openmp()}")  # type: ignore[union-attr]
    worst = 0.0
    print(f"{'medians':<28}{'torch':>10}{'ours':>10}{'sum':>10}{'both':>10}{'ratio':>8}{'of 20 % quantiles':>20}")
    for name in CASES:
        torch_alone, ours, both = measure(name, options.seconds).values()
        total = torch_alone.median + ours.median
        ratio = both.median / total
        worst = max(worst, ratio)
        columns = (torch_alone.median, ours.median, total, both.median)
        # Where other processes want the cores too, the quantile says more.
        quiet = both.low / (torch_alone.low + ours.low)
        print(f"{name:<28}" + "".join(f"{1e3 * x:>8.3f}ms" for x in columns) + f"{ratio:>8.3f}{quiet:>20.3f}")
    print(f"worst ratio of medians {worst:.3f}, limit {LIMIT}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())

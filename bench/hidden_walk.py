"""The walk in hidden space against the direct walk, in processor time of one thread: `python -m bench.hidden_walk`.

For each network and size: milliseconds of the direct walk, its time over that of the walk in hidden space, measured and
as the cost model has it, and which of the two the library takes. Noise is drawn; alpha is one number per sample.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import gdpd_kernels as gk
from gdpd.denoisers import MLPDenoiser
from gdpd_kernels import functional
from gdpd_kernels.hidden_walk import PASSES, hidden_walk

NETWORKS = ((100, 100, 100), (256, 64, 64), (512, 128, 128), (100, 256, 256), (100, 32, 32))
ROWS, STEPS = (64, 1024, 4096), (10, 50)


@contextmanager
def walking(hidden: bool) -> Iterator[None]:
    """Every call in hidden space, or none."""
    kept = functional._hidden_walk_that_pays
    functional._hidden_walk_that_pays = (lambda program, *_: hidden_walk(program)) if hidden else (lambda *_: None)
    try:
        yield
    finally:
        functional._hidden_walk_that_pays = kept


def call(net: nn.Module, rows: int, steps: int, mode: str) -> Callable[[], object]:
    z, alpha = torch.randn(rows, net.features), torch.rand(rows)  # type: ignore[arg-type]
    table = gk.ddim_table(num_inference_steps=steps)
    grad = torch.randn_like(z)
    net.requires_grad_(mode == "trainable")

    def sample() -> Tensor:
        return gk.reverse_sample(net, z, table=table, alpha=alpha, seed=1, backend="native")

    def both() -> object:
        z.requires_grad_()
        alpha.requires_grad_()
        wanted = [z, alpha, *(p for p in net.parameters() if p.requires_grad)]
        return torch.autograd.grad(sample(), wanted, grad)

    def forward() -> object:
        with torch.no_grad():
            return sample()

    return forward if mode == "forward" else both


def compare(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Medians of seconds of processor time: direct, and in hidden space, taken in turn."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _, hidden in itertools.product(range(repeats + 1), seconds):
        with walking(hidden):
            run()
            calls = 0
            started = time.thread_time()
            while calls == 0 or time.thread_time() - started < 0.01:
                run()
                calls += 1
            seconds[hidden].append((time.thread_time() - started) / calls)
    return statistics.median(seconds[False][1:]), statistics.median(seconds[True][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'network':<20}{'rows':>6}{'steps':>6}  {'mode':<10}{'direct ms':>10}{'gain':>7}{'model':>7}  taken")
    for (features, *hidden), rows, steps in itertools.product(NETWORKS, arguments.rows, arguments.steps):
        torch.manual_seed(0)
        net = MLPDenoiser(features, hidden)
        program = gk.capture(net, features).program
        walks = hidden_walk(program)
        assert walks is not None
        name = "-".join(map(str, (features, *hidden, features)))
        for mode, computes in (("forward", "forward"), ("frozen", "inputs"), ("trainable", "parameters")):
            macs, saved = PASSES[computes] * rows * steps * program.macs, walks.saved(rows, steps, computes)
            model, taken = macs / (macs - saved), "hidden" if saved > 0 else "direct"
            direct, through = compare(call(net, rows, steps, mode), arguments.repeats)
            print(
                f"{name:<20}{rows:>6}{steps:>6}  {mode:<10}{1e3 * direct:>10.3f}{direct / through:>7.2f}{model:>7.2f}"
                f"  {taken}",
                flush=True,
            )


if __name__ == "__main__":
    main()

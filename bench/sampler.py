"""asv benchmarks of the reverse sampler: the whole grid in seconds per call, and peak memory of its large cases.

A combination whose matrix products alone would take longer than BENCH_BUDGET seconds (default 0.5; "inf" for all) at
a modest 50 GFLOP/s is skipped, so that `asv run --quick` ends.
"""

from __future__ import annotations

import os

from gdpd_kernels.benchmark import cases
from gdpd_kernels.benchmark.cases import Case

_RATE = 50e9
HOWS = ("native", "native_bf16", "reference", "eager")


class _Sampler:
    """Prepares the call of a combination; a benchmark runs it."""

    param_names = ("network", "mode", "how", "batch", "width", "steps")
    timeout = 600

    def setup(self, network: str, mode: str, how: str, batch: int, width: int, steps: int) -> None:
        case = Case(network, batch, width, steps, mode)
        if not case.sensible or case.flops > float(os.environ.get("BENCH_BUDGET", "0.5")) * _RATE:
            raise NotImplementedError
        self.call = cases.prepare(case, how)


class Sample(_Sampler):
    """Seconds per call over the whole grid."""

    params = (tuple(cases.NETWORKS), cases.MODES, HOWS, cases.BATCHES, cases.WIDTHS, cases.STEPS)

    def time_sample(self, *_: object) -> None:
        self.call()


class SampleRelease(_Sampler):
    """Seconds per call of the paper's network as the public releases write it."""

    params = (("paper",), ("trainable",), ("release",), cases.BATCHES, cases.WIDTHS, cases.STEPS)

    def time_sample(self, *_: object) -> None:
        self.call()


class SampleCompiled(_Sampler):
    """Seconds per call of torch.compile, warmed up. It compiles for up to minutes: a few sizes."""

    params = (("mlp",), ("forward", "frozen", "trainable"), ("compiled",), (64, 1024), (100,), (5, 10))
    smoke = False  # `make bench` leaves it out

    def setup(self, *args: object) -> None:
        super().setup(*args)  # type: ignore[arg-type]
        for _ in range(3):
            self.call()

    def time_sample(self, *_: object) -> None:
        self.call()


class SampleMemory(_Sampler):
    """Peak memory of the whole process, PyTorch itself included; `bench.compare` shows what the call adds."""

    params = (
        ("mlp",),
        ("frozen", "trainable"),
        ("native", "reference", "eager"),
        (64, 1024, 4096),
        (100, 512),
        (5, 50),
    )

    def peakmem_sample(self, *_: object) -> None:
        self.call()

"""The names of a step's parts as NVTX ranges, where the nvtx package is installed and a tool such as Nsight listens."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from gdpd_kernels.ranges import listening

DOMAIN = "gdpd"


@contextmanager
def nvtx_ranges() -> Iterator[None]:
    """Within the block every span is an NVTX range of the domain "gdpd"; without nvtx or a tool, nothing happens."""
    if importlib.util.find_spec("nvtx") is None:
        yield
        return
    import nvtx

    if not nvtx.enabled():
        yield
        return
    with listening(lambda name: nvtx.annotate(name, domain=DOMAIN)):
        yield

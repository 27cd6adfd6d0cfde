"""The names of a step's parts as NVTX ranges, where the nvtx package is installed and a tool such as Nsight listens."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from gdpd_kernels.ranges import Name, listening

DOMAIN = "gdpd"


@contextmanager
def nvtx_ranges() -> Iterator[None]:
    """Within the block every span is an NVTX range of the domain "gdpd"; without nvtx or a tool, nothing happens.

    Of what is known of a span the batch is the range's payload and the backend its category; the rest stands in its
    message, as in "sampler forward, steps 5".
    """
    if importlib.util.find_spec("nvtx") is None:
        yield
        return
    import nvtx

    if not nvtx.enabled():
        yield
        return

    def annotate(name: Name) -> AbstractContextManager[object]:
        rest = [f"{key} {value}" for key, value in name.facts.items() if key not in ("batch", "backend")]
        message = ", ".join([str(name), *rest])
        batch, backend = name.facts.get("batch"), name.facts.get("backend")
        return nvtx.annotate(message, domain=DOMAIN, category=backend, payload=batch)

    with listening(annotate):
        yield

"""The Triton kernels compiled ahead of time for GPUs that are not there: machine code, registers, shared memory."""

from __future__ import annotations

import pytest

from programs import mlp

pytest.importorskip("triton", reason="the extra `triton` is not installed")

from bench.gpu_static import SHARED_LIMIT, TARGETS, inspect, sources


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_forward_fits_the_target_and_uses_its_matrix_units(target: str) -> None:
    tile, (forward, _) = sources(mlp(32, 32), 1024, "tf32", target)
    found = inspect(forward, "forward", target, tile)
    assert found.spills == 0
    assert found.stack == 0
    assert found.matrix > 0
    assert 0 < found.shared <= SHARED_LIMIT[target]
    assert found.instructions > 100

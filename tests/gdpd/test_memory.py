"""Peak memory of a stretch belongs to that stretch, not to what the process did before."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from gdpd.training import memory
from gdpd.training.memory import peak_memory

CPU = torch.device("cpu")
BLOCK_MIB = 96


def allocate() -> None:
    np.ones(BLOCK_MIB * 2**20, dtype=np.uint8)  # written to, so resident; above malloc's threshold, so given back


@pytest.mark.skipif(sys.platform != "linux", reason="the mark can be set back on Linux only")
def test_peak_is_of_the_block_alone() -> None:
    with peak_memory(CPU) as before:
        pass
    with peak_memory(CPU) as large:
        allocate()
    with peak_memory(CPU) as after:
        pass
    assert set(large) == {"peak_memory"}
    for small in (before, after):
        assert 0.95 * BLOCK_MIB < large["peak_memory"] - small["peak_memory"] < 1.2 * BLOCK_MIB


def test_a_mark_that_cannot_be_set_back_counts_only_where_it_rises(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = iter([100.0, 150.0, 150.0, 150.0])
    monkeypatch.setattr(memory, "_reset", lambda: False)
    monkeypatch.setattr(memory, "_lifetime_peak", lambda: next(marks))
    with peak_memory(CPU) as risen:
        pass
    with peak_memory(CPU) as hidden:
        pass
    assert risen == {"peak_memory": 150.0}
    assert hidden == {}


def test_lifetime_peak_is_in_mebibytes() -> None:
    if sys.platform == "win32":
        assert memory._lifetime_peak() == 0.0
    else:
        assert 30 < memory._lifetime_peak() < 64 * 1024  # a Python with torch loaded

"""Peak memory of a stretch belongs to that stretch, not to what the process did before."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch

from gdpd.training import memory
from gdpd.training.memory import peak_memory

CPU = torch.device("cpu")
BLOCK_MIB = 96


def allocate() -> None:
    # Fresh pages, written to and given back; an allocator may have free ones that are resident already.
    with mmap.mmap(-1, BLOCK_MIB * 2**20) as block:
        for _ in range(BLOCK_MIB):
            block.write(b"1" * 2**20)


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

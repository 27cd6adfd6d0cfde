"""Fixtures shared by the tests of `gdpd`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from a second thread, and on a busy machine lose a lot by waiting for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_thread_again() -> Iterator[None]:
    """What a test runs may pin a number of its own, and on it depend the last bits of torch's sums in the next one."""
    yield
    torch.set_num_threads(1)

"""Soft-DTW by anti-diagonals against the recursion cell by cell, finite differences, and aeon's implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdpd.distillers.soft_dtw import soft_dtw
from test_losses import soft_dtw_by_cells


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 6),
    m=st.integers(1, 7),
    gamma=st.sampled_from([1e-3, 0.3, 1.2, 50.0]),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_those_of_the_recursion(n: int, m: int, gamma: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(3, steps, 2, generator=generator).double().requires_grad_() for steps in (n, m))
    ends = [torch.randint(1, steps + 1, (3,), generator=generator) for steps in (n, m)]
    for lengths in ((None, None), ends):
        ours = soft_dtw(x, y, gamma, *lengths)
        rows = []
        for i in range(3):
            own, other = (steps if end is None else int(end[i]) for steps, end in zip((n, m), lengths, strict=True))
            rows.append(soft_dtw_by_cells(x[i, :own], y[i, :other], gamma))
        theirs = torch.stack(rows)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        weights = torch.tensor([1.0, -2.0, 0.5]).double()
        for a, b in zip(*(torch.autograd.grad((v * weights).sum(), (x, y)) for v in (ours, theirs)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_gradients_are_finite_differences() -> None:
    x, y = torch.randn(2, 4, 3).double().requires_grad_(), torch.randn(2, 5, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: soft_dtw(a, b, 0.7), (x, y))


def test_the_value_is_that_of_aeon() -> None:
    from aeon.distances import soft_dtw_distance

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 11)), rng.normal(size=(2, 7))
    value = soft_dtw(torch.from_numpy(x.T)[None], torch.from_numpy(y.T)[None], 1.2)
    assert float(value) == pytest.approx(soft_dtw_distance(x, y, gamma=1.2), rel=1e-9)


def test_float32_is_as_near_to_float64_as_the_recursion_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, steps, 8, generator=generator) for steps in (20, 27))
    exact = soft_dtw(x.double(), y.double(), 1.2)
    ours = (soft_dtw(x, y, 1.2) - exact).abs().max()
    loops = (torch.stack([soft_dtw_by_cells(a, b, 1.2) for a, b in zip(x, y, strict=True)]) - exact).abs().max()
    rounding = torch.finfo(torch.float32).eps * exact.abs().max()
    assert float(ours) <= 2 * float(loops) + float(rounding)


def test_autocast_does_not_coarsen_the_costs() -> None:
    x, y = torch.randn(2, 9, 8), torch.randn(2, 12, 8)
    expected = soft_dtw(x, y, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(soft_dtw(x, y, 1.0), expected)


def test_what_does_not_fit_is_refused() -> None:
    x = torch.randn(2, 4, 3)
    with pytest.raises(ValueError, match="gamma=0 is not above 0"):
        soft_dtw(x, x, 0)
    for y in (torch.randn(3, 4, 3), torch.randn(2, 4, 2), torch.randn(4, 3)):
        with pytest.raises(ValueError, match=r"expected \[batch, n, width\]"):
            soft_dtw(x, y, 1.0)

"""The rules by which results are held to the float64 reference; stated here once.

Sizes and errors are Euclidean norms. A gradient's error is judged beside the whole set of gradients, not beside its
own size: the true gradient of a bias before BatchNorm is exactly zero, that of a number alpha a sum of terms that
cancel, and what any arithmetic finds there beyond the truth is rounding of those terms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from problem import Result

# Units of rounding that are nobody's fault: sums in another order, a multiply-add in one rounding, and the luck of a
# plain run whose errors happened to cancel.
ROUNDINGS = {torch.float32: 8, torch.bfloat16: 1, torch.float16: 1}
FLOAT64 = 1e-12


def size(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.detach(), dtype=torch.float64))


def scales(exact: Result) -> dict[str, float]:
    """What an error is measured by: a value by its own size, a gradient by that of the whole set."""
    whole = math.hypot(*(size(x) for key, x in exact.items() if key.startswith("grad")))
    return {key: whole if key.startswith("grad") else size(x) for key, x in exact.items()}


def assert_same_form(found: Result, exact: Result, dtype: torch.dtype) -> None:
    assert list(found) == list(exact)
    for key, x in exact.items():
        assert found[key].shape == x.shape, key
        assert found[key].dtype == dtype, key
        assert found[key].isfinite().all(), f"{key} is not finite"


def assert_exact(found: Result, exact: Result, limit: float = FLOAT64) -> None:
    """float64 results equal the reference's to 1e-12 of their size."""
    assert_same_form(found, exact, torch.float64)
    for key, scale in scales(exact).items():
        error = size(found[key] - exact[key])
        assert error <= limit * scale, f"{key}: error {error:.2e} of {scale:.2e}, {error / (scale or 1):.1e} relative"


def assert_as_accurate(
    found: Result, plain: Result, exact: Result, precision: torch.dtype, state: torch.dtype = torch.float32
) -> None:
    """The error is at most twice that of plain PyTorch in the same precision, plus rounding.

    Args:
        found: results under test.
        plain: those of the reference, so of plain PyTorch, in the same precision.
        exact: those of the reference in float64, of the same inputs.
        precision: of the matrix products.
        state: dtype of the results.
    """
    assert_same_form(found, exact, state)
    rounding = ROUNDINGS[precision] * torch.finfo(precision).eps / 2
    for key, scale in scales(exact).items():
        error, allowed = size(found[key] - exact[key]), 2 * size(plain[key] - exact[key])
        assert error <= allowed + rounding * scale, (
            f"{key}: error {error:.2e}, twice plain PyTorch's is {allowed:.2e}, rounding {rounding * scale:.2e}"
        )


def assert_identical(found: Result, expected: Result) -> None:
    """The same bits."""
    assert list(found) == list(expected)
    for key, x in expected.items():
        assert found[key].shape == x.shape, key
        assert torch.equal(found[key], x), f"{key} differs by {float((found[key] - x).abs().max()):.1e}"

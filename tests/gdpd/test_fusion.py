"""NoiseFusion: alpha is a weight, of the kind asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdpd.fusion import NoiseFusion


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(1, 40), st.sampled_from(["per_sample", "per_dimension"]))
def test_learned_alpha_lies_strictly_between_zero_and_one(batch: int, features: int, kind: str) -> None:
    alpha = NoiseFusion(features, kind)(torch.randn(batch, features))
    assert alpha.shape == (batch, 1 if kind == "per_sample" else features)
    assert bool(((alpha > 0) & (alpha < 1)).all())


def test_per_sample_alpha_is_the_first_component_of_a_softmax_over_two() -> None:
    torch.manual_seed(0)
    fusion, z = NoiseFusion(16).eval(), torch.randn(5, 16)
    expected = fusion.logits(fusion.bottleneck(z)).softmax(1)[:, :1]
    torch.testing.assert_close(fusion(z), expected)


def test_fixed_alpha_is_that_number_and_learns_nothing() -> None:
    fusion = NoiseFusion(16, 0.25)
    assert fusion(torch.randn(3, 16)).tolist() == [[0.25]]
    assert not list(fusion.parameters())


def test_learned_alpha_passes_gradient_to_the_feature() -> None:
    z = torch.randn(4, 16, requires_grad=True)
    NoiseFusion(16)(z).sum().backward()
    assert z.grad is not None
    assert float(z.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("kind", "told"), [("per_sampel", "did you mean 'per_sample'"), (1.5, "outside"), (-0.1, "outside")]
)
def test_unknown_kind_or_weight_outside_its_interval_is_refused(kind: str | float, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        NoiseFusion(16, kind)

"""Feature vectors in tokens and back."""

from __future__ import annotations

import pytest
import torch

from gdpd.tokens import TokenSplit, token_split


@pytest.mark.parametrize(("features", "width", "pad"), [(12, 4, False), (12, 12, False), (10, 4, True), (3, 8, True)])
def test_tokens_are_consecutive_numbers_and_join_to_the_vector(features: int, width: int, pad: bool) -> None:
    split = TokenSplit(features, width, pad)
    z = torch.randn(5, features)
    tokens = split.split(z)
    assert tokens.shape == (5 * split.tokens, width)
    for row in range(5):
        for i in range(split.tokens * width):
            expected = float(z[row, i]) if i < features else 0.0
            assert float(tokens[row * split.tokens + i // width, i % width]) == expected
    assert torch.equal(split.join(tokens), z)


@pytest.mark.parametrize(
    ("features", "width", "tokens"), [(100, 10, 10), (512, 64, 8), (2048, 64, 32), (32, 4, 8), (66, 6, 11), (7, 1, 7)]
)
def test_the_width_taken_makes_eight_tokens_or_more_of_at_most_64(features: int, width: int, tokens: int) -> None:
    split = token_split(features, None)
    assert (split.width, split.tokens) == (width, tokens)


def test_padding_that_is_asked_for_keeps_the_paper_s_width() -> None:
    assert token_split(600, None, pad=True) == TokenSplit(600, 64, True)
    assert token_split(97, None, pad=True) == TokenSplit(97, 12, True)


@pytest.mark.parametrize(
    ("features", "width", "told"),
    [
        (100, 64, r"token_width=64 does not divide .* 100 numbers. .* \(1, 2, 4, .*, 50, 100\), or pad_tokens"),
        (100, 0, "width=0"),
        (97, None, "97 numbers has no divisor near 12 to cut it by, only 1.*pad_tokens=True"),
        (134, None, "134 numbers has no divisor near 16"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_way_out(features: int, width: int | None, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        token_split(features, width)


def test_wide_tokens_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="token_width=257: tokens wider than 256 are reported to diverge"):
        token_split(514, 257)

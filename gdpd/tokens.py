"""A feature vector cut in tokens of equal width, each of which is diffused on its own (GenDD, arXiv 2507.14503)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

WIDEST = 64  # the width that the paper uses; tokens over 256 are reported there to diverge
_DIVERGES_FROM = 256


@dataclass(frozen=True)
class TokenSplit:
    """How feature vectors of `features` numbers are cut in `tokens` tokens of `width` numbers.

    Attributes:
        features: width D of the feature vector.
        width: width of a token.
        pad: whether zeros fill up the last token, where `width` does not divide D.

    Raises:
        ValueError: a width below 1, or one that does not divide D without padding.
    """

    features: int
    width: int
    pad: bool = False

    def __post_init__(self) -> None:
        for name in ("features", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} of a token split is below 1")
        if self.features % self.width and not self.pad:
            divisors = [n for n in range(1, self.features + 1) if self.features % n == 0]
            raise ValueError(
                f"token_width={self.width} does not divide the teacher's feature of {self.features} numbers. Give a "
                f"divisor ({', '.join(map(str, divisors))}), or pad_tokens=True, which adds "
                f"{self.tokens * self.width - self.features} zeros."
            )
        if self.width > _DIVERGES_FROM:
            warnings.warn(
                f"token_width={self.width}: tokens wider than {_DIVERGES_FROM} are reported to diverge "
                "(arXiv 2507.14503).",
                UserWarning,
                stacklevel=3,
            )

    @property
    def tokens(self) -> int:
        """How many tokens a vector makes."""
        return -(-self.features // self.width)

    def split(self, z: Tensor) -> Tensor:
        """[batch, D] → [batch · tokens, width]: the tokens of the first vector in order, then those of the next."""
        padding = self.tokens * self.width - self.features
        return (F.pad(z, (0, padding)) if padding else z).reshape(-1, self.width)

    def join(self, tokens: Tensor) -> Tensor:
        """What `split` was given: [batch · tokens, width] → [batch, D]; padding is dropped."""
        return tokens.reshape(-1, self.tokens * self.width)[:, : self.features]


def token_split(features: int, width: int | None, pad: bool = False) -> TokenSplit:
    """The split of vectors of `features` numbers; `width` None takes the widest of at most 64 that divides them.

    Raises:
        ValueError: as `TokenSplit`; or no width from 8 to 64 divides `features`, and none is given.
    """
    if width is not None:
        return TokenSplit(features, width, pad)
    if pad:
        return TokenSplit(features, min(features, WIDEST), pad)
    found = max(n for n in range(1, min(features, WIDEST) + 1) if features % n == 0)
    if found < min(features, 8):
        raise ValueError(
            f"the teacher's feature of {features} numbers has no divisor from 8 to {WIDEST} to cut it by. Give "
            f"pad_tokens=True, which adds zeros up to the next multiple of {WIDEST}, or a token_width of your own."
        )
    return TokenSplit(features, found)

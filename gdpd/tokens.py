"""A feature vector cut in tokens of equal width, each of which is diffused on its own (GenDD, arXiv 2507.14503)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

WIDEST = 64  # the width that the paper uses; tokens over 256 are reported there to diverge
TOKENS = 8  # what it makes of the narrowest feature there, of 512 numbers
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
    """The split of vectors of `features` numbers.

    With `width` None it is the widest divisor that makes 8 tokens or more of 64 numbers or fewer: 64 of 512 to 2048, as
    the paper cuts, and 10 of 100. With `pad`, it need not divide.

    Raises:
        ValueError: as `TokenSplit`; or no divisor is near that width, and none is given.
    """
    if width is not None:
        return TokenSplit(features, width, pad)
    limit = max(1, min(WIDEST, features // TOKENS))
    if pad:
        return TokenSplit(features, limit, pad)
    found = max(n for n in range(1, limit + 1) if features % n == 0)
    if 4 * found < limit:
        raise ValueError(
            f"the teacher's feature of {features} numbers has no divisor near {limit} to cut it by, only {found}. Give "
            "pad_tokens=True, which fills up the last token with zeros, or a token_width of your own."
        )
    return TokenSplit(features, found)

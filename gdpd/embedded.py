"""GenDD's head as the kernels take it in training: a denoiser of one width, whose condition is embedded already."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gdpd.denoisers import AdaLNDenoiser


class EmbeddedHead(nn.Module):
    """``module(z, t, given)``: the head over the embedding of its condition, which many rows of a step share.

    With `variance` the prediction is the noise and, beside it, the interpolation of the variance. Since a denoiser
    predicts what is as wide as its state, the state is as wide as both then: the token, and numbers that nobody reads.

    Holds no parameters but the head's, so it is not to be made part of another module's state.

    Args:
        head: the denoiser.
        variance: whether the variance is predicted as well.
    """

    def __init__(self, head: AdaLNDenoiser, variance: bool) -> None:
        super().__init__()
        self.head = head
        self.width = head.features
        self.features = 2 * head.features if variance else head.features

    def forward(self, z: Tensor, t: Tensor, given: Tensor) -> Tensor:
        """Prediction ``[rows, features]`` from ``z`` ``[rows, features]``, int64 ``t`` ``[rows]`` and ``given``
        ``[rows, hidden]``, from `embed_tokens`."""
        return self.head.from_embedding(z[:, : self.width], t, given)[:, : self.features]


def embed_tokens(head: AdaLNDenoiser, c: Tensor, no_condition: Tensor, dropped: Tensor) -> Tensor:
    """What `EmbeddedHead` takes as `given`, for every token of every row of `c`, several times over.

    The Linear of the condition runs once for each row of `c`, not for each of its tokens and repetitions.

    Args:
        head: the denoiser.
        c: conditions, ``[batch, C]``.
        no_condition: what stands in the place of a dropped one, ``[C]``.
        dropped: bool ``[repeats, batch, tokens]``.

    Returns:
        ``[repeats · batch · tokens, hidden]``.
    """
    embedded = head.cond_embedding(torch.cat([c, no_condition[None]]))
    rows = torch.where(dropped[..., None], embedded[-1], embedded[:-1, None])
    return (rows + head.token_embedding).flatten(0, 2)

"""Counter-based Gaussian noise in plain tensor arithmetic, which every backend reproduces word for word.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is the 64-bit
seed (low word, high word). The four counter words are ``(col // 4, row, step, sample)`` for the element at
``[row, col]`` of a matrix; the four words that come out serve columns ``4 g .. 4 g + 3``. Nothing is ever
stored for the backward pass: the same counters give the same words again.

``step`` 0 is the noise of the start (and of ``prior_loss``), ``step`` k + 1 the eta noise of sampler step k;
``sample`` is the index among ``num_samples``.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MASK16 = 0xFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# A 32-bit word in an int or in an int64 tensor: the round function is the same arithmetic on both.
Word: TypeAlias = int | Tensor


def philox_words(
    seed: int | Tensor,
    rows: int,
    cols: int,
    step: int = 0,
    sample: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """The raw 32-bit words behind a [rows, cols] matrix of noise.

    Args:
        seed: 64-bit key: an int (taken modulo 2^64) or an int64 tensor of one element, which may be traced by
            torch.compile.
        rows: rows of the matrix.
        cols: columns of the matrix.
        step: third counter word, 0 .. 2^32 - 1.
        sample: fourth counter word, 0 .. 2^32 - 1.
        device: where the words go; the seed's device if it is a tensor, else the CPU.

    Returns:
        int64 tensor [rows, ceil(cols / 4), 4] with values in 0 .. 2^32 - 1.

    Raises:
        ValueError: a negative size, a counter word out of range, or a seed tensor that is not one integer.
    """
    if rows < 0 or cols < 0:
        raise ValueError(f"rows is {rows} and cols {cols}; neither may be negative")
    for name, value in (("step", step), ("sample", sample)):
        if not 0 <= value <= _MASK32:
            raise ValueError(f"{name} is {value}; a counter word lies in 0 .. 2^32 - 1")
    if device is None:
        device = seed.device if isinstance(seed, Tensor) else "cpu"
    group = torch.arange((cols + 3) // 4, dtype=torch.int64, device=device)[None, :]  # [1, groups]
    row = torch.arange(rows, dtype=torch.int64, device=device)[:, None]  # [rows, 1]
    words = _philox(group, row, step, sample, seed_key(seed, device))
    return torch.stack(torch.broadcast_tensors(*words), dim=-1)


def philox_normal(
    seed: int | Tensor,
    rows: int,
    cols: int,
    step: int = 0,
    sample: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise [rows, cols], a pure function of its arguments.

    Box and Muller's transform of uniforms ``u = (2 (w >> 9) + 1) 2^-24``, which are exact in float32 and
    never 0 or 1: columns ``4 g, 4 g + 1`` are ``r cos(2 pi u1), r sin(2 pi u1)`` with ``r = sqrt(-2 ln u0)``
    from the words 0 and 1, columns ``4 g + 2, 4 g + 3`` the same from the words 2 and 3.

    Args:
        seed, rows, cols, step, sample, device: as in `philox_words`.
        dtype: floating dtype of the result. float64 evaluates the same uniforms in float64; the 16-bit types
            are rounded from float32.

    Returns:
        tensor [rows, cols] of ``dtype``.

    Raises:
        ValueError: as `philox_words`, or ``dtype`` not floating.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; normal noise needs a floating dtype such as torch.float32")
    words = philox_words(seed, rows, cols, step, sample, device)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    uniform = (2 * (words >> 9) + 1).to(compute) * 2.0**-24
    radius = torch.sqrt(-2.0 * torch.log(uniform[..., 0::2]))  # [rows, groups, 2]
    angle = (2.0 * math.pi) * uniform[..., 1::2]
    normal = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return normal.reshape(rows, words.shape[1] * 4)[:, :cols].to(dtype)


def seed_key(seed: int | Tensor, device: torch.device | str | None = None) -> tuple[Word, Word]:
    """The key words (low, high) of a 64-bit seed: ints of an int, 0-d int64 tensors of a tensor."""
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"seed is a {seed.dtype} tensor of shape {tuple(seed.shape)}; "
                "expected one int64 number, or a Python int"
            )
        word = seed.reshape(()).to(device=device, dtype=torch.int64)
        return word & _MASK32, (word >> 32) & _MASK32
    return seed & _MASK32, (seed >> 32) & _MASK32


def _philox(c0: Word, c1: Word, c2: Word, c3: Word, key: tuple[Word, Word]) -> tuple[Word, Word, Word, Word]:
    """Ten rounds on broadcastable counter words; ints stay ints until they meet a tensor."""
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def _multiply(multiplier: int, word: Word) -> tuple[Word, Word]:
    """High and low 32 bits of a 32 × 32 bit product.

    In two halves: the full product does not fit a signed 64-bit integer, whose overflow no backend defines.
    """
    upper = multiplier * (word >> 16)  # < 2^48
    lower = multiplier * (word & _MASK16)  # < 2^48
    high = (upper + (lower >> 16)) >> 16
    low = (lower + ((upper & _MASK16) << 16)) & _MASK32
    return high, low

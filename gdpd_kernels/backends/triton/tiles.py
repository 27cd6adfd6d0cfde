"""Device functions of the generated kernels: blocks of rows in and out, products, norms, noise; with `activations`.

A block is [rows, size]: `width` of its `size` columns are real, and only those rows that are `valid`. What lies in the
padding of a value is finite and otherwise arbitrary; the padding of a gradient is zero.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from gdpd_kernels.backends.triton.activations import *  # noqa: F403

# Triton's interpreter truncates to bfloat16 and multiplies its bit patterns; there, products are taken of float32
# numbers that are rounded by hand, which means the same.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "") == "1")

# Programs whose part of a batch's statistics is joined at a time.
TOGETHER = tl.constexpr(32)

# --- rows and columns in memory -------------------------------------------------------------------------------------


@triton.jit
def load_rows(base, rows, valid, stride: tl.constexpr, start, width, size: tl.constexpr):
    """Columns [start, start + width) of `rows`; zero in the padding."""
    cols = tl.arange(0, size)
    at = rows[:, None] * stride + (start + cols)[None, :]
    return tl.load(base + at, mask=valid[:, None] & (cols < width)[None, :], other=0.0)


@triton.jit
def store_rows(base, rows, valid, x, stride: tl.constexpr, start, width):
    """x into columns [start, start + width) of `rows`; its padding goes nowhere."""
    cols = tl.arange(0, x.shape[1])
    at = rows[:, None] * stride + (start + cols)[None, :]
    tl.store(base + at, x, mask=valid[:, None] & (cols < width)[None, :])


@triton.jit
def add_rows(base, rows, valid, again, x, stride: tl.constexpr, start, width):
    """Stores x the first time, when `again` is 0, and adds it from then on: nothing has to be zero before."""
    cols = tl.arange(0, x.shape[1])
    at = rows[:, None] * stride + (start + cols)[None, :]
    mask = valid[:, None] & (cols < width)[None, :]
    old = tl.load(base + at, mask=mask & (cols < again * x.shape[1])[None, :], other=0.0)
    tl.store(base + at, old + x, mask=mask)


@triton.jit
def load_mixed(base, rows, valid, row_stride, col_stride, start, width, size: tl.constexpr):
    """A block of any strides, also of zero: how alpha is broadcast."""
    cols = tl.arange(0, size)
    at = rows[:, None] * row_stride + (start + cols)[None, :] * col_stride
    return tl.load(base + at, mask=valid[:, None] & (cols < width)[None, :], other=0.0)


@triton.jit
def load_row(base, start, width, size: tl.constexpr, other: tl.constexpr = 0.0):
    """One row [1, size] that serves all: a bias, a table at its step."""
    cols = tl.arange(0, size)
    return tl.load(base + start + cols, mask=cols < width, other=other)[None, :]


@triton.jit
def store_row(base, x, start, width):
    """x [1, size]."""
    cols = tl.arange(0, x.shape[1])
    tl.store(base + start + cols[None, :], x, mask=(cols < width)[None, :])


@triton.jit
def add_row(base, again, x, start, width):
    """The sum over the rows of x, stored or added as in `add_rows`."""
    cols = tl.arange(0, x.shape[1])
    mask = cols < width
    old = tl.load(base + start + cols, mask=mask & (cols < again * x.shape[1]), other=0.0)
    tl.store(base + start + cols, old + tl.sum(x, axis=0), mask=mask)


@triton.jit
def add_matrix(
    base, again, x,
    stride: tl.constexpr, row: tl.constexpr, n_rows: tl.constexpr, col: tl.constexpr, n_cols: tl.constexpr,
):  # fmt: skip
    """A block of a weight's gradient, stored or added as in `add_rows`."""
    rows, cols = tl.arange(0, x.shape[0]), tl.arange(0, x.shape[1])
    at = (row + rows)[:, None] * stride + (col + cols)[None, :]
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    old = tl.load(base + at, mask=mask & (cols < again * x.shape[1])[None, :], other=0.0)
    tl.store(base + at, old + x, mask=mask)


@triton.jit
def add_block(base, again, x):
    """A block of a weight's gradient with its padding, stored or added as in `add_rows`."""
    cols = tl.arange(0, x.shape[1])
    at = tl.arange(0, x.shape[0])[:, None] * x.shape[1] + cols[None, :]
    old = tl.load(base + at, mask=(cols < again * x.shape[1])[None, :], other=0.0)
    tl.store(base + at, old + x)


# --- values in memory: block after block, each [BLOCK, size] row by row ---------------------------------------------


@triton.jit
def load_slot(room, at, c, BLOCK: tl.constexpr, size: tl.constexpr):
    """The block that begins at column c of the value at column `at`; nothing is masked."""
    inside = tl.arange(0, BLOCK)[:, None] * size + tl.arange(0, size)[None, :]
    return tl.load(room + (at + c) * BLOCK + inside)


@triton.jit
def store_slot(room, at, c, x):
    """x into the block that begins at column c of the value at column `at`."""
    inside = tl.arange(0, x.shape[0])[:, None] * x.shape[1] + tl.arange(0, x.shape[1])[None, :]
    tl.store(room + (at + c) * x.shape[0] + inside, x)


@triton.jit
def load_moved(
    room, at, shift: tl.constexpr, width: tl.constexpr, blocked: tl.constexpr,
    c, stop, BLOCK: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """[BLOCK, size] with column c + shift + j of a value `width` wide, in blocks of `blocked`, in column j, where there
    is one and j < stop; else zero."""
    cols = tl.arange(0, size)
    source = c + shift + cols
    mask = tl.broadcast_to(((source >= 0) & (source < width) & (cols < stop))[None, :], [BLOCK, size])
    column = (at + source // blocked * blocked) * BLOCK + source % blocked
    return tl.load(room + tl.arange(0, BLOCK)[:, None] * blocked + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_moved(room, at, shift: tl.constexpr, blocked: tl.constexpr, c, width, x):
    """x into the columns from c + shift on of the value at column `at`, in blocks of `blocked`."""
    cols = tl.arange(0, x.shape[1])
    target = c + shift + cols
    column = (at + target // blocked * blocked) * x.shape[0] + target % blocked
    mask = tl.broadcast_to((cols < width)[None, :], [x.shape[0], x.shape[1]])
    tl.store(room + tl.arange(0, x.shape[0])[:, None] * blocked + column[None, :], x, mask=mask)


# --- products -------------------------------------------------------------------------------------------------------


@triton.jit
def pack_block(
    weight, packed, which, stride: tl.constexpr,
    row: tl.constexpr, n_rows: tl.constexpr, row_size: tl.constexpr,
    col: tl.constexpr, n_cols: tl.constexpr, col_size: tl.constexpr,
):  # fmt: skip
    """One of a weight's blocks, padded with zeros, row after row."""
    across: tl.constexpr = (n_cols + col_size - 1) // col_size
    rows = (which // across) * row_size + tl.arange(0, row_size)
    cols = (which % across) * col_size + tl.arange(0, col_size)
    at = (row + rows)[:, None] * stride + (col + cols)[None, :]
    w = tl.load(weight + at, mask=(rows < n_rows)[:, None] & (cols < n_cols)[None, :], other=0.0)
    inside = tl.arange(0, row_size)[:, None] * col_size + tl.arange(0, col_size)[None, :]
    tl.store(packed + which * (row_size * col_size) + inside, w)


@triton.jit
def load_block(packed, n_rows: tl.constexpr, n_cols: tl.constexpr):
    """A packed block. Of one address and constant offsets, without masks: nothing to keep in registers across steps."""
    return tl.load(packed + tl.arange(0, n_rows)[:, None] * n_cols + tl.arange(0, n_cols)[None, :])


@triton.jit
def nearest_bfloat16(x):
    """x rounded to bfloat16, ties to even, in float32."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, acc, precision: tl.constexpr):
    """acc + a b, operands rounded to `precision`, sums in float32."""
    if precision == "bf16":
        if INTERPRETED:
            acc = tl.dot(nearest_bfloat16(a), nearest_bfloat16(b), acc)
        else:
            acc = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    elif precision == "fp16":
        acc = tl.dot(a.to(tl.float16), b.to(tl.float16), acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=precision)
    return acc


@triton.jit
def linear(x, packed, acc, precision: tl.constexpr, n_rows: tl.constexpr, n_cols: tl.constexpr):
    """acc + x W^T for a packed block of the weight [out, in]."""
    return dot(x, tl.trans(load_block(packed, n_rows, n_cols)), acc, precision)


@triton.jit
def linear_input_grad(g, packed, acc, precision: tl.constexpr, n_rows: tl.constexpr, n_cols: tl.constexpr):
    """acc + g W."""
    return grad_dot(g, load_block(packed, n_rows, n_cols), acc, precision)


@triton.jit
def linear_weight_grad(g, x, precision: tl.constexpr):
    """g^T x."""
    return grad_dot(tl.trans(g), x, tl.zeros([g.shape[1], x.shape[1]], tl.float32), precision)


@triton.jit
def grad_dot(a, b, acc, precision: tl.constexpr):
    """As `dot`, for products with a gradient."""
    # Gradients may be smaller than float16 can tell from zero. Its values are exact in tf32, which has the same number
    # of digits and the range of float32.
    return dot(a, b, acc, "tf32" if precision == "fp16" else precision)


# --- columns on the move --------------------------------------------------------------------------------------------


@triton.jit
def moved(x, offset: tl.constexpr, width: tl.constexpr, n: tl.constexpr, size: tl.constexpr):
    """[rows, size] with x[:, j + offset] in column j, where that is one of x's `width` columns and j < n; else zero."""
    cols = tl.arange(0, size)
    inside = (cols + offset >= 0) & (cols + offset < width) & (cols < n)
    at = tl.where(inside, cols + offset, 0)
    found = tl.gather(x, tl.broadcast_to(at[None, :], [x.shape[0], size]), axis=1)
    return tl.where(inside[None, :], found, 0.0)


@triton.jit
def real(x, width):
    """x with zero in the padding of its columns."""
    return tl.where((tl.arange(0, x.shape[1]) < width)[None, :], x, 0.0)


@triton.jit
def row_sum(x, width):
    """[rows, 1]."""
    return tl.sum(real(x, width), axis=1)[:, None]


# --- BatchNorm: statistics of the batch -----------------------------------------------------------------------------


@triton.jit
def column_moments(x, valid, count):
    """Mean [1, size] and sum of squared deviations of the valid rows, of which there are `count`."""
    mean = tl.sum(tl.where(valid[:, None], x, 0.0), axis=0)[None, :] / count
    off = tl.where(valid[:, None], x - mean, 0.0)
    return mean, tl.sum(off * off, axis=0)[None, :]


@triton.jit
def add_moments(base, before, count, x, valid, start, columns: tl.constexpr, width):
    """The moments of x, of whose rows `count` are valid, joined with those of `before` rows that are there already.

    M2 = M2_a + M2_b + (mean_b - mean_a)^2 n_a n_b / (n_a + n_b) (Chan, Golub & LeVeque, 1983).
    """
    cols = tl.arange(0, x.shape[1])
    at = base + start + cols[None, :]
    mask, again = (cols < width)[None, :], (cols < before * x.shape[1])[None, :]
    mean, square = column_moments(x, valid, count.to(tl.float32))
    old = tl.load(at, mask=mask & again, other=0.0)
    old_square = tl.load(at + columns, mask=mask & again, other=0.0)
    share = count.to(tl.float32) / (before + count).to(tl.float32)
    off = mean - old
    tl.store(at, old + off * share, mask=mask)
    tl.store(at + columns, old_square + square + off * (off * (before.to(tl.float32) * share)), mask=mask)


@triton.jit
def joined_moments(
    moments, programs, tiles, total,
    stride: tl.constexpr, start, columns: tl.constexpr, width, size: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of the batch [1, size] from what `programs` have left, always in the same order.

    Of some programs at a time M2 = sum_i (M2_i + n_i (mean_i - mean)^2); these and those before as in `add_moments`.
    """
    cols = tl.arange(0, size)
    before = tl.zeros([size], tl.float32)
    mean, square = before, before
    for first in tl.range(0, programs, TOGETHER, disable_licm=True):
        which = first + tl.arange(0, TOGETHER)
        at = moments + which[:, None] * stride + (start + cols)[None, :]
        mask = (which < programs)[:, None] & (cols < width)[None, :]
        # Rows of a program: its tiles are full but for the last of all.
        n = (tiles - which + programs - 1) // programs * BLOCK
        n = tl.where((tiles - 1) % programs == which, n - (tiles * BLOCK - total), n)
        n = tl.where(which < programs, n, 0).to(tl.float32)[:, None]
        count = tl.sum(n)
        means = tl.load(at, mask=mask, other=0.0)
        middle = tl.sum(n * means, axis=0) / count
        off = means - middle[None, :]
        within = tl.sum(tl.load(at + columns, mask=mask, other=0.0) + n * off * off, axis=0)
        share = count / (before + count)
        off = middle - mean
        mean += off * share
        square += within + off * (off * (before * share))
        before += count
    return mean[None, :], square[None, :] / total.to(tl.float32)


@triton.jit
def joined_sums(sums, programs, stride: tl.constexpr, start, width, size: tl.constexpr):
    """[1, size]: a sum over the batch from those of the programs, always in the same order."""
    cols = tl.arange(0, size)
    found = tl.zeros([size], tl.float32)
    for first in tl.range(0, programs, TOGETHER, disable_licm=True):
        which = first + tl.arange(0, TOGETHER)
        mask = (which < programs)[:, None] & (cols < width)[None, :]
        found += tl.sum(tl.load(sums + which[:, None] * stride + (start + cols)[None, :], mask=mask, other=0.0), axis=0)
    return found[None, :]


@triton.jit
def inverse_deviation(variance, eps, width):
    """1 / sqrt(variance + eps) [1, size], zero in the padding: eps may be zero."""
    inside = (tl.arange(0, variance.shape[1]) < width)[None, :]
    return tl.where(inside, 1.0 / tl.sqrt(tl.where(inside, variance, 1.0) + eps), 0.0)


# --- noise ----------------------------------------------------------------------------------------------------------


@triton.jit
def philox_words(key, group, row, step, sample):
    """Philox4x32-10 (Salmon et al., 2011): four uint32 blocks for the counter (group, row, step, sample)."""
    key = key.to(tl.uint64)
    k0 = (key & 0xFFFFFFFF).to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    c0, c1 = group.to(tl.uint32), row.to(tl.uint32)
    c2, c3 = step.to(tl.uint32), sample.to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def gaussian_pair(w0, w1):
    """Box and Muller's transform of two words, as in `philox.philox_normal`."""
    u0 = (2 * (w0 >> 9) + 1).to(tl.float32) * 5.9604644775390625e-08
    u1 = (2 * (w1 >> 9) + 1).to(tl.float32) * 5.9604644775390625e-08
    radius = tl.sqrt(-2.0 * tl.log(u0))
    # The angle is 2 pi u1: quarters of a turn are taken off exactly, and what is left lies in [-pi/4, pi/4]. The
    # library's functions reduce any angle, for which they need a table in local memory.
    quarter = tl.floor(4.0 * u1 + 0.5)
    x = 6.283185307179586 * (u1 - 0.25 * quarter)
    s = x * x
    sine = x * (1.0 + s * (-0.16666667 + s * (0.008333334 + s * (-0.00019841270 + s * 2.7557319e-06))))
    cosine = 1.0 + s * (-0.5 + s * (0.041666668 + s * (-0.0013888889 + s * 2.4801588e-05)))
    turned = (quarter == 1.0) | (quarter == 3.0)
    along, across = tl.where(turned, sine, cosine), tl.where(turned, cosine, sine)
    along = tl.where((quarter == 1.0) | (quarter == 2.0), -along, along)
    across = tl.where((quarter == 2.0) | (quarter == 3.0), -across, across)
    return radius * along, radius * across


@triton.jit
def normals(seed, rows, step, samples, start, size: tl.constexpr):
    """Standard normal noise [rows, size] for columns from `start` on, a multiple of four."""
    shape: tl.constexpr = [rows.shape[0], size // 4]
    zero = tl.zeros(shape, tl.uint32)
    group = zero + (start // 4 + tl.arange(0, size // 4))[None, :].to(tl.uint32)
    row = zero + rows[:, None].to(tl.uint32)
    sample = zero + samples[:, None].to(tl.uint32)
    w0, w1, w2, w3 = philox_words(tl.load(seed), group, row, zero + step, sample)
    n0, n1 = gaussian_pair(w0, w1)
    n2, n3 = gaussian_pair(w2, w3)
    # join makes a last axis of two: first (0, 2) beside (1, 3), then flat in the order 0, 1, 2, 3.
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [rows.shape[0], size])


# --- the end of a backward pass -------------------------------------------------------------------------------------


@triton.jit
def reduce_block(partials, programs, stride, out, start, numel, scale, BLOCK: tl.constexpr):
    """Numbers [start, start + BLOCK) of one gradient: the sum of the programs' shares, always in the same order."""
    at = start + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(programs):
        total += tl.load(partials + i * stride + at, mask=at < numel, other=0.0)
    tl.store(out + at, total * scale, mask=at < numel)


@triton.jit
def reduce_weight(
    partials, programs, stride, out, start, columns: tl.constexpr,
    row: tl.constexpr, n_rows: tl.constexpr, row_size: tl.constexpr,
    col: tl.constexpr, n_cols: tl.constexpr, col_size: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `reduce_block`, for the padded blocks of the gradient of a weight with so many columns."""
    across: tl.constexpr = (n_cols + col_size - 1) // col_size
    at = start + tl.arange(0, BLOCK)
    which, inside = at // (row_size * col_size), at % (row_size * col_size)
    rows = (which // across) * row_size + inside // col_size
    cols = (which % across) * col_size + inside % col_size
    mask = (rows < n_rows) & (cols < n_cols)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(programs):
        total += tl.load(partials + i * stride + at, mask=mask, other=0.0)
    tl.store(out + (row + rows) * columns + col + cols, total, mask=mask)

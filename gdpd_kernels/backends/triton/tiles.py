"""Device functions of the generated kernels: blocks of rows in and out, products, norms, activations, noise.

A block is [rows, size]: `width` of its `size` columns are real, and only those rows that are `valid`. What lies in the
padding of a value is finite and otherwise arbitrary; the padding of a gradient is zero.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Triton's interpreter truncates to bfloat16 and multiplies its bit patterns; there, products are taken of float32
# numbers that are rounded by hand, which means the same.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "") == "1")

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
def joined_moments(
    moments, tiles, total,
    stride: tl.constexpr, start: tl.constexpr, columns: tl.constexpr, width: tl.constexpr, size: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of the batch [1, size] from the moments of its tiles, always in the same order.

    M2 = sum_i (M2_i + n_i (mean_i - mean)^2) (Chan, Golub & LeVeque, 1983).
    """
    cols = tl.arange(0, size)
    mask = cols < width
    mean = tl.zeros([size], tl.float32)
    for i in range(tiles):
        n = tl.minimum(total - i * BLOCK, BLOCK).to(tl.float32)
        mean += n * tl.load(moments + i * stride + start + cols, mask=mask, other=0.0)
    mean = mean / total.to(tl.float32)
    square = tl.zeros([size], tl.float32)
    for i in range(tiles):
        n = tl.minimum(total - i * BLOCK, BLOCK).to(tl.float32)
        off = tl.load(moments + i * stride + start + cols, mask=mask, other=0.0) - mean
        square += tl.load(moments + i * stride + start + columns + cols, mask=mask, other=0.0) + n * off * off
    return mean[None, :], square[None, :] / total.to(tl.float32)


@triton.jit
def joined_sums(
    sums, tiles,
    stride: tl.constexpr, start: tl.constexpr, width: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """[1, size]: a sum over the batch from those of its tiles, always in the same order."""
    cols = tl.arange(0, size)
    found = tl.zeros([size], tl.float32)
    for i in range(tiles):
        found += tl.load(sums + i * stride + start + cols, mask=cols < width, other=0.0)
    return found[None, :]


@triton.jit
def inverse_deviation(variance, eps, width):
    """1 / sqrt(variance + eps) [1, size], zero in the padding: eps may be zero."""
    inside = (tl.arange(0, variance.shape[1]) < width)[None, :]
    return tl.where(inside, 1.0 / tl.sqrt(tl.where(inside, variance, 1.0) + eps), 0.0)


# --- activations and their derivatives ------------------------------------------------------------------------------


@triton.jit
def relu(x):
    """max(x, 0); a NaN stays."""
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def relu_grad(y, g):
    """From the result y."""
    return tl.where(y <= 0.0, 0.0, g)


@triton.jit
def leaky_relu(x, slope):
    """x, or slope x where x is negative."""
    return tl.where(x > 0.0, x, x * slope)


@triton.jit
def leaky_relu_grad(x, g, slope):
    """From the input."""
    return tl.where(x > 0.0, g, g * slope)


@triton.jit
def elu(x, alpha):
    """Near zero by the series of exp(x) - 1, which would cancel."""
    down = tl.minimum(x, 0.0)
    series = down * (1.0 + down * (0.5 + down * (0.16666667 + down * (0.041666668 + down * 0.008333334))))
    return tl.where(x > 0.0, x, alpha * tl.where(down > -0.2, series, tl.exp(down) - 1.0))


@triton.jit
def elu_grad(x, g, alpha):
    """From the input."""
    return tl.where(x > 0.0, g, g * alpha * tl.exp(tl.minimum(x, 0.0)))


@triton.jit
def softplus(x):
    """max(x, 0) + log(1 + exp(-|x|)), of a small exponential by its series."""
    e = tl.exp(-tl.abs(x))
    series = e * (1.0 - e * (0.5 - e * (0.33333333 - e * (0.25 - e * 0.2))))
    return tl.maximum(x, 0.0) + tl.where(e < 0.03, series, tl.log(1.0 + e))


@triton.jit
def softplus_grad(x, g):
    """From the input."""
    return g * sigmoid(x)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), through exp of what is not positive, which cannot overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def sigmoid_grad(y, g):
    """From the result y."""
    return g * y * (1.0 - y)


@triton.jit
def tanh(x):
    """Near zero by its series, where 1 - exp(-2 |x|) would cancel."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = tl.abs(x) * (1.0 + s * (-0.33333333 + s * (0.13333333 + s * (-0.053968254 + s * 0.021869488))))
    size = tl.where(s < 0.04, near, far)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def tanh_grad(y, g):
    """From the result y."""
    return g * (1.0 - y * y)


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x * sigmoid(x)


@triton.jit
def silu_grad(x, g):
    """From the input."""
    s = sigmoid(x)
    return g * s * (1.0 + x * (1.0 - s))


@triton.jit
def gelu(x):
    """x times the normal distribution function (Hendrycks & Gimpel, 2016)."""
    return 0.5 * x * (1.0 + tl.math.erf(0.70710678118654752 * x))


@triton.jit
def gelu_grad(x, g):
    """From the input."""
    density = 0.39894228040143268 * tl.exp(-0.5 * x * x)
    return g * (0.5 * (1.0 + tl.math.erf(0.70710678118654752 * x)) + x * density)


@triton.jit
def gelu_tanh(x):
    """GELU through tanh in place of erf."""
    return 0.5 * x * (1.0 + tanh(0.79788456080286536 * (x + 0.044715 * x * x * x)))


@triton.jit
def gelu_tanh_grad(x, g):
    """From the input."""
    t = tanh(0.79788456080286536 * (x + 0.044715 * x * x * x))
    inner = 0.79788456080286536 * (1.0 + 0.134145 * x * x)
    return g * 0.5 * (1.0 + t + x * (1.0 - t * t) * inner)


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

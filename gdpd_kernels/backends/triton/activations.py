"""Device functions of the generated kernels: activations and, as name_grad, their derivatives times a gradient."""

from __future__ import annotations

import triton
import triton.language as tl


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

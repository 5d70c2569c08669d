"""Activations and their derivatives inside kernels, in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

# Name of the activation -> the constant that selects it in a kernel.
CODES = {"identity": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "quick_gelu": 4, "silu": 5}


@triton.jit
def _sigmoid(x):
    """sigmoid(x) and its derivative, without overflow and without the difference 1 - sigmoid(x)."""
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    return tl.where(x < 0.0, e * r, r), e * r * r


@triton.jit
def _tanh_argument(z):
    """v such that gelu_tanh(z) = z * sigmoid(v)."""
    return 1.5957691216057308 * (z + 0.044715 * z * z * z)


@triton.jit
def activate(z, CODE: tl.constexpr):
    """act(z) for an fp32 tile."""
    if CODE == 1:
        return tl.maximum(z, 0.0)
    elif CODE == 2:
        return 0.5 * z * (1.0 + tl.math.erf(z * 0.7071067811865476))
    elif CODE == 3:
        s, _ = _sigmoid(_tanh_argument(z))
        return z * s
    elif CODE == 4:
        s, _ = _sigmoid(1.702 * z)
        return z * s
    elif CODE == 5:
        s, _ = _sigmoid(z)
        return z * s
    else:
        return z


@triton.jit
def derivative(z, CODE: tl.constexpr):
    """d act(z) / dz for an fp32 tile."""
    if CODE == 1:
        return tl.where(z > 0.0, 1.0, 0.0)
    elif CODE == 2:
        cdf = 0.5 * (1.0 + tl.math.erf(z * 0.7071067811865476))
        return cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif CODE == 3:
        s, slope = _sigmoid(_tanh_argument(z))
        # The slope is 0 long before the square is too large to multiply it.
        return s + z * slope * (1.5957691216057308 * (1.0 + 0.134145 * tl.minimum(z * z, 1e6)))
    elif CODE == 4:
        s, slope = _sigmoid(1.702 * z)
        return s + z * slope * 1.702
    elif CODE == 5:
        s, slope = _sigmoid(z)
        return s + z * slope
    else:
        return tl.full(z.shape, 1.0, tl.float32)

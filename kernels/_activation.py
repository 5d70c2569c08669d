"""Activations and their derivatives inside kernels, in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

# Name of the activation -> the constant that selects it in a kernel.
CODES = {"identity": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "quick_gelu": 4, "silu": 5}


@triton.jit
def _tanh(x):
    # exp of a negative number only, so that nothing overflows.
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def activate(z, CODE: tl.constexpr):
    """act(z) for an fp32 tile."""
    if CODE == 1:
        return tl.maximum(z, 0.0)
    elif CODE == 2:
        return 0.5 * z * (1.0 + tl.math.erf(z * 0.7071067811865476))
    elif CODE == 3:
        return 0.5 * z * (1.0 + _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)))
    elif CODE == 4:
        return z * tl.sigmoid(1.702 * z)
    elif CODE == 5:
        return z * tl.sigmoid(z)
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
        t = _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))
        return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * z * z)
    elif CODE == 4:
        s = tl.sigmoid(1.702 * z)
        return s * (1.0 + 1.702 * z * (1.0 - s))
    elif CODE == 5:
        s = tl.sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    else:
        return tl.full(z.shape, 1.0, tl.float32)

"""What stands in front of a quantization of rows: nothing, an RMSNorm, or SwiGLU; and the rounding that both share with XLA."""

import triton
import triton.language as tl


@triton.jit
def front(x, up, gain, at, k, mask, inverse, FRONT: tl.constexpr, SHIFT: tl.constexpr):
    """The float32 values of a tile that are to be quantized, zero where masked.

    `at` are indices into x [M, K] (and up), `inverse` is 1 / rms of each row. The result is rounded to x's type, as it would be had the
    layer in front written it.
    """
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if FRONT == "rmsnorm":
        weight = tl.load(gain + k, mask=mask, other=0.0).to(tl.float32) + SHIFT
        v = v * inverse[:, None] * weight
    elif FRONT == "swiglu":
        v = tl.math.div_rn(v, 1.0 + tl.exp(-v)) * tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    if FRONT != "none":
        v = v.to(x.dtype.element_ty).to(tl.float32)
    return v


@triton.jit
def inverse_rms(x, row, ok, K, EPS: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """1 / sqrt(mean(x^2) + EPS) of the rows that start at `row`, float32 [BR]."""
    squares = tl.zeros((BR,), dtype=tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)[None, :]
        v = tl.load(x + row[:, None] + k, mask=ok[:, None] & (k < K), other=0.0).to(tl.float32)
        squares += tl.sum(v * v, axis=1)
    return tl.math.div_rn(1.0, tl.math.sqrt_rn(tl.math.div_rn(squares, K.to(tl.float32)) + EPS))

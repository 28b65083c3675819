"""Rows of a packed embedding table, decoded: y [T, K] = rows ids of the matrix [N, K], bit for bit what `dequantize` gives."""

import triton
import triton.language as tl

from ._decode import small_float, weight_scale
from ._dense import second_scale


@triton.jit
def number(code, table, CODE: tl.constexpr):
    """The float32 value of a code, before its zero point."""
    if CODE == "int":
        return code.to(tl.float32)
    elif CODE == "nf4" or CODE == "fp4_bnb":
        return tl.load(table + code.to(tl.int32))
    elif CODE == "fp8_e5m2":
        return (code.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    elif CODE == "fp8_e4m3":
        return small_float(code, 4, 3, "f32")
    elif CODE == "fp6_e2m3":
        return small_float(code, 2, 3, "f32")
    elif CODE == "fp6_e3m2":
        return small_float(code, 3, 2, "f32")
    else:
        tl.static_assert(CODE == "fp4_e2m1")
        return small_float(code, 2, 1, "f32")


@triton.jit
def take(ids, codes, scale, scale2, scale_offset, zero, table, levels, y, T, N, K, ROW, GROUPS, BK: tl.constexpr, CODE: tl.constexpr,
         BITS: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr, SCALE: tl.constexpr, SCALE2: tl.constexpr, GROUP: tl.constexpr,
         SHARE: tl.constexpr):
    """One program is one row and BK of its columns. Negative ids count from the end; ids out of range give NaN."""
    t = tl.program_id(0)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    row = tl.load(ids + t).to(tl.int64)
    row = tl.where(row < 0, row + N, row)
    inside = (row >= 0) & (row < N)
    n = tl.where(inside, row, 0)
    start = codes + n * ROW
    kept = k < K
    if BITS == 8:
        code = tl.load(start + k, mask=kept, other=0)
    else:
        start += k // 128 * (16 * BITS)
        j = k % 128
        code = tl.zeros((BK,), dtype=tl.int32)
        if BITS & 4:
            code |= (tl.load(start + j % 64, mask=kept, other=0).to(tl.int32) >> (j // 64 * 4)) & 15
        if BITS & 2:
            code |= ((tl.load(start + 16 * (BITS & 4) + j % 32, mask=kept, other=0).to(tl.int32) >> (j // 32 * 2)) & 3) << (BITS & 4)
        if BITS & 1:
            code |= ((tl.load(start + 16 * (BITS - 1) + j % 16, mask=kept, other=0).to(tl.int32) >> (j // 16)) & 1) << (BITS - 1)
    mean = 0.0
    if SCALE == "nested":
        mean = tl.load(scale_offset)
    seconds, outer = second_scale(scale, scale2, 0, n, N, GROUPS, SCALE2)
    if SHARE == 0:
        at = k // GROUP
    else:
        at = n // SHARE * GROUPS + k // GROUP
    s = weight_scale(scale, seconds, levels, mean, tl.where(kept, at, 0), outer, SCALE, SCALE2)
    v = number(code, table, CODE)
    if ZERO == "int":
        v = (v - tl.load(zero + at, mask=kept, other=0).to(tl.float32)) * s
    elif ZERO == "float":
        v = v - OFFSET
        v = v * s + tl.load(zero + at, mask=kept, other=0.0).to(tl.float32)
    else:
        v = (v - OFFSET) * s
    v = tl.where(inside, v, float("nan"))
    tl.store(y + t.to(tl.int64) * K + k, v.to(y.dtype.element_ty), mask=kept)

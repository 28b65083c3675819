"""Quantization of activations: scales per token or group, codes of every type, exactly the reference's.

Divisions are correctly rounded and rounding is by the magic number (half to even): both compilers and the interpreter agree on them.
Small floats are rounded by their bits, because not every target can convert to them.
"""

import triton
import triton.language as tl

from ._norm import front, inverse_rms

TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def rounded(x, ROUNDING: tl.constexpr):
    """x as an integer, in float32. Above 2^22, where the magic number does not work, every x is clipped later."""
    if ROUNDING == "rne":
        return tl.where(tl.abs(x) < 4194304.0, (x + 12582912.0) - 12582912.0, x)
    else:
        whole = tl.where(tl.abs(x) < 4194304.0, tl.where(x < 0, tl.ceil(x), tl.floor(x)), x)
        if ROUNDING == "rha":
            whole += tl.where(tl.abs(x - whole) >= 0.5, tl.where(x < 0, -1.0, 1.0), 0.0)
        return whole


@triton.jit
def small_float_code(x, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, HIGH: tl.constexpr, ROUNDING: tl.constexpr):
    """Sign-exponent-mantissa codes of x, saturating, as int32: subnormals and normals are one ascending sequence of integers."""
    LOWEST: tl.constexpr = 2 - 2 ** (EXPONENT - 1)
    magnitude = tl.minimum(tl.abs(x), HIGH)
    e = tl.maximum((magnitude.to(tl.int32, bitcast=True) >> 23) - 127, LOWEST)
    inverse_step = ((MANTISSA - e + 127) << 23).to(tl.float32, bitcast=True)
    count = rounded(magnitude * inverse_step, ROUNDING).to(tl.int32)
    sign = (x.to(tl.int32, bitcast=True) >> 31) & 1
    return (sign << (EXPONENT + MANTISSA)) | (count + ((e - LOWEST) << MANTISSA))


@triton.jit
def small_float_value(x, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """The value of a non-negative x rounded to a small float, half to even."""
    e = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) - 127, 2 - 2 ** (EXPONENT - 1))
    step = ((e - MANTISSA + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((MANTISSA - e + 127) << 23).to(tl.float32, bitcast=True)
    return rounded(x * inverse, "rne") * step


@triton.jit
def usable(scale):
    """A scale to divide by: 1 where it is zero or subnormal, NaN where it is not finite."""
    scale = tl.where(tl.abs(scale) < TINY, 1.0, scale)
    return tl.where(tl.abs(scale) < float("inf"), scale, float("nan"))


@triton.jit
def power_scale(amax, RULE: tl.constexpr, HIGH: tl.constexpr, EMAX: tl.constexpr, MANTISSA: tl.constexpr):
    """MX: 2^e by one of the seven rules of `qfunc._scales.MX`; 1 for zeros, NaN where amax is not finite."""
    if RULE == "mx_rceil":
        bits = tl.math.div_rn(amax, HIGH).to(tl.int32, bitcast=True)
    elif RULE == "mx_ceil_x":
        bits = tl.math.div_rn(amax, 7.25).to(tl.int32, bitcast=True)
    else:
        bits = amax.to(tl.int32, bitcast=True)
    if RULE == "mx_even":
        bits += 1 << (22 - MANTISSA)
    elif RULE == "mx_even1":
        bits += 1 << 21
    e = (bits >> 23) & 255
    if RULE == "mx_ceil" or RULE == "mx_rceil" or RULE == "mx_ceil_x":
        e += ((bits & 0x7FFFFF) != 0).to(tl.int32)
    if RULE != "mx_rceil" and RULE != "mx_ceil_x":
        e -= EMAX
    e = tl.minimum(tl.maximum(e, 1), 254)
    e = tl.where(amax == 0, 127, e)
    return tl.where(amax < float("inf"), (e << 23).to(tl.float32, bitcast=True), float("nan"))


@triton.jit
def symmetric_scale(amax, outer, RULE: tl.constexpr, DIVISOR: tl.constexpr, CLIP: tl.constexpr, HIGH: tl.constexpr, EMAX: tl.constexpr,
                    MANTISSA: tl.constexpr, INNER_LOW: tl.constexpr, INNER_HIGH: tl.constexpr):
    """The scale of a cell from its largest magnitude, which is NaN where the cell has one."""
    amax = amax * CLIP
    if RULE == "two_level":
        inner = tl.math.div_rn(tl.math.div_rn(amax, HIGH), outer)
        kept = small_float_value(tl.minimum(tl.maximum(inner, INNER_LOW), INNER_HIGH), 4, 3)
        return tl.where(inner == inner, kept, float("nan")) * outer
    elif RULE == "amax" or RULE == "amax_half":
        return usable(tl.math.div_rn(amax, DIVISOR))
    elif RULE == "amax_half_inverse":
        least = tl.maximum(tl.math.div_rn(amax, DIVISOR), 1.1920928955078125e-07)
        return usable(tl.where(amax == amax, least, float("nan")))
    else:
        return power_scale(amax, RULE, HIGH, EMAX, MANTISSA)


@triton.jit
def amax_of(v, axis: tl.constexpr):
    """Largest magnitude, NaN where there is one: the maximum of the hardware passes over NaN."""
    return tl.where(tl.max((v != v).to(tl.int32), axis=axis) > 0, float("nan"), tl.max(tl.where(v == v, tl.abs(v), 0.0), axis=axis))


@triton.jit
def coded(v, s, z, CODE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr,
          RULE: tl.constexpr, ROUNDING: tl.constexpr, ASYMMETRIC: tl.constexpr):
    """Codes of v under the scale s and zero point z, as int32."""
    if RULE == "amax_half_inverse" or RULE == "minmax_inverse":
        y = v * tl.math.div_rn(1.0, s)
    else:
        y = tl.math.div_rn(v, s)
    if CODE == "int":
        q = rounded(y, ROUNDING)
        if ASYMMETRIC:
            q += z
        q = tl.minimum(tl.maximum(q, LOW), HIGH)
        return tl.where(y == y, q, 0.0).to(tl.int32)
    else:
        q = small_float_code(y, EXPONENT, MANTISSA, HIGH, ROUNDING)
        if CODE == "fp8_e4m3" or CODE == "fp8_e5m2":
            q = tl.where(y == y, q, 0x7F)
        return q


@triton.jit
def quantize_rows(x, up, gain, given, given_zero, codes, scale, zero, M, K, GROUPS,
                  BR: tl.constexpr, BK: tl.constexpr, SPREAD: tl.constexpr, FRONT: tl.constexpr, EPS: tl.constexpr,
                  SHIFT: tl.constexpr, CELL: tl.constexpr, GROUP: tl.constexpr, CODE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
                  DIVISOR: tl.constexpr, CLIP: tl.constexpr, RULE: tl.constexpr, EMAX: tl.constexpr, EXPONENT: tl.constexpr,
                  MANTISSA: tl.constexpr, ROUNDING: tl.constexpr, ASYMMETRIC: tl.constexpr, INNER_LOW: tl.constexpr,
                  INNER_HIGH: tl.constexpr):
    """Codes [M, K], scale [M, GROUPS] and zero [M, 1]; see `_plan_rows.describe`. Grid: (row tiles, chunks of a row where SPREAD)."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    ok = r < M
    row = r.to(tl.int64) * K
    inverse = r.to(tl.float32)
    if FRONT == "rmsnorm":
        inverse = inverse_rms(x, row, ok, K, EPS, BR, BK)
    s = tl.full((BR, 1), 1.0, tl.float32)
    z = tl.full((BR, 1), 0.0, tl.float32)
    outer = s
    if CELL == "given" or RULE == "two_level":
        outer = tl.load(given + r, mask=ok, other=1.0)[:, None]
        s = outer
    if CELL == "given" and ASYMMETRIC:
        z = tl.load(given_zero + r, mask=ok, other=0).to(tl.float32)[:, None]
    if CELL == "token":
        low = tl.zeros((BR,), dtype=tl.float32)
        high = tl.zeros((BR,), dtype=tl.float32)
        invalid = tl.zeros((BR,), dtype=tl.int32)
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)[None, :]
            mask = ok[:, None] & (k < K)
            v = front(x, up, gain, row[:, None] + k, k, mask, inverse, FRONT, SHIFT)
            invalid |= tl.max((v != v).to(tl.int32), axis=1)
            v = tl.where(v == v, v, 0.0)
            low = tl.minimum(low, tl.min(v, axis=1))
            high = tl.maximum(high, tl.max(v, axis=1))
        if ASYMMETRIC:
            low = tl.where(invalid > 0, float("nan"), low * CLIP)
            high = tl.where(invalid > 0, float("nan"), high * CLIP)
            if RULE == "minmax_inverse":
                one = usable(tl.math.div_rn(high - low, DIVISOR))
            else:
                one = usable(tl.math.div_rn(high, DIVISOR) - tl.math.div_rn(low, DIVISOR))
            point = LOW - rounded(tl.math.div_rn(low, one), "rne")
            point = tl.where(tl.abs(point) < float("inf"), tl.minimum(tl.maximum(point, LOW), HIGH), 0.0)
            tl.store(zero + r, point.to(tl.int32), mask=ok)
            z = point[:, None]
        else:
            amax = tl.where(invalid > 0, float("nan"), tl.maximum(-low, high))
            one = symmetric_scale(amax, 1.0, RULE, DIVISOR, CLIP, HIGH, EMAX, MANTISSA, INNER_LOW, INNER_HIGH)
        tl.store(scale + r, one, mask=ok)
        s = one[:, None]

    begin = 0
    end = K
    if SPREAD:
        begin = tl.program_id(1) * BK
        end = begin + 1
    for start in range(begin, end, BK):
        k = start + tl.arange(0, BK)[None, :]
        mask = ok[:, None] & (k < K)
        v = front(x, up, gain, row[:, None] + k, k, mask, inverse, FRONT, SHIFT)
        if CELL == "group":
            cells = tl.reshape(v, (BR, BK // GROUP, GROUP))
            many = symmetric_scale(amax_of(cells, 2), outer, RULE, DIVISOR, CLIP, HIGH, EMAX, MANTISSA, INNER_LOW, INNER_HIGH)
            g = start // GROUP + tl.arange(0, BK // GROUP)[None, :]
            tl.store(scale + r.to(tl.int64)[:, None] * GROUPS + g, many, mask=ok[:, None] & (g < GROUPS))
            q = coded(cells, many[:, :, None], 0.0, CODE, LOW, HIGH, EXPONENT, MANTISSA, RULE, ROUNDING, False)
            q = tl.reshape(q, (BR, BK))
        else:
            q = coded(v, s, z, CODE, LOW, HIGH, EXPONENT, MANTISSA, RULE, ROUNDING, ASYMMETRIC)
        tl.store(codes + row[:, None] + k, q.to(codes.dtype.element_ty), mask=mask)

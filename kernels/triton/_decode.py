"""From stored codes and scales to numbers, in registers. Shifts, masks and bit patterns only: no table but nf4's and fp4_bnb's own.

All of it is exact but nf4 and fp4_bnb, whose 16 values are rounded to the operand's type.
"""

import triton
import triton.language as tl


@triton.jit
def along_n(v, SWAP: tl.constexpr):
    """A vector over output channels, broadcastable against the tile of sums."""
    if SWAP:
        return v[:, None]
    else:
        return v[None, :]


@triton.jit
def along_m(v, SWAP: tl.constexpr):
    """A vector over tokens, broadcastable against the tile of sums."""
    if SWAP:
        return v[None, :]
    else:
        return v[:, None]


@triton.jit
def cast(v, DOT: tl.constexpr):
    """A tile as the tensor cores' operand type."""
    if DOT == "bf16":
        return v.to(tl.bfloat16)
    elif DOT == "f16":
        return v.to(tl.float16)
    else:
        return v.to(tl.float32)


@triton.jit
def small_float(code, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, DOT: tl.constexpr):
    """Sign-exponent-mantissa codes without infinities: their bits as those of a wider float, times the difference of the biases.

    Subnormals come out right, because the product of a subnormal and a power of two is exact; e4m3's two NaN patterns are kept.
    """
    WIDTH: tl.constexpr = EXPONENT + MANTISSA
    if DOT == "f32":
        u = code.to(tl.uint32)
        bits = ((u >> WIDTH) << 31) | ((u & ((1 << WIDTH) - 1)) << (23 - MANTISSA))
        value = bits.to(tl.float32, bitcast=True) * (2.0 ** (128 - 2 ** (EXPONENT - 1)))
    else:
        SHIFT: tl.constexpr = (7 if DOT == "bf16" else 10) - MANTISSA
        MASK: tl.constexpr = ((1 << WIDTH) - 1) << SHIFT
        u = code.to(tl.uint16)
        if SHIFT + WIDTH <= 15 - WIDTH:         # the shifted copies meet nowhere that the mask keeps
            bits = ((u << (15 - WIDTH)) | (u << SHIFT)) & (0x8000 | MASK)
        else:
            bits = ((u << (15 - WIDTH)) & 0x8000) | ((u << SHIFT) & MASK)
        if DOT == "bf16":
            value = bits.to(tl.bfloat16, bitcast=True) * (2.0 ** (128 - 2 ** (EXPONENT - 1)))
        else:
            value = bits.to(tl.float16, bitcast=True) * (2.0 ** (16 - 2 ** (EXPONENT - 1)))
    if EXPONENT == 4:
        value = tl.where((code & 0x7F) == 0x7F, tl.full(value.shape, float("nan"), value.dtype), value)
    return value


@triton.jit
def e5m2(code, DOT: tl.constexpr):
    """e5m2 is the upper byte of a float16, infinities and NaN included."""
    return cast((code.to(tl.uint16) << 8).to(tl.float16, bitcast=True), DOT)


@triton.jit
def decode(code, offset, table_ptr, CODE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, DOT: tl.constexpr):
    """Codes as operands of the product. `offset` is what comes off an integer code, its zero point or the code of zero, broadcastable."""
    if DOT == "e4m3" or DOT == "e5m2":
        return code
    elif CODE == "int":
        if BITS == 8:
            if DOT == "s8":
                if ZERO == "int":           # 8-bit codes less their zero point do not fit: 128 comes off here, the rest off the sum
                    return (code ^ 0x80).to(tl.int8, bitcast=True)
                else:
                    return code
            elif ZERO == "int":
                return cast(code.to(tl.float32) - offset.to(tl.float32), DOT)
            else:
                return cast(code, DOT)
        elif DOT == "s8":
            return code.to(tl.int8) - offset.to(tl.int8)
        elif DOT == "bf16":                 # 0x4300 | code is the bit pattern of 128 + code: no conversion of integers
            return (code.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True) - (offset.to(tl.float32) + 128.0).to(tl.bfloat16)
        elif DOT == "f16":                  # 0x6400 | code is 1024 + code
            return (code.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - (offset.to(tl.float32) + 1024.0).to(tl.float16)
        else:
            return code.to(tl.float32) - offset.to(tl.float32)
    elif CODE == "nf4" or CODE == "fp4_bnb":
        return cast(tl.load(table_ptr + code.to(tl.int32)), DOT)
    elif CODE == "fp8_e4m3":
        return small_float(code, 4, 3, DOT)
    elif CODE == "fp8_e5m2":
        return e5m2(code, DOT)
    elif CODE == "fp6_e2m3":
        return small_float(code, 2, 3, DOT)
    elif CODE == "fp6_e3m2":
        return small_float(code, 3, 2, DOT)
    else:
        tl.static_assert(CODE == "fp4_e2m1")
        return small_float(code, 2, 1, DOT)


@triton.jit
def exponent_scale(byte):
    """2^(E - 127) of an e8m0 byte, by its bits; 0 is the subnormal 2^-127 and 255 is NaN."""
    e = byte.to(tl.uint32)
    return tl.where(e == 255, 0x7FC00000, tl.where(e == 0, 0x00400000, e << 23)).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def stored_scale(scale_ptr, scale2_ptr, at, SCALE: tl.constexpr):
    """What is read of the scales at the indices `at` of one matrix, and the scale of its 256 where scales are nested."""
    s = tl.load(scale_ptr + at)
    if SCALE == "nested":
        return s, tl.load(scale2_ptr + at // 256)
    else:
        return s, s


@triton.jit
def scale_value(s, second, levels_ptr, mean, outer, SCALE: tl.constexpr, SCALE2: tl.constexpr):
    """Effective float32 scales of what `stored_scale` read; `outer` is the second scale of two-level formats."""
    if SCALE == "nested":                   # bitsandbytes: a code of the 8-bit map, times the scale of its 256, plus the mean
        return tl.load(levels_ptr + s.to(tl.int32)) * second + mean
    if SCALE == "e8m0":
        value = exponent_scale(s)
    elif SCALE == "e4m3":
        value = small_float(s, 4, 3, "f32")
    else:
        value = s.to(tl.float32)
    if SCALE2 == "none":
        return value
    else:
        return value * outer


@triton.jit
def weight_scale(scale_ptr, scale2_ptr, levels_ptr, mean, at, outer, SCALE: tl.constexpr, SCALE2: tl.constexpr):
    """Effective float32 scales at the indices `at` of one matrix."""
    s, second = stored_scale(scale_ptr, scale2_ptr, at, SCALE)
    return scale_value(s, second, levels_ptr, mean, outer, SCALE, SCALE2)

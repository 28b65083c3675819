"""Decoders of ggml's types without codebooks: plain numbers, blocks of 32, K super-blocks, ternary and 1 or 2 bit blocks, 4-bit floats.

Each takes blocks uint8 [..., n, bytes] and returns float32 [..., n, elements]. Layouts are those of ggml's `ggml-common.h`; a product
d * scale * q has at most 22 significant bits, so whether XLA contracts the addition behind it changes nothing. Products are taken in
float32, never in integers: a negative d times a zero code is -0.0 in ggml too.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from ._ggml_bits import bits, digits, double, flat, from_bits, halves, lookup, signed, split, times_power, words

F32 = jnp.float32
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def f32(b):
    return from_bits(words(b, 4))


def bf16(b):
    return from_bits(words(b, 2) << 16)


def i8(b):
    return signed(b)


def i16(b):
    word = words(b, 2)
    return word.astype(F32) - np.float32(65536) * (word >> 15).astype(F32)


def nibbles(qs):
    """16 bytes to 32 codes: the low nibbles, then the high ones."""
    return flat(digits(qs, (0, 4), 15))


def q4_0(b):
    return halves(b[..., :2]) * (nibbles(b[..., 2:]).astype(F32) - 8)


def q4_1(b):
    return halves(b[..., :2]) * nibbles(b[..., 4:]).astype(F32) + halves(b[..., 2:4])


def q5_0(b):
    return halves(b[..., :2]) * ((nibbles(b[..., 6:]) | bits(b[..., 2:6]) << 4).astype(F32) - 16)


def q5_1(b):
    return halves(b[..., :2]) * (nibbles(b[..., 8:]) | bits(b[..., 4:8]) << 4).astype(F32) + halves(b[..., 2:4])


def q8_0(b):
    return halves(b[..., :2]) * signed(b[..., 2:])


def q8_1(b):
    return halves(b[..., :2]) * signed(b[..., 4:])


def q8_k(b):
    return f32(b[..., :4]) * signed(b[..., 4:260])


def grouped(scale, codes):
    """Codes [..., n] times the scale [..., g] of their group of n / g."""
    return flat(scale[..., None] * split(codes, scale.shape[-1]))


def affine(scale, codes, offset):
    """As `grouped`, less an offset per group."""
    return flat(scale[..., None] * split(codes, scale.shape[-1]) - offset[..., None])


def q2_k(b):
    d, dmin = halves(b[..., 80:82]), halves(b[..., 82:84])
    codes = flat(digits(split(b[..., 16:80], 2), (0, 2, 4, 6), 3), 3)
    return affine(d * (b[..., :16] & 15).astype(F32), codes.astype(F32), dmin * (b[..., :16] >> 4).astype(F32))


def q3_k(b):
    low, high = b[..., 96:104], b[..., 104:108]
    scale = nibbles(low) | flat(digits(high, (0, 2, 4, 6), 3)) << 4
    codes = flat(digits(split(b[..., 32:96], 2), (0, 2, 4, 6), 3), 3).astype(F32)
    # A clear bit of the mask subtracts 4.
    absent = flat(digits(b[..., :32], range(8), 1) ^ 1).astype(F32)
    return grouped(halves(b[..., 108:110]) * (scale.astype(F32) - 32), codes - 4 * absent)


def six_bit_pairs(b):
    """12 bytes to the eight 6-bit scales and the eight 6-bit minima of Q4_K and Q5_K."""
    scale, least, mixed = b[..., 0:4], b[..., 4:8], b[..., 8:12]
    return (jnp.concatenate([scale & 63, (mixed & 15) | (scale >> 6 << 4)], -1).astype(F32),
            jnp.concatenate([least & 63, (mixed >> 4) | (least >> 6 << 4)], -1).astype(F32))


def q4_k(b):
    scale, least = six_bit_pairs(b[..., 4:16])
    codes = flat(digits(split(b[..., 16:], 4), (0, 4), 15), 3)
    return affine(halves(b[..., 0:2]) * scale, codes.astype(F32), halves(b[..., 2:4]) * least)


def q5_k(b):
    scale, least = six_bit_pairs(b[..., 4:16])
    codes = flat(digits(split(b[..., 48:], 4), (0, 4), 15), 3) | flat(digits(b[..., 16:48], range(8), 1)) << 4
    return affine(halves(b[..., 0:2]) * scale, codes.astype(F32), halves(b[..., 2:4]) * least)


def q6_k(b):
    low = flat(digits(split(b[..., :128], 2), (0, 4), 15), 3)
    high = flat(digits(split(b[..., 128:192], 2), (0, 2, 4, 6), 3), 3)
    return grouped(halves(b[..., 208:210]) * signed(b[..., 192:208]), (low | high << 4).astype(F32) - 32)


def ternary(qs, powers: int):
    """Base-3 digits of every byte: the byte is the fraction digits / 3**5 in units of 1/256, so each digit is floor(3 frac(byte 3**i))."""
    shifted = qs[..., None, :] * np.array([3**i for i in range(powers)], np.uint8)[:, None]
    return flat((shifted.astype(jnp.uint16) * 3) >> 8)


def tq1_0(b):
    codes = jnp.concatenate([ternary(b[..., :32], 5), ternary(b[..., 32:48], 5), ternary(b[..., 48:52], 4)], -1)
    return halves(b[..., 52:54]) * (codes.astype(F32) - 1)


def tq2_0(b):
    codes = flat(digits(split(b[..., :64], 2), (0, 2, 4, 6), 3), 3)
    return halves(b[..., 64:66]) * (codes.astype(F32) - 1)


def q1_0(b):
    return halves(b[..., :2]) * (2 * bits(b[..., 2:]).astype(F32) - 1)


def q2_0(b):
    codes = flat((b[..., 2:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3)
    return halves(b[..., :2]) * (codes.astype(F32) - 1)


def mxfp4(b):
    return times_power(lookup(E2M1_DOUBLED, nibbles(b[..., 1:])), b[..., :1].astype(jnp.int32) - 128)


def nvfp4(b):
    scale = b[..., :4]
    field, fraction = (scale >> 3) & 15, (scale & 7).astype(F32)
    value = jnp.where(field == 0, fraction * np.float32(2**-10), times_power(1 + fraction / 8, field.astype(jnp.int32) - 8))
    value = jnp.where((scale == 0x7F), 0, value)
    codes = flat(digits(split(b[..., 4:], 4), (0, 4), 15), 3)
    return grouped(value, lookup(E2M1_DOUBLED, codes))


def f64(b):
    return double(b)


def f16(b):
    return halves(b)

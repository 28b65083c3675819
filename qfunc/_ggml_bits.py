"""Bytes to numbers, by shifts, masks and 32-bit bitcasts only: the parts that every ggml block type is made of.

Everything here keeps the bits of ggml's own floats, eager and jitted alike. Two habits of XLA's CPU backend would break that: it
flushes subnormal results to zero, so powers of two are applied to the exponent field instead of multiplied in, and bitcasts to types
narrower than a byte are wrong on constants, so they are not used.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax


def digits(data, shifts, mask: int):
    """Fields of every byte: integers [..., n] to [..., len(shifts), n], where row i holds (data >> shifts[i]) & mask."""
    shifts = np.asarray(shifts, data.dtype)[:, None]
    return (data[..., None, :] >> shifts) & np.asarray(mask, data.dtype)


def split(data, groups: int):
    """[..., n] to [..., groups, n / groups]."""
    return data.reshape(*data.shape[:-1], groups, data.shape[-1] // groups)


def flat(data, axes: int = 2):
    """Merge the last `axes` axes into one."""
    return data.reshape(*data.shape[:-axes], -1)


def bits(data):
    """uint8 [..., n] to its single bits [..., 8 n], least significant first."""
    return flat((data[..., None] >> np.arange(8, dtype=np.uint8)) & np.uint8(1))


def words(data, size: int):
    """Little-endian words of `size` (2 or 4) bytes: uint8 [..., size n] to uint32 [..., n]."""
    parts = data.reshape(*data.shape[:-1], -1, size).astype(jnp.uint32)
    out = parts[..., 0]
    for i in range(1, size):
        out = out | (parts[..., i] << np.uint32(8 * i))
    return out


def signed(data):
    """uint8 as two's complement, in float32."""
    return data.astype(jnp.float32) - np.float32(256) * (data >> np.uint8(7)).astype(jnp.float32)


def from_bits(word):
    """uint32 as the float32 of those bits."""
    return lax.bitcast_convert_type(word, jnp.float32)


def half(word):
    """uint32 holding a float16 to float32, subnormals, infinities and NaN included."""
    sign, field, fraction = (word >> 15) << 31, (word >> 10) & 31, word & 1023
    normal = ((field + 112) << 23) | (fraction << 13)
    special = jnp.uint32(0x7F800000) | (fraction << 13)
    small = lax.bitcast_convert_type(fraction.astype(jnp.float32) * np.float32(2**-24), jnp.uint32)
    return from_bits(sign | jnp.where(field == 0, small, jnp.where(field == 31, special, normal)))


def halves(data):
    """uint8 [..., 2 n] of little-endian float16 to float32 [..., n]."""
    return half(words(data, 2))


def double(data):
    """uint8 [..., 8 n] of little-endian float64 to float32 [..., n], rounded half to even."""
    pair = split(words(data, 4), data.shape[-1] // 8)
    low, high = pair[..., 0], pair[..., 1]
    field = ((high >> 20) & 2047).astype(jnp.int32) - 896
    kept = ((high & 0xFFFFF) << 3) | (low >> 29)
    sticky = low & 0x1FFFFFFF
    shift = jnp.clip(1 - field, 0, 25).astype(jnp.uint32)
    full = kept | 0x800000
    lost = jnp.where(shift > 0, full & ((jnp.uint32(1) << shift) - 1), 0)
    # The dropped bits as one number of at least 30 bits: twice it against one unit says which way to round.
    above = jnp.where(shift > 0, lost << 1 | (sticky > 0).astype(jnp.uint32), sticky)
    unit = jnp.where(shift > 0, jnp.uint32(1) << shift, jnp.uint32(1) << 28)
    body = jnp.where(shift > 0, full >> shift, (jnp.maximum(field, 0).astype(jnp.uint32) << 23) | kept)
    body = body + ((above > unit) | ((above == unit) & (body & 1 == 1))).astype(jnp.uint32)
    nan = (field == 1151) & ((kept | sticky) > 0)
    body = jnp.where(field >= 255, jnp.uint32(0x7F800000), body)
    return from_bits((high >> 31 << 31) | jnp.where(nan, jnp.uint32(0x7FC00000), body))


def times_power(value, exponent):
    """value * 2**exponent with subnormal results kept.

    Arguments: `value` float32 of few significant bits (no bit may fall off the end of a subnormal); `exponent` int32.
    """
    word = lax.bitcast_convert_type(value, jnp.uint32)
    sign, field, fraction = word & np.uint32(0x80000000), ((word >> 23) & 255).astype(jnp.int32), word & 0x7FFFFF
    moved = field + exponent
    normal = (jnp.clip(moved, 1, 255).astype(jnp.uint32) << 23) | jnp.where(moved < 255, fraction, 0)
    small = (fraction | 0x800000) >> jnp.clip(1 - moved, 0, 31).astype(jnp.uint32)
    out = jnp.where(field == 0, 0, jnp.where(moved > 0, normal, small))
    return from_bits(sign | out)


def lookup(table, index):
    """Rows of a small float32 table at integer indices (in range by construction)."""
    return jnp.take(jnp.asarray(table, jnp.float32), index.astype(jnp.int32), axis=0, mode="clip")

"""Float32 arithmetic that means the same under every compiler: true division, powers of two by exponent bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp

TINY = 1.1754943508222875e-38
"""The smallest normal float32, 2^-126: XLA's CPU backend flushes results below it to zero."""


def divide(x, y):
    """x / y, correctly rounded. Shapes broadcast; float32.

    XLA rewrites a division by a constant or by a broadcast array into a multiplication with the reciprocal, which is off by one
    unit in the last place in a quarter of all cases. A divisor that depends on x, if only where x is NaN, is not recognised.
    """
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    return x / jnp.where(jnp.isnan(x), x, y)


def multiply_add(x, y, z):
    """x y + z with both roundings; float32.

    XLA's CPU backend contracts a product and a sum to one fused operation, in some programs and not in others. Taking the product
    apart into magnitude and sign is exact and keeps it from that; barriers and bitcasts do not.
    """
    product = x * y
    return jnp.abs(product) * jnp.sign(product) + z


def extreme(reduce, x, axis, keepdims: bool = False, initial=None):
    """`jnp.max` or `jnp.min` over axes where NaN wins: XLA's CPU backend loses NaN in the reductions that it vectorizes."""
    value = reduce(x, axis=axis, keepdims=keepdims, initial=initial)
    return jnp.where(jnp.any(jnp.isnan(x), axis=axis, keepdims=keepdims), jnp.nan, value)


def float_bits(x):
    """The bit pattern of float32 x, as int32."""
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)


def from_bits(bits):
    """The float32 of a bit pattern, the inverse of `float_bits`."""
    return jax.lax.bitcast_convert_type(bits.astype(jnp.int32), jnp.float32)


def decode_e8m0(byte):
    """2^(E - 127) of a uint8 exponent byte E (OCP MX, E8M0); 255 is NaN. E = 0 is the subnormal 2^-127."""
    e = byte.astype(jnp.int32)
    return from_bits(jnp.where(e == 255, 0x7FC00000, jnp.where(e == 0, 0x00400000, e << 23)))


def round_by(x, rounding: str):
    """Round to an integer: `rne` half to even, `rha` half away from zero, `trunc` toward zero."""
    if rounding == "rne":
        return jnp.round(x)
    whole = jnp.trunc(x)
    # x - trunc(x) is exact, where floor(|x| + 0.5) would round 0.49999997 up.
    return whole if rounding == "trunc" else whole + jnp.where(jnp.abs(x - whole) >= 0.5, jnp.sign(x), 0)

"""Element codes: what the bits of one quantized number mean.

A code is a record with two pure functions: `encode(x, rounding)` takes numbers already divided by their scale to stored codes, and
`decode(codes)` gives their values back as float32. Codes of fewer than 8 bits are unsigned bytes here; `qfunc._pack` packs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from ._numerics import TINY, divide, float_bits, from_bits, round_by
from ._spec import bits_of


@dataclass(frozen=True)
class Code:
    """One element type.

    Fields:
        name: as in `WeightSpec.code`.
        bits: bits of one code.
        dtype: numpy type of the unpacked codes (uint8 for everything below 8 bits).
        lowest, highest: the range of integer codes (their values, not their stored form); of the others, the range of values.
        offset: stored code of the value 0 (the code that pads a packed block).
        encode: (x float32, rounding) -> codes. NaN gives an arbitrary code.
        decode: codes -> values, float32.
    """

    name: str
    bits: int
    dtype: Any
    lowest: float
    highest: float
    offset: int
    encode: Callable
    decode: Callable

    @property
    def integer(self) -> bool:
        """True for int2..int8 and uint2..uint8."""
        return self.name.startswith(("int", "uint"))

    @property
    def packed(self) -> bool:
        """True where several codes share a byte."""
        return self.bits < 8


def _integer(name: str) -> Code:
    bits, signed = bits_of(name), not name.startswith("u")
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    # Signed codes below 8 bits are stored as offset binary, so that one subtraction decodes them.
    offset = -low if bits < 8 else 0
    dtype = np.dtype(np.int8 if signed and bits == 8 else np.uint8)

    def encode(x, rounding="rne"):
        return (jnp.clip(round_by(x, rounding), low, high).astype(jnp.int32) + offset).astype(dtype)

    def decode(codes):
        return (codes.astype(jnp.int32) - offset).astype(jnp.float32)

    return Code(name, bits, dtype, low, high, offset, encode, decode)


def _round_minifloat(x, rounding: str, exponent_bits: int, mantissa_bits: int, largest: float):
    """x rounded to the nearest number of a small float format, saturating; exact in float32."""
    lowest = 2 - 2 ** (exponent_bits - 1)                       # exponent of the smallest normal number, 1 - bias
    magnitude = jnp.abs(x)
    exponent = jnp.maximum((float_bits(magnitude) >> 23) - 127, lowest)
    step = from_bits((exponent - mantissa_bits + 127) << 23)
    return jnp.minimum(round_by(divide(magnitude, step), rounding) * step, largest)


def _minifloat(name: str, exponent_bits: int, mantissa_bits: int, largest: float) -> Code:
    """Sign, exponent, mantissa without infinities or NaN (OCP MX, sections 5.3.2 and 5.3.3)."""
    bits, lowest = 1 + exponent_bits + mantissa_bits, 2 - 2 ** (exponent_bits - 1)

    def encode(x, rounding="rne"):
        value = _round_minifloat(x, rounding, exponent_bits, mantissa_bits, largest)
        exponent = jnp.maximum((float_bits(value) >> 23) - 127, lowest)
        # A subnormal and the normals above it count on in one sequence: mantissa plus 2^m per exponent.
        mantissa = (value * from_bits((mantissa_bits - exponent + 127) << 23)).astype(jnp.int32)
        code = mantissa + ((exponent - lowest) << mantissa_bits)
        sign = (float_bits(x) >> 31) & 1
        return ((sign << (bits - 1)) | code).astype(jnp.uint8)

    def decode(codes):
        c = codes.astype(jnp.int32)
        code, sign = c & (2 ** (bits - 1) - 1), c >> (bits - 1)
        field, mantissa = code >> mantissa_bits, code & (2**mantissa_bits - 1)
        normal = from_bits(((field + lowest - 1 + 127) << 23) | (mantissa << (23 - mantissa_bits)))
        subnormal = mantissa.astype(jnp.float32) * np.float32(2.0 ** (lowest - mantissa_bits))
        value = jnp.where(field == 0, subnormal, normal)
        return jnp.where(sign == 1, -value, value)

    return Code(name, bits, np.dtype(np.uint8), -largest, largest, 0, encode, decode)


def _float8(name: str, dtype, mantissa_bits: int) -> Code:
    largest = float(jnp.finfo(dtype).max)

    def encode(x, rounding="rne"):
        # Above the largest number and half a step the cast gives NaN (e4m3) or infinity (e5m2), not saturation.
        x = jnp.clip(x, -largest, largest)
        if rounding != "rne":
            exponent_bits = 7 - mantissa_bits
            x = jnp.copysign(_round_minifloat(x, rounding, exponent_bits, mantissa_bits, largest), x)
        return x.astype(dtype)

    return Code(name, 8, np.dtype(dtype), -largest, largest, 0, encode, lambda codes: codes.astype(jnp.float32))


def _table(name: str, values: tuple[float, ...]) -> Code:
    """A table of 16 values: nearest value, the lower one at a midpoint (bitsandbytes, csrc/cpu_ops.cpp)."""
    table = np.asarray(values, np.float32)
    order = np.argsort(table, kind="stable").astype(np.uint8)
    ranked = table[order]
    middles = ((ranked[1:].astype(np.float64) + ranked[:-1]) / 2).astype(np.float32)
    zero = int(np.flatnonzero(table == 0)[0])

    def encode(x, rounding="rne"):
        rank = jnp.searchsorted(jnp.asarray(middles), x, side="left")
        return jnp.asarray(order)[rank]

    return Code(name, 4, np.dtype(np.uint8), float(table.min()), float(table.max()), zero, encode,
                lambda codes: jnp.take(jnp.asarray(table), codes.astype(jnp.int32), mode="clip"))


# bitsandbytes 0.50 (functional.py, get_4bit_type); NF4 is from QLoRA, arXiv 2305.14314, appendix E.
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
_FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
FP4_BNB = _FP4 + tuple(-v for v in _FP4)

CODES: dict[str, Code] = {code.name: code for code in (
    *(_integer(f"{sign}int{bits}") for sign in ("", "u") for bits in range(2, 9)),
    _float8("fp8_e4m3", jnp.float8_e4m3fn, 3),
    _float8("fp8_e5m2", jnp.float8_e5m2, 2),
    _minifloat("fp6_e2m3", 2, 3, 7.5),
    _minifloat("fp6_e3m2", 3, 2, 28.0),
    _minifloat("fp4_e2m1", 2, 1, 6.0),
    _table("nf4", NF4),
    _table("fp4_bnb", FP4_BNB),
)}
"""Every regular element code by name."""


def code(name: str) -> Code:
    """The record of a code; ValueError with the names there are."""
    try:
        return CODES[name]
    except KeyError:
        raise ValueError(f"no element code {name!r}; there are {', '.join(CODES)}") from None


def usable(scale):
    """A scale to divide by: 1 where it is zero or so small that a division could overflow; NaN where it is not finite."""
    scale = jnp.where(jnp.abs(scale) < TINY, jnp.float32(1), scale)
    return jnp.where(jnp.isfinite(scale), scale, jnp.float32(jnp.nan))

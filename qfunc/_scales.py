"""Scale rules: from the extremes of a cell to its scale. One table, because producers of checkpoints differ in nothing else so much.

Notation: a cell is what shares one scale; lo and hi are its smallest and largest element, amax the largest magnitude, b the bits of
the code, m its mantissa bits, c its largest value. All arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from einops import rearrange

from ._codes import Code, usable
from ._numerics import divide, extreme, float_bits
from ._spec import Granularity


def scale_shape(granularity: Granularity, rows: int, columns: int) -> tuple[int, int]:
    """Shape of the scales of a matrix stored as (rows = out, columns = in)."""
    kind, size = granularity.kind, granularity.size
    return {"tensor": (1, 1), "channel": (rows, 1), "token": (rows, 1),
            "group": (rows, -(-columns // max(size, 1))),
            "block": (-(-rows // max(granularity.out, 1)), -(-columns // max(size, 1)))}[kind]


def reduce_cells(x, granularity: Granularity, reduce: Callable):
    """Reduce every cell of x [..., rows, columns] by `reduce` (jnp.max or jnp.min) to the shape of its scales; NaN wins.

    Cells that stick out over an edge are completed with zeros, so `reduce` must not mind a zero (amax, or a range that includes 0).
    """
    *_, rows, columns = x.shape
    outs, ins = scale_shape(granularity, rows, columns)
    cell_out, cell_in = -(-rows // outs), -(-columns // ins)
    if granularity.kind in ("group", "block"):
        cell_in, cell_out = granularity.size, granularity.out or 1
    pad = [(0, 0)] * (x.ndim - 2) + [(0, outs * cell_out - rows), (0, ins * cell_in - columns)]
    cells = rearrange(jnp.pad(x, pad), "... (n r) (g c) -> ... n g r c", n=outs, g=ins, r=cell_out, c=cell_in)
    return extreme(reduce, cells, (-2, -1))


def spread(scale, granularity: Granularity, rows: int, columns: int):
    """Scales [..., outs, ins] as an array that broadcasts against [..., rows, columns]."""
    if granularity.kind in ("group", "block"):
        scale = jnp.repeat(scale, granularity.size, -1)[..., :columns]
    if granularity.kind == "block":
        scale = jnp.repeat(scale, granularity.out, -2)[..., :rows, :]
    return scale


def span(outer, granularity: Granularity, groups: int):
    """The outer scales of `mx_dual`, one for every DUAL_SPAN elements, as one for each of the groups below them."""
    return jnp.repeat(outer, DUAL_SPAN // granularity.size, -1)[..., :groups]


def _amax(lo, hi):
    # NaN must win here, or a poisoned weight would get a finite scale; both operations propagate it.
    return jnp.maximum(jnp.abs(lo), jnp.abs(hi))


def _full_range(lo, hi, code: Code):
    """s = -(element of largest magnitude) / 2^(b-1): every code is used and s may be negative (ggml Q4_0, auto-round)."""
    extreme = jnp.where(jnp.abs(hi) >= jnp.abs(lo), hi, lo)
    return divide(-extreme, -code.lowest)


SYMMETRIC: dict[str, Callable] = {
    # SGLang's int8 kernels, AutoAWQ, msModelSlim; for floats amax lands on the largest value.
    "amax": lambda lo, hi, code: divide(_amax(lo, hi), code.highest),
    # compressed-tensors and torchao: amax / (2^(b-1) - 1/2), the lowest code is used.
    "amax_half": lambda lo, hi, code: divide(_amax(lo, hi), code.highest + 0.5),
    # The same with torchao's smallest scale, float32's epsilon (its int8 activations).
    "amax_half_inverse": lambda lo, hi, code: jnp.maximum(divide(_amax(lo, hi), code.highest + 0.5), jnp.float32(2**-23)),
    "full_range": _full_range,
}
"""Rules without a zero point: (lo, hi, code) -> float32 scale."""

INVERSE = frozenset({"amax_half_inverse", "minmax_inverse"})
"""Rules of activations whose codes are round(x (1 / s)), as torchao computes them, where those of all others are round(x / s): the two
differ where x / s is a tie, and under `amax_half` the largest element of every row is one."""


def minmax(lo, hi, code: Code, rounding: Callable = jnp.round, joined: bool = False):
    """Integer zero point over a range that includes 0: s = (hi - lo) / (2^b - 1), z = clip(round(lowest - lo / s)); w = (q - z) s.

    `joined`: one division, as torchao has it (`minmax_inverse`); else two, since hi - lo may overflow.
    """
    lo, hi = jnp.minimum(lo, 0), jnp.maximum(hi, 0)
    steps = code.highest - code.lowest
    scale = usable(divide(hi - lo, steps) if joined else divide(hi, steps) - divide(lo, steps))
    return scale, jnp.clip(code.lowest - rounding(divide(lo, scale)), code.lowest, code.highest)


def minmax_float(lo, hi, code: Code):
    """Float zero point (torchao's tinygemm int4): s = (hi - lo) / (2^b - 1), z = lo - lowest s; w = q s + z."""
    steps = code.highest - code.lowest
    scale = usable(divide(hi, steps) - divide(lo, steps))
    return scale, lo - code.lowest * scale


# Largest exponent and mantissa bits of the MX element types (OCP Microscaling Formats 1.0, section 5).
MX_ELEMENTS = {"fp4_e2m1": (2, 1), "fp6_e2m3": (2, 3), "fp6_e3m2": (4, 2), "fp8_e4m3": (8, 3), "fp8_e5m2": (15, 2)}


def _field(x):
    return (float_bits(x) >> 23) & 255


def _ceil_field(x):
    return _field(x) + ((float_bits(x) & 0x7FFFFF) != 0).astype(jnp.int32)


def _even(amax, code: Code, mantissa: int):
    bumped = float_bits(amax) + (1 << (22 - mantissa))
    return ((bumped >> 23) & 255) - MX_ELEMENTS[code.name][0]


MX: dict[str, Callable] = {
    # OCP's rule (torchao's default, ggml): floor(log2 amax) - emax.
    "mx_floor": lambda amax, code: _field(amax) - MX_ELEMENTS[code.name][0],
    # Round amax to the element's own precision first (torchao EVEN).
    "mx_even": lambda amax, code: _even(amax, code, MX_ELEMENTS[code.name][1]),
    # AMD Quark and compressed-tensors: one mantissa bit for fp4 and for fp8.
    "mx_even1": lambda amax, code: _even(amax, code, 1),
    "mx_ceil": lambda amax, code: _ceil_field(amax) - MX_ELEMENTS[code.name][0],
    # NVIDIA Blackwell: ceil(log2(amax / c)); nothing is clipped.
    "mx_rceil": lambda amax, code: _ceil_field(divide(amax, code.highest)),
    # msModelSlim's ceil_x and auto-round's rceil with their default divisor 7.25.
    "mx_ceil_x": lambda amax, code: _ceil_field(divide(amax, 7.25)),
}
"""Rules for a power of two: (amax, code) -> biased exponent, before clipping."""

DUAL_SPAN = 512
"""Elements that share one outer float32 scale, amax / c, under the rule `mx_dual`; below it are blocks of 32 by `mx_floor`."""

RULES = (*SYMMETRIC, *MX, "minmax", "minmax_inverse", "minmax_float", "two_level", "double", "mx_dual")
"""The names that `WeightSpec.scale_rule` and `ActivationSpec.scale_rule` take."""


def mx_exponent(amax, code: Code, rule: str):
    """The e8m0 byte of a block: 127 for an all-zero block, 255 (NaN) where amax is not finite.

    Bytes below 1 are not made: 2^-127 is a float32 subnormal that XLA's CPU backend takes for zero.
    """
    exponent = jnp.clip(MX[rule](amax, code), 1, 254)
    exponent = jnp.where(amax == 0, 127, exponent)
    return jnp.where(jnp.isfinite(amax), exponent, 255).astype(jnp.uint8)

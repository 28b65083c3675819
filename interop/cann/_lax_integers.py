"""Torch rules of lax primitives in which integers have ends: quotients, signs, shifts, counts of bits.

Where torch and XLA differ the rule says so: division by zero and of the least integer by -1, NaN in `sign`, shifts by the width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ._arrays import torch_dtype
from ._build import is_literal, number, rule
from ._lax_elementwise import UNSIGNED, binary, every, signed, unary, unsigned64
from ._program import abstract


def _divide(eqn, scope):
    if eqn.outvars[0].aval.dtype.kind in "cfV" or "float" in eqn.outvars[0].aval.dtype.name:
        return binary(torch.div)(eqn, scope)
    # XLA defines x / 0 = -1 and x % 0 = x where torch stops, and min / -1 = min and min % -1 = 0 where it dies.
    def divide(x, y):
        quotient = torch.where(y == 0, -1, torch.div(x, torch.where(_unsafe(y), 1, y), rounding_mode="trunc"))
        return torch.where(y == -1, -x, quotient) if y.dtype.is_signed else quotient
    return every(eqn, unsigned64(eqn, divide))


def _remainder(eqn, scope):
    if "float" in eqn.outvars[0].aval.dtype.name:
        return binary(torch.fmod)(eqn, scope)
    return every(eqn, unsigned64(eqn, lambda x, y: torch.where(y == 0, x, torch.fmod(x, torch.where(_unsafe(y), 1, y)))))


def _unsafe(y):
    return (y == 0) | (y == -1) if y.dtype.is_signed else y == 0


def _shift(function: Callable, arithmetic: bool):
    """Shifts by the width or more give 0, or the sign; torch leaves them undefined."""
    def factory(eqn, scope):
        shape, dtype = abstract(eqn.outvars[0].aval)
        bits = dtype.itemsize * 8
        second = eqn.invars[1]

        def clipped(x, n):
            if not isinstance(n, torch.Tensor):
                return function(x, n, bits)
            beyond = (n < 0) | (n >= bits)              # an amount is unsigned
            shifted = function(x, torch.where(beyond, bits - 1, n), bits)
            return shifted if arithmetic else torch.where(beyond, 0, shifted)
        if is_literal(second) and not second.aval.shape and 0 <= number(second) < bits and not is_literal(eqn.invars[0]):
            amount = number(second)
            return signed(eqn, lambda x: clipped(x, amount))
        return every(eqn, signed(eqn, clipped))
    return factory


def _logical_right(x, n, bits: int):
    if x.dtype == torch.uint8:
        return x >> n
    # An arithmetic shift drags the sign along: mask what it brought in.
    mask = ((-1 << (bits - 1)) >> n) << 1 if not isinstance(n, torch.Tensor) else None
    if mask is not None:
        return (x >> n) & ~mask if n else x
    return torch.where(n == 0, x, (x >> n) & ~((torch.full_like(x, -1) << (bits - 1) >> n) << 1))


def _arithmetic_right(x, n, bits: int):
    if x.dtype != torch.uint8:
        return x >> n
    return (x.view(torch.int8) >> (n.view(torch.int8) if isinstance(n, torch.Tensor) else n)).view(torch.uint8)


def _sign(eqn, scope):
    if torch_dtype(eqn.invars[0].aval.dtype) in UNSIGNED:       # the highest bit is no sign
        return every(eqn, signed(eqn, lambda x: (x != 0).to(x.dtype)))
    return unary(lambda x: torch.where(torch.isnan(x), x, torch.sign(x)) if x.is_floating_point() else torch.sgn(x))(eqn, scope)


def _leading_zeros(x):
    """All bits below the highest one are set, by doubling; what is left is zeros in front."""
    bits = 8 * x.dtype.itemsize
    wide = x.to(torch.int64) & (2**bits - 1 if bits < 64 else -1)
    for by in (1, 2, 4, 8, 16, 32):
        wide = wide | ((wide >> by) & (2 ** (64 - by) - 1))
    return (bits - _bits(wide)).to(x.dtype)


def _bits(x):
    """Ones among the bits of an integer, counted pair by pair."""
    wide = x.to(torch.int64) & ((1 << (8 * x.dtype.itemsize)) - 1 if x.dtype.itemsize < 8 else -1)
    wide = wide - ((wide >> 1) & 0x5555555555555555)
    wide = (wide & 0x3333333333333333) + ((wide >> 2) & 0x3333333333333333)
    wide = (wide + (wide >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((wide * 0x0101010101010101) >> 56).to(x.dtype)


rule("div")(_divide)
rule("rem")(_remainder)
rule("sign")(_sign)
rule("shift_left")(_shift(lambda x, n, bits: x << n, False))
rule("shift_right_logical")(_shift(_logical_right, False))
rule("shift_right_arithmetic")(_shift(_arithmetic_right, True))
rule("population_count")(unary(_bits))
rule("clz")(unary(_leading_zeros))

"""Torch rules of elementwise lax primitives; those of integers alone are in `_lax_integers`.

Where torch and XLA differ the rule says so, as in casts of what does not fit.
Unsigned integers above 8 bits, which torch only stores, are computed as signed ones of the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ._arrays import CARRIERS, torch_dtype
from ._build import UnknownPrimitive, is_literal, number, rule, tensor_of
from ._program import abstract, device

EIGHT = (torch.float8_e4m3fn, torch.float8_e5m2)
UNSIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def every(eqn, function: Callable) -> Callable:
    """`function` of all operands as tensors, for a rule whose literals may stand anywhere."""
    literals = {i: v for i, v in enumerate(eqn.invars) if is_literal(v)}
    if not literals:
        return function
    count = len(eqn.invars)

    def run(*given):
        rest = iter(given)
        return function(*(tensor_of(literals[i]) if i in literals else next(rest) for i in range(count)))
    return run


def signed(eqn, function: Callable) -> Callable:
    """`function` on signed views of unsigned operands; an unsigned result is viewed back."""
    _, dtype = abstract(eqn.outvars[0].aval)
    if dtype not in UNSIGNED and not any(torch_dtype(v.aval.dtype) in UNSIGNED for v in eqn.invars if not is_literal(v)):
        return function

    def run(*operands):
        out = function(*(x.view(UNSIGNED[x.dtype]) if x.dtype in UNSIGNED else x for x in operands))
        return out.view(dtype) if dtype in UNSIGNED and out.dtype != dtype else out
    return run


def _eight(eqn, function: Callable) -> Callable:
    """`function` of 8-bit floats in float32, which rounds once, as XLA does."""
    _, dtype = abstract(eqn.outvars[0].aval)
    if not any(torch_dtype(v.aval.dtype) in EIGHT for v in eqn.invars):
        return function

    def run(*operands):
        out = function(*(x.to(torch.float32) if isinstance(x, torch.Tensor) and x.dtype in EIGHT else x for x in operands))
        return cast(out, torch.float32, dtype) if dtype in EIGHT else out
    return run


def _fits(v) -> bool:
    """A literal that a Python number says as well: not one whose bits are a negative number when they are seen as signed."""
    value = number(v)
    return torch_dtype(v.aval.dtype) not in UNSIGNED or value < 2**31


def unary(function: Callable):
    """A rule of one operand."""
    return lambda eqn, scope: signed(eqn, every(eqn, _eight(eqn, function)))


def binary(function: Callable, numbers: bool = True, swapped: Callable | None = None):
    """A rule of two operands; `numbers`: a literal in second place may go in as a Python number; `swapped` takes one in first place."""
    def factory(eqn, scope):
        first, second = eqn.invars
        if any(torch_dtype(v.aval.dtype) in EIGHT for v in eqn.invars):
            return every(eqn, _eight(eqn, function))
        if numbers and is_literal(second) and not is_literal(first) and not second.aval.shape and _fits(second):
            value = number(second)
            return signed(eqn, lambda x: function(x, value))
        if swapped is not None and is_literal(first) and not is_literal(second) and not first.aval.shape and _fits(first):
            value = number(first)
            return signed(eqn, lambda y: swapped(y, value))
        return _signed_all(eqn, function)
    return factory


def _signed_all(eqn, function):
    def run(*operands):
        return function(*operands)
    return every(eqn, signed(eqn, run))


def unsigned64(eqn, function):
    """Order and quotients of unsigned numbers, in 64 bits."""
    _, dtype = abstract(eqn.outvars[0].aval)
    if torch_dtype(eqn.invars[0].aval.dtype) not in UNSIGNED:
        return lambda *operands: function(*operands).to(dtype)

    def run(*operands):
        out = function(*(widened(x) for x in operands))
        return narrowed(out, dtype)
    return run


def widened(x: torch.Tensor) -> torch.Tensor:
    """An unsigned tensor as int64; the highest bit of uint64 is refused by the type table already."""
    if x.dtype == torch.uint64:
        return x.view(torch.int64)
    if x.dtype not in UNSIGNED:
        return x
    return x.view(UNSIGNED[x.dtype]).to(torch.int64) & (0xFFFFFFFF if x.dtype == torch.uint32 else 0xFFFF)


def narrowed(x: torch.Tensor, dtype) -> torch.Tensor:
    """An int64 tensor as another integer type, by its low bits."""
    return x.to(UNSIGNED[dtype]).view(dtype) if dtype in UNSIGNED else x.to(dtype)


def _compare(function: Callable):
    def factory(eqn, scope):
        dtype = torch_dtype(eqn.invars[0].aval.dtype)
        if dtype in UNSIGNED:
            return every(eqn, lambda x, y: function(widened(x), widened(y)))
        if dtype in CARRIERS:
            return every(eqn, lambda x, y: function(x.float(), y.float()))
        first, second = eqn.invars
        if is_literal(second) and not is_literal(first):
            value = number(second)
            return lambda x: function(x, value)
        return every(eqn, function)
    return factory


def _total(function: Callable):
    """Order in which NaN is above everything and equal to itself."""
    def compare(x, y):
        if not x.is_floating_point():
            return function(x, y)
        nan_x, nan_y = torch.isnan(x), torch.isnan(y)
        return torch.where(nan_x | nan_y, function(nan_x.to(torch.int8), nan_y.to(torch.int8)), function(x, y))
    return lambda eqn, scope: every(eqn, lambda x, y: compare(widened(x), widened(y)))


def _extreme(function: Callable):
    def factory(eqn, scope):
        return every(eqn, unsigned64(eqn, _eight(eqn, function)))
    return factory


def _round(eqn, scope):
    if int(eqn.params["rounding_method"]) == 1:
        return every(eqn, torch.round)
    # Half away from zero; adding one half first would round 0.49999997 up.
    return every(eqn, lambda x: torch.where((x - torch.trunc(x)).abs() >= 0.5, torch.trunc(x) + torch.sign(x), torch.trunc(x)))


def _power(eqn, scope):
    exponent = eqn.params["y"]
    if "float" in eqn.outvars[0].aval.dtype.name:
        return every(eqn, lambda x: torch.pow(x, exponent))
    return every(eqn, signed(eqn, lambda x: torch.pow(x, exponent)))


def _pow(x, y):
    return torch.pow(x, y.to(x.dtype)) if isinstance(y, torch.Tensor) else torch.pow(x, y)


def _cast(eqn, scope):
    source, dtype = torch_dtype(eqn.invars[0].aval.dtype), torch_dtype(eqn.params["new_dtype"])
    return every(eqn, lambda x: cast(x, source, dtype))


def cast(x: torch.Tensor, source, dtype) -> torch.Tensor:
    """A cast as XLA makes it: what fp8 cannot hold is NaN (infinite in e5m2), floats saturate in integers and NaN is 0 there."""
    if source == dtype:
        return x
    if source in UNSIGNED:
        x, source = widened(x), torch.int64
    if dtype == torch.bool:
        return x != 0
    if source in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu) and dtype != torch.float32:
        return cast(x.to(torch.float32), torch.float32, dtype)
    if dtype in FP8_LIMITS:
        x = x.to(torch.float32)
        limit, beyond = FP8_LIMITS[dtype]
        # Values halfway between the largest number and the next would be it are rounded to it.
        return torch.where(x.abs() > limit, torch.copysign(torch.full_like(x, beyond), x), x).to(dtype)
    if source.is_floating_point and not dtype.is_floating_point and not dtype.is_complex:
        return _saturated(x, dtype)
    return narrowed(x, dtype) if dtype in UNSIGNED else x.to(dtype)


FP8_LIMITS = {torch.float8_e4m3fn: (464.0, float("nan")), torch.float8_e5m2: (61439.998, float("inf"))}


def _saturated(x, dtype):
    bounds = torch.iinfo(dtype)
    x = torch.nan_to_num(x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x, nan=0.0)
    if bounds.bits < 32:
        return x.clamp(bounds.min, bounds.max).to(UNSIGNED.get(dtype, dtype) if bounds.bits < 16 else torch.int32).to(dtype)
    if dtype == torch.uint32:
        top = 2.0**32
        return narrowed(torch.where(x >= top, 2**32 - 1, x.clamp(0, top - 256).to(torch.int64)), dtype)
    # The largest int32 is no float32: 2^31 itself is cut off apart.
    top = float(2**(bounds.bits - 1))
    inside = (x >= -top) & (x < top)
    return torch.where(inside, torch.where(inside, x, 0).to(dtype), torch.where(x > 0, bounds.max, bounds.min).to(dtype))


def _select(eqn, scope):
    dtype = torch_dtype(eqn.outvars[0].aval.dtype)
    carrier = CARRIERS.get(dtype)

    def run(which, *cases):
        if carrier is not None:
            cases = [case.view(carrier) for case in cases]
        if which.dtype == torch.bool:
            out = torch.where(which, cases[1], cases[0]) if len(cases) > 1 else cases[0]
        else:
            out = cases[0]
            for i, case in enumerate(cases[1:], 1):
                out = torch.where(which == i, case, out)
        return out.view(dtype) if carrier is not None else out
    return every(eqn, run)


def _clamp(low, x, high):
    return torch.minimum(torch.maximum(x, low), high)


def _bitcast(eqn, scope):
    source, dtype = torch_dtype(eqn.invars[0].aval.dtype), torch_dtype(eqn.params["new_dtype"])
    shape = tuple(eqn.outvars[0].aval.shape)
    if source.itemsize == dtype.itemsize:
        return every(eqn, lambda x: x.view(dtype))
    if source.itemsize > dtype.itemsize:
        return every(eqn, lambda x: x.reshape(*x.shape, 1).contiguous().view(dtype).reshape(shape))
    return every(eqn, lambda x: x.contiguous().view(dtype).reshape(shape))


def _precision(eqn, scope):
    """Fewer bits in the same type, half to even; what a shorter exponent cannot hold is infinite above and zero below, subnormals too."""
    exponent, mantissa = eqn.params["exponent_bits"], eqn.params["mantissa_bits"]
    dtype = torch_dtype(eqn.outvars[0].aval.dtype)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or not 1 <= exponent <= 8:
        raise UnknownPrimitive(eqn)
    drop, bias = max(23 - mantissa, 0), 2 ** (exponent - 1) - 1

    def run(x):
        wide = x.to(torch.float32)
        bits = wide.contiguous().view(torch.int32)
        if drop:
            bits = (bits + ((1 << (drop - 1)) - 1 + ((bits >> drop) & 1))) & -(1 << drop)
        if exponent < 8:
            field, sign = (bits >> 23) & 255, bits & -2**31
            bits = torch.where(field > 127 + bias, sign | 0x7F800000, torch.where(field <= 127 - bias, sign, bits))
        return torch.where(torch.isnan(wide), wide, bits.view(torch.float32)).to(x.dtype)
    return every(eqn, run)


def _iota(eqn, scope):
    shape, dtype, axis = tuple(eqn.params["shape"]), torch_dtype(eqn.params["dtype"]), eqn.params["dimension"]
    own = [size if i == axis else 1 for i, size in enumerate(shape)]

    def run():
        made = torch.arange(shape[axis], dtype=UNSIGNED.get(dtype, dtype), device=device()).reshape(own).expand(shape)
        return made.view(dtype) if dtype in UNSIGNED else made
    return run


def _logistic(x):
    return torch.sigmoid(x)


def _negative(y, value):
    return value - y


def _nan_max(x, y):
    return torch.logical_or(x, y) if x.dtype == torch.bool else torch.maximum(x, y)


def _nan_min(x, y):
    return torch.logical_and(x, y) if x.dtype == torch.bool else torch.minimum(x, y)


_UNARY = {
    "neg": torch.neg, "abs": torch.abs, "floor": torch.floor, "ceil": torch.ceil, "exp": torch.exp, "exp2": torch.exp2,
    "expm1": torch.expm1, "log": torch.log, "log1p": torch.log1p, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt,
    "cbrt": lambda x: torch.copysign(torch.pow(x.abs(), 1 / 3), x), "square": torch.square, "logistic": _logistic, "tanh": torch.tanh,
    "sin": torch.sin, "cos": torch.cos, "tan": torch.tan, "asin": torch.asin, "acos": torch.acos, "atan": torch.atan,
    "sinh": torch.sinh, "cosh": torch.cosh, "asinh": torch.asinh, "acosh": torch.acosh, "atanh": torch.atanh,
    "erf": torch.erf, "erfc": torch.erfc, "erf_inv": torch.erfinv, "lgamma": torch.lgamma, "digamma": torch.digamma,
    "bessel_i0e": torch.special.i0e, "bessel_i1e": torch.special.i1e,
    "is_finite": torch.isfinite, "not": torch.bitwise_not, "copy": lambda x: x, "copy_p": lambda x: x,
    "stop_gradient": lambda x: x, "name": lambda x: x, "real": torch.real, "imag": torch.imag, "conj": torch.conj_physical,
    "sharding_constraint": lambda x: x, "layout_constraint": lambda x: x, "reshard": lambda x: x, "pvary": lambda x: x,
}
_BINARY = {
    "add": binary(torch.add, swapped=torch.add), "add_any": binary(torch.add), "sub": binary(torch.sub, swapped=_negative),
    "mul": binary(torch.mul, swapped=torch.mul), "pow": binary(_pow), "atan2": binary(torch.atan2, numbers=False),
    "nextafter": binary(torch.nextafter, numbers=False), "complex": binary(torch.complex, numbers=False),
    "max": _extreme(_nan_max), "min": _extreme(_nan_min),
    "and": binary(torch.bitwise_and, swapped=torch.bitwise_and), "or": binary(torch.bitwise_or, swapped=torch.bitwise_or),
    "xor": binary(torch.bitwise_xor, swapped=torch.bitwise_xor),
    "eq": _compare(torch.eq), "ne": _compare(torch.ne), "lt": _compare(torch.lt), "le": _compare(torch.le), "gt": _compare(torch.gt),
    "ge": _compare(torch.ge),
}

for _name, _function in _UNARY.items():
    rule(_name)(unary(_function))
for _name, _factory in _BINARY.items():
    rule(_name)(_factory)
for _name, _function in {"lt_to": torch.lt, "le_to": torch.le, "eq_to": torch.eq}.items():
    rule(_name)(_total(_function))
rule("round")(_round)
rule("integer_pow")(_power)
rule("convert_element_type")(_cast)
rule("select_n")(_select)
rule("clamp")(lambda eqn, scope: every(eqn, unsigned64(eqn, _eight(eqn, _clamp))))
rule("bitcast_convert_type")(_bitcast)
rule("reduce_precision")(_precision)
rule("iota")(_iota)


@rule("optimization_barrier", "device_put")
def _handed_on(eqn, scope):
    return every(eqn, lambda *operands: operands)

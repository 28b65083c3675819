"""Quantization of activations: the formulas, as plain jax.numpy. They are the specification that every kernel must equal.

s = clip amax / c, or 1 where that is 0; codes = clip(round(x / s)), or clip(round(x (1 / s))) under the rules of `_scales.INVERSE`; a zero
row gives exactly zero codes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from . import _scales
from ._codec import E4M3_LARGEST, two_level
from ._codes import CODES, Code, code, usable
from ._numerics import decode_e8m0, divide, extreme, round_by
from ._spec import ActivationSpec, group


class QuantizedActivation(NamedTuple):
    """A quantized activation.

    `codes`: int8 (int4 and int8), float8 or uint8 (e2m1, e2m3, e3m2: one code a byte), shape of x [..., M, K].
    `scale`: float32, [..., M, 1] per token, [..., M, ceil(K / n)] per group, ones but for the batch axes per tensor.
    `zero`: int32 with the shape of `scale`, or None when symmetric. x = (codes - zero) scale.
    """

    codes: Any
    scale: Any
    zero: Any = None


def quantize_rows(x, spec: ActivationSpec, input_scale=None, input_zero=None, scope: int = 0) -> QuantizedActivation:
    """Quantize an activation by its spec.

    Arguments:
        x: float [..., M, K]; computed in float32.
        input_scale, input_zero: the calibrated scale and zero point of a static or outer per-tensor scale, broadcastable to the
            per-tensor shape; None where the scale comes from the data.
        scope: how many leading axes of x are separate tensors: a per-tensor scale is taken over the others.
    """
    element = code(spec.code)
    x = bounded(x.astype(jnp.float32), spec)
    scale, zero = _scale_zero(x, spec, element, input_scale, input_zero, scope)
    if spec.scale_rule in _scales.INVERSE:
        y = x * _wide(divide(1, scale), spec, x.shape[-1])
    else:
        y = divide(x, _wide(scale, spec, x.shape[-1]))
    if not element.integer:
        return QuantizedActivation(element.encode(y, spec.rounding), scale, None)
    y = round_by(y, spec.rounding)
    if zero is not None:
        y = y + _wide(zero, spec, x.shape[-1]).astype(jnp.float32)
    # The symmetric rule never needs the lowest code on the data that it saw; a calibrated range, or another rule, may.
    spared = zero is None and spec.mode == "dynamic" and spec.scale_rule == "amax"
    lowest = -element.highest if spared else element.lowest
    return QuantizedActivation(jnp.clip(y, lowest, element.highest).astype(jnp.int8), scale, zero)


def check_activation(spec: ActivationSpec | None) -> None:
    """Raise ValueError where the fields of a spec contradict each other, so that nothing is quantized by half of it."""
    if spec is None:
        return
    element = CODES.get(spec.code)
    known = element is not None and (element.integer and element.lowest < 0 or spec.code.startswith("fp") and spec.code != "fp4_bnb")
    rules = (*_scales.SYMMETRIC, *_scales.MX, "mx_dual")
    expectations = (
        ("code", spec.code, "int2 to int8, fp8_e4m3, fp8_e5m2, fp6_e2m3, fp6_e3m2 or fp4_e2m1", known),
        ("granularity", str(spec.granularity), "token, tensor or group", spec.granularity.kind in ("token", "tensor", "group")),
        ("zero", spec.zero, "None, or 'int' for integers", spec.zero is None or spec.zero == "int" and known and element.integer),
        ("outer", spec.outer, "None, 'tensor' or 'token'", spec.outer in (None, "tensor", "token")),
        ("scale_rule", spec.scale_rule, f"one of {', '.join(rules)}, or with a zero point minmax or minmax_inverse",
         spec.scale_rule in rules or spec.outer is not None or spec.zero == "int" and spec.scale_rule in ("minmax", "minmax_inverse")),
        ("code", spec.code, f"one of {', '.join(_scales.MX_ELEMENTS)} for powers of two",
         spec.scale_rule not in (*_scales.MX, "mx_dual") or spec.code in _scales.MX_ELEMENTS),
        ("bound", spec.bound, "None or a positive number", spec.bound is None or spec.bound > 0),
    )
    for field, found, expected, holds in expectations:
        if not holds:
            raise ValueError(f"activations: expected {field} {expected}, found {found!r}")


def bounded(x, spec: ActivationSpec | None):
    """x within the bound of its spec, where there is one; no kernel has to know of it."""
    return x if spec is None or spec.bound is None else jnp.clip(x, -spec.bound, spec.bound)


def dequantize_rows(q: QuantizedActivation, spec: ActivationSpec) -> jax.Array:
    """The float32 activation [..., M, K] of a `QuantizedActivation`."""
    codes, scale, zero = q
    element = code(spec.code)
    values = codes.astype(jnp.float32) if element.integer else element.decode(codes)
    if zero is not None:
        values = values - _wide(zero, spec, codes.shape[-1]).astype(jnp.float32)
    return values * _wide(scale, spec, codes.shape[-1])


def _wide(scale, spec: ActivationSpec, columns: int):
    return jnp.repeat(scale, spec.granularity.size, -1)[..., :columns] if spec.granularity.kind == "group" else scale


def _tensor_axes(x, scope: int) -> tuple[int, ...]:
    return tuple(range(scope, x.ndim))


def _aligned(value, x, scope: int, dtype):
    """A calibrated value [*batch, 1, 1] as an array of x's rank, its batch axes first."""
    value = jnp.asarray(value, dtype)
    batch = value.shape[: min(scope, max(value.ndim - 2, 0))]
    return value.reshape(*batch, *([1] * (x.ndim - len(batch))))


def _cells(x, spec: ActivationSpec, scope: int, reduce):
    kind = spec.granularity.kind
    if kind == "tensor":
        return extreme(reduce, x, _tensor_axes(x, scope), keepdims=True, initial=0)      # there may be no rows
    if kind == "token":
        return extreme(reduce, x, -1, keepdims=True)
    size = spec.granularity.size
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)])       # a zero changes neither amax nor a range with 0
    return extreme(reduce, rearrange(padded, "... (g c) -> ... g c", c=size), -1)


def _scale_zero(x, spec: ActivationSpec, element: Code, input_scale, input_zero, scope: int):
    if spec.outer is not None:
        outer = _outer(x, spec, element, input_scale, scope)
        inner = two_level(_cells(jnp.abs(x), spec, scope, jnp.max) * jnp.float32(spec.clip), outer, element)
        return inner.astype(jnp.float32) * outer, None
    if input_scale is not None and spec.granularity.kind == "tensor":
        zero = None if spec.zero is None else _aligned(input_zero, x, scope, jnp.int32)
        return _aligned(input_scale, x, scope, jnp.float32), zero
    if spec.mode == "static":
        raise ValueError("a static activation scheme needs the calibrated input_scale of the weight, found none")
    if spec.zero == "int":
        lo, hi = _cells(x, spec, scope, jnp.min) * spec.clip, _cells(x, spec, scope, jnp.max) * spec.clip
        scale, zero = _scales.minmax(lo, hi, element, joined=spec.scale_rule == "minmax_inverse")
        return scale, jnp.where(jnp.isfinite(zero), zero, 0).astype(jnp.int32)
    amax = _cells(jnp.abs(x), spec, scope, jnp.max)
    if spec.clip != 1:
        amax = amax * jnp.float32(spec.clip)
    if spec.scale_rule == "mx_dual":
        wide = dataclasses.replace(spec, granularity=group(_scales.DUAL_SPAN))
        outer = usable(divide(_cells(jnp.abs(x), wide, scope, jnp.max) * jnp.float32(spec.clip), element.highest))
        outer = _scales.span(outer, spec.granularity, amax.shape[-1])
        return decode_e8m0(_scales.mx_exponent(divide(amax, outer), element, "mx_floor")) * outer, None
    if spec.scale_rule in _scales.MX:
        return decode_e8m0(_scales.mx_exponent(amax, element, spec.scale_rule)), None
    lo, hi = -amax, amax
    if spec.scale_rule == "full_range":         # the only rule that asks for the sign of the largest element
        lo, hi = (_cells(x, spec, scope, end) * jnp.float32(spec.clip) for end in (jnp.min, jnp.max))
    return usable(_scales.SYMMETRIC[spec.scale_rule](lo, hi, element)), None


def _outer(x, spec: ActivationSpec, element: Code, input_scale, scope: int):
    if input_scale is not None and spec.outer == "tensor":
        return _aligned(input_scale, x, scope, jnp.float32)
    axes = _tensor_axes(x, scope) if spec.outer == "tensor" else (-1,)
    amax = extreme(jnp.max, jnp.abs(x), axes, keepdims=True, initial=0)
    return usable(divide(amax * jnp.float32(spec.clip), element.highest * E4M3_LARGEST))

"""The activation as the handlers take it. Codes are made inside the kernels; what is rarer is made by XLA in front of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qfunc import _scales
from qfunc._activation import QuantizedActivation, _outer, _scale_zero, dequantize_rows, quantize_rows
from qfunc._codes import CODES as ELEMENTS
from qfunc._codes import code
from qfunc._qtensor import QTensor
from qfunc._spec import ActivationSpec

NONE, CODES, TOKEN, GROUP, GIVEN, FLOAT, FLOAT_CODES = range(7)
"""Where codes and scales of an activation come from. NONE is a product in floating point, FLOAT one of the values of small floats,
FLOAT_CODES the same of codes that come with the call."""

AMAX, POWER, TWO_LEVEL, KNOWN, DUAL = range(5)
"""Rules of the scales of small floats, as the handlers number them; KNOWN scales come with the call."""

FORMATS = {"fp8_e4m3": (3, -6, 7), "fp8_e5m2": (2, -14, 7), "fp6_e2m3": (3, 0, 5), "fp6_e3m2": (2, -2, 5), "fp4_e2m1": (1, 0, 3)}
"""Small floats: bits of the mantissa, exponent of the smallest normal number, position of the sign."""

CEIL = (1 << 23) - 1
MX = {"mx_floor": (None, 0), "mx_even": (None, None), "mx_even1": (None, 1 << 21), "mx_ceil": (None, CEIL), "mx_rceil": ("largest", CEIL),
      "mx_ceil_x": (7.25, CEIL)}
"""Rules of powers of two: what amax is divided by first, and what is added to its bits before the exponent is read; where nothing is
divided, the exponent of the largest code comes off. `mx_even` rounds to the element's own mantissa."""


DUAL_GROUPS = (16, 32, 64, 128)
"""Groups below an outer scale of `mx_dual` that the handlers know."""


class Side(NamedTuple):
    """x [M, K] (float or int8 codes), scale float32 [M, G] or None, zero int32 [M, 1] or None."""

    x: Any
    scale: Any = None
    zero: Any = None


def shared(spec: ActivationSpec | None, how: int, calibrated: bool) -> bool:
    """Whether one scale over all rows of a call, quantized as `how`, is left to the handlers to find."""
    if spec is None or calibrated or how not in (GIVEN, FLOAT) or spec.mode == "static" or spec.zero is not None:
        return False
    if spec.outer is not None:
        return spec.outer == "tensor"
    return spec.granularity.kind == "tensor" and spec.scale_rule == "amax" and spec.scale_dtype == "float32"


def is_integer(spec: ActivationSpec | None, w: QTensor) -> bool:
    """Whether codes on both sides are integers, so that sums are made in int32."""
    weight = w.scheme.weight
    return spec is not None and weight.code in ELEMENTS and code(weight.code).integer and code(spec.code).integer and weight.zero != "float"


def group_of(spec: ActivationSpec | None, columns: int) -> int:
    """Codes under one activation scale."""
    return spec.granularity.size if spec is not None and spec.granularity.kind == "group" else columns


def float_attributes(spec: ActivationSpec | None) -> dict | None:
    """The handlers' description of a small float activation, or None where only XLA can make it."""
    if spec is None or spec.code not in FORMATS or spec.rounding != "rne" or spec.outlier_threshold is not None or spec.zero is not None:
        return None
    (mantissa, exponent, sign), largest = FORMATS[spec.code], code(spec.code).highest
    divisor, bump, emax = 1.0, 0, 0
    if spec.outer is not None:
        rule = TWO_LEVEL
    elif spec.granularity.kind == "tensor":
        rule = KNOWN
    elif spec.scale_rule == "mx_dual" and spec.granularity.size in DUAL_GROUPS:
        rule, emax = DUAL, _scales.MX_ELEMENTS[spec.code][0]
    elif spec.scale_rule in MX:
        rule = POWER
        divisor, bump = MX[spec.scale_rule]
        emax = _scales.MX_ELEMENTS[spec.code][0] if divisor is None else 0
        divisor = {None: 1.0, "largest": largest}.get(divisor, divisor)
        bump = 1 << (22 - mantissa) if bump is None else bump
    elif spec.scale_rule == "amax" and spec.scale_dtype == "float32":
        rule = AMAX
    else:
        return None
    whole = dict(rule=rule, mantissa=mantissa, exponent=exponent, sign=sign, bump=bump, emax=emax)
    return {**{name: np.int32(value) for name, value in whole.items()}, "divisor": np.float32(divisor)}


NO_FLOAT = {**{name: np.int32(0) for name in ("rule", "mantissa", "exponent", "sign", "bump", "emax")}, "divisor": np.float32(1)}


def _plain(spec: ActivationSpec) -> bool:
    return spec.rounding == "rne" and spec.scale_rule == "amax" and spec.outer is None and spec.scale_dtype == "float32"


def mode(spec: ActivationSpec | None, w: QTensor, quantized: bool) -> int:
    """How the handler quantizes x."""
    if not is_integer(spec, w):
        ordered = w.perm is None or spec is None or spec.granularity.kind != "group"
        if not ordered or float_attributes(spec) is None:
            return NONE
        return FLOAT_CODES if quantized else FLOAT
    if quantized or not _plain(spec):
        return CODES
    kind = spec.granularity.kind
    if kind == "tensor":
        return GIVEN
    if spec.zero is not None or (kind == "group" and w.perm is not None):
        return CODES
    return TOKEN if kind == "token" else GROUP


def bounds(spec: ActivationSpec | None, w: QTensor) -> tuple[float, float]:
    """(lowest, highest) code."""
    if spec is None:
        return 0.0, 0.0
    if not code(spec.code).integer:
        return -code(spec.code).highest, code(spec.code).highest
    return lowest(spec), code(spec.code).highest


def lowest(spec: ActivationSpec) -> float:
    """The lowest integer code that `qfunc._activation.quantize_rows` gives."""
    element = code(spec.code)
    spared = spec.zero is None and spec.mode == "dynamic" and spec.scale_rule == "amax"
    return -element.highest if spared else element.lowest


def given(x, spec: ActivationSpec, input_scale, input_zero, scope: int):
    """(scale, zero) of each row, [M, 1], where they are not found row by row inside: per tensor, or the outer one of two levels."""
    if spec.outer is not None:
        if spec.outer != "tensor":
            return None, None
        parts = _outer(x, spec, code(spec.code), input_scale, scope), None
    elif spec.granularity.kind == "tensor":
        parts = _scale_zero(x, spec, code(spec.code), input_scale, input_zero, scope)
    else:
        return None, None
    return tuple(None if part is None else jnp.broadcast_to(part, (*x.shape[:-1], 1)).reshape(-1, 1) for part in parts)


def _reordered(x, perm, owner):
    if perm is None:
        return x
    return jnp.take(x, perm, axis=-1) if owner is None else jnp.take_along_axis(x, perm[owner], -1)


def _rows(part, shape):
    """A scale or zero point of rank len(shape) + 1 as [M, G], broadcast over what shares it."""
    return jnp.broadcast_to(part, (*shape, part.shape[-1])).reshape(-1, part.shape[-1])


def side(spec: ActivationSpec | None, w: QTensor, x: tuple, scope: int, how: int, owner=None, expert=None) -> Side:
    """x [*rows, K] prepared.

    `w` brings the small leaves (smooth, perm, input_scale, input_zero) without batch axes, or with the axis of experts where `owner`
    [T] names each row's expert; `expert` are then the scales [T, 1, 1] and zero points of per-tensor schemes, or None.
    """
    shape, columns = x[0].shape[:-1], x[0].shape[-1]
    if len(x) > 1:
        q = QuantizedActivation(*x)
        if how == NONE:
            return Side(_reordered(dequantize_rows(q, spec), w.perm, owner).reshape(-1, columns))
        return _coded(q, w, owner, shape, columns)
    (x,) = x
    if w.smooth is not None:
        x = x.astype(jnp.float32) * (w.smooth if owner is None else w.smooth[owner]).astype(jnp.float32)
    if spec is None:
        return Side(_reordered(x, w.perm, owner).reshape(-1, columns))
    if how in (TOKEN, GROUP) or owner is None and shared(spec, how, w.input_scale is not None):
        return Side(_reordered(x, w.perm, owner).reshape(-1, columns))
    own = x[:, None, :] if owner is not None else x
    scales = (w.input_scale, w.input_zero) if owner is None else expert
    scope = scope if owner is None else 1
    if how in (GIVEN, FLOAT):
        scale, zero = given(own.astype(jnp.float32), spec, *scales, scope)
        return Side(_reordered(x, w.perm, owner).reshape(-1, columns), scale, zero)
    q = quantize_rows(own, spec, *scales, scope)
    if owner is not None:
        q = QuantizedActivation(*(None if part is None else part[:, 0] for part in q))
    if how == NONE:
        return Side(_reordered(dequantize_rows(q, spec), w.perm, owner).reshape(-1, columns))
    return _coded(q, w, owner, shape, columns)


def _coded(q: QuantizedActivation, w: QTensor, owner, shape, columns: int) -> Side:
    zero = None if q.zero is None else _rows(q.zero, shape)
    return Side(_reordered(q.codes, w.perm, owner).reshape(-1, columns), _rows(q.scale, shape), zero)


def outliers(spec: ActivationSpec, x, scope: int, owner=None, experts: int = 0):
    """The columns that LLM.int8 multiplies in floating point, broadcastable against x."""
    if owner is None:
        return jnp.any(jnp.abs(x) >= spec.outlier_threshold, axis=tuple(range(scope, x.ndim - 1)), keepdims=True)
    largest = jax.ops.segment_max(jnp.abs(x), owner, experts)
    return (largest >= spec.outlier_threshold)[owner]

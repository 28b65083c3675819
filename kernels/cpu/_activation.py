"""The activation as the handlers take it. Integer codes are made inside the kernels; what is rarer is made by XLA in front of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qfunc._activation import QuantizedActivation, _scale_zero, dequantize_rows, quantize_rows
from qfunc._codes import code
from qfunc._qtensor import QTensor
from qfunc._spec import ActivationSpec

NONE, CODES, TOKEN, GROUP, GIVEN = range(5)
"""Where codes and scales of an integer activation come from; NONE is a product in floating point."""


class Side(NamedTuple):
    """x [M, K] (float or int8 codes), scale float32 [M, G] or None, zero int32 [M, 1] or None."""

    x: Any
    scale: Any = None
    zero: Any = None


def is_integer(spec: ActivationSpec | None, w: QTensor) -> bool:
    """Whether codes on both sides are integers, so that sums are made in int32."""
    return spec is not None and code(w.scheme.weight.code).integer and code(spec.code).integer and w.scheme.weight.zero != "float"


def group_of(spec: ActivationSpec | None, columns: int) -> int:
    """Codes under one activation scale."""
    return spec.granularity.size if spec is not None and spec.granularity.kind == "group" else columns


def _plain(spec: ActivationSpec) -> bool:
    return spec.rounding == "rne" and spec.scale_rule == "amax" and spec.outer is None and spec.scale_dtype == "float32"


def mode(spec: ActivationSpec | None, w: QTensor, quantized: bool) -> int:
    """How the handler quantizes x."""
    if not is_integer(spec, w):
        return NONE
    if quantized or not _plain(spec):
        return CODES
    kind = spec.granularity.kind
    if kind == "tensor":
        return GIVEN
    if spec.zero is not None or (kind == "group" and w.perm is not None):
        return CODES
    return TOKEN if kind == "token" else GROUP


def bounds(spec: ActivationSpec | None, w: QTensor) -> tuple[float, float]:
    """(lowest, highest) code. Scales from the data never need the lowest one; a calibrated range may."""
    if spec is None or not code(spec.code).integer:
        return 0.0, 0.0
    element = code(spec.code)
    calibrated = w.input_scale is not None or spec.zero is not None
    return (element.lowest if calibrated else -element.highest), element.highest


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
    if how in (TOKEN, GROUP):
        return Side(_reordered(x, w.perm, owner).reshape(-1, columns))
    own = x[:, None, :] if owner is not None else x
    scales = (w.input_scale, w.input_zero) if owner is None else expert
    scope = scope if owner is None else 1
    if how == GIVEN:
        scale, zero = _scale_zero(own.astype(jnp.float32), spec, code(spec.code), *scales, scope)
        scale, zero = (None if part is None else jnp.broadcast_to(part, (*own.shape[:-1], 1)).reshape(-1, 1) for part in (scale, zero))
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

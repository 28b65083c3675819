"""`quantize_activation` as a primitive, so that layers can share one quantization among several matmuls."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from qfunc import _activation, _schemes
from qfunc._activation import QuantizedActivation
from qfunc._qtensor import QTensor
from qfunc._spec import ActivationSpec, Scheme

from . import _reference
from ._dispatch import Call, Implementation, define, forced, register

quantize_activation_p = Primitive("quantize_activation")
quantize_activation_p.multiple_results = True


def quantize_activation(x, spec, *, scale=None, zero=None) -> QuantizedActivation:
    """Quantize an activation as a scheme says.

    Arguments:
        x: float [..., M, K].
        spec: ActivationSpec, Scheme, name of a scheme, or a QTensor, whose calibrated scale and smoothing are then used and whose
            leading axes, which x must have too, keep per-tensor scales apart.
        scale, zero: calibrated per-tensor scale (float32) and zero point (int32) of static schemes, scalars or [..., 1, 1].

    Returns: (codes, scale, zero) as `QuantizedActivation` describes them; zero is None when symmetric. s = clip amax / c (1 where that
    is 0), codes = clip(round(x / s)), in float32.

    Raises ValueError where the scheme keeps activations in floating point, is static and has no scale, or splits outlier columns off
    (those belong to the matmul). There is no derivative: `matmul` of the float activation is straight-through.
    """
    x, scope, before = jnp.asarray(x), 0, 0
    if isinstance(spec, QTensor):
        scale = spec.input_scale if scale is None else scale
        zero = spec.input_zero if zero is None else zero
        x, scope, before = _like_weight(x, spec)
        spec = spec.scheme
    if not isinstance(spec, ActivationSpec):
        named = _schemes.scheme(spec) if not isinstance(spec, Scheme) else spec
        if named.activation is None:
            raise ValueError(f"quantize_activation: {named.name} keeps activations in floating point")
        spec = named.activation
    if spec.outlier_threshold is not None:
        raise ValueError("quantize_activation: outlier columns are split off inside the matmul; pass it the float activation")
    if spec.mode == "static" and scale is None:
        raise ValueError("quantize_activation: a static scheme needs its calibrated scale, found none")
    if spec.zero is not None and scale is not None and zero is None:
        zero = jnp.zeros((), jnp.int32)
    x = _activation.bounded(x, spec)
    extra = [jnp.asarray(scale, jnp.float32)] if scale is not None else []
    if scale is not None and spec.zero is not None:
        extra.append(jnp.asarray(zero, jnp.int32))
    extra = [e if e.ndim >= 2 else e.reshape(1, 1) for e in extra]
    scope = max((e.ndim - 2 for e in extra), default=scope)
    parts = quantize_activation_p.bind(x, *extra, spec=spec, scope=scope, implementation=forced())
    return QuantizedActivation(*(jnp.moveaxis(part, range(scope, scope + before), range(before)) for part in parts))


def _like_weight(x, w: QTensor):
    """(x smoothed, with w's leading axes in front; their number; how many axes of x stood before them)."""
    *batch, columns, _ = w.matrix_shape
    scope, before = len(batch), max(x.ndim - len(batch) - 2, 0) if batch else 0
    spec = w.scheme.activation
    if batch and w.smooth is None and spec is not None and spec.granularity.kind != "tensor" and spec.outer != "tensor":
        return x, 0, 0                          # no scale of x knows of w's leading axes: rows for several experts are welcome
    if x.shape[-1:] != (columns,) or batch and (x.ndim < scope + 2 or x.shape[before:before + scope] != tuple(batch)):
        expected = ", ".join(map(str, (*batch, *["M"] * bool(batch), columns)))
        raise ValueError(f"quantize_activation: expected x [..., {expected}], found {x.shape}; w {w!r}")
    x = jnp.moveaxis(x, range(before), range(scope, scope + before))
    if w.smooth is not None:
        smooth = w.smooth.astype(jnp.float32)
        x = x.astype(jnp.float32) * jnp.expand_dims(smooth, tuple(range(scope, x.ndim - 1)))
    return x, scope, before


def _describe(avals, params) -> Call:
    return Call("quantize_activation", (avals[0],), spec=params["spec"], extra=tuple(avals[1:]), scope=params["scope"])


def _abstract(x, *extra, spec, scope, implementation):
    scale, zero = (*extra, None, None)[:2]
    out = jax.eval_shape(lambda x, s, z: _activation.quantize_rows(x, spec, s, z, scope), _struct(x), *(
        None if e is None else _struct(e) for e in (scale, zero)))
    return [jax.core.ShapedArray(part.shape, part.dtype) for part in out if part is not None]


def _struct(aval):
    return jax.ShapeDtypeStruct(aval.shape, np.dtype(aval.dtype))


def _batch(operands, dims, *, spec, scope, implementation):
    x, *extra = operands
    size = next(o.shape[d] for o, d in zip(operands, dims, strict=True) if d is not None)
    x = jnp.moveaxis(x, dims[0], 0) if dims[0] is not None else jnp.broadcast_to(x, (size, *x.shape))
    moved = []
    for e, d in zip(extra, dims[1:], strict=True):
        # The axes of a calibrated scale follow those of x from the front.
        e = jnp.moveaxis(e, d, 0) if d is not None else e[None]
        moved.append(e.reshape(e.shape[0], *([1] * (scope + 3 - e.ndim)), *e.shape[1:]))
    parts = quantize_activation_p.bind(x, *moved, spec=spec, scope=scope + 1, implementation=implementation)
    return parts, [0] * len(parts)


def _jvp(primals, tangents, **params):
    if any(type(t) is not ad.Zero for t in tangents):
        raise TypeError("quantize_activation has no derivative; call matmul with the float activation, which is straight-through")
    parts = quantize_activation_p.bind(*primals, **params)
    return parts, [ad.Zero.from_primal_value(part) for part in parts]


quantize_activation_p.def_abstract_eval(_abstract)
define(quantize_activation_p, _describe)
batching.primitive_batchers[quantize_activation_p] = _batch
ad.primitive_jvps[quantize_activation_p] = _jvp
register("quantize_activation", Implementation("reference", None, lambda call, platform: None, _reference.quantize_activation))

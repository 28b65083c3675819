"""From a `Call` to the FFI handlers: what the native kernels support, and how they are called."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from qfunc._activation import _scale_zero
from qfunc._codes import code
from qfunc._scales import INVERSE

from .. import _reference
from .._dispatch import Call
from . import _library
from ._activation import (
    FLOAT,
    FLOAT_CODES,
    GIVEN,
    GROUP,
    NO_FLOAT,
    NONE,
    TOKEN,
    Side,
    bounds,
    float_attributes,
    given,
    group_of,
    is_integer,
    lowest,
    mode,
    outliers,
    shared,
    side,
)
from ._operands import FLOATS, GGML, refusal, weight_operands

SMALL = ("smooth", "perm", "input_scale", "input_zero")
"""Leaves that belong to the activation's side."""

ANY = 1 << 40
"""A limit of int32 sums where there are none."""


def supports(call: Call, platform: str) -> str | None:
    """None, or why the native kernels cannot run this call."""
    _, missing = _library.load()
    if missing is not None:
        return missing
    return _SUPPORTS[call.primitive](call)


def _supports_quantize(call: Call) -> str | None:
    spec = call.spec
    # The handlers divide by the scale, where the rules of INVERSE multiply by what one over it rounds to.
    inside = spec.granularity.kind == "tensor" and spec.scale_rule not in INVERSE or spec.zero is None and spec.scale_rule == "amax"
    integer = inside and spec.rounding == "rne" and spec.scale_dtype == "float32"
    if not integer if code(spec.code).integer else float_attributes(spec) is None:
        return f"activations in {spec.code} with these rules are quantized by XLA"
    return _float_reason("x", call.x[0])


def _supports_matmul(call: Call) -> str | None:
    w, spec = call.w, call.spec
    reason = refusal(w) or (None if call.quantized else _float_reason("x", call.x[0]))
    reason = reason or (_float_reason("bias", call.bias) if call.bias is not None else None)
    if reason is not None:
        return reason
    if str(np.dtype(call.out_dtype)) not in FLOATS:
        return f"a result of type {np.dtype(call.out_dtype)}"
    if not is_integer(spec, w):
        return None
    columns, granularity = w.matrix_shape[-2], w.scheme.weight.granularity
    groups = [group_of(spec, columns), granularity.size if granularity.kind in ("group", "block") else columns]
    odd = [g for g in groups if g < columns and g % 4]
    if odd:
        return f"integer groups of {odd[0]}, which is not a multiple of 4"
    if groups[0] < columns and spec.zero is not None:
        return "zero points for groups of the activation"
    return None


def _supports_take(call: Call) -> str | None:
    if call.w.scheme.weight.code in GGML:
        return "rows of ggml's blocks are decoded by XLA"
    return refusal(call.w)


def _float_reason(name: str, value) -> str | None:
    return None if str(np.dtype(value.dtype)) in FLOATS else f"{name} of type {value.dtype}"


_SUPPORTS = {"quantized_matmul": _supports_matmul, "quantized_grouped_matmul": _supports_matmul,
             "quantize_activation": _supports_quantize, "quantized_take": _supports_take}


def _small(w):
    return {name: leaf for name in SMALL if (leaf := getattr(w, name)) is not None}


def matmul(call: Call, *operands):
    """`quantized_matmul`: see `qfunc.kernels._reference.matmul`."""
    x, w, _, bias = call.split(operands)
    w = w.canonical
    spec, scope, how = call.spec, call.scope - call.batch, mode(call.spec, w, call.quantized)
    threshold, out = None if spec is None or call.quantized else spec.outlier_threshold, call.out_dtype
    if threshold is not None and (how not in (TOKEN, GROUP) or threshold <= 0):
        return _with_outliers(call, x[0], w, bias)
    together = 0
    if threshold is not None or not call.quantized and shared(spec, how, w.input_scale is not None):
        together = int(np.prod(x[0].shape[call.scope:-1]))
    if threshold is not None:
        x, out = (x[0].astype(jnp.float32),), jnp.float32       # the sum of both products is rounded, not one of them

    def prepare(x, small):
        return side(spec, dataclasses.replace(w, **small), x, scope, how)

    for _ in range(call.batch):
        prepare = jax.vmap(prepare)
    y = _product(call, prepare(x, _small(w)), w, None, bias, spec, how, out, together, threshold)
    return y.astype(call.out_dtype).reshape(*x[0].shape[:-1], w.matrix_shape[-1])


def grouped_matmul(call: Call, *operands):
    """`quantized_grouped_matmul`: see `qfunc.kernels._reference.grouped_matmul`."""
    x, w, sizes, bias = call.split(operands)
    w = w.canonical
    spec, how, experts = call.spec, mode(call.spec, w, call.quantized), sizes.shape[0]
    rows = jnp.arange(x[0].shape[0], dtype=jnp.int32)
    ends = jnp.cumsum(sizes)
    owner = jnp.minimum(jnp.searchsorted(ends, rows, side="right"), experts - 1)
    valid = (rows < ends[-1])[:, None]
    shared = spec is not None and (spec.granularity.kind == "tensor" or spec.outer == "tensor" or spec.outlier_threshold is not None)
    if len(x) == 1 and shared:
        x = (jnp.where(valid, x[0].astype(jnp.float32), 0),)         # scales over an expert's rows must not see what is not its own
    product = functools.partial(_product, call, w=w, sizes=sizes)
    if spec is not None and spec.outlier_threshold is not None and len(x) == 1:
        value = x[0] if w.smooth is None else x[0] * w.smooth.astype(jnp.float32)[owner]
        plain = dataclasses.replace(w, smooth=None)
        mask = outliers(spec, value, 0, owner, experts)
        regular = side(spec, plain, (jnp.where(mask, 0, value),), 0, how, owner)
        irregular = side(None, plain, (jnp.where(mask, value, 0),), 0, NONE, owner)
        y = product(regular, bias=None, spec=spec, how=how, out=jnp.float32)
        return (y + product(irregular, bias=bias, spec=None, how=NONE, out=jnp.float32)).astype(call.out_dtype)
    scales = None
    if len(x) == 1 and spec is not None:
        value = x[0].astype(jnp.float32)
        if w.smooth is not None:
            value = value * w.smooth.astype(jnp.float32)[owner]
        scales = _reference._expert_scales(value, spec, w, sizes, owner)
    return product(side(spec, w, x, 0, how, owner, scales), bias=bias, spec=spec, how=how, out=call.out_dtype)


def _with_outliers(call: Call, x, w, bias):
    """Outliers beside codes that XLA makes: two products. Elsewhere the handler keeps the columns apart itself."""
    spec, how = call.spec, mode(call.spec, w, False)
    scope = call.scope - call.batch

    def prepare(x, small):
        own = dataclasses.replace(w, **small)
        value = x.astype(jnp.float32)
        if own.smooth is not None:
            value = value * own.smooth.astype(jnp.float32)
        mask, plain = outliers(spec, value, scope), dataclasses.replace(own, smooth=None)
        return side(spec, plain, (jnp.where(mask, 0, value),), scope, how), side(None, plain, (jnp.where(mask, value, 0),), scope, NONE)

    for _ in range(call.batch):
        prepare = jax.vmap(prepare)
    regular, irregular = prepare(x, _small(w))
    y = _product(call, regular, w, None, None, spec, how, jnp.float32) + _product(call, irregular, w, None, bias, None, NONE, jnp.float32)
    return y.astype(call.out_dtype).reshape(*x.shape[:-1], w.matrix_shape[-1])


def _product(call: Call, part: Side, w, sizes, bias, spec, how: int, out, together: int = 0, threshold: float | None = None):
    """The handler on x [*batch, M, K]: y [B, M, N], or [T, N] for experts.

    `together` rows share what the handler finds in all of them: their scale, or the columns that reach the threshold.
    """
    *batch, columns, rows = w.matrix_shape
    count = int(np.prod(batch))
    leading = 1 if sizes is not None else count
    x = part.x.reshape(leading, -1, columns)
    operands, attributes = weight_operands(w)
    limit = None if how in (NONE, FLOAT, FLOAT_CODES) else _reference._exact_terms(spec, w.scheme.weight)
    empty = jnp.zeros(0, jnp.float32)
    bias = empty if bias is None else bias.reshape(count, rows)
    y = jax.ffi.ffi_call("qfunc_matmul", jax.ShapeDtypeStruct((leading, x.shape[1], rows), out))(
        x, empty if part.scale is None else part.scale, empty if part.zero is None else part.zero, *operands, bias,
        empty if sizes is None else sizes, **attributes,
        **_activation_attributes(spec, how, columns, bounds(spec, w), limit, together, threshold))
    return y[0] if sizes is not None else y


def _activation_attributes(spec, how: int, columns: int, bounds: tuple, limit: int | None, together: int = 0,
                           threshold: float | None = None) -> dict:
    formats = float_attributes(spec) if how in (FLOAT, FLOAT_CODES) else NO_FLOAT
    return dict(mode=np.int32(how), x_group=np.int64(group_of(spec, columns)), clip=np.float32(spec.clip if spec is not None else 1),
                lowest=np.float32(bounds[0]), highest=np.float32(bounds[1]), limit=np.int64(limit or ANY), together=np.int64(together),
                threshold=np.float32(threshold or 0), **formats)


def quantize_activation(call: Call, x, *extra):
    """`quantize_activation`: [codes, scale[, zero]], see `qfunc._activation.quantize_rows`."""
    spec, columns, element = call.spec, x.shape[-1], code(call.spec.code)
    steps = -(-columns // group_of(spec, columns)) if columns else 1
    rows = int(np.prod(x.shape[:-1]))
    per_tensor = spec.granularity.kind == "tensor"
    how = FLOAT if not element.integer else GIVEN if per_tensor else GROUP if spec.granularity.kind == "group" else TOKEN
    empty = jnp.zeros(0, jnp.float32)
    calibrated = (*extra, None, None)[:2]
    together = int(np.prod(x.shape[call.scope:-1])) if not per_tensor and shared(spec, how, calibrated[0] is not None) else 0
    scale, zero = (None, None) if together else given(x.astype(jnp.float32), spec, *calibrated, call.scope)
    stored = jnp.int8 if element.integer else element.dtype
    results = jax.ShapeDtypeStruct((rows, columns), stored), jax.ShapeDtypeStruct((rows, steps), jnp.float32)
    bounds = (lowest(spec) if element.integer else -element.highest, element.highest)
    codes, found = jax.ffi.ffi_call("qfunc_quantize", results)(
        x.reshape(rows, columns), empty if scale is None else scale, empty if zero is None else zero,
        **_activation_attributes(spec, how, columns, bounds, None, together))
    codes = codes.reshape(x.shape)
    if per_tensor:
        parts = _scale_zero(x.astype(jnp.float32), spec, element, *calibrated, call.scope)
        return [codes, *(part for part in parts if part is not None)]
    return [codes, found.reshape(*x.shape[:-1], steps)]


def take(call: Call, ids, *leaves):
    """`quantized_take`: see `qfunc.kernels._take.reference`."""
    w = call.packed.build(leaves).canonical
    operands, attributes = weight_operands(w)
    columns = w.matrix_shape[0]
    rows = jax.ShapeDtypeStruct((ids.size, columns), jnp.float32)
    values = jax.ffi.ffi_call("qfunc_take", rows)(ids.reshape(-1), *operands, **attributes)
    if w.perm is not None:
        values = values[:, jnp.argsort(w.perm)]
    return values.astype(call.out_dtype).reshape(*ids.shape, columns)


RUN = {"quantized_matmul": matmul, "quantized_grouped_matmul": grouped_matmul, "quantize_activation": quantize_activation,
       "quantized_take": take}

"""The specification of the primitives: plain jax.numpy, exact, for any platform that XLA runs on.

Integer codes on both sides are summed in int32 over every segment that shares one pair of scales; everything else is the float32
product of the dequantized activation and the dequantized weight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange

from qfunc import _scales
from qfunc._activation import QuantizedActivation, dequantize_rows, quantize_rows
from qfunc._codec import E4M3_LARGEST, outer_scale
from qfunc._codes import code, usable
from qfunc._numerics import divide
from qfunc._pack import unpack
from qfunc._qtensor import CODECS, QTensor, dequantize_matrix

from ._dispatch import Call

HIGHEST = jax.lax.Precision.HIGHEST


def matmul(call: Call, *operands):
    """y [*batch, *rows, N] = x [*batch, *rows, K] @ w (+ bias [*batch, N]), cast to `call.out_dtype` at the end."""
    return batched(call, functools.partial(_matmul, call.spec, call.scope - call.batch), operands)


def batched(call: Call, function, operands):
    """function(parts of x, w) -> float32 [*rows, N] over the batch axes that x shares with w, plus the bias, cast to `call.out_dtype`."""
    x, w, _, bias = call.split(operands)
    for _ in range(call.batch):
        function = jax.vmap(function)
    y = function(x, w)
    if bias is not None:
        y = y + jnp.expand_dims(bias.astype(jnp.float32), tuple(range(call.batch, y.ndim - 1)))
    return y.astype(call.out_dtype)


def grouped_matmul(call: Call, *operands):
    """y [T, N]: rows of x [T, K], sorted by expert, times the expert's own matrix of w [E, K, N]; rows beyond sum(sizes) are zero."""
    x, w, sizes, bias = call.split(operands)
    rows = jnp.arange(x[0].shape[0], dtype=jnp.int32)
    ends = jnp.cumsum(sizes)
    owner = jnp.minimum(jnp.searchsorted(ends, rows, side="right"), sizes.shape[0] - 1)
    valid = (rows < ends[-1])[:, None]
    y = _grouped(call.spec, x, w, sizes, owner, valid)
    if bias is not None:
        y = y + bias.astype(jnp.float32)[owner]
    return jnp.where(valid, y, 0).astype(call.out_dtype)


def quantize_activation(call: Call, x, *extra):
    """(codes, scale[, zero]) of x by `call.spec`; `extra` are the calibrated scale and zero point."""
    scale, zero = (*extra, None, None)[:2]
    q = quantize_rows(x, call.spec, scale, zero, call.scope)
    return [part for part in q if part is not None]


def effective_matrix(w: QTensor) -> jax.Array:
    """The float32 matrix [..., N, K] that x is multiplied by, smoothing included: the derivative's matrix."""
    matrix = dequantize_matrix(w)
    return matrix if w.smooth is None else matrix * w.smooth.astype(jnp.float32)[..., None, :]


def _matmul(spec, scope: int, x: tuple, w: QTensor):
    w = w.canonical
    if len(x) > 1:
        return _contract(QuantizedActivation(*x), spec, w, _dot)
    (x,) = x
    x = x.astype(jnp.float32)
    if w.smooth is not None:
        x = x * w.smooth.astype(jnp.float32)
    if spec is None:
        return _dot(x, dequantize_matrix(w), jnp.float32)
    if spec.outlier_threshold is not None:
        axes = tuple(range(scope, x.ndim - 1))
        outlier = jnp.any(jnp.abs(x) >= spec.outlier_threshold, axis=axes, keepdims=True)
        return _split_outliers(x, outlier, spec, w, _dot)
    q = quantize_rows(x, spec, w.input_scale, w.input_zero, scope)
    return _contract(q, spec, w, _dot)


def _split_outliers(x, outlier, spec, w: QTensor, dot: Callable, owner=None):
    """LLM.int8 (arXiv 2208.07339): outlier columns in floating point, the others in int8 with scales that do not see them."""
    regular = quantize_rows(jnp.where(outlier, 0, x), spec)
    return _contract(regular, spec, w, dot, owner) + dot(jnp.where(outlier, x, 0), dequantize_matrix(w), jnp.float32)


def _dot(x, w, dtype):
    """x [..., K] times w [N, K], accumulated in `dtype`."""
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ())), precision=HIGHEST, preferred_element_type=dtype)


def _contract(q: QuantizedActivation, spec, w: QTensor, dot: Callable, owner=None):
    element = w.scheme.weight.code
    if element in CODECS.decoders or not (code(element).integer and code(spec.code).integer and w.scheme.weight.zero != "float"):
        return dot(dequantize_rows(q, spec), dequantize_matrix(w), jnp.float32)
    columns = w.matrix_shape[-2]
    if w.perm is not None and spec.granularity.kind == "group":         # the groups of x are in the caller's order, those of w are not
        return dot(dequantize_rows(q, spec), dequantize_matrix(w), jnp.float32)
    if w.perm is not None:
        q = q._replace(codes=_permuted(q.codes, w.perm, owner))
    return _integer(q, spec, _integer_weight(w, columns), _row_scales(w, columns), _weight_group(w, columns), columns, dot, owner,
                    _exact_terms(spec, w.scheme.weight))


def _permuted(codes, perm, owner):
    return jnp.take_along_axis(codes, perm[owner], -1) if owner is not None else jnp.take(codes, perm, axis=-1)


def _integer_weight(w: QTensor, columns: int):
    """The integers [..., N, K] that the scales multiply, zero point subtracted: int8 where they fit, else int32."""
    spec, element = w.scheme.weight, code(w.scheme.weight.code)
    codes = unpack(w.codes, element.bits, columns) if element.packed else w.codes
    values = codes.astype(jnp.int32) - element.offset
    if spec.zero is None:
        return values.astype(jnp.int8) if element.lowest < 0 else values
    return values - _scales.spread(w.zero.astype(jnp.int32), spec.granularity, *values.shape[-2:])


def _row_scales(w: QTensor, columns: int):
    """Effective scales as [..., N, G], whatever the granularity."""
    scale, granularity, rows = outer_scale(w.leaves, w.scheme.weight), w.scheme.weight.granularity, w.matrix_shape[-1]
    if granularity.kind == "block":
        return jnp.repeat(scale, granularity.out, -2)[..., :rows, :]
    return jnp.broadcast_to(scale, (*scale.shape[:-2], rows, scale.shape[-1]))


def _weight_group(w: QTensor, columns: int) -> int:
    granularity = w.scheme.weight.granularity
    return granularity.size if granularity.kind in ("group", "block") else columns


def _exact_terms(x, w) -> int:
    """How many products of codes an int32 sum can hold: 131071 for two symmetric int8, 33025 where both have zero points."""
    def reach(spec):
        element = code(spec.code)
        return max(-element.lowest, element.highest if spec.zero is None else element.highest - element.lowest)
    return int((2**31 - 1) // (reach(x) * reach(w)))


def _integer(q, spec, weight, scale, group: int, columns: int, dot: Callable, owner, limit: int):
    """Sum over segments of (codes @ weight in int32) * scales in float32; no segment is longer than `limit`."""
    values = q.codes
    if values.dtype != weight.dtype:
        values, weight = values.astype(jnp.int32), weight.astype(jnp.int32)
    own = spec.granularity.size if spec.granularity.kind == "group" else columns
    segment = math.gcd(*(size for size in (group, own) if size < columns)) or min(columns, limit)
    count = -(-columns // segment)

    def per_row(scales):                        # [..., N] of each row's expert where there are experts
        return scales[owner] if owner is not None else scales

    def total(values, weight, zero):
        # The zero point of x comes off the sum, which wraps as int32 does and ends exact: int8 products are the fast ones.
        part = dot(values, weight, jnp.int32)
        if zero is not None:
            part = part - zero * per_row(weight.astype(jnp.int32).sum(-1, dtype=jnp.int32))
        return part.astype(jnp.float32)

    if count == 1:
        return total(values, weight, q.zero) * q.scale * per_row(scale[..., 0])
    values, weight = _segments(values, count, segment), _segments(weight, count, segment)
    steps = jnp.arange(count)

    def step(y, s):
        zero = q.zero if q.zero is None or spec.granularity.kind != "group" else q.zero[..., s * segment // own, None]
        part = total(values[s], weight[s], zero) * per_row(scale[..., s * segment // group])
        if spec.granularity.kind == "group":
            part = part * q.scale[..., s * segment // own, None]
        return y + part, None

    rows = weight.shape[-2]
    y, _ = jax.lax.scan(step, jnp.zeros((*values.shape[1:-1], rows), jnp.float32), steps)
    return y if spec.granularity.kind == "group" else y * q.scale


def _segments(x, count: int, segment: int):
    pad = [(0, 0)] * (x.ndim - 1) + [(0, count * segment - x.shape[-1])]
    return rearrange(jnp.pad(x, pad), "... (s c) -> s ... c", s=count)


def _grouped(spec, x: tuple, w: QTensor, sizes, owner, valid):
    w = w.canonical

    def dot(x, weight, dtype):
        return jax.lax.ragged_dot(x, jnp.swapaxes(weight, -1, -2), sizes, precision=HIGHEST, preferred_element_type=dtype)

    if len(x) > 1:
        return _contract(QuantizedActivation(*x), spec, w, dot, owner)
    (x,) = x
    x = jnp.where(valid, x.astype(jnp.float32), 0)
    if w.smooth is not None:
        x = x * w.smooth.astype(jnp.float32)[owner]
    if spec is None:
        return dot(x, dequantize_matrix(w), jnp.float32)
    if spec.outlier_threshold is not None:
        largest = jax.ops.segment_max(jnp.abs(x), owner, sizes.shape[0])
        return _split_outliers(x, (largest >= spec.outlier_threshold)[owner], spec, w, dot, owner)
    q = quantize_rows(x[:, None, :], spec, *_expert_scales(x, spec, w, sizes, owner), scope=1)
    q = QuantizedActivation(*(None if part is None else part[:, 0] for part in q))
    return _contract(q, spec, w, dot, owner)


def _expert_scales(x, spec, w: QTensor, sizes, owner):
    """Per-tensor scales of each row's expert, [T, 1, 1]: calibrated, or from the expert's own rows."""
    if spec.granularity.kind != "tensor" and spec.outer != "tensor":
        return None, None
    if w.input_scale is not None:
        zero = None if w.input_zero is None else w.input_zero[owner]
        return w.input_scale[owner], zero
    count, clip, element = sizes.shape[0], jnp.float32(spec.clip), code(spec.code)
    lo, hi = jax.ops.segment_min(jnp.min(x, -1), owner, count), jax.ops.segment_max(jnp.max(x, -1), owner, count)
    lo, hi = (jnp.where(sizes > 0, end, 0) * clip for end in (lo, hi))          # infinite where an expert has no row
    if spec.zero is not None:
        scale, zero = _scales.minmax(lo, hi, element)
        return scale[owner][:, None, None], jnp.where(jnp.isfinite(zero), zero, 0).astype(jnp.int32)[owner][:, None, None]
    if spec.outer is not None:
        scale = divide(jnp.maximum(jnp.abs(lo), jnp.abs(hi)), element.highest * E4M3_LARGEST)
    else:
        scale = _scales.SYMMETRIC[spec.scale_rule](lo, hi, element)
    return usable(scale)[owner][:, None, None], None

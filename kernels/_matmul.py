"""`quantized_matmul`: one equation per matmul with a packed weight, with batching and derivative rules."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from qfunc._activation import QuantizedActivation, bounded
from qfunc._qtensor import QTensor

from . import _reference
from ._dispatch import Call, Implementation, Packed, define, forced, insert_axis, register

quantized_matmul_p = Primitive("quantized_matmul")


def matmul(x, w, *, bias=None, out_dtype=None) -> jax.Array:
    """y = x @ w (+ bias), contracting the last axis of x with the contracted axis of w.

    Arguments:
        x: float array [..., K], or the result of `quantize_activation` (codes, scale, zero), which several weights may share.
        w: float array (..., K, N), or QTensor. Leading axes of w are batch axes, as in `jnp.matmul`.
        bias: float [N] (or [*batch, N]), added in float32 before the final cast.
        out_dtype: dtype of y; by default that of x, or the weight's logical dtype when x is quantized.

    Returns: y [..., N]. With a QTensor, exactly one `quantized_matmul` equation: x is quantized as the scheme says, integer codes are
    summed in int32, the rest in float32. The derivative in x is straight-through, dx = dy @ dequantize(w)^T in float32.

    Raises ValueError where the contracted sizes or the batch axes differ, naming both.
    """
    if not isinstance(w, QTensor):
        return _float_matmul(x, w, bias, out_dtype)
    parts, logical = activation_parts(x, w)
    *batch, columns, rows = w.matrix_shape
    if parts[0].shape[-1:] != (columns,):
        found = parts[0].shape[-1] if parts[0].ndim else "a scalar"
        raise ValueError(f"matmul: x ends in {found}, the weight contracts {columns}; x {parts[0].shape}, w {w!r}")
    parts, extra = _align_batch(parts, tuple(batch), w)
    operands, has_bias = [*parts, *w.leaves.values()], bias is not None
    if has_bias:
        bias = jnp.asarray(bias)
        if bias.shape[-1:] != (rows,) or bias.ndim - 1 > len(batch):
            raise ValueError(f"matmul: bias {bias.shape} does not fit the output size {rows} of {w!r}")
        operands.append(jnp.broadcast_to(bias, (*batch, rows)))
    y = quantized_matmul_p.bind(
        *operands, packed=Packed.of(w), parts=len(parts), has_bias=has_bias, out_dtype=np.dtype(out_dtype or logical),
        batch=len(batch), scope=len(batch), implementation=forced())
    return jnp.moveaxis(y, range(len(batch), len(batch) + extra), range(extra))


def activation_parts(x, w: QTensor) -> tuple[list, np.dtype]:
    """x as the primitive's operands, and the dtype that the result has by default."""
    if not isinstance(x, tuple):
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"matmul: x must be floating point or the result of quantize_activation, found {x.dtype}")
        return [bounded(x, w.scheme.activation)], x.dtype
    if w.scheme.activation is None:
        raise ValueError(f"matmul: x is quantized, but {w.scheme.name} keeps activations in floating point")
    return [part for part in QuantizedActivation(*x) if part is not None], np.dtype(w.dtype)


def _float_matmul(x, w, bias, out_dtype):
    if isinstance(x, tuple):
        raise TypeError("matmul: a quantized activation needs a QTensor weight, found a float array")
    x, w = jnp.asarray(x), jnp.asarray(w)
    if w.ndim < 2 or x.shape[-1:] != (w.shape[-2],):
        raise ValueError(f"matmul: x {x.shape} does not contract with w {w.shape}")
    y = jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)
    if bias is not None:
        y = y + jnp.expand_dims(jnp.asarray(bias, jnp.float32), -2) if jnp.ndim(bias) > 1 else y + jnp.asarray(bias, jnp.float32)
    return y.astype(out_dtype or x.dtype)


def _align_batch(parts, batch: tuple[int, ...], w: QTensor):
    """Bring w's batch axes to the front of x; axes of x before them follow (their count is returned, to be moved back)."""
    if not batch:
        return parts, 0
    lead = parts[0].shape[:-2]
    extra = max(len(lead) - len(batch), 0)
    shared = lead[extra:]
    if len(shared) < len(batch):
        shared = (1,) * (len(batch) - len(shared)) + shared
    if any(a not in (1, b) for a, b in zip(shared, batch, strict=True)):
        raise ValueError(f"matmul: batch axes {lead} of x do not broadcast to {batch} of {w!r}")

    def align(part):
        rest = part.shape[-2:] if part.ndim > 1 else part.shape
        before = part.shape[:extra]
        own = part.shape[extra:part.ndim - len(rest)]
        own = (1,) * (len(batch) - len(own)) + own
        part = part.reshape(*before, *own, *rest)
        part = jnp.broadcast_to(part, (*before, *batch, *rest))
        return jnp.moveaxis(part, range(extra), range(len(batch), len(batch) + extra))

    return [align(part) for part in parts], extra


def describe(avals, params) -> Call:
    """The `Call` of a matmul equation."""
    packed, parts = params["packed"], params["parts"]
    count = parts + len(packed.fields)
    sizes = avals[count] if params.get("grouped") else None
    rest = avals[count + (sizes is not None):]
    return Call("quantized_grouped_matmul" if params.get("grouped") else "quantized_matmul", tuple(avals[:parts]), packed,
                tuple(avals[parts:count]), sizes, rest[0] if params["has_bias"] else None, packed.scheme.activation, (),
                params["out_dtype"], params.get("batch", 0), params.get("scope", 0), rows=rest[-1] if params.get("gathered") else None)


def _abstract(*avals, **params):
    call = describe(avals, params)
    *batch, columns, rows = call.w.matrix_shape
    if call.x[0].shape[-1] != columns or call.x[0].shape[:len(batch)] != tuple(batch):
        raise ValueError(f"quantized_matmul: x {call.x[0].shape} does not fit w {call.w.matrix_shape}")
    return jax.core.ShapedArray((*call.x[0].shape[:-1], rows), params["out_dtype"])


def _batch(operands, dims, *, packed, parts, has_bias, out_dtype, batch, scope, implementation):
    size = next(o.shape[d] for o, d in zip(operands, dims, strict=True) if d is not None)
    count = parts + len(packed.fields)
    bind = functools.partial(quantized_matmul_p.bind, packed=packed, parts=parts, scope=scope + 1, implementation=implementation)
    weight_mapped = any(d is not None for d in dims[parts:count])
    if weight_mapped:
        moved = [insert_axis(o, d, size, 0) for o, d in zip(operands, dims, strict=True)]
        return bind(*moved, has_bias=has_bias, out_dtype=out_dtype, batch=batch + 1), 0
    x = [insert_axis(o, d, size, batch) for o, d in zip(operands[:parts], dims[:parts], strict=True)]
    weight = operands[parts:count]
    if not has_bias or dims[-1] is None:
        return bind(*x, *weight, *operands[count:], has_bias=has_bias, out_dtype=out_dtype, batch=batch), batch
    y = bind(*x, *weight, has_bias=False, out_dtype=np.dtype(np.float32), batch=batch)
    bias = insert_axis(operands[-1], dims[-1], size, batch).astype(jnp.float32)
    y = y + jnp.expand_dims(bias, tuple(range(batch + 1, y.ndim - 1)))
    return y.astype(out_dtype), batch


def linear_in_x(t, matrix, batch: int):
    """t [*batch, *rows, K] times matrix [*batch, N, K], float32."""
    axes = tuple(range(batch))
    dims = (((t.ndim - 1,), (matrix.ndim - 1,)), (axes, axes))
    return jax.lax.dot_general(t.astype(jnp.float32), matrix, dims, precision=_reference.HIGHEST)


def float_tangents(packed: Packed, leaves, tangents):
    """(leaf positions, primals, tangents) of the weight leaves that carry a derivative: scales, never codes."""
    moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero and t.dtype != jax.dtypes.float0]
    return moving, [leaves[i] for i in moving], [tangents[i] for i in moving]


def matrix_tangent(packed: Packed, leaves, tangents):
    """The derivative of the effective matrix with respect to the scales, or None."""
    moving, primals, moved = float_tangents(packed, leaves, tangents)
    if not moving:
        return None

    def matrix(*values):
        now = list(leaves)
        for i, value in zip(moving, values, strict=True):
            now[i] = value
        return _reference.effective_matrix(packed.build(now))

    return jax.jvp(matrix, primals, moved)[1]


def refuse_quantized(tangents, parts: int) -> None:
    """A quantized activation has no derivative: codes are integers and a scale alone is not x."""
    if parts > 1 and any(type(t) is not ad.Zero and t.dtype != jax.dtypes.float0 for t in tangents[:parts]):
        raise TypeError("a matmul of a quantized activation has no derivative in x; call matmul with the float activation")


def _jvp(primals, tangents, **params):
    packed, parts, batch = params["packed"], params["parts"], params["batch"]
    refuse_quantized(tangents, parts)
    count = parts + len(packed.fields)
    leaves = primals[parts:count]
    y = quantized_matmul_p.bind(*primals, **params)
    pieces = []
    if parts == 1 and type(tangents[0]) is not ad.Zero:
        pieces.append(linear_in_x(tangents[0], _reference.effective_matrix(packed.build(leaves)), batch))
    turned = matrix_tangent(packed, leaves, tangents[parts:count])
    if turned is not None:
        if parts > 1:
            raise TypeError("a matmul of a quantized activation has no derivative in the scales; call matmul with the float activation")
        pieces.append(linear_in_x(primals[0], turned, batch))
    if params["has_bias"] and type(tangents[-1]) is not ad.Zero:
        bias = tangents[-1].astype(jnp.float32)
        pieces.append(jnp.broadcast_to(jnp.expand_dims(bias, tuple(range(batch, y.ndim - 1))), y.shape))
    return y, sum(pieces[1:], pieces[0]).astype(y.dtype) if pieces else ad.Zero.from_primal_value(y)


quantized_matmul_p.def_abstract_eval(_abstract)
define(quantized_matmul_p, describe)
batching.primitive_batchers[quantized_matmul_p] = _batch
ad.primitive_jvps[quantized_matmul_p] = _jvp
register("quantized_matmul", Implementation("reference", None, lambda call, platform: None, _reference.matmul))

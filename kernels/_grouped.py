"""`quantized_grouped_matmul`: rows sorted by expert, each times its own expert's packed matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from qfunc._qtensor import QTensor

from . import _reference
from ._dispatch import Implementation, Packed, define, forced, insert_axis, register
from ._matmul import activation_parts, describe, matrix_tangent, refuse_quantized

quantized_grouped_matmul_p = Primitive("quantized_grouped_matmul")


def grouped_matmul(x, w, group_sizes, *, rows=None, bias=None, out_dtype=None) -> jax.Array:
    """Rows of x, sorted by expert, times the matrix of their expert: `jax.lax.ragged_dot` on a packed stack.

    Arguments:
        x: float [T, K], or the result of `quantize_activation`; the first group_sizes[0] rows belong to expert 0, and so on.
        w: QTensor (E, K, N), or float array [E, K, N].
        group_sizes: int [E]; zeros are allowed, and rows beyond their sum give zero rows.
        rows: int [R], or None. With it, x [T, K] holds each token once, and row r of the product is that of x[rows[r]], which must lie in
            [0, T): what is sorted by expert is then `rows`. The result is that of `grouped_matmul(x[rows], ...)`, bit for bit; on a GPU
            the kernel reads the rows where they lie, and a token that several experts share is quantized once.
        bias: float [E, N], added to each row of its expert.
        out_dtype: dtype of y, by default that of x.

    Returns: y [T, N], or [R, N]. Each row is what `matmul` gives with its expert's slice of w; a per-tensor dynamic scale is taken over
    the rows of one expert. Raises ValueError where shapes do not fit.
    """
    group_sizes = jnp.asarray(group_sizes)
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer) or group_sizes.ndim != 1:
        raise ValueError(f"grouped_matmul: group_sizes must be integers [E], found {group_sizes.dtype} {group_sizes.shape}")
    shape = w.matrix_shape if isinstance(w, QTensor) else jnp.shape(w)
    if len(shape) != 3 or shape[0] != group_sizes.shape[0]:
        raise ValueError(f"grouped_matmul: expected w (E, K, N) with E = {group_sizes.shape[0]} groups, found {tuple(shape)}")
    if bias is not None and jnp.shape(bias) != (shape[0], shape[2]):
        raise ValueError(f"grouped_matmul: expected bias {(shape[0], shape[2])}, found {jnp.shape(bias)}")
    if rows is not None:
        rows = jnp.asarray(rows)
        if not jnp.issubdtype(rows.dtype, jnp.integer) or rows.ndim != 1:
            raise ValueError(f"grouped_matmul: rows must be integers [R], found {rows.dtype} {rows.shape}")
    if not isinstance(w, QTensor):
        x = jnp.asarray(x)
        return _float_grouped(x if rows is None else _taken(x, rows), jnp.asarray(w), group_sizes, bias, out_dtype)
    parts, logical = activation_parts(x, w)
    if parts[0].ndim != 2 or parts[0].shape[-1] != shape[1]:
        raise ValueError(f"grouped_matmul: expected x [T, {shape[1]}], found {parts[0].shape}; w {w!r}")
    operands = [*parts, *w.leaves.values(), group_sizes.astype(jnp.int32)]
    if bias is not None:
        operands.append(jnp.asarray(bias))
    if rows is not None:
        operands.append(rows.astype(jnp.int32))
    return quantized_grouped_matmul_p.bind(
        *operands, packed=Packed.of(w), parts=len(parts), has_bias=bias is not None, out_dtype=np.dtype(out_dtype or logical),
        implementation=forced(), grouped=True, gathered=rows is not None)


def owners(sizes, rows: int):
    """(expert of each row, whether it has one) of T = `rows` rows sorted by expert."""
    ends = jnp.cumsum(sizes)
    index = jnp.arange(rows, dtype=ends.dtype)
    return jnp.minimum(jnp.searchsorted(ends, index, side="right"), sizes.shape[0] - 1), index < ends[-1]


def _taken(x, rows):
    return jnp.take(x, rows, axis=0, mode="clip")


def _float_grouped(x, w, sizes, bias, out_dtype):
    y = jax.lax.ragged_dot(x, w.astype(x.dtype), sizes.astype(jnp.int32), preferred_element_type=jnp.float32)
    owner, valid = owners(sizes, x.shape[0])
    if bias is not None:
        y = y + jnp.asarray(bias, jnp.float32)[owner]
    return jnp.where(valid[:, None], y, 0).astype(out_dtype or x.dtype)


def _abstract(*avals, **params):
    call = describe(avals, params)
    return jax.core.ShapedArray((call.direct.x[0].shape[0], call.w.matrix_shape[-1]), params["out_dtype"])


def _batch(operands, dims, **params):
    size = next(o.shape[d] for o, d in zip(operands, dims, strict=True) if d is not None)
    fixed = {i: o for i, (o, d) in enumerate(zip(operands, dims, strict=True)) if d is None}
    mapped = [insert_axis(o, d, size, 0) for o, d in zip(operands, dims, strict=True) if d is not None]

    def one(moving):
        moving = iter(moving)
        return quantized_grouped_matmul_p.bind(*(fixed[i] if i in fixed else next(moving) for i in range(len(operands))), **params)

    return jax.lax.map(one, mapped), 0


def _jvp(primals, tangents, **params):
    packed, parts = params["packed"], params["parts"]
    refuse_quantized(tangents, parts)
    count = parts + len(packed.fields)
    leaves, sizes, rows = primals[parts:count], primals[count], primals[-1]
    y = quantized_grouped_matmul_p.bind(*primals, **params)
    owner, valid = owners(sizes, y.shape[0])

    def times(t, matrix):
        t = _taken(t, rows) if params["gathered"] else t
        return jax.lax.ragged_dot(t.astype(jnp.float32), jnp.swapaxes(matrix, -1, -2), sizes, precision=_reference.HIGHEST)

    pieces = []
    if parts == 1 and type(tangents[0]) is not ad.Zero:
        pieces.append(times(tangents[0], _reference.effective_matrix(packed.build(leaves))))
    turned = matrix_tangent(packed, leaves, tangents[parts:count])
    if turned is not None:
        if parts > 1:
            raise TypeError("a matmul of a quantized activation has no derivative in the scales; call it with the float activation")
        pieces.append(times(primals[0], turned))
    if params["has_bias"] and type(tangents[count + 1]) is not ad.Zero:
        pieces.append(tangents[count + 1].astype(jnp.float32)[owner])
    if not pieces:
        return y, ad.Zero.from_primal_value(y)
    return y, jnp.where(valid[:, None], sum(pieces[1:], pieces[0]), 0).astype(y.dtype)


quantized_grouped_matmul_p.def_abstract_eval(_abstract)
define(quantized_grouped_matmul_p, describe)
batching.primitive_batchers[quantized_grouped_matmul_p] = _batch
ad.primitive_jvps[quantized_grouped_matmul_p] = _jvp
register("quantized_grouped_matmul", Implementation("reference", None, lambda call, platform: None, _reference.grouped_matmul))

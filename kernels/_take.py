"""`quantized_take`: rows of a packed embedding table, decoding only the rows asked for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from qfunc import _codec, _pack
from qfunc._codes import code
from qfunc._numerics import multiply_add
from qfunc._qtensor import CODECS, QTensor

from ._dispatch import Call, Implementation, Packed, define, forced, register
from ._matmul import float_tangents

quantized_take_p = Primitive("quantized_take")


def take(table, ids) -> jax.Array:
    """Rows of an embedding table: ids.shape + (hidden,).

    Arguments: `table` float array (vocab, hidden), or a QTensor stored as its lm_head (hidden, vocab), of which only the rows asked
    for are decoded; `ids` integers. Negative ids count from the end; ids out of range give NaN rows, as `jnp.take` does.

    Returns: the table's logical dtype, equal to the rows of `dequantize` bit for bit. With a QTensor, exactly one `quantized_take`
    equation, whose operands are int32 ids in range and the table's leaves. Raises TypeError where ids are not integers, ValueError
    where the table has leading axes.
    """
    ids = jnp.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"take: ids must be integers, found {ids.dtype}")
    if not isinstance(table, QTensor):
        return jnp.take(jnp.asarray(table), ids, axis=0)
    if len(table.matrix_shape) != 2:
        raise ValueError(f"take: expected a table (hidden, vocab), found {table!r}")
    rows = table.matrix_shape[-1]
    ids = jnp.where(ids < 0, ids + rows, ids) if jnp.issubdtype(ids.dtype, jnp.signedinteger) else ids
    valid = (ids >= 0) & (ids < rows)
    inside = jnp.clip(ids, 0, rows - 1).astype(jnp.int32)
    values = quantized_take_p.bind(inside, *table.leaves.values(), packed=Packed.of(table), implementation=forced())
    return jnp.where(valid[..., None], values, jnp.asarray(jnp.nan, values.dtype))


def reference(call: Call, ids, *leaves):
    """values [*ids.shape, hidden] of the rows `ids` of a table in its logical dtype, decoded in float32."""
    w = call.packed.build(leaves).canonical
    values = _rows(w, ids.reshape(-1), w.matrix_shape[0])
    return values.astype(call.out_dtype).reshape(*ids.shape, w.matrix_shape[0])


def _rows(w: QTensor, ids, columns: int):
    spec = w.scheme.weight
    if spec.code in CODECS.decoders:
        return CODECS.decoders[spec.code](w.codes[ids], columns)
    granularity = spec.granularity
    # Flattened first, all scale levels are per row and group, so that a gather of rows keeps their meaning.
    scale = _codec.outer_scale(w.leaves, spec)
    index = ids // granularity.out if granularity.kind == "block" else ids

    def gather(leaf):
        return leaf[index] if leaf.shape[0] > 1 or granularity.kind == "block" else jnp.broadcast_to(leaf, (ids.shape[0], leaf.shape[1]))

    element = code(spec.code)
    codes = w.codes[ids]
    codes = _pack.unpack(codes, element.bits, columns) if element.packed else codes
    wide = _spread(gather(scale), granularity, columns)
    values = element.decode(codes)
    if spec.zero is None:
        out = values * wide
    else:
        zero = _spread(gather(w.zero.astype(jnp.float32)), granularity, columns)
        out = (values - zero) * wide if spec.zero == "int" else multiply_add(values, wide, zero)
    return out if w.perm is None else out[:, jnp.argsort(w.perm)]


def _spread(scale, granularity, columns: int):
    return jnp.repeat(scale, granularity.size, -1)[..., :columns] if granularity.kind in ("group", "block") else scale


def describe(avals, params) -> Call:
    """The `Call` of a take equation: `x` is (ids,)."""
    packed = params["packed"]
    return Call("quantized_take", tuple(avals[:1]), packed, tuple(avals[1:]), out_dtype=np.dtype(packed.dtype))


def _abstract(*avals, **params):
    call = describe(avals, params)
    return jax.core.ShapedArray((*call.x[0].shape, call.w.matrix_shape[0]), call.out_dtype)


def _batch(operands, dims, **params):
    ids, *leaves = operands
    if all(d is None for d in dims[1:]):
        return quantized_take_p.bind(jnp.moveaxis(ids, dims[0], 0), *leaves, **params), 0
    fixed = {i: o for i, (o, d) in enumerate(zip(operands, dims, strict=True)) if d is None}
    mapped = [jnp.moveaxis(o, d, 0) for o, d in zip(operands, dims, strict=True) if d is not None]

    def one(moving):
        moving = iter(moving)
        return quantized_take_p.bind(*(fixed[i] if i in fixed else next(moving) for i in range(len(operands))), **params)

    return jax.lax.map(one, mapped), 0


def _jvp(primals, tangents, **params):
    ids, *leaves = primals
    y = quantized_take_p.bind(*primals, **params)
    moving, values, moved = float_tangents(params["packed"], leaves, tangents[1:])
    if not moving:
        return y, ad.Zero.from_primal_value(y)
    call = describe(primals, params)

    def rows(*now):
        own = list(leaves)
        for i, value in zip(moving, now, strict=True):
            own[i] = value
        return reference(call, ids, *own)

    return y, jax.jvp(rows, values, moved)[1]


quantized_take_p.def_abstract_eval(_abstract)
define(quantized_take_p, describe)
batching.primitive_batchers[quantized_take_p] = _batch
ad.primitive_jvps[quantized_take_p] = _jvp
register("quantized_take", Implementation("reference", None, lambda call, platform: None, reference))

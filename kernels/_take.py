"""Rows of a packed embedding table."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qfunc import _codec, _pack
from qfunc._codes import code
from qfunc._numerics import multiply_add
from qfunc._qtensor import CODECS, QTensor


def take(table, ids) -> jax.Array:
    """Rows of an embedding table: ids.shape + (hidden,).

    Arguments: `table` float array (vocab, hidden), or a QTensor stored as its lm_head (hidden, vocab), of which only the rows asked
    for are decoded; `ids` integers. Negative ids count from the end; ids out of range give NaN rows, as `jnp.take` does.

    Returns: the table's logical dtype, equal to the rows of `dequantize` bit for bit.
    """
    ids = jnp.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"take: ids must be integers, found {ids.dtype}")
    if not isinstance(table, QTensor):
        return jnp.take(jnp.asarray(table), ids, axis=0)
    if len(table.matrix_shape) != 2:
        raise ValueError(f"take: expected a table (hidden, vocab), found {table!r}")
    w = table.canonical
    columns, rows = w.matrix_shape
    flat = ids.reshape(-1)
    flat = jnp.where(flat < 0, flat + rows, flat)
    valid = (flat >= 0) & (flat < rows)
    values = _rows(w, jnp.clip(flat, 0, rows - 1), columns)
    values = jnp.where(valid[:, None], values, jnp.nan).astype(jnp.dtype(w.dtype))
    return values.reshape(*ids.shape, columns)


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

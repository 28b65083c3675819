"""Embedding: rows of a table, float or packed."""

from __future__ import annotations

from collections.abc import Mapping

import qfunc


def embed(params: Mapping, ids, dtype=None):
    """Rows of an embedding table.

    Arguments: `params` with either `weight`, a float table (vocab, hidden), or `kernel`, a QTensor of logical shape (hidden, vocab): the
    orientation of an lm_head, so that tied weights are one leaf. `ids` integers of any shape, each in [0, vocab).
    Returns: ids.shape + (hidden,) in `dtype`, by default that of the table; NaN rows for ids out of range.
    """
    rows = qfunc.take(params["kernel"] if "kernel" in params else params["weight"], ids)
    return rows if dtype is None else rows.astype(dtype)

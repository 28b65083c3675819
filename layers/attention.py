"""Scaled dot-product attention over heads."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v, softmax in float32.

    Arguments: `q` [..., T, heads, D]; `k`, `v` [..., S, heads, D]; `mask` boolean, broadcastable to [..., heads, T, S], True where a key
    may be seen. A query that may see no key gets the mean of `v`, never NaN.
    Returns: [..., T, heads, D] in the dtype of `q`.
    """
    scores = jnp.einsum("...tnd,...snd->...nts", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("...nts,...snd->...tnd", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)

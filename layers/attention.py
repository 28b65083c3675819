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


def causal_mask(positions, keys: int, window: int | None = None):
    """Which keys each query may see: those at its own position and before, of the last `window` where there is one.

    Arguments: `positions` int [T], of the queries; `keys`, how many key positions there are, from 0 on.
    Returns: bool [T, keys].
    """
    distance = positions[:, None] - jnp.arange(keys)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def grouped_attention(q, k, v, mask, *, scale: float, softcap: float | None = None, sinks=None):
    """Attention in which several query heads share one key and value head; softmax in float32.

    Arguments:
        q: [B, T, heads, D]; k: [B, S, kv heads, D]; v: [B, S, kv heads, Dv]; heads is a multiple of kv heads.
        mask: bool [T, S] or [B, 1, T, S], True where a key may be seen.
        scale: the scores are q k^T scale; with `softcap` c they become c tanh(scores / c).
        sinks: float [heads], one more score per head that takes its share of the softmax and gives nothing (GPT-OSS).

    Returns: [B, T, heads, Dv] in the dtype of q.
    """
    batch, tokens, heads, _ = q.shape
    shared = q.reshape(batch, tokens, k.shape[2], heads // k.shape[2], -1)
    scores = jnp.einsum("btngd,bsnd->bngts", shared, k, preferred_element_type=jnp.float32) * jnp.float32(scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask if mask.ndim == 2 else mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        sink = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(k.shape[2], -1, 1, 1), (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]
    out = jnp.einsum("bngts,bsnd->btngd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(batch, tokens, heads, -1)

"""Multi-head latent attention: keys and values of all heads come from one short row per token, and that row is what is cached.

Source: DeepSeek-V2, 2024, section 2.1. The cache holds the normalised latent (entry `k`) and the rotated shared key (entry `v`, always
in floating point); a step decodes all latents through `kv_b_proj`.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from .attention import grouped_attention
from .cache import update
from .config import ModelConfig
from .linear import linear, linears, row_linear
from .norms import rms_norm
from .places import Places
from .rope import rotate, rotations


def latent_attention(params: Mapping, x, places: Places, cache: Mapping | None, config: ModelConfig, index: int):
    """Latent attention.

    Arguments: `params` with `q_proj`, or `q_a_proj`, `q_a_layernorm`, `q_b_proj`; `kv_a_proj_with_mqa`, `kv_a_layernorm`, `kv_b_proj`
    and `o_proj`; `x` [B, T, hidden]; `places` of its tokens; `cache` of the layer or None.
    Returns: ([B, T, hidden], the layer's new cache or None).
    """
    latent, eps = config.latent, config.rms_norm_eps
    batch, tokens, _ = x.shape
    q, row = linears([params["q_proj" if "q_proj" in params else "q_a_proj"], params["kv_a_proj_with_mqa"]], x)
    if "q_proj" not in params:
        q = linear(params["q_b_proj"], rms_norm(params["q_a_layernorm"], q, eps))
    q = q.reshape(batch, tokens, config.num_attention_heads, -1)
    row = row[:, :, None]
    cos, sin = rotations(config.rope, latent.rope, places.positions)
    q = jnp.concatenate([q[..., :latent.nope], rotate(q[..., latent.nope:], cos, sin, latent.interleaved)], axis=-1)
    shared = rotate(row[..., latent.kv_rank:], cos, sin, latent.interleaved)
    entries, kept = cache or {"k": None, "v": None}, {}
    short = rms_norm(params["kv_a_layernorm"], row[..., :latent.kv_rank], eps)
    kept["k"], short = update(entries["k"], short, places.slots[0], "k", config.cache, params)
    kept["v"], shared = update(entries["v"], shared, places.slots[0], "v", "float", params)
    wide = linear(params["kv_b_proj"], short[:, :, 0]).reshape(batch, short.shape[1], config.num_attention_heads, -1)
    shared = jnp.broadcast_to(shared, (*wide.shape[:-1], latent.rope))
    k = jnp.concatenate([wide[..., :latent.nope], shared], axis=-1)
    mixed = grouped_attention(q, k, wide[..., latent.nope:], places.mask(k.shape[1]), scale=config.attention_scale)
    return row_linear(params["o_proj"], mixed.reshape(batch, tokens, -1), config.axis), None if cache is None else kept

"""Decoder-only models as one pure function of a nested dict of parameters.

The parameters are named as the Hugging Face checkpoint names them, linear weights as `kernel` (in, out), float or packed:

    model/embed_tokens/weight                                   (vocab, hidden)
    model/layers/<i>/{input_layernorm, post_attention_layernorm}/weight
    model/layers/<i>/self_attn/{q_proj, k_proj, v_proj, o_proj}/{kernel, bias}, {q_norm, k_norm}/weight, sinks, k_scale, v_scale
    model/layers/<i>/mlp/{gate_proj, up_proj, down_proj}/kernel
    model/layers/<i>/mlp/{gate/kernel, experts/<proj>/kernel (experts, in, out) or experts/<e>/<proj>/kernel, shared_experts/...}
    model/norm/weight; lm_head/kernel (hidden, vocab), absent where it is the embedding table

What the parameters tell (biases, norms of heads, sinks, experts) is read off them; everything else is in `ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

import qfunc

from .attention import grouped_attention
from .cache import update
from .config import ModelConfig
from .embedding import embed
from .latent import latent_attention
from .linear import linears, row_linear
from .mlp import clamped_swiglu, gated, gated_mlp
from .moe import mixture
from .norms import rms_norm
from .places import Places
from .rope import rotate, rotations
from .stack import STACK, scan_layers


def apply(params: Mapping, ids, cache: Mapping | None, config: ModelConfig, *, last: bool = False, pad=None) -> tuple[Any, dict | None]:
    """The logits of a decoder.

    Arguments:
        params: as above.
        ids: int [B, T], the tokens that follow those in the cache.
        cache: what `qfunc.layers.cache.init_cache` or an earlier call gave, with room for T more tokens, or None: `ids` are then whole
            texts, and a quantized cache's rounding still applies.
        config: static.
        last: only the logits of the last token, [B, 1, vocab]: what a prompt needs.
        pad: int [B], how many of the first ids of each row are padding, whose logits mean nothing, or None. A cache keeps it in its
            entry `pad`, which counts instead.

    Returns: (logits [B, T, vocab] in the dtype of the activations, the new cache or None).
    Raises: ValueError where shapes do not fit.
    """
    hidden, cache = hidden_states(params, ids, cache, config, pad)
    return head(params, hidden[:, -1:] if last else hidden, config), cache


def hidden_states(params: Mapping, ids, cache: Mapping | None, config: ModelConfig, pad=None) -> tuple[Any, dict | None]:
    """What `apply` computes before the output layer: ([B, T, hidden] after the last norm, the new cache or None)."""
    ids = jnp.asarray(ids)
    if ids.ndim != 2:
        raise ValueError(f"ids: expected [batch, tokens], found {ids.shape}")
    model = params["model"]
    start, pad = (jnp.zeros((), jnp.int32), pad) if cache is None else (cache["length"], cache.get("pad"))
    places = Places.of(ids.shape[1], start, pad)
    x = embed(model["embed_tokens"], ids, jnp.dtype(config.dtype))
    if config.embed_scale != 1:
        x = x * jnp.asarray(config.embed_scale, x.dtype)
    x, layers = run_layers(model["layers"], x, places, None if cache is None else cache["layers"], config)
    x = rms_norm(model["norm"], x, config.rms_norm_eps, offset=config.norm_offset)
    return x, None if cache is None else {**cache, "length": start + ids.shape[1], "layers": layers}


def run_layers(layers: Mapping, x, places: Places, cache, config: ModelConfig):
    """(x, the layers' new caches or None): all layers one after the other, under `lax.scan` where they are stacked."""
    if config.scan:
        return scan_layers(lambda own, x, kept: decoder_layer(own, x, places, kept, config, 0), layers[STACK], x, cache)
    kept = []
    for index in range(config.num_hidden_layers):
        x, new = decoder_layer(layers[str(index)], x, places, None if cache is None else cache[index], config, index)
        kept.append(new)
    return x, None if cache is None else tuple(kept)


def head(params: Mapping, x, config: ModelConfig):
    """Logits [..., vocab] of hidden states [..., hidden]: the output layer, or the embedding table where they are tied."""
    own = params.get("lm_head")
    if own is not None:
        logits = qfunc.matmul(x, own["kernel"], bias=own.get("bias"))
    else:
        table = params["model"]["embed_tokens"]
        table = table["kernel"] if "kernel" in table else table["weight"]
        logits = qfunc.matmul(x, table if isinstance(table, qfunc.QTensor) else jnp.swapaxes(table, -1, -2))
    if config.final_softcap is not None:
        logits = config.final_softcap * jnp.tanh(logits / config.final_softcap)
    return logits


def decoder_layer(params: Mapping, x, places: Places, cache: Mapping | None, config: ModelConfig, index: int):
    """One layer: x + attention(norm(x)), then the same with the perceptron or the experts.

    Arguments: `params` of the layer; `x` [B, T, hidden]; `places` of its tokens; `cache` of the layer or None; `index`, for the kind of
    layer. Returns: (x, the layer's new cache or None).
    """
    names = config.names

    def norm(name: str | None, h):
        return h if name is None else rms_norm(params[name], h, config.rms_norm_eps, offset=config.norm_offset)

    attend = self_attention if config.latent is None else latent_attention
    mixed, cache = attend(params["self_attn"], norm(names.attention_norm, x), places, cache, config, index)
    x = x + norm(names.attention_out_norm, mixed)
    return x + norm(names.mlp_out_norm, feed_forward(params[names.mlp], norm(names.mlp_norm, x), config)), cache


def feed_forward(params: Mapping, x, config: ModelConfig):
    """The second half of a layer: a gated perceptron, or experts where the parameters have them."""
    limit = config.swiglu_limit
    combine = gated(config.hidden_act) if limit is None else clamped_swiglu(limit, config.swiglu_alpha)
    if "experts" not in params:
        return gated_mlp(params, x, combine, axis=config.axis)
    if config.routing is None:
        raise ValueError(f"the parameters have experts, but the configuration of {config.family} names none")
    return mixture(params, x, config.routing, config.names, combine, axis=config.axis, split_experts=config.split_experts)


def self_attention(params: Mapping, x, places: Places, cache: Mapping | None, config: ModelConfig, index: int):
    """Grouped-query attention with rotary positions; queries and keys are normalised by head where there are norms for it."""
    batch, tokens, _ = x.shape
    window = config.windows[index]
    rope = config.rope if window is None or config.local_rope is None else config.local_rope
    q, k, v = (y.reshape(batch, tokens, -1, config.head_dim)
               for y in linears([params["q_proj"], params["k_proj"], params["v_proj"]], x))
    if "q_norm" in params:
        q, k = (rms_norm(params[name], y, config.rms_norm_eps, offset=config.norm_offset) for name, y in (("q_norm", q), ("k_norm", k)))
    cos, sin = rotations(rope, config.head_dim, places.positions)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    entries = cache or {"k": None, "v": None}
    kept = {}
    kept["k"], k = update(entries["k"], k, places.slots[0], "k", config.cache, params)
    kept["v"], v = update(entries["v"], v, places.slots[0], "v", config.cache, params)
    mixed = grouped_attention(q, k, v, places.mask(k.shape[1], window), scale=config.attention_scale, softcap=config.softcap,
                              sinks=params.get("sinks"))
    return row_linear(params["o_proj"], mixed.reshape(batch, tokens, -1), config.axis), None if cache is None else kept

"""BERT-style encoders as pure functions of a nested dict of parameters, and sentence embeddings on top of them.

The parameters are named as the Hugging Face checkpoint names them, linear weights as `kernel` (in, out):

    embeddings/{word,position,token_type}_embeddings/weight   (rows, hidden); a packed word table is `kernel` (hidden, rows)
    embeddings/LayerNorm/{weight,bias}                        (hidden,)
    encoder/layer/<i>/attention/self/{query,key,value}        {kernel, bias}
    encoder/layer/<i>/attention/output/{dense,LayerNorm}
    encoder/layer/<i>/intermediate/dense, encoder/layer/<i>/output/{dense,LayerNorm}

Sources: Devlin et al., "BERT", 2018; Reimers and Gurevych, "Sentence-BERT", 2019 (mean pooling over the tokens).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import jax.numpy as jnp
from einops import rearrange

from .attention import attention
from .embedding import embed
from .linear import linear, linears
from .mlp import ACTIVATIONS
from .norms import layer_norm


@dataclass(frozen=True)
class EncoderConfig:
    """The fields of a Hugging Face `config.json` that the forward pass needs, under their names there."""

    num_hidden_layers: int
    num_attention_heads: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r}: expected one of {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}")

    @classmethod
    def from_json(cls, config: Mapping) -> EncoderConfig:
        """From a parsed `config.json`; ValueError where it describes another architecture than BERT with absolute positions."""
        for key, expected in (("model_type", "bert"), ("position_embedding_type", "absolute"), ("is_decoder", False)):
            if config.get(key, expected) != expected:
                raise ValueError(f"{key}: expected {expected!r}, found {config[key]!r}")
        return cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})


def encode(params: Mapping, ids, mask, config: EncoderConfig, *, token_types=None):
    """The last hidden states of a BERT encoder.

    Arguments: `params` as above; `ids` int32 [batch, tokens]; `mask` [batch, tokens], nonzero for real tokens; `token_types` like `ids`,
    zeros where not given.
    Returns: [batch, tokens, hidden] in the dtype of the position table. Rows of padding are finite and mean nothing.
    Raises: ValueError where there are more tokens than positions.
    """
    if ids.shape[-1] > config.max_position_embeddings:
        raise ValueError(f"ids have {ids.shape[-1]} tokens, the model has {config.max_position_embeddings} positions")
    keys = mask.astype(bool)[..., None, None, :]
    x = _embeddings(params["embeddings"], ids, token_types, config)
    for i in range(config.num_hidden_layers):
        x = _layer(params["encoder"]["layer"][str(i)], x, keys, config)
    return x


def mean_pool(hidden, mask):
    """The mean of the hidden states of real tokens: [batch, tokens, hidden], [batch, tokens] to float32 [batch, hidden]."""
    weight = mask.astype(jnp.float32)[..., None]
    return (hidden.astype(jnp.float32) * weight).sum(-2) / jnp.maximum(weight.sum(-2), 1e-9)


def sentence_embedding(params: Mapping, ids, mask, config: EncoderConfig):
    """Sentence embeddings as sentence-transformers computes them for all-MiniLM-L6-v2: mean over real tokens, L2 normalised.

    Arguments: as for `encode`. Returns: float32 [batch, hidden], rows of length 1.
    """
    pooled = mean_pool(encode(params, ids, mask, config), mask)
    return pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)


def _embeddings(params, ids, token_types, config):
    positions = params["position_embeddings"]["weight"]
    types = params["token_type_embeddings"]["weight"]
    x = embed(params["word_embeddings"], ids, positions.dtype) + positions[: ids.shape[-1]]
    x = x + (types[0] if token_types is None else jnp.take(types, token_types, axis=0))
    return layer_norm(params["LayerNorm"], x, config.layer_norm_eps)


def _layer(params, x, keys, config):
    own = params["attention"]["self"]
    mixed = linears([own["query"], own["key"], own["value"]], x)
    q, k, v = (rearrange(y, "... t (n d) -> ... t n d", n=config.num_attention_heads) for y in mixed)
    mixed = rearrange(attention(q, k, v, keys), "... t n d -> ... t (n d)")
    out = params["attention"]["output"]
    x = layer_norm(out["LayerNorm"], linear(out["dense"], mixed) + x, config.layer_norm_eps)
    wide = ACTIVATIONS[config.hidden_act](linear(params["intermediate"]["dense"], x))
    return layer_norm(params["output"]["LayerNorm"], linear(params["output"]["dense"], wide) + x, config.layer_norm_eps)

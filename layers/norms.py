"""Normalisations over the last axis, computed in float32 and returned in the dtype of the input."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jax import lax


def layer_norm(params: Mapping, x, eps: float = 1e-12):
    """LayerNorm: (x - mean) / sqrt(var + eps) * weight + bias, with the biased variance.

    Arguments: `params` with `weight` and optionally `bias`, both (features,); `x` [..., features].
    Returns: the shape and dtype of `x`.
    """
    h = x.astype(jnp.float32)
    h = h - h.mean(-1, keepdims=True)
    h = h * lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + eps) * params["weight"].astype(jnp.float32)
    if "bias" in params:
        h = h + params["bias"].astype(jnp.float32)
    return h.astype(x.dtype)


def rms_norm(params: Mapping, x, eps: float = 1e-6, *, offset: float = 0.0):
    """RMSNorm: x / sqrt(mean(x^2) + eps) * (weight + offset) (+ bias).

    Arguments: `params` with `weight` and optionally `bias` (as msModelSlim's outlier suppression writes), both (features,);
    `x` [..., features]; `offset`, 1 for Gemma, whose weights are differences from one.
    Returns: the shape and dtype of `x`.
    """
    h = x.astype(jnp.float32)
    h = h * lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + eps) * (params["weight"].astype(jnp.float32) + offset)
    if "bias" in params:
        h = h + params["bias"].astype(jnp.float32)
    return h.astype(x.dtype)

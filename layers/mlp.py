"""The two-layer perceptrons of transformers: gated (SwiGLU, GeGLU) and clamped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp

from .linear import linears, row_linear

ACTIVATIONS: dict[str, Callable] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
"""`hidden_act` of Hugging Face to the function."""


def gated(activation: str) -> Callable:
    """(gate, up) -> act(gate) up."""
    return lambda gate, up: ACTIVATIONS[activation](gate) * up


def clamped_swiglu(limit: float, alpha: float) -> Callable:
    """(gate, up) -> (clip(up, -limit, limit) + 1) g sigmoid(alpha g), g = min(gate, limit); GPT-OSS's."""
    def combine(gate, up):
        gate = jnp.minimum(gate, limit)
        return (jnp.clip(up, -limit, limit) + 1) * gate * jax.nn.sigmoid(alpha * gate)
    return combine


def gated_mlp(params: Mapping, x, combine: Callable, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
              axis: str | None = None):
    """down(combine(gate(x), up(x))).

    Arguments: `params` with the three linear layers under `names`; `x` [..., hidden]; `combine`, such as `gated("silu")`;
    `axis`, the mesh axis over which the inner size is split, if it is.
    Returns: the shape and dtype of `x`.
    """
    gate, up = linears([params[names[0]], params[names[1]]], x)
    return row_linear(params[names[2]], combine(gate, up), axis)

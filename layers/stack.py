"""Layers as one pytree with a leading axis, for `lax.scan`: compiled once, whatever their number.

A scan hands a custom call a slice of the stack, which XLA copies first, so that each packed weight crosses memory more than once;
`kernels/bench/decode.py --scan` measures it. Unrolled layers are therefore the default, and a scan is for models that compile too long.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from .config import ModelConfig

STACK = "stack"
"""The one key of `model/layers` where the layers are stacked."""


def stack_layers(params: Mapping, config: ModelConfig) -> tuple[dict, ModelConfig]:
    """(parameters, config) with the layers stacked leaf by leaf; the config says so in `scan`.

    Raises: ValueError, naming the first difference, where the layers are not alike: in their leaves, shapes, schemes or windows.
    """
    reason = difference(params, config)
    if reason is not None:
        raise ValueError(f"layers cannot be stacked: {reason}")
    layers = params["model"]["layers"]
    ordered = [layers[str(i)] for i in range(config.num_hidden_layers)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ordered)
    return {**params, "model": {**params["model"], "layers": {STACK: stack}}}, config.replace(scan=True)


def difference(params: Mapping, config: ModelConfig) -> str | None:
    """Why the layers are not alike, None where they are."""
    if len(set(config.windows)) > 1:
        return f"their windows are {', '.join(map(str, dict.fromkeys(config.windows)))}"
    layers = params["model"]["layers"]

    def described(index: int):
        leaves, tree = jax.tree_util.tree_flatten_with_path(layers[str(index)])
        return {jax.tree_util.keystr(keys, simple=True, separator="/"): (leaf.shape, leaf.dtype) for keys, leaf in leaves}, tree
    first, tree = described(0)
    for index in range(1, config.num_hidden_layers):
        other, shape = described(index)
        odd = next((name for name in sorted(first.keys() | other.keys()) if first.get(name) != other.get(name)), None)
        if odd is not None:
            return f"{odd} of layer {index} differs from that of layer 0"
        if shape != tree:
            return f"a scheme of layer {index} differs from that of layer 0"
    return None


def scan_layers(layer, stack, x, cache):
    """(x, new cache) of `layer(params, x, cache) -> (x, cache)` over a stack of parameters and of caches, or None."""
    def body(x, inputs):
        return layer(inputs[0], x, inputs[1])
    return lax.scan(body, x, (stack, cache))

"""Mixtures of experts: routers in floating point, tokens sorted by expert, no token dropped.

Sources: Shazeer et al., 2017; Mixtral, 2024; DeepSeek-V2 and V3, 2024 (groups, sigmoid scores, shared experts); GPT-OSS, 2025.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax

import qfunc

from .config import Names, Routing
from .linear import ROTATIONS, as_float, linear
from .mlp import gated_mlp


def route(params: Mapping, x, routing: Routing):
    """The experts of each token and their weights, in float32 whatever the model's dtype or the router's storage.

    Arguments: `params`, the router: `kernel` (hidden, experts), optionally `bias` (experts,) on the logits and
    `e_score_correction_bias` (experts,), which moves the choice but not the weights; `x` [T, hidden].
    Returns: (weights float32 [T, top_k], experts int32 [T, top_k]).
    """
    logits = jnp.matmul(x.astype(jnp.float32), as_float(params["kernel"]), precision=lax.Precision.HIGHEST)
    if "bias" in params:
        logits = logits + params["bias"].astype(jnp.float32)
    if routing.score == "softmax_chosen":
        best, experts = lax.top_k(logits, routing.top_k)
        return jax.nn.softmax(best, axis=-1) * routing.scale, experts
    scores = jax.nn.sigmoid(logits) if routing.score == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    choice = scores
    if "e_score_correction_bias" in params:
        choice = choice + params["e_score_correction_bias"].astype(jnp.float32)
    if routing.groups > 1:
        choice = _limit_groups(choice, routing)
    _, experts = lax.top_k(choice, routing.top_k)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if routing.normalize:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return weights * routing.scale, experts


def _limit_groups(choice, routing: Routing):
    grouped = choice.reshape(choice.shape[0], routing.groups, -1)
    best = grouped.max(-1) if routing.group_score == "max" else lax.top_k(grouped, 2)[0].sum(-1)
    _, chosen = lax.top_k(best, routing.top_groups)
    kept = jax.nn.one_hot(chosen, routing.groups, dtype=jnp.bool_).any(-2)
    return jnp.where(kept[..., None], grouped, routing.drop_value).reshape(choice.shape)


def mixture(params: Mapping, x, routing: Routing, names: Names, combine: Callable, *, axis: str | None = None,
            split_experts: bool = False):
    """A mixture-of-experts layer.

    Arguments: `params` with the router, `experts` (stacks `<proj>/{kernel, bias}` with a leading axis, or `<i>/<proj>` one by one
    where their static metadata differ) and, where the family has them, shared experts; `x` [..., hidden]; `axis`, the mesh axis over
    which the experts' inner size, or with `split_experts` the stacks themselves, are split, if they are.
    Returns: the shape and dtype of `x`: sum over the token's experts of weight times expert(x), plus the shared experts.
    """
    rows = x.reshape(-1, x.shape[-1])
    weights, experts = route(params[names.router], rows, routing)
    own, first = params["experts"], None
    if axis is not None and any(key.isdigit() for key in own):
        raise ValueError("experts whose schemes differ are no stack and cannot be split over devices; load them without a mesh")
    if axis is not None and split_experts:
        first = lax.axis_index(axis) * (routing.experts // lax.axis_size(axis))
    elif axis is not None:
        own = _bias_once(own, names.down, axis)
    out = experts_of(own, rows, weights, experts, routing, names, combine, first=first)
    if axis is not None:
        out = lax.psum(out, axis)
    out = out.astype(x.dtype)
    if names.shared is not None and names.shared in params:
        shared = gated_mlp(params[names.shared], rows, combine, axis=axis)
        if names.shared_gate is not None:
            shared = shared * jax.nn.sigmoid(linear(params[names.shared_gate], rows))
        out = out + shared
    return out.reshape(x.shape)


def experts_of(params: Mapping, rows, weights, experts, routing: Routing, names: Names, combine: Callable, *, first=None):
    """Sum over each row's experts of weight times expert(row).

    Arguments: `rows` [T, hidden]; `weights`, `experts` [T, top_k] of `route`; `first`, where the stacks hold only the experts from that
    one on: rows of others give zero.
    Returns: float32 [T, hidden].
    """
    if any(key.isdigit() for key in params):
        return _one_by_one(params, rows, weights, experts, routing, names, combine)
    choice = experts.reshape(-1)
    held = jax.tree.leaves(params)[0].shape[0]
    if first is not None:
        # Rows of the experts that are held come first, in their order: what lies behind them has no expert and gives zero.
        choice = (choice - first) % routing.experts
    order = jnp.argsort(choice, stable=True)
    sizes = jnp.bincount(choice, length=routing.experts)[:held].astype(jnp.int32)

    tokens = order // routing.top_k

    def first(layer, x, shared):
        return grouped(layer, x, sizes, shared, tokens)

    out = _expert(params, rows, names, combine, first, lambda layer, hidden: grouped(layer, hidden, sizes))
    out = out[jnp.argsort(order)].reshape(rows.shape[0], routing.top_k, -1)
    return jnp.einsum("tkh,tk->th", out.astype(jnp.float32), weights)


def _bias_once(params: Mapping, down: str, axis: str):
    """The experts with the bias of their last layer on the first device of the axis alone, as partial sums are added up."""
    if "bias" not in params.get(down, {}):
        return params
    bias = params[down]["bias"]
    return {**params, down: {**params[down], "bias": jnp.where(lax.axis_index(axis) == 0, bias, jnp.zeros_like(bias))}}


def grouped(layer: Mapping, x, sizes, shared=None, tokens=None):
    """`linear` with a stack of experts; `shared` is `x` already quantized, where several stacks take it; `tokens` are the rows of `x`
    that are sorted by expert, by default all in their order."""
    found = [name for name in ROTATIONS if name in layer]
    if found:
        raise ValueError(f"a stack of experts with an online rotation, {found[0]}: expected none, rotations belong to single layers")
    x, dtype = x if shared is None else shared, x.dtype
    return qfunc.grouped_matmul(x, layer["kernel"], sizes, rows=tokens, bias=layer.get("bias"), out_dtype=dtype)


def _expert(params: Mapping, x, names: Names, combine: Callable, apply: Callable, last: Callable):
    if names.gate_up is not None and names.gate_up in params:
        both = apply(params[names.gate_up], x, None)
        gate, up = both[..., 0::2], both[..., 1::2]
    else:
        layers = [params[names.gate], params[names.up]]
        shared = _shared(layers, x)
        gate, up = (apply(layer, x, shared) for layer in layers)
    hidden = combine(gate, up)
    return last(params[names.down], hidden)


def _shared(layers, x):
    """The one quantization of `x` that both stacks would make, or None. Scales per tensor are each expert's own: those stay apart."""
    kernels = [layer["kernel"] for layer in layers]
    if not all(isinstance(k, qfunc.QTensor) and k.scheme.activation is not None for k in kernels):
        return None
    spec = kernels[0].scheme.activation
    if any(k.scheme.activation != spec or k.smooth is not None or k.perm is not None or k.input_scale is not None for k in kernels):
        return None
    if spec.granularity.kind == "tensor" or spec.outer == "tensor" or spec.outlier_threshold is not None:
        return None
    return qfunc.quantize_activation(x, spec)


def _one_by_one(params: Mapping, rows, weights, experts, routing: Routing, names: Names, combine: Callable):
    """Experts that are no stack: each runs on all rows, those of others set to zero, and is skipped where it has none."""
    stacked = {name: layer for name, layer in params.items() if not name.isdigit()}
    out = jnp.zeros(rows.shape, jnp.float32)
    for index in range(routing.experts):
        own = {**jax.tree.map(lambda leaf, i=index: leaf[i], stacked), **params.get(str(index), {})}
        share = jnp.where(experts == index, weights, 0).sum(-1)
        mine = (experts == index).any(-1)

        def run(own=own, share=share, mine=mine):
            x = jnp.where(mine[:, None], rows, 0)
            y = _expert(own, x, names, combine, lambda layer, x, shared: linear(layer, x), linear)
            return y.astype(jnp.float32) * share[:, None]

        out = out + lax.cond(mine.any(), run, lambda: jnp.zeros(rows.shape, jnp.float32))
    return out

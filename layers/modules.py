"""nnx modules over the functions of this package: they hold float or packed parameters and mix with modules of one's own.

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = layers.Embedding(256, 64, rngs=rngs)
            self.attention = layers.Attention(64, heads=4, kv_heads=2, rngs=rngs)
            self.head = nnx.Linear(64, 10, rngs=rngs)
    qnet = quantize_nnx(Net(nnx.Rngs(0)), {"attention/*": "w8a8_dynamic", "*": None})

Parameters have the names of Hugging Face checkpoints, so that `module.assign(checkpoint.params["model"]["layers"]["0"]["self_attn"])` takes
what was loaded. A module computes what the function in its docstring computes of `module.params`; there is no second forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx

import qfunc
from qfunc._qtensor import QTensor

from . import decoder
from .cache import FORMATS, init_cache
from .config import ModelConfig, Names, Routing
from .embedding import embed
from .linear import linear
from .mlp import ACTIVATIONS, gated, gated_mlp
from .moe import mixture
from .norms import layer_norm, rms_norm
from .places import Places
from .rope import Rope

nnx.register_data_type(QTensor)


class Layer(nnx.Module):
    """A module whose forward pass is a function of its parameters as a nested dict."""

    @property
    def params(self) -> dict:
        """The parameters as the functions of this package take them: nested dicts of arrays and QTensors."""
        own = {}
        for name, value in vars(self).items():
            if isinstance(value, nnx.Param):
                own[name] = value.get_raw_value()
            elif isinstance(value, Layer):
                own[name] = value.params
        return own

    def assign(self, params: Mapping) -> None:
        """Take over parameters, of a checkpoint for instance.

        Raises ValueError, before anything changes, where names or logical shapes are not those of this module.
        """
        self._check(params, "")
        self._take(params)

    def _check(self, params: Mapping, path: str) -> None:
        own = self.params
        if own.keys() != params.keys():
            raise ValueError(f"{path or type(self).__name__}: expected {', '.join(sorted(own))}, found {', '.join(sorted(params))}")
        for name, value in own.items():
            if isinstance(value, dict):
                getattr(self, name)._check(params[name], f"{path}{name}/")
            elif tuple(value.shape) != tuple(params[name].shape):
                raise ValueError(f"{path}{name}: expected the shape {tuple(value.shape)}, found {tuple(params[name].shape)}")

    def _take(self, params: Mapping) -> None:
        for name, value in params.items():
            target = getattr(self, name)
            if isinstance(target, Layer):
                target._take(value)
            else:
                target.set_value(value)


class Linear(Layer):
    """`qfunc.layers.linear.linear`: y [..., outs] = x [..., ins] @ kernel (+ bias); `batch`, leading axes of a stack of kernels."""

    def __init__(self, ins: int, outs: int, *, use_bias: bool = False, batch: tuple[int, ...] = (), dtype=jnp.float32, rngs: nnx.Rngs):
        start = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-2, out_axis=-1, batch_axis=tuple(range(len(batch))))
        self.kernel = nnx.Param(start(rngs.params(), (*batch, ins, outs), dtype))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros((*batch, outs), dtype))

    def __call__(self, x):
        return linear(self.params, x)


class Embedding(Layer):
    """`qfunc.layers.embedding.embed`: rows of a table `weight` (vocab, hidden); `attend(x)` gives the logits of a tied output layer."""

    def __init__(self, vocab: int, hidden: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.weight = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (vocab, hidden), dtype))

    def __call__(self, ids):
        return embed(self.params, ids)

    def attend(self, x):
        table = self.params["weight"]
        return qfunc.matmul(x, table if isinstance(table, QTensor) else jnp.swapaxes(table, -1, -2))


class RMSNorm(Layer):
    """`qfunc.layers.norms.rms_norm`."""

    def __init__(self, features: int, *, eps: float = 1e-6, offset: float = 0.0, use_bias: bool = False, dtype=jnp.float32,
                 rngs: nnx.Rngs | None = None):
        self.eps, self.offset = eps, offset
        self.weight = nnx.Param(jnp.full(features, 1 - offset, dtype))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(features, dtype))

    def __call__(self, x):
        return rms_norm(self.params, x, self.eps, offset=self.offset)


class LayerNorm(Layer):
    """`qfunc.layers.norms.layer_norm`."""

    def __init__(self, features: int, *, eps: float = 1e-5, use_bias: bool = True, dtype=jnp.float32, rngs: nnx.Rngs | None = None):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(features, dtype))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(features, dtype))

    def __call__(self, x):
        return layer_norm(self.params, x, self.eps)


class MLP(Layer):
    """`qfunc.layers.mlp.gated_mlp`: down(act(gate(x)) up(x)), x [..., hidden]."""

    def __init__(self, hidden: int, inner: int, *, activation: str = "silu", dtype=jnp.float32, rngs: nnx.Rngs):
        self.activation = _known(activation)
        self.gate_proj = Linear(hidden, inner, dtype=dtype, rngs=rngs)
        self.up_proj = Linear(hidden, inner, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(inner, hidden, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return gated_mlp(self.params, x, gated(self.activation))


class Experts(Layer):
    """The stacked layers of a mixture: `gate_proj`, `up_proj` (experts, hidden, inner), `down_proj` (experts, inner, hidden)."""

    def __init__(self, experts: int, hidden: int, inner: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.gate_proj = Linear(hidden, inner, batch=(experts,), dtype=dtype, rngs=rngs)
        self.up_proj = Linear(hidden, inner, batch=(experts,), dtype=dtype, rngs=rngs)
        self.down_proj = Linear(inner, hidden, batch=(experts,), dtype=dtype, rngs=rngs)


class MoE(Layer):
    """`qfunc.layers.moe.mixture`: each token's `routing.top_k` experts, weighted and added up; x [..., hidden].

    `shared`, inner size of an expert that every token takes, if any. Under a rule `*` the router `gate` stays in floating point.
    """

    def __init__(self, hidden: int, inner: int, routing: Routing, *, shared: int | None = None, activation: str = "silu",
                 dtype=jnp.float32, rngs: nnx.Rngs):
        self.routing, self.activation = routing, _known(activation)
        self.gate = Linear(hidden, routing.experts, dtype=dtype, rngs=rngs)
        self.experts = Experts(routing.experts, hidden, inner, dtype=dtype, rngs=rngs)
        if shared is not None:
            self.shared_experts = MLP(hidden, shared, activation=activation, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return mixture(self.params, x, self.routing, Names(shared="shared_experts"), gated(self.activation))


class Attention(Layer):
    """`qfunc.layers.decoder.self_attention`: causal grouped-query attention with rotary positions.

    Arguments: `heads`, `kv_heads` (by default as many), `head_dim` (by default hidden / heads); `rope`; `window`, how far back a query
    sees; `qk_norm`, RMSNorm of queries and keys by head; `cache`, the format of the key/value cache (`qfunc.layers.cache.FORMATS`).
    """

    def __init__(self, hidden: int, heads: int, kv_heads: int | None = None, *, head_dim: int | None = None, rope: Rope | None = None,
                 window: int | None = None, use_bias: bool = False, qk_norm: bool = False, cache: str = "float", dtype=jnp.float32,
                 rngs: nnx.Rngs):
        kv_heads, head_dim = kv_heads or heads, head_dim or hidden // heads
        if cache not in FORMATS:
            raise ValueError(f"cache: expected one of {', '.join(FORMATS)}, found {cache!r}")
        self.config = ModelConfig("attention", 0, hidden, 1, heads, kv_heads, head_dim, (window,), rope or Rope(), head_dim**-0.5,
                                  dtype=str(jnp.dtype(dtype)), cache=cache)
        for name, ins, outs in (("q_proj", hidden, heads * head_dim), ("k_proj", hidden, kv_heads * head_dim),
                                ("v_proj", hidden, kv_heads * head_dim), ("o_proj", heads * head_dim, hidden)):
            setattr(self, name, Linear(ins, outs, use_bias=use_bias and name != "o_proj", dtype=dtype, rngs=rngs))
        if qk_norm:
            self.q_norm, self.k_norm = RMSNorm(head_dim, dtype=dtype), RMSNorm(head_dim, dtype=dtype)

    def __call__(self, x, cache=None):
        """[B, T, hidden] of x [B, T, hidden]; with a cache of `init_cache`, whose tokens x follows, (that, the new cache)."""
        start = jnp.zeros((), jnp.int32) if cache is None else cache["length"]
        places = Places.of(x.shape[1], start)
        kept = None if cache is None else cache["layers"][0]
        y, kept = decoder.self_attention(self.params, x, places, kept, self.config, 0)
        return y if cache is None else (y, {"length": start + x.shape[1], "layers": (kept,)})

    def init_cache(self, batch: int, length: int) -> dict:
        """An empty cache for `batch` texts of at most `length` tokens."""
        return init_cache(self.config, batch, length)


def _known(activation: str) -> str:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, found {activation!r}")
    return activation

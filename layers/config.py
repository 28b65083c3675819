"""What a decoder needs to know about its model: frozen, hashable records, so that they can be static arguments of jit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from .mlp import ACTIVATIONS
from .rope import Rope


@dataclass(frozen=True)
class Names:
    """What a family calls the parts of its layers.

    Fields: `attention_norm`, `mlp_norm` before the two halves, `attention_out_norm`, `mlp_out_norm` after them (None where there is
    none); `mlp`, the second half; inside a mixture of experts `router`, `shared`, `shared_gate`; of each expert `gate`, `up`, `down`.
    A model whose experts have gate and up in one matrix has `gate_up` in place of both, its columns alternating.
    """

    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attention_out_norm: str | None = None
    mlp_out_norm: str | None = None
    mlp: str = "mlp"
    router: str = "gate"
    shared: str | None = None
    shared_gate: str | None = None
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    gate_up: str | None = None


@dataclass(frozen=True)
class Routing:
    """How tokens find their experts.

    Fields:
        experts, top_k: how many there are, how many each token takes.
        score: `softmax` over all experts, `sigmoid` of each, or `softmax_chosen`: top-k of the logits, then softmax over those.
        normalize: the weights of a token's experts are divided by their sum.
        scale: factor on the weights.
        groups, top_groups: experts stand in `groups` groups, of which a token may use the best `top_groups`; a group is as good as
            its best expert (`max`) or its two best together (`top2`), as `group_score` says.
        drop_value: what stands for the experts of other groups when the best are chosen: 0, or -inf.
    """

    experts: int
    top_k: int
    score: str = "softmax"
    normalize: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    drop_value: float = 0.0

    def __post_init__(self):
        if self.score not in ("softmax", "sigmoid", "softmax_chosen"):
            raise ValueError(f"router score {self.score!r}: expected softmax, sigmoid or softmax_chosen")
        if not 0 < self.top_k <= self.experts:
            raise ValueError(f"num_experts_per_tok: expected 1 to {self.experts}, found {self.top_k}")
        if self.experts % self.groups or not 0 < self.top_groups <= self.groups:
            raise ValueError(f"{self.experts} experts, {self.groups} groups, {self.top_groups} chosen: expected groups that divide them")


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, 2024): sizes of the latent rows and of the parts of a head."""

    kv_rank: int
    q_rank: int | None
    nope: int
    rope: int
    value: int
    interleaved: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only model.

    Fields:
        family: the model type it was made from.
        head_dim: of queries and keys (of the rotated part, where there is a `latent`).
        windows: per layer, how many positions back a query sees, or None for all.
        rope, local_rope: of all layers, and of those with a window where they have their own.
        attention_scale: factor on the scores.
        norm_offset: 1 where norm weights are stored as differences from one.
        embed_scale: factor on the embeddings; `softcap`, `final_softcap`: of the scores and the logits, or None.
        swiglu_limit, swiglu_alpha: GPT-OSS's clamped SwiGLU; None for the plain one.
        tied: the output layer is the embedding table.
        dtype: of the activations.
        cache: format of the key/value cache, a name of `qfunc.layers.cache.FORMATS`.
        eos: token ids that end a text.
        axis: inside shard_map, the mesh axis over which heads and inner sizes are split (`qfunc.layers.parallel` sets it); the numbers
            of heads are then those of one device. `split_experts`: whole experts are split over it instead of their inner size.
        scan: the layers are one stack that runs under `lax.scan` (`qfunc.layers.stack` sets it).
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    rope: Rope
    attention_scale: float
    max_positions: int = 0
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    local_rope: Rope | None = None
    norm_offset: float = 0.0
    embed_scale: float = 1.0
    softcap: float | None = None
    final_softcap: float | None = None
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702
    tied: bool = False
    routing: Routing | None = None
    latent: Latent | None = None
    names: Names = Names()
    dtype: str = "float32"
    cache: str = "float"
    eos: tuple[int, ...] = ()
    axis: str | None = None
    split_experts: bool = False
    scan: bool = False

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r}: expected one of {', '.join(ACTIVATIONS)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads: expected a multiple of num_key_value_heads {self.num_key_value_heads}, "
                             f"found {self.num_attention_heads}")
        if len(self.windows) != self.num_hidden_layers:
            raise ValueError(f"layer_types: expected {self.num_hidden_layers} of them, found {len(self.windows)}")
        turned = int(self.head_dim * self.rope.partial_rotary_factor) // 2
        if self.rope.factors is not None and len(self.rope.factors) != turned:
            raise ValueError(f"rope factors: expected {turned}, half of the rotated dimensions, found {len(self.rope.factors)}")

    def replace(self, **changes) -> ModelConfig:
        """A copy with other fields."""
        return dataclasses.replace(self, **changes)

"""Model families as data: from a Hugging Face `config.json` to a `ModelConfig`. A family is a row, not a copy of the forward pass.

Each row follows the `modeling_<type>.py` of transformers; what a published configuration leaves out has the default it has there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax.numpy as jnp

from ._typed import typed
from ._weights import adapt as adapt
from .config import Latent, ModelConfig, Names, Routing
from .rope import Rope, yarn_mscale

GEMMA = Names(attention_out_norm="post_attention_layernorm", mlp_norm="pre_feedforward_layernorm",
              mlp_out_norm="post_feedforward_layernorm")
GELU = "gelu_pytorch_tanh"
GPT_OSS_ROPE = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
MIXTRAL = Names(mlp="block_sparse_moe", gate="w1", up="w3", down="w2")


def _windows(found: Mapping, default: Callable[[int], bool] | None = None) -> tuple[int | None, ...]:
    """Per layer its window, by `layer_types` or, without those, by `default` of the layer's index."""
    size, count = found.get("sliding_window"), found["num_hidden_layers"]
    types = found.get("layer_types")
    if size is None:
        return (None,) * count
    if size == 0:
        raise ValueError("sliding_window: expected a window of at least 1, or null, found 0")
    if types is not None:
        unknown = set(types) - {"sliding_attention", "full_attention"}
        if unknown:
            raise ValueError(f"layer_types: expected sliding_attention or full_attention, found {', '.join(map(str, unknown))}")
        return tuple(size if kind == "sliding_attention" else None for kind in types)
    return tuple(size if default is not None and default(i) else None for i in range(count))


def _optional_windows(found: Mapping, default: Callable[[int], bool] | None = None) -> tuple[int | None, ...]:
    """Qwen's: off unless `use_sliding_window`, and then from layer `max_window_layers` on, or as `default` says."""
    if not found.get("use_sliding_window"):
        return (None,) * found["num_hidden_layers"]
    return _windows(found, default or (lambda i: i >= found.get("max_window_layers", 28)))


def _rope(found: Mapping, default: Mapping | None = None) -> Rope:
    """The rotary embedding; without an entry for it that of `default`."""
    entry = found.get("rope_parameters") or found.get("rope_scaling") or default or {}
    if "partial_rotary_factor" in found:
        entry = {"partial_rotary_factor": found["partial_rotary_factor"], **entry}
    return Rope.from_json(entry, found["max_position_embeddings"], found.get("rope_theta", 10000.0))


def _plain(found: Mapping) -> dict:
    """What nearly all families have."""
    heads = found["num_attention_heads"]
    head_dim = found.get("head_dim") or found["hidden_size"] // heads
    return {
        "vocab_size": found["vocab_size"], "hidden_size": found["hidden_size"], "num_hidden_layers": found["num_hidden_layers"],
        "num_attention_heads": heads, "num_key_value_heads": found.get("num_key_value_heads") or heads, "head_dim": head_dim,
        "windows": (None,) * found["num_hidden_layers"], "attention_scale": head_dim**-0.5,
        "max_positions": found["max_position_embeddings"], "rms_norm_eps": found.get("rms_norm_eps", 1e-6),
        "hidden_act": found.get("hidden_act") or found.get("hidden_activation") or "silu",
        "tied": found.get("tie_word_embeddings", False), "eos": ends(found),
    }


def ends(found: Mapping) -> tuple[int, ...]:
    """The ids that end a text, of a `config.json` or a `generation_config.json`. Raises: ValueError where they are no integers."""
    ids = typed({"eos_token_id": found.get("eos_token_id")}).get("eos_token_id", ())
    return tuple(ids) if isinstance(ids, list | tuple) else (ids,)


def _llama(found: Mapping) -> dict:
    return {**_plain(found), "rope": _rope(found)}


def _mistral(found: Mapping) -> dict:
    return {**_llama(found), "windows": _windows(found, lambda i: True)}


def _qwen(found: Mapping) -> dict:
    return {**_llama(found), "windows": _optional_windows(found)}


def _mixtral(found: Mapping) -> dict:
    routing = Routing(found["num_local_experts"], found.get("num_experts_per_tok", 2), normalize=True)
    return {**_mistral(found), "routing": routing, "names": MIXTRAL}


def _other_windows(found: Mapping) -> tuple[int | None, ...]:
    """Qwen2-MoE's own: every other layer, below `max_window_layers`."""
    return _optional_windows(found, lambda i: i % 2 == 0 and i < found.get("max_window_layers", 28))


def _experts(found: Mapping) -> int:
    return found["num_experts"] if "num_experts" in found else found["num_local_experts"]


def _qwen3_moe(found: Mapping) -> dict:
    routing = Routing(_experts(found), found["num_experts_per_tok"], normalize=found.get("norm_topk_prob", False))
    # All layers or none, whatever `layer_types` says.
    windows = _optional_windows({**found, "layer_types": None}, lambda i: True)
    return {**_qwen(found), "windows": windows, "routing": routing}


def _qwen2_moe(found: Mapping) -> dict:
    return {**_qwen3_moe(found), "windows": _other_windows(found), "names": Names(shared="shared_expert", shared_gate="shared_expert_gate")}


def _gemma(found: Mapping) -> dict:
    if found.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention: expected false, as a decoder's tokens see no later ones, found true")
    act = found.get("hidden_activation") or found.get("hidden_act") or GELU
    return {**_llama(found), "norm_offset": 1.0, "embed_scale": math.sqrt(found["hidden_size"]), "hidden_act": act}


def _gemma1(found: Mapping) -> dict:
    # The first configurations say "gelu" of what was trained with the approximation.
    fields = _gemma(found)
    return {**fields, "hidden_act": GELU if fields["hidden_act"] == "gelu" else fields["hidden_act"]}


def _gemma2(found: Mapping) -> dict:
    return {**_gemma(found), "names": GEMMA, "windows": _windows(found, lambda i: i % 2 == 0),
            "attention_scale": found.get("query_pre_attn_scalar", 256) ** -0.5,
            "softcap": found.get("attn_logit_softcapping"), "final_softcap": found.get("final_logit_softcapping")}


def _gemma3(found: Mapping) -> dict:
    entries, positions = found.get("rope_parameters"), found["max_position_embeddings"]
    if entries is None or "full_attention" not in entries:
        entries = {"full_attention": {"rope_theta": found.get("rope_theta", 1e6), **(entries or found.get("rope_scaling") or {})}}
    local = entries.get("sliding_attention") or {}
    if isinstance(local, Mapping):
        local = {"rope_theta": found.get("rope_local_base_freq", 10000.0), **local}
    pattern = found.get("sliding_window_pattern") or found.get("_sliding_window_pattern") or 6
    return {**_gemma2({**found, "rope_parameters": None, "rope_scaling": None}),
            "windows": _windows(found, lambda i: (i + 1) % pattern != 0),
            "rope": Rope.from_json(entries["full_attention"], positions, 1e6), "local_rope": Rope.from_json(local, positions)}


def _gpt_oss(found: Mapping) -> dict:
    routing = Routing(found["num_local_experts"], found.get("num_experts_per_tok", 4), score="softmax_chosen")
    names = Names(router="router", gate_up="gate_up_proj")
    return {**_llama(found), "rope": _rope(found, GPT_OSS_ROPE), "windows": _windows(found, lambda i: i % 2 == 0), "routing": routing,
            "names": names, "swiglu_limit": found.get("swiglu_limit", 7.0), "swiglu_alpha": found.get("swiglu_alpha", 1.702)}


def _latent(found: Mapping, interleaved: bool) -> dict:
    nope, turned = found["qk_nope_head_dim"], found["qk_rope_head_dim"]
    rope = _rope(found)
    scale = (nope + turned) ** -0.5
    if rope.kind != "default" and rope.mscale_all_dim:
        scale *= yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
    latent = Latent(found["kv_lora_rank"], found.get("q_lora_rank"), nope, turned, found["v_head_dim"], interleaved)
    return {**_plain(found), "rope": rope, "head_dim": turned, "attention_scale": scale, "latent": latent,
            "names": Names(shared="shared_experts" if found.get("n_shared_experts", 1) else None)}


def _deepseek_v2(found: Mapping) -> dict:
    method, groups = found.get("topk_method", "greedy"), found.get("n_group") or 1
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"topk_method: expected greedy or group_limited_greedy, found {method!r}")
    if found.get("norm_topk_prob"):
        raise ValueError("norm_topk_prob: expected false for deepseek_v2 (transformers ignores it, the original code does not), found true")
    routing = Routing(found["n_routed_experts"], found["num_experts_per_tok"], scale=found.get("routed_scaling_factor", 1.0),
                      **({"groups": groups, "top_groups": found["topk_group"]} if method == "group_limited_greedy" else {}))
    return {**_latent(found, True), "routing": routing}


def _deepseek_v3(found: Mapping) -> dict:
    routing = Routing(found["n_routed_experts"], found["num_experts_per_tok"], score=found.get("scoring_func", "sigmoid"),
                      normalize=found.get("norm_topk_prob", True), scale=found["routed_scaling_factor"],
                      groups=found["n_group"] or 1, top_groups=found["topk_group"] or 1, group_score="top2", drop_value=-jnp.inf)
    return {**_latent(found, found.get("rope_interleave", True)), "routing": routing}


FAMILIES: dict[str, Callable[[Mapping], dict]] = {
    "llama": _llama, "mistral": _mistral, "qwen2": _qwen, "qwen3": _qwen, "qwen2_moe": _qwen2_moe, "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral, "gemma": _gemma1, "gemma2": _gemma2, "gemma3_text": _gemma3, "gpt_oss": _gpt_oss,
    "deepseek_v2": _deepseek_v2, "deepseek_v3": _deepseek_v3,
}
"""`model_type` to a function from the parsed configuration to the fields of `ModelConfig`."""


def model_config(found: Mapping, dtype: str = "float32", **changes) -> ModelConfig:
    """The `ModelConfig` of a parsed `config.json`.

    Arguments: `found`; `dtype` of the activations; `changes`, other fields to set.
    Raises: ValueError for a `model_type` that the table does not have, or a field that is missing or not understood.
    """
    if not found:
        raise ValueError("expected a config.json that describes the model, found none")
    kind = found.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type: expected one of {', '.join(FAMILIES)}, found {kind!r}")
    try:
        fields = FAMILIES[kind](typed(found, kind))
    except KeyError as error:
        raise ValueError(f"{kind}: the configuration lacks {error.args[0]!r}") from None
    return ModelConfig(**{"family": kind, "dtype": dtype, **fields, **changes})

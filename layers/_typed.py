"""The fields of a `config.json` that decide a model's numbers: their types, and what an absent one means to transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping


def _integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value) -> bool:
    """True for a finite int or float that is no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


TYPES: tuple[tuple[str, Callable[[object], bool], str], ...] = (
    ("an integer of at least 1", lambda value: _integer(value) and value > 0,
     "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim max_position_embeddings num_local_experts "
     "num_experts n_routed_experts num_experts_per_tok kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
     "sliding_window_pattern _sliding_window_pattern"),
    ("an integer of at least 0", lambda value: _integer(value) and value >= 0,
     "sliding_window max_window_layers n_group topk_group n_shared_experts"),
    ("a positive number", lambda value: is_number(value) and value > 0,
     "rms_norm_eps rope_theta rope_local_base_freq partial_rotary_factor query_pre_attn_scalar attn_logit_softcapping "
     "final_logit_softcapping swiglu_limit swiglu_alpha routed_scaling_factor"),
    ("true or false", lambda value: isinstance(value, bool),
     "tie_word_embeddings use_sliding_window norm_topk_prob rope_interleave"),
    ("a name", lambda value: isinstance(value, str), "hidden_act hidden_activation topk_method scoring_func"),
    ("a list of names", lambda value: isinstance(value, list | tuple) and all(isinstance(v, str) for v in value), "layer_types"),
    ("an object", lambda value: isinstance(value, Mapping), "rope_parameters rope_scaling"),
    ("an integer or a list of them", lambda value: all(_integer(v) for v in (value if isinstance(value, list | tuple) else [value])),
     "eos_token_id"),
)
"""What a field must be, the test of it, and the fields."""
NULLABLE = frozenset({"sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "n_group", "topk_group"})
"""Fields whose null says "none of it"; any other null is an absent field."""

_LONG, _QWEN = {"max_position_embeddings": 131072}, {"max_position_embeddings": 32768, "sliding_window": 4096}
_GEMMA = {"head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True}
DEFAULTS: dict[str, dict] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {**_LONG, "sliding_window": 4096},
    "qwen2": _QWEN, "qwen3": {**_QWEN, "head_dim": 128}, "qwen2_moe": _QWEN, "qwen3_moe": _QWEN,
    "mixtral": {**_LONG, "rope_theta": 1e6, "rms_norm_eps": 1e-5},
    "gemma": _GEMMA,
    "gemma2": {**_GEMMA, "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {**_GEMMA, **_LONG, "sliding_window": 4096},
    "gpt_oss": {**_LONG, "head_dim": 64, "sliding_window": 128, "rope_theta": 150000.0, "rms_norm_eps": 1e-5},
    "deepseek_v2": {"max_position_embeddings": 2048},
    "deepseek_v3": {"max_position_embeddings": 4096, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4},
}
"""Family to what transformers takes for a field that a `config.json` leaves out, where that is not the same in all of them."""


def typed(found: Mapping, family: str | None = None) -> dict:
    """The configuration without empty fields and with its family's defaults. Raises: ValueError at a field of another type."""
    kept = {name: value for name, value in found.items() if value is not None or name in NULLABLE}
    for expected, good, names in TYPES:
        for name in names.split():
            value = kept.get(name)
            if value is not None and not good(value):
                raise ValueError(f"{name}: expected {expected}, found {value!r:.80}")
    return {**DEFAULTS.get(family, {}), **kept}

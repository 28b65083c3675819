"""From GGUF's names and metadata to those of Hugging Face.

Names: llama.cpp, `gguf-py/gguf/tensor_mapping.py`. Models that llama.cpp rotates in pairs of neighbours have the rows of q and k permuted
by its converter (`LlamaModel.permute`); undoing that gives Hugging Face's order.
"""

from __future__ import annotations

import re

import numpy as np

from qfunc.layers.rope import yarn_mscale

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q_a": "self_attn.q_a_proj", "attn_q_b": "self_attn.q_b_proj", "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_b": "self_attn.kv_b_proj", "attn_k_b": "self_attn.k_b_proj", "attn_v_b": "self_attn.v_b_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm", "attn_kv_a_norm": "self_attn.kv_a_layernorm", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj", "ffn_up_exps": "mlp.experts.up_proj", "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_up_exps": "mlp.experts.gate_up_proj", "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj", "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate", "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# What single architectures call differently.
OTHER = {
    "llama+experts": {"ffn_gate_inp": "block_sparse_moe.gate", "ffn_gate_exps": "block_sparse_moe.experts.w1",
                      "ffn_up_exps": "block_sparse_moe.experts.w3", "ffn_down_exps": "block_sparse_moe.experts.w2"},
    "gemma2": {"ffn_norm": "pre_feedforward_layernorm"}, "gemma3": {"ffn_norm": "pre_feedforward_layernorm"},
    "glm4": {"ffn_up": "mlp.gate_up_proj", "post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm"},
    "phi3": {"ffn_up": "mlp.gate_up_proj"}, "gpt-oss": {"ffn_gate_inp": "mlp.router"},
    "deepseek2": {"ffn_gate_shexp": "mlp.shared_experts.gate_proj", "ffn_up_shexp": "mlp.shared_experts.up_proj",
                  "ffn_down_shexp": "mlp.shared_experts.down_proj"},
}
LEAVES = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias", "attn_sinks.weight": "self_attn.sinks"}
"""Whole names below a layer that become a leaf, not a module."""

PERMUTED = frozenset({
    "llama", "llama-embed", "deci", "baichuan", "internlm2", "minicpm", "xverse", "olmo", "granite", "granitemoe", "granitehybrid",
    "bailingmoe", "smollm3", "arcee", "mistral3", "deepseek", "arctic", "nanbeige", "llada"})
"""Architectures whose converter permutes the rows of q and k."""
PLAIN = frozenset({
    "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "phi3", "gpt-oss", "deepseek2", "falcon", "stablelm",
    "starcoder2", "olmo2", "olmoe", "cohere2", "command-r", "glm4", "glm4moe", "qwen2vl", "qwen3vl", "qwen3vlmoe", "qwen3next", "qwen35",
    "qwen35moe", "apertus", "llama4", "seed_oss"})
"""Architectures whose converter leaves them as they are."""
SHIFTED_NORMS = frozenset({"gemma", "gemma2", "gemma3", "qwen3next", "qwen35", "qwen35moe"})
"""Architectures whose norms llama.cpp stores as 1 + weight."""

MODEL_TYPES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss", "deepseek2": "deepseek_v3", "gemma3": "gemma3_text",
               "granitemoe": "granitemoe", "glm4moe": "glm4_moe", "qwen2vl": "qwen2_vl"}


def hugging_face(name: str, architecture: str, experts: bool) -> str | None:
    """The Hugging Face name of a tensor (with its `.weight` or `.bias`), None where there is none."""
    stem, _, param = name.rpartition(".")
    match = _BLOCK.fullmatch(stem)
    if match is None:
        return f"{TOP[stem]}.{param}" if stem in TOP else None
    number, inner = match.groups()
    if f"{inner}.{param}" in LEAVES:
        return f"model.layers.{number}.{LEAVES[f'{inner}.{param}']}"
    key = f"{architecture}+experts" if experts else architecture
    module = OTHER.get(key, OTHER.get(architecture, {})).get(inner, LAYER.get(inner))
    return None if module is None else f"model.layers.{number}.{module}.{param}"


def permuted_heads(name: str, architecture: str, metadata: dict) -> int | None:
    """The number of heads over which the rows of a q or k tensor are permuted, None where they are not; 0 where it is not told.

    Models whose layers differ have a list of numbers, one a layer.
    """
    match = re.fullmatch(r"blk\.(\d+)\.attn_([qk])\.(?:weight|bias)", name)
    if match is None or architecture not in PERMUTED:
        return None
    heads = metadata.get(f"{architecture}.attention.head_count")
    if match[2] == "k":
        heads = metadata.get(f"{architecture}.attention.head_count_kv", heads)
    if isinstance(heads, np.ndarray):
        layer = int(match[1])
        heads = heads[layer].item() if layer < heads.size else 0
    return heads if isinstance(heads, int) and not isinstance(heads, bool) else 0


def is_shifted(name: str, architecture: str) -> bool:
    """Whether a tensor is the weight of a norm that the file keeps as 1 + weight (Mamba's own norms it keeps as they are)."""
    return architecture in SHIFTED_NORMS and name.endswith("norm.weight") and not name.endswith("ssm_norm.weight")


def number(metadata: dict, key: str, default=None):
    """A number of the metadata; `default` where there is none, or one per layer, or something else."""
    value = metadata.get(key, default)
    return value if isinstance(value, int | float) else default


def to_hugging_face(rows, heads: int):
    """Rows in llama.cpp's order to Hugging Face's: (heads, dim / 2, 2) to (heads, 2, dim / 2)."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def to_gguf(rows, heads: int):
    """The inverse of `to_hugging_face`."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


_FIELDS = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "rope.freq_base": "rope_theta", "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.key_length": "head_dim", "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size", "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "vocab_size": "vocab_size", "attention.sliding_window": "sliding_window", "expert_weights_scale": "routed_scaling_factor",
    "leading_dense_block_count": "first_k_dense_replace", "attention.q_lora_rank": "q_lora_rank", "attention.kv_lora_rank": "kv_lora_rank",
    "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base_swa": "rope_local_base_freq",
}
_SCALING = {"factor": "factor", "original_context_length": "original_max_position_embeddings", "yarn_beta_fast": "beta_fast",
            "yarn_beta_slow": "beta_slow", "yarn_attn_factor": "attention_factor"}
"""`<architecture>.rope.scaling.` to the fields of transformers' `rope_scaling`; others keep their names, which `Rope` refuses."""
ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies, in which llama.cpp's converter writes the scaling of Llama 3.1 and later."""
_WIDE = {"gemma2": 46, "gemma3": 62}
"""Layers of the models of 27B, whose scores are scaled by hidden size / heads: llama.cpp tells them, too, by their layers alone."""
_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Ids that end a text: of a document, of a turn, of a message."""


def config(metadata: dict, architecture: str, tensors: dict) -> dict:
    """A Hugging Face style configuration; everything of the file, tokenizer included, stays under `gguf`."""
    out: dict = {"model_type": MODEL_TYPES.get(architecture, architecture)}
    for key, name in _FIELDS.items():
        value = metadata.get(f"{architecture}.{key}")
        if value is not None:
            out[name] = value.tolist() if isinstance(value, np.ndarray) else value
    if architecture == "llama" and out.get("num_experts"):
        out["model_type"], out["num_local_experts"] = "mixtral", out.pop("num_experts")
    if architecture in ("qwen3moe", "qwen2moe"):
        out["norm_topk_prob"] = bool(number(metadata, f"{architecture}.expert_weights_norm", architecture == "qwen3moe"))
    for key, name in _IDS.items():
        if f"tokenizer.ggml.{key}" in metadata:
            out[name] = metadata[f"tokenizer.ggml.{key}"]
    ends = [end for key in _ENDS if isinstance(end := metadata.get(f"tokenizer.ggml.{key}"), int)]
    if len(set(ends)) > 1:
        out["eos_token_id"] = list(dict.fromkeys(ends))
    embedding = tensors.get("token_embd.weight")
    if embedding is not None:
        out["vocab_size"] = embedding.shape[0]
    if "head_dim" not in out:
        width, heads = (number(metadata, f"{architecture}.{key}", 0) for key in ("embedding_length", "attention.head_count"))
        turned = number(metadata, "llama.rope.dimension_count") if architecture == "llama" else None
        found = turned or (width // heads if heads else None)
        out |= {"head_dim": found} if found else {}
    # llama.cpp's default; transformers has others for some families.
    out.setdefault("rope_theta", 10000.0)
    out["tie_word_embeddings"] = "output.weight" not in tensors
    out["attention_bias"] = any(name.endswith("attn_q.bias") for name in tensors)
    if architecture in _WIDE and isinstance(out.get("head_dim"), int):
        wide = out.get("num_hidden_layers") == _WIDE[architecture] and out.get("num_attention_heads")
        out["query_pre_attn_scalar"] = out["hidden_size"] // out["num_attention_heads"] if wide else out["head_dim"]
    scaling = _rope_scaling(metadata, architecture, tensors)
    out |= {"rope_scaling": scaling} if scaling else {}
    out["gguf"] = metadata
    return out


def _rope_scaling(metadata: dict, architecture: str, tensors: dict) -> dict:
    """The entry `rope_scaling` as transformers would have it, empty where frequencies are not scaled."""
    prefix = f"{architecture}.rope.scaling."
    found = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    legacy = metadata.get(f"{architecture}.rope.scale_linear")
    if legacy is not None:
        found.setdefault("factor", legacy)
    # A factor without a type is a linear one, in llama.cpp too.
    kind = found.pop("type", "linear" if found.get("factor", 1) != 1 else "none")
    out = {}
    if kind != "none":
        out = {"rope_type": kind, **{_SCALING.get(key, key): value for key, value in found.items()}}
        if number(out, "yarn_ext_factor", 0) in (-1, 1):
            del out["yarn_ext_factor"]                         # how far YaRN's ramp counts: fully
        share = out.pop("attn_factor", 1)
        if share != 1 and kind == "yarn" and "attention_factor" not in out:
            # llama.cpp multiplies its own factor by this one; transformers' stands in its place.
            out["attention_factor"] = share * yarn_mscale(number(out, "factor", 1))
        elif share != 1:
            out["attn_factor"] = share
    if ROPE_FACTORS in tensors:
        out = {"rope_type": "factors", **out, "factors": tuple(tensors[ROPE_FACTORS].raw().view(np.float32).tolist())}
    return out

"""Every family of models lowers for CUDA on a machine without a GPU, and each of its matmuls becomes the custom call that it should.

The whole table, every family in every scheme, is `gpu_offline`; the usual run takes a sample of it. Nothing is compiled here.
"""

import dataclasses
import functools
import warnings
from collections import Counter

import jax
import jax.numpy as jnp
import lowered
import numpy as np
import pytest

import qfunc
from qfunc.layers.cache import init_cache
from qfunc.layers.decoder import apply
from qfunc.layers.encoder import EncoderConfig, encode
from qfunc.layers.families import FAMILIES, adapt, model_config

# Sizes that groups of 256 divide, in every projection.
SMALL = {"vocab_size": 96, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MOE = {**SMALL, "moe_intermediate_size": 256, "num_experts": 4, "num_experts_per_tok": 2}
LATENT = {**SMALL, "num_hidden_layers": 2, "num_key_value_heads": 4, "kv_lora_rank": 256, "q_lora_rank": 256, "qk_nope_head_dim": 48,
          "qk_rope_head_dim": 16, "v_head_dim": 64, "moe_intermediate_size": 256, "n_routed_experts": 4, "num_experts_per_tok": 2,
          "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5, "n_shared_experts": 1}
del LATENT["head_dim"]
MODELS = {
    "llama": ("Llama", SMALL), "mistral": ("Mistral", {**SMALL, "sliding_window": 5}), "qwen2": ("Qwen2", SMALL), "qwen3": ("Qwen3", SMALL),
    "qwen3_moe": ("Qwen3Moe", {**MOE, "norm_topk_prob": True}),
    "qwen2_moe": ("Qwen2Moe", {**MOE, "shared_expert_intermediate_size": 256}),
    "mixtral": ("Mixtral", {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "gemma": ("Gemma", SMALL), "gemma2": ("Gemma2", {**SMALL, "sliding_window": 4, "query_pre_attn_scalar": 24}),
    "gemma3_text": ("Gemma3", {**SMALL, "sliding_window": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 20}),
    "gpt_oss": ("GptOss", {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
    "deepseek_v2": ("DeepseekV2", {**LATENT, "topk_method": "group_limited_greedy", "norm_topk_prob": False}),
    "deepseek_v3": ("DeepseekV3", {**LATENT, "norm_topk_prob": True}),
}
NAMES = (*MODELS, "bert")
SCHEMES = tuple(qfunc.schemes)
USUAL = ("w4a16_g128", "w8a8_dynamic", "fp8_dynamic", "mxfp4", "nvfp4")
SAMPLE = {(family, scheme) for family in ("qwen3", "qwen3_moe") for scheme in USUAL} | {(family, "w4a8_dynamic") for family in NAMES}
SAMPLE |= {("llama", "w8a8_static"), ("gpt_oss", "mxfp4_a16"), ("deepseek_v3", "fp8_block"), ("llama", "w4a16_g128_actorder"),
           ("mixtral", "nf4_dq"), ("qwen2", "llm_int8")}
UNUSED = {"bert": 1}
"""Packed matrices that the forward pass does not read: BERT's pooler is no part of the embedding."""
IDS = jax.ShapeDtypeStruct((2, 3), jnp.int32)


def as_shapes(tree):
    def one(leaf):
        leaf = jnp.asarray(leaf)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16 if leaf.dtype == jnp.float32 else leaf.dtype)
    return jax.tree.map(one, tree)


@functools.cache
def build(family: str):
    """(forward, shapes of its parameters) of a tiny model, named as the checkpoint that transformers writes names them."""
    transformers = pytest.importorskip("transformers")
    import tempfile
    if family == "bert":
        fields = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}
        model, kind = transformers.BertModel(transformers.BertConfig(**fields)), "bert"
    else:
        name, fields = MODELS[family]
        config = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
        model, kind = getattr(transformers, f"{name}ForCausalLM")(config(**fields)), family
    with tempfile.TemporaryDirectory() as folder:
        model.float().save_pretrained(folder)
        checkpoint = qfunc.load(folder)
        if kind == "bert":
            config = EncoderConfig.from_json(checkpoint.config)
            params = as_shapes(jax.tree.map(np.asarray, checkpoint.params))
            return (lambda params, ids: encode(params, ids, jnp.ones_like(ids), config)), params
        config = model_config(checkpoint.config, dtype="bfloat16")
        params = as_shapes(jax.tree.map(np.asarray, adapt(checkpoint.params, config)))
    return (lambda params, ids: apply(params, ids, None, config)[0]), params


def packed(params, scheme: str):
    """The parameters quantized, as shapes; calibrated leaves are put in where a scheme would ask for them."""
    full = qfunc.scheme(scheme)
    plain = full.replace(activation=None, weight_actorder=False)

    def complete(q):
        if not isinstance(q, qfunc.QTensor):
            return q
        *batch, columns, _ = q.matrix_shape
        extra, act = {}, full.activation
        if act is not None and act.mode == "static":
            extra["input_scale"] = jax.ShapeDtypeStruct((*batch, 1, 1), jnp.float32)
            if act.zero is not None:
                extra["input_zero"] = jax.ShapeDtypeStruct((*batch, 1, 1), jnp.int32)
        if full.weight.actorder:
            extra["perm"] = jax.ShapeDtypeStruct((*batch, columns), jnp.int32)
        return dataclasses.replace(q, scheme=full, **extra)

    quantized = jax.eval_shape(lambda p: qfunc.quantize(p, plain), params)
    return jax.tree.map(complete, quantized, is_leaf=lambda leaf: isinstance(leaf, qfunc.QTensor))


@pytest.fixture
def hopper(monkeypatch):
    with lowered.without_compiling(monkeypatch), warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


CASES = [pytest.param(family, scheme, id=f"{family}-{scheme}", marks=() if (family, scheme) in SAMPLE else pytest.mark.gpu_offline)
         for family in NAMES for scheme in SCHEMES]


@pytest.mark.parametrize(("family", "scheme"), CASES)
def test_every_matmul_becomes_a_kernel(family, scheme, hopper):
    forward, params = build(family)
    params = packed(params, scheme)
    matrices = [leaf for leaf in jax.tree.leaves(params, is_leaf=lambda q: isinstance(q, qfunc.QTensor)) if isinstance(leaf, qfunc.QTensor)]
    told = qfunc.explain(forward, params, IDS, platform="cuda")
    operations: Counter = Counter()
    for choice in told:
        operations[choice.primitive, choice.implementation] += choice.count
    rows = qfunc.scheme(scheme).activation
    known = rows is None or rows.scale_rule != "mx_dual"                    # that rule's codes are made by XLA
    assert all(name == "triton" or (primitive == "quantize_activation" and not known) for primitive, name in operations), told
    products = operations["quantized_matmul", "triton"] + operations["quantized_grouped_matmul", "triton"]
    assert products == len(matrices) - UNUSED.get(family, 0)

    found = lowered.reached(lowered.lower(forward, params, IDS))
    assert lowered.operations(found) == operations
    kernels, spec = lowered.kernels(found), qfunc.scheme(scheme).activation
    halves = 2 if spec is not None and spec.outlier_threshold is not None else 1
    assert kernels["dense"] == halves * operations["quantized_matmul", "triton"]
    assert kernels["grouped"] == halves * operations["quantized_grouped_matmul", "triton"]
    assert (kernels["quantize_rows"] > 0) == (spec is not None and known)
    assert set(kernels) <= {"dense", "grouped", "quantize_rows", "take"}


def test_every_family_is_here():
    assert set(FAMILIES) - {"gemma3", "llama4"} <= set(MODELS), set(FAMILIES) - set(MODELS)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_step_with_a_cache_exports(family, hopper):
    transformers = pytest.importorskip("transformers")
    forward, params = build(family)
    params = packed(params, "w4a16_g128")
    config = model_config({"model_type": family, **MODELS[family][1], "rope_theta": 1e4}, dtype="bfloat16")
    cache = jax.eval_shape(lambda: init_cache(config, 2, 16))
    step = jax.jit(lambda params, ids, cache: apply(params, ids, cache, config, last=True))
    made = jax.export.export(step, platforms=("cuda",), disabled_checks=qfunc.kernels.export_checks())(params, IDS, cache)
    text = made.mlir_module()
    assert "qfunc_dense" in text and ("qfunc_grouped" in text) == (family == "qwen3_moe")
    assert transformers and jax.export.deserialize(made.serialize()).platforms == ("cuda",)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w4a16_g128", "w8a8_dynamic", "fp8_block", "mxfp4"])
@pytest.mark.parametrize("family", NAMES)
def test_every_family_exports(family, scheme, hopper):
    """What is exported holds one kernel for each packed matrix, those of its activations, and no operation that fell to XLA."""
    forward, params = build(family)
    params = packed(params, scheme)
    matrices = [leaf for leaf in jax.tree.leaves(params, is_leaf=lambda q: isinstance(q, qfunc.QTensor)) if isinstance(leaf, qfunc.QTensor)]
    experts = sum(len(q.matrix_shape) == 3 for q in matrices)
    made = jax.export.export(jax.jit(forward), platforms=("cuda",), disabled_checks=qfunc.kernels.export_checks())(params, IDS)
    assert jax.export.deserialize(made.serialize()).platforms == ("cuda",)
    found = lowered.reached(made.mlir_module())
    operations, kernels = lowered.operations(found), lowered.kernels(found)
    assert all(name == "triton" for _, name in operations), operations
    assert operations["quantized_grouped_matmul", "triton"] == kernels["grouped"] == experts
    assert operations["quantized_matmul", "triton"] == kernels["dense"] == len(matrices) - experts - UNUSED.get(family, 0)
    assert (kernels["quantize_rows"] > 0) == (qfunc.scheme(scheme).activation is not None)

"""Each family against transformers on torch: a tiny random model, float32, as a whole and token by token through the cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qfunc
from qfunc.layers.cache import init_cache
from qfunc.layers.decoder import apply
from qfunc.layers.families import FAMILIES, adapt, model_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
DEEPSEEK = {**SMALL, "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
            "moe_intermediate_size": 12, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
            "first_k_dense_replace": 1, "routed_scaling_factor": 1.7, "n_shared_experts": 2}
MSCALE = {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9}

CASES = {
    "llama": ("Llama", SMALL),
    "llama-tied-bias-llama3": ("Llama", {**SMALL, "tie_word_embeddings": True, "attention_bias": True, "rope_parameters": LLAMA3}),
    "llama-linear": ("Llama", {**SMALL, "head_dim": 12, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1000.0}}),
    "llama-yarn": ("Llama", {**SMALL, "rope_parameters": YARN}),
    "mistral": ("Mistral", {**SMALL, "sliding_window": 5}),
    "qwen2": ("Qwen2", {**SMALL, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4}),
    "qwen3": ("Qwen3", {**SMALL, "head_dim": 16}),
    "qwen3_moe": ("Qwen3Moe", {**SMALL, "head_dim": 16, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2,
                               "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "qwen2_moe": ("Qwen2Moe", {**SMALL, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20, "num_experts": 6,
                               "num_experts_per_tok": 3}),
    "mixtral": ("Mixtral", {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "gemma": ("Gemma", {**SMALL, "head_dim": 16}),
    "gemma2": ("Gemma2", {**SMALL, "head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 24}),
    "gemma3_text": ("Gemma3", {**SMALL, "head_dim": 16, "num_hidden_layers": 3, "sliding_window": 4, "sliding_window_pattern": 3,
                               "query_pre_attn_scalar": 20}),
    "gpt_oss": ("GptOss", {**SMALL, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4,
                           "rope_parameters": {**YARN, "truncate": False}}),
    "deepseek_v2": ("DeepseekV2", {**DEEPSEEK, "q_lora_rank": None, "topk_method": "group_limited_greedy", "norm_topk_prob": False}),
    "deepseek_v2-yarn": ("DeepseekV2", {**DEEPSEEK, "q_lora_rank": 20, "topk_method": "greedy", "rope_parameters": MSCALE}),
    "deepseek_v3": ("DeepseekV3", {**DEEPSEEK, "q_lora_rank": 20, "norm_topk_prob": True, "rope_parameters": MSCALE}),
}


def build(case: str, folder):
    """(their model, our params, our config) of a random model, by way of the checkpoint that transformers writes."""
    name, fields = CASES[case]
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")(kind(**fields, attn_implementation="eager")).eval().float()
    with torch.no_grad():
        for key, value in [*model.named_parameters(), *((k, b) for k, b in model.named_buffers() if "correction" in k)]:
            value.copy_(torch.randn_like(value) * (0.3 if "norm" in key or "correction" in key else 0.15) + (1.0 if "norm" in key else 0))
    model.save_pretrained(folder)
    checkpoint = qfunc.load(folder)
    config = model_config(checkpoint.config)
    return model, adapt(checkpoint.params, config), config


run = jax.jit(apply, static_argnums=3, donate_argnums=2)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(ids, logits of transformers, our params, our config) of a case, made once for all tests of it."""
    @functools.cache
    def make(case: str):
        model, params, config = build(case, tmp_path_factory.mktemp(case))
        ids = np.random.default_rng(0).integers(3, SMALL["vocab_size"], (2, 12))
        with torch.no_grad():
            return ids, model(torch.tensor(ids)).logits.numpy(), params, config
    return make


@pytest.mark.parametrize("case", CASES)
def test_whole_texts_equal_transformers(case, built):
    ids, want, params, config = built(case)
    got, none = run(params, ids, None, config)
    assert none is None
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_steps_equal_transformers(case, built):
    ids, want, params, config = built(case)
    first, cache = run(params, ids[:, :7], init_cache(config, 2, 16), config)
    steps = [first]
    for i in range(7, 12):
        logits, cache = run(params, ids[:, i:i + 1], cache, config)
        steps.append(logits)
    np.testing.assert_allclose(np.concatenate(steps, 1), want, atol=1e-4)
    assert int(cache["length"]) == 12


@pytest.mark.slow
def test_latent_rows_in_a_quantized_cache(tmp_path):
    _, params, config = build("deepseek_v2", tmp_path)
    ids = np.random.default_rng(1).integers(3, 96, (2, 8))
    plain, _ = apply(params, ids, None, config)
    config = config.replace(cache="fp8_e4m3_token")
    whole, _ = run(params, ids, None, config)
    assert 0 < np.linalg.norm(whole - plain) / np.linalg.norm(plain) < 0.06
    first, cache = run(params, ids[:, :7], init_cache(config, 2, 8), config)
    last, cache = run(params, ids[:, 7:], cache, config)
    np.testing.assert_allclose(np.concatenate([first, last], 1), whole, atol=1e-3)
    assert cache["layers"][0]["k"]["codes"].dtype == jnp.float8_e4m3fn and cache["layers"][0]["v"]["codes"].dtype == jnp.float32


def test_experts_in_one_tensor_are_quantized(tmp_path):
    name, fields = CASES["gpt_oss"]
    fields = {**fields, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**fields, attn_implementation="eager")).eval().float()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn_like(value) * 0.2)
    model.save_pretrained(tmp_path)
    packed = qfunc.load_model(tmp_path, dtype="float32", quantize={"*/experts/*kernel": "mxfp4_a16"})
    experts = packed.params["model"]["layers"]["0"]["mlp"]["experts"]
    assert experts["gate_up_proj"]["kernel"].scheme.name == "mxfp4_a16" and experts["down_proj"]["bias"].shape == (4, 64)
    with torch.no_grad():
        for layer, own in zip(model.model.layers, packed.params["model"]["layers"].values(), strict=True):
            for part in ("gate_up_proj", "down_proj"):
                decoded = own["mlp"]["experts"][part]["kernel"].dequantize("float32")
                getattr(layer.mlp.experts, part).copy_(torch.tensor(np.asarray(decoded)))
        ids = np.random.default_rng(0).integers(3, 96, (2, 9))
        np.testing.assert_allclose(packed(ids), model(torch.tensor(ids)).logits.numpy(), atol=1e-4)


def test_every_family_has_a_test():
    assert {case.split("-")[0] for case in CASES} == set(FAMILIES)


def test_configurations_that_are_not_understood_are_refused():
    good = {**SMALL, "model_type": "llama"}
    assert hash(model_config(good)) == hash(model_config(good))
    for change, message in (({"model_type": "bert"}, "model_type"), ({"hidden_act": "silly"}, "silly"),
                            ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
                            ({"num_key_value_heads": 3}, "multiple"),
                            ({"model_type": "mistral", "sliding_window": 4, "layer_types": ["chunked"] * 2}, "chunked")):
        with pytest.raises(ValueError, match=message):
            model_config({**good, **change})
    with pytest.raises(ValueError, match="vocab_size"):
        model_config({key: value for key, value in good.items() if key != "vocab_size"})
    config = model_config(good)
    with pytest.raises(ValueError, match="lm_head"):
        adapt({"model": {"embed_tokens": {}, "layers": {"0": {}, "1": {}}, "norm": {}}}, config)
    with pytest.raises(ValueError, match="model/layers/1"):
        adapt({"model": {"embed_tokens": {}, "layers": {"0": {}}, "norm": {}}}, config)
    with pytest.raises(ValueError, match="batch, tokens"):
        apply({}, jnp.zeros(3, jnp.int32), None, config)


@pytest.mark.parametrize("axis", ["tp", "ep"])
@pytest.mark.parametrize("case", ["deepseek_v3", "gpt_oss", "qwen2_moe", "gemma2"])
def test_families_over_two_devices(case, axis, tmp_path):
    from qfunc.layers.parallel import parallel_apply, place
    _, params, config = build(case, tmp_path)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), (axis,))
    if config.routing is None and axis == "ep":
        with pytest.raises(ValueError, match="models with experts"):
            place(params, config, mesh)
        return
    ids = np.random.default_rng(2).integers(3, 96, (2, 9))
    want, _ = apply(params, ids, None, config)
    placed = place(params, config, mesh)
    run = jax.jit(parallel_apply(mesh, placed, config), static_argnums=3)
    np.testing.assert_allclose(run(placed, ids, None, config)[0], want, atol=1e-4)
    first, cache = run(placed, ids[:, :5], init_cache(config, 2, 9), config)
    last, _ = run(placed, ids[:, 5:], cache, config)
    np.testing.assert_allclose(np.concatenate([first, last], 1), want, atol=1e-4)

"""Configurations of models: types, defaults, and what is refused. What transformers computes of them is in `test_families.py`."""

import numpy as np
import pytest

from qfunc.layers._typed import DEFAULTS
from qfunc.layers.families import FAMILIES, model_config
from qfunc.layers.rope import Rope

SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "num_local_experts": 4}
LATENT = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
          "qk_rope_head_dim": 4, "v_head_dim": 6, "q_lora_rank": 12}


def config(family: str, **fields):
    return model_config({"model_type": family, **SMALL, **EXPERTS, **(LATENT if family.startswith("deepseek") else {}), **fields})


@pytest.mark.parametrize(("field", "value", "expected"), [
    ("hidden_size", "64", "an integer of at least 1"), ("num_attention_heads", 0, "an integer of at least 1"),
    ("num_attention_heads", True, "an integer of at least 1"), ("num_hidden_layers", -1, "an integer of at least 1"),
    ("num_key_value_heads", [2, 2], "an integer of at least 1"), ("sliding_window", "8", "an integer of at least 0"),
    ("rms_norm_eps", "1e-5", "a positive number"), ("rope_theta", 0, "a positive number"),
    ("tie_word_embeddings", "false", "true or false"), ("rope_parameters", "yarn", "an object"),
    ("eos_token_id", "</s>", "an integer or a list"), ("eos_token_id", [[2]], "an integer or a"),
    ("layer_types", "full_attention", "a list of names"), ("hidden_act", ["silu"], "a name"),
])
def test_fields_of_another_type_are_refused(field, value, expected):
    with pytest.raises(ValueError, match=f"^{field}: expected {expected}"):
        config("mistral", **{field: value})


def test_a_null_is_an_absent_field():
    with pytest.raises(ValueError, match="lacks 'num_attention_heads'"):
        config("llama", num_attention_heads=None)
    assert config("llama", num_key_value_heads=None, head_dim=None, rope_scaling=None, eos_token_id=None).num_key_value_heads == 4
    assert config("mistral", sliding_window=None).windows == (None,) * 4
    assert config("gemma2", attn_logit_softcapping=None).softcap is None


@pytest.mark.parametrize(("entry", "message"), [
    ({"rope_type": "linear", "rope_theta": 1e4}, "'linear': expected factor beside it, found rope_theta"),
    ({"rope_type": "llama3", "factor": 8.0}, "expected low_freq_factor, high_freq_factor, original_max_position_embeddings beside it"),
    ({"type": "yarn"}, "'yarn': expected factor"),
    ({"rope_type": "linear", "factor": "4"}, "factor: expected a positive number, found '4'"),
    ({"rope_type": "linear", "factor": 0}, "factor: expected a positive number, found 0"),
    ({"rope_type": "yarn", "factor": 4.0, "beta_fast": "32"}, "beta_fast: expected a number, found '32'"),
    ({"rope_type": ["yarn"], "factor": 4.0}, "expected an object whose rope_type is a name"),
    ({"rope_type": "yarn", "factor": 4.0, "truncate": 1}, "truncate: expected true or false"),
    ({"rope_type": "linear", "factor": 4.0, "llama_4_scaling_beta": 0.1}, "found 'llama_4_scaling_beta'"),
    ({"rope_type": "linear", "factor": 4.0, "factors": [1.0]}, "expected no factors"),
])
def test_rotary_entries_without_their_numbers_are_refused(entry, message):
    for field in ("rope_parameters", "rope_scaling"):
        with pytest.raises(ValueError, match=message):
            config("llama", **{field: entry})


@pytest.mark.parametrize("name", ["full_attention", "sliding_attention"])
def test_an_entry_by_kind_of_layer_is_an_object(name):
    with pytest.raises(ValueError, match="rope_parameters: expected an object .* found 'yarn'"):
        config("gemma3_text", rope_parameters={"full_attention": {}, "sliding_attention": {}, name: "yarn"})


def test_a_rotary_entry_keeps_what_changes_nothing():
    entry = {"rope_type": "linear", "factor": 4.0, "finetuned": True, "mrope_section": [1, 1, 2], "attention_factor": None}
    assert config("llama", rope_scaling=entry).rope == Rope("linear", factor=4.0, original_max_position_embeddings=64)
    factors = [1.0, 2.0, 3.0, 4.0]
    rope = config("llama", rope_scaling={"rope_type": "factors", "factors": factors}).rope
    np.testing.assert_allclose(rope.frequencies(8) * factors, Rope().frequencies(8), rtol=1e-6)


def test_tokens_that_see_later_ones_are_refused():
    for family in ("gemma", "gemma2", "gemma3_text"):
        assert config(family, use_bidirectional_attention=False)
        with pytest.raises(ValueError, match="use_bidirectional_attention: expected false"):
            config(family, use_bidirectional_attention=True)


def test_gemmas_first_configurations_mean_the_approximation():
    assert config("gemma", hidden_act="gelu", hidden_activation=None).hidden_act == "gelu_pytorch_tanh"
    assert config("llama", hidden_act="gelu").hidden_act == "gelu"


@pytest.mark.parametrize(("family", "fields", "windows"), [
    ("qwen3_moe", {}, (7, 7, 7, 7)), ("qwen3_moe", {"layer_types": ["full_attention"] * 4}, (7, 7, 7, 7)),
    ("qwen3_moe", {"use_sliding_window": False}, (None,) * 4),
    ("qwen2_moe", {"max_window_layers": 3}, (7, None, 7, None)), ("qwen2_moe", {"max_window_layers": 1}, (7, None, None, None)),
    ("qwen2_moe", {"layer_types": ["full_attention", "sliding_attention"] * 2}, (None, 7, None, 7)),
    ("qwen2_moe", {"use_sliding_window": False, "sliding_window": 0}, (None,) * 4),
    ("qwen2", {"max_window_layers": 3}, (None, None, None, 7)),
])
def test_which_layers_of_qwen_have_a_window(family, fields, windows):
    assert config(family, **{"use_sliding_window": True, "sliding_window": 7, **fields}).windows == windows


def test_a_window_of_nothing_is_refused():
    with pytest.raises(ValueError, match="sliding_window: expected a window of at least 1, or null, found 0"):
        config("mistral", sliding_window=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_fields_mean_what_they_mean_to_transformers(family):
    transformers = pytest.importorskip("transformers")
    kind = transformers.models.auto.configuration_auto.CONFIG_MAPPING[family]
    sized = {**SMALL, **(EXPERTS if "moe" in family or family in ("mixtral", "gpt_oss") else {}),
             **({**LATENT, "n_routed_experts": 32} if family.startswith("deepseek") else {})}
    given = {name: value for name, value in sized.items() if name not in ("head_dim", "max_position_embeddings", "n_group", "topk_group")}
    whole = kind(**given).to_dict()
    ours = model_config({"model_type": family, **given})
    theirs = model_config({**whole, "model_type": family})
    assert ours == theirs.replace(eos=()) and DEFAULTS[family]["max_position_embeddings"] == whole["max_position_embeddings"]

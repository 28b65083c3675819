"""What a GGUF file says of its model, as the configuration that transformers would have."""

import gguf as package
import numpy as np
import pytest

import qfunc
from qfunc import CheckpointError
from qfunc.layers.families import model_config
from qfunc.layers.rope import Rope, yarn_mscale

SIZES = {"block_count": 2, "context_length": 4096, "embedding_length": 32, "feed_forward_length": 48, "attention.head_count": 4,
         "attention.head_count_kv": 2, "attention.key_length": 16}


def write(path, architecture, tensors=None, **fields):
    """A GGUF file of these fields (in the architecture's own section, `__` for dots) and tensors, besides an embedding table."""
    writer = package.GGUFWriter(path, architecture)
    for key, value in {**SIZES, **{key.replace("__", "."): value for key, value in fields.items()}}.items():
        key = key if key.startswith("tokenizer.") else f"{architecture}.{key}"
        add = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool, int: writer.add_uint32}[type(value)]
        add(key, value)
    for name, array in {"token_embd.weight": np.zeros((64, 32), np.float32), **(tensors or {})}.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def config(*args, **fields):
    return model_config(qfunc.load(write(*args, **fields)).config)


def test_divisors_of_the_frequencies_are_read(tmp_path, rng):
    """Llama 3.1's scaling as llama.cpp's converter writes it: a tensor."""
    llama3 = Rope("llama3", 500.0, 8.0, original_max_position_embeddings=int(rng.integers(16, 64)), high_freq_factor=4.0)
    plain = 500.0 ** -(np.arange(0, 16, 2) / 16)
    factors = (plain / llama3.frequencies(16)).astype(np.float32)
    assert factors.max() > 1
    found = config(tmp_path / "a.gguf", "llama", {"rope_freqs.weight": factors}, rope__freq_base=500.0)
    assert found.rope.kind == "factors" and hash(found) == hash(found)
    np.testing.assert_allclose(found.rope.frequencies(16), llama3.frequencies(16), rtol=1e-6)
    loaded = qfunc.load(tmp_path / "a.gguf")
    assert not loaded.notes and "rope_freqs" not in loaded.params


@pytest.mark.parametrize(("factors", "fields", "message"), [
    (np.ones(4, np.float32), {}, "expected 8, half of the rotated dimensions, found 4"),
    (np.zeros(8, np.float32), {}, "factors: expected a list of positive numbers"),
    (np.ones(8, np.float16), {}, "rope_freqs.weight.*one row of f32"),
    (np.ones(8, np.float32), {"rope__scaling__type": "linear", "rope__scaling__factor": 2.0}, "rope_type 'linear': expected no factors"),
])
def test_divisors_that_make_no_sense_are_refused(tmp_path, factors, fields, message):
    with pytest.raises((ValueError, CheckpointError), match=message):
        config(tmp_path / "a.gguf", "llama", {"rope_freqs.weight": factors}, **fields)


def test_yarn_has_its_own_length_and_betas(tmp_path, rng):
    length = int(rng.integers(64, 1024))
    fields = {"type": "yarn", "factor": 4.0, "original_context_length": length, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0,
              "finetuned": True, "yarn_ext_factor": 1.0}
    fields = {f"rope__scaling__{key}": value for key, value in fields.items()}
    want = Rope("yarn", 10000.0, 4.0, original_max_position_embeddings=length, beta_fast=16.0, beta_slow=2.0)
    assert config(tmp_path / "a.gguf", "qwen3", **fields).rope == want
    # llama.cpp multiplies YaRN's own magnitude by attn_factor; yarn_attn_factor is transformers' attention_factor.
    for name, magnitude in (("attn_factor", 1.5 * yarn_mscale(4.0)), ("yarn_attn_factor", 1.5)):
        found = config(tmp_path / "b.gguf", "qwen3", **fields, **{f"rope__scaling__{name}": 1.5})
        assert found.rope.magnitude == pytest.approx(magnitude)


@pytest.mark.parametrize(("fields", "want"), [
    ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, Rope(original_max_position_embeddings=4096)),
    ({"rope__scaling__factor": 4.0}, Rope("linear", factor=4.0, original_max_position_embeddings=4096)),
    ({"rope__scale_linear": 4.0}, Rope("linear", factor=4.0, original_max_position_embeddings=4096)),
])
def test_a_factor_without_a_type_is_linear(tmp_path, fields, want):
    assert config(tmp_path / "a.gguf", "qwen3", **fields).rope == want


@pytest.mark.parametrize("name", ["alpha", "yarn_log_multiplier", "yarn_ext_factor", "novel"])
def test_other_fields_of_a_scaling_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"rope_parameters: .* found '{name}'"):
        config(tmp_path / "a.gguf", "qwen3", rope__scaling__type="yarn", rope__scaling__factor=4.0, **{f"rope__scaling__{name}": 0.5})


@pytest.mark.parametrize(("architecture", "layers", "width"), [
    ("gemma2", 2, 16), ("gemma2", 46, 8), ("gemma2", 62, 16), ("gemma3", 2, 16), ("gemma3", 62, 8)])
def test_scores_of_gemma_are_scaled_as_llama_cpp_scales_them(tmp_path, architecture, layers, width):
    found = config(tmp_path / "a.gguf", architecture, block_count=layers)
    assert found.attention_scale == pytest.approx(width ** -0.5)


def test_caps_of_gemma_are_read(tmp_path):
    found = config(tmp_path / "a.gguf", "gemma2", attn_logit_softcapping=7.0, final_logit_softcapping=5.0)
    assert (found.softcap, found.final_softcap) == (7.0, 5.0)
    assert config(tmp_path / "b.gguf", "gemma3", rope__freq_base_swa=77.0).local_rope.rope_theta == 77.0


def test_every_id_that_ends_a_text_is_read(tmp_path):
    ids = {f"tokenizer__ggml__{name}_token_id": number for name, number in (("bos", 1), ("eos", 5), ("eot", 7), ("eom", 5))}
    assert config(tmp_path / "a.gguf", "llama", **ids).eos == (5, 7)
    assert config(tmp_path / "b.gguf", "llama", **{key: 5 for key in ids if "bos" not in key}).eos == (5,)

"""What ends a text, what texts become before they are tokens, and the arguments of `generate`."""

import json
import re

import numpy as np
import pytest
from checkpoints import checkpoint, one_layer

import qfunc

CONFIG = {"model_type": "llama", "vocab_size": 48, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
          "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "eos_token_id": 3, "torch_dtype": "float32",
          "tie_word_embeddings": True}


@pytest.fixture
def folder(tmp_path, rng):
    return checkpoint(tmp_path / "m", one_layer(rng), config=CONFIG)


@pytest.mark.parametrize(("found", "ends"), [(7, (3, 7)), ([7, 3, 9], (3, 7, 9)), (None, (3,)), ([], (3,))])
def test_both_files_say_what_ends_a_text(folder, found, ends):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": found, "temperature": 0.7}))
    model = qfunc.load_model(folder)
    assert model.config.eos == ends
    # A file of weights has its configuration beside it.
    assert qfunc.load_model(folder / "model.safetensors").config.eos == ends


def test_generation_ends_at_an_id_of_its_own_file(folder):
    first = int(qfunc.load_model(folder).generate([5], max_new_tokens=1)[0])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [first]}))
    assert len(qfunc.load_model(folder).generate([5], max_new_tokens=8)) == 1


def test_an_end_that_is_no_id_is_refused(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(qfunc.CheckpointError, match="eos_token_id: expected an integer or a list of them, found '</s>'"):
        qfunc.load_model(folder)


def test_texts_are_neither_cut_nor_padded(folder):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(48)}, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.enable_truncation(8)
    made.enable_padding(length=8, pad_id=0, pad_token="w0")
    made.save(str(folder / "tokenizer.json"))
    tokenizer = qfunc.load_model(folder).tokenizer
    assert tokenizer.encode(" ".join(["w5"] * 30)).ids == [5] * 30 and tokenizer.encode("w5 w6").ids == [5, 6]


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ValueError, match="package tokenizers, .* is not installed"):
        qfunc.load_model(folder).generate("text")


@pytest.mark.parametrize(("arguments", "message"), [
    ({"temperature": float("nan")}, "a finite temperature >= 0 .* nan"), ({"temperature": float("inf")}, "a finite temperature"),
    ({"max_new_tokens": 2.5}, "an integer max_new_tokens .* 2.5"), ({"top_p": float("nan")}, "0 < top_p <= 1"),
    ({"seed": [2**33]}, re.escape("seed: expected integers from 0 to 2**32 - 1, found 8589934592")), ({"seed": [-1]}, "found -1"),
    ({"seed": 2**40}, "found 1099511627776"), ({"seed": 1.5}, "found 1.5"), ({"seed": [1, 2]}, "one number or 1 of them"),
    ({"mask": np.ones(2)}, r"mask: expected it beside ids \[batch, tokens\], found ids \(2,\)"),
])
def test_arguments_that_make_no_sense_are_refused(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        qfunc.load_model(folder).generate([5, 6], **{"max_new_tokens": 2, "temperature": 1.0, **arguments})


def test_a_temperature_that_float32_has_not_is_its_limit(folder):
    model = qfunc.load_model(folder)
    assert (model.generate([5, 6], max_new_tokens=6, temperature=1e-45) == model.generate([5, 6], max_new_tokens=6)).all()


def test_seeds_of_any_integer_kind(folder):
    model = qfunc.load_model(folder)
    texts = [model.generate([5, 6], max_new_tokens=5, temperature=1.0, seed=seed) for seed in ([7], np.asarray([7]), (np.uint32(7),))]
    assert all((text == texts[0]).all() for text in texts)
    assert (model.generate([5], max_new_tokens=5, temperature=1.0, seed=np.int64(7))
            == model.generate([5], max_new_tokens=5, temperature=1.0, seed=7)).all()

"""The tokenizer in a GGUF file: every text comes back, and words are split as the file says."""

import pytest

from qfunc.interop._gguf_tokenizer import PATTERNS, gguf_tokenizer

tokenizers = pytest.importorskip("tokenizers")


def metadata(pre: str, **more) -> dict:
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merged = ["12", "123", "1234", "he", "Ġhe"]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": ["<end>", *letters, *merged, "<tool>"],
            "tokenizer.ggml.merges": ["1 2", "12 3", "123 4", "h e", "Ġ he"],
            "tokenizer.ggml.token_type": [3, *[1] * (len(letters) + len(merged)), 4], "tokenizer.ggml.bos_token_id": 0, **more}


@pytest.mark.parametrize("pre", PATTERNS)
def test_texts_come_back(pre):
    made = gguf_tokenizer(metadata(pre))
    for text in ("he said: he's 1234!\n\n  Done ", "zwölf Boxkämpfer 你好 🙂", "\tx\r\n<tool>y"):
        assert made.decode(made.encode(text).ids) == text
    assert made.encode("<end>").ids == [0] and made.decode(made.encode("a<end>").ids) == "a"


def test_numbers_are_split_as_each_model_does():
    pieces = {pre: gguf_tokenizer(metadata(pre)).encode("he 1234").tokens for pre in PATTERNS}
    assert pieces["gpt-2"] == pieces["default"] == ["he", "Ġ", "1234"]
    assert pieces["llama-bpe"] == ["he", "Ġ", "123", "4"]
    assert pieces["qwen2"] == ["he", "Ġ", "1", "2", "3", "4"]


def test_the_first_token_and_other_kinds():
    assert gguf_tokenizer(metadata("qwen2", **{"tokenizer.ggml.add_bos_token": True})).encode(" he").tokens == ["<end>", "Ġhe"]
    assert gguf_tokenizer({**metadata("qwen2"), "tokenizer.ggml.model": "llama"}) is None
    assert gguf_tokenizer(metadata("some-new-one")) is None and gguf_tokenizer({}) is None

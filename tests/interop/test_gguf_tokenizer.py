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
    assert gguf_tokenizer({**metadata("qwen2"), "tokenizer.ggml.model": "llama"}) is None            # without scores
    assert gguf_tokenizer({**metadata("qwen2"), "tokenizer.ggml.model": "t5"}) is None
    assert gguf_tokenizer(metadata("some-new-one")) is None and gguf_tokenizer({}) is None


def pieces(**more) -> dict:
    """A SentencePiece vocabulary: control tokens, all bytes, letters, and words whose scores are not the order of their lengths."""
    letters = list("▁abcdehlort.")
    words = {"he": -1, "el": -2, "▁t": -3, "ll": -4, "lo": -5, "▁the": -6, "hel": -0.5, "th": -7, "hello": -8, "▁he": -9, "▁▁": -10}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *words]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(letters) + len(words))]
    scores = [0.0] * 259 + [-100.0 - i for i in range(len(letters))] + list(map(float, words.values()))
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.bos_token_id": 1, **more}


def merged(text: str, vocabulary: dict) -> list[str]:
    """SentencePiece's rule, written out: join the neighbours whose token has the highest score, the leftmost first."""
    scores = {t: s for t, s, kind in zip(vocabulary["tokenizer.ggml.tokens"], vocabulary["tokenizer.ggml.scores"],
                                         vocabulary["tokenizer.ggml.token_type"], strict=True) if kind == 1}
    parts = list(text.replace(" ", "▁"))
    while True:
        found = [(-scores[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in scores]
        if not found:
            return [p for part in parts for p in ([part] if part in scores else [f"<0x{b:02X}>" for b in part.encode()])]
        _, i = min(found)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


def test_sentence_piece_merges_by_score(rng):
    vocabulary = pieces()
    made = gguf_tokenizer(vocabulary)
    texts = ["the hello", "  hehello. the", "ż hello🙂", *("".join(rng.choice(list("helot ."), 12)) for _ in range(200))]
    for text in texts:
        assert made.encode(text).tokens == ["<s>", *merged(" " + text, vocabulary)]
        assert made.decode(made.encode(text).ids) == text
    assert made.encode("</s>").ids == [1, 2]
    bare = gguf_tokenizer(pieces(**{"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}))
    assert bare.encode("hello").tokens == merged("hello", vocabulary) and bare.decode(bare.encode(" he").ids) == " he"

"""The byte-level BPE tokenizer that a GGUF file carries, as a `tokenizers.Tokenizer`.

Source: llama.cpp, `src/llama-vocab.cpp` (the expressions by `tokenizer.ggml.pre`; token type 3 is a control token, 4 one of the user's).
"""

from __future__ import annotations

from collections.abc import Mapping

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS: dict[str, tuple[str, bool]] = {
    "default": (GPT2, False), "gpt-2": (GPT2, False),
    "qwen2": (_WORDS + r"\p{N}" + _REST, True),
    "llama-bpe": (_WORDS + r"\p{N}{1,3}" + _REST, False),
}
"""`tokenizer.ggml.pre` to the expression whose matches are the words, and whether text is brought to NFC first."""
CONTROL, USER = 3, 4


def gguf_tokenizer(metadata: Mapping):
    """The tokenizer of a file's metadata; None where it is of another kind than byte-level BPE, or splits words in a way not listed."""
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if metadata.get("tokenizer.ggml.model") != "gpt2" or pre not in PATTERNS or "tokenizer.ggml.merges" not in metadata:
        return None
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    except ImportError:
        return None
    tokens = list(metadata["tokenizer.ggml.tokens"])
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    pattern, nfc = PATTERNS[pre]
    if nfc:
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    kinds = list(metadata.get("tokenizer.ggml.token_type", ()))
    made.add_special_tokens([AddedToken(t, normalized=False) for t, kind in zip(tokens, kinds, strict=False) if kind == CONTROL])
    made.add_tokens([AddedToken(t, normalized=False) for t, kind in zip(tokens, kinds, strict=False) if kind == USER])
    first = metadata.get("tokenizer.ggml.bos_token_id")
    if metadata.get("tokenizer.ggml.add_bos_token") and first is not None:
        made.post_processor = processors.TemplateProcessing(single=f"{tokens[first]} $A", special_tokens=[(tokens[first], int(first))])
    return made

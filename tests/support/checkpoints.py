"""Small checkpoints made on the spot, for cases that no recorded one covers."""

from __future__ import annotations

import json
import os
import struct
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).parent.parent / "data" / "checkpoints"
NAMES = {"int8": "I8", "int16": "I16", "uint8": "U8", "int32": "I32", "int64": "I64", "uint32": "U32", "float16": "F16", "float32": "F32",
         "float64": "F64", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0", "bool": "BOOL"}


def header_and_data(tensors: dict, metadata: dict | None = None) -> tuple[dict, bytes]:
    """The header (as a dict, to be damaged) and the data of a safetensors file."""
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, array in tensors.items():
        part = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": NAMES[array.dtype.name], "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    return header, data


def write_file(path: Path, header, data: bytes) -> Path:
    """A safetensors file of a header (a dict, or text) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def checkpoint(folder: Path, tensors: dict, quantization: dict | None = None, config: dict | None = None,
               metadata: dict | None = None) -> Path:
    """A checkpoint folder of these tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {"model_type": "qwen3", "torch_dtype": "bfloat16", **(config or {})}
    if quantization is not None:
        found["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(found))
    write_file(folder / "model.safetensors", *header_and_data(tensors, metadata))
    return folder


def sampled(names, *patterns: str) -> list:
    """Parameters of a test, of which the usual run takes those that a pattern matches; the others are slow."""
    return [name if any(fnmatchcase(name, pattern) for pattern in patterns) else pytest.param(name, marks=pytest.mark.slow)
            for name in names]


def archive() -> Path | None:
    """The folder of whole recorded checkpoints, None where there is none."""
    if os.environ.get("QFUNC_FIXTURES"):
        return Path(os.environ["QFUNC_FIXTURES"])
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qfunc-fixtures"
    return next((p for p in sorted(cache.glob("*")) if p.is_dir() and any(p.glob("*/reference.npz"))), None)


def one_layer(rng) -> dict:
    """Random float32 tensors of a Llama of one layer: 48 tokens, 32 hidden, 2 heads of 16 over 1."""
    def matrix(*shape):
        return (rng.standard_normal(shape) * 0.2).astype(np.float32)
    p = "model.layers.0."
    return {"model.embed_tokens.weight": matrix(48, 32) * 3, "model.norm.weight": np.ones(32, np.float32),
            p + "input_layernorm.weight": np.ones(32, np.float32), p + "post_attention_layernorm.weight": np.ones(32, np.float32),
            p + "self_attn.q_proj.weight": matrix(32, 32), p + "self_attn.k_proj.weight": matrix(16, 32),
            p + "self_attn.v_proj.weight": matrix(16, 32), p + "self_attn.o_proj.weight": matrix(32, 32),
            **{p + f"mlp.{name}_proj.weight": matrix(32, 32) for name in ("gate", "up", "down")}}

"""`load_model`: from a checkpoint on disk to a model that computes, quantizing float checkpoints on the way where that is asked."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from qfunc._errors import CheckpointError
from qfunc._qtensor import QTensor
from qfunc.layers.cache import FORMATS
from qfunc.layers.families import adapt, ends, model_config
from qfunc.layers.model import Model

from ._checkpoint import DTYPES, Checkpoint, is_gguf, load, locate
from ._gguf_tokenizer import gguf_tokenizer
from ._online import load_online
from ._refuse import folder_json

KEPT = ("_scale", "_zero", "correction_bias")
"""Ends of the names of float leaves whose precision matters more than the model's dtype."""


def load_model(path: str | Path, *, mesh=None, dtype=None, quantize=None, cache: str | None = None, progress: bool | None = None) -> Model:
    """Load a decoder that `qfunc.load` can read and run it on its packed weights.

    Arguments:
        path: folder, `.gguf` file or hub id.
        mesh: a `jax.sharding.Mesh` of one axis; weights are split over it (see `qfunc.layers.parallel`).
        dtype: of the activations and float weights, `"float32"`, `"bfloat16"` or `"float16"`; by default the checkpoint's.
        quantize: for a float checkpoint, or one in fp8 or NVFP4, a scheme, alias or rules as `qfunc.quantize` takes them: each leaf is
            quantized (again) as it is read, so that memory peaks near the packed model plus one leaf; what no rule names stays as it is.
            The name of a checkpoint's own format, such as `"awq"`, loads it as it is.
        cache: format of the key/value cache (`qfunc.layers.cache.FORMATS`); by default what the checkpoint has scales for, else float.
        progress: as in `qfunc.load`.

    Returns: `Model`. Raises: CheckpointError for a damaged or unknown checkpoint, architecture or tokenizer, or weights of other shapes
    than the configuration says; ValueError for rules that do not fit,
    and where `quantize` meets weights that are quantized in another way.
    """
    path = locate(path)
    asked = None if dtype is None else _dtype(dtype)
    if cache is not None and cache not in FORMATS:
        raise ValueError(f"cache: expected one of {', '.join(FORMATS)}, found {cache!r}")
    checkpoint = load(path, progress=progress) if quantize is None else load_online(path, quantize, progress)
    name = asked or _own_dtype(checkpoint)
    fields = {"cache": cache or checkpoint.kv_cache or "float"}
    try:
        config = model_config(checkpoint.config, name, **fields)
        config = config.replace(eos=tuple(dict.fromkeys((*config.eos, *_other_ends(path)))))
        params = adapt(_cast(checkpoint.params, jnp.dtype(name)), config)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if mesh is not None:
        from qfunc.layers.parallel import place
        params = place(params, config, mesh)
    tokenizer = tokenizer_of(path) or gguf_tokenizer(checkpoint.config.get("gguf") or {})
    return Model(params, config, tokenizer, mesh=mesh, notes=checkpoint.notes)


def _other_ends(path: Path) -> tuple[int, ...]:
    """The ids that end a text by `generation_config.json`: chat models have more there than in `config.json`."""
    found = None if is_gguf(path) else folder_json(path if path.is_dir() else path.parent, "generation_config.json")
    return ends(found or {})


def tokenizer_of(path: Path):
    """The `tokenizers.Tokenizer` beside a checkpoint, None where there is no file or the package is not installed.

    It takes texts as they are: lengths that its file cuts or pads to were those of a training.
    """
    file = (path if path.is_dir() else path.parent) / "tokenizer.json"
    if not file.exists():
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    try:
        found = Tokenizer.from_file(str(file))
    except Exception as error:                      # tokenizers raises nothing narrower
        raise CheckpointError(f"{file}: expected a tokenizer as the tokenizers package writes it, found {error}") from error
    found.no_truncation()
    found.no_padding()
    return found


def _dtype(asked) -> str:
    try:
        name = str(jnp.dtype(DTYPES.get(asked, asked)))
    except TypeError:
        name = None
    if name not in DTYPES.values():
        raise ValueError(f"dtype: expected float32, bfloat16 or float16, found {asked!r}")
    return name


def _own_dtype(checkpoint: Checkpoint) -> str:
    for key in ("dtype", "torch_dtype"):
        found = checkpoint.config.get(key)
        if isinstance(found, str) and found.removeprefix("torch.") in DTYPES.values():
            return found.removeprefix("torch.")
    norm = checkpoint.params.get("model", {}).get("norm", {}).get("weight")
    return "bfloat16" if norm is None else str(norm.dtype)


def _cast(params, dtype):
    """Float weights in the model's dtype; packed weights keep their leaves and change their logical dtype."""
    def one(keys, leaf):
        name = keys[-1].key
        if isinstance(leaf, QTensor):
            return leaf.replace(dtype=str(dtype))
        cast = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim and not name.endswith(KEPT)
        return leaf.astype(dtype) if cast else leaf
    return jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda leaf: isinstance(leaf, QTensor))

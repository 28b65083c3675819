"""`load_model`: from a checkpoint on disk to a model that computes, quantizing float checkpoints on the way where that is asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qfunc._errors import CheckpointError
from qfunc._qtensor import QTensor
from qfunc._quantize import quantize as quantize_params
from qfunc.layers.cache import FORMATS
from qfunc.layers.families import adapt, model_config
from qfunc.layers.model import Model

from ._checkpoint import DTYPES, Checkpoint, is_gguf, load, locate, logical_dtype, open_source
from ._gguf_tokenizer import gguf_tokenizer
from ._load import Leaf, make_plan
from ._refuse import refuse

ONLINE: dict[str, Mapping[str, str | None]] = {
    # SGLang's online methods that touch the experts alone (quark_int4fp8_moe.py, nvfp4_online.py).
    "quark_int4fp8_moe": {"*/experts/*": "w4afp8", "*": None},
    "nvfp4_online": {"*/experts/*": "nvfp4_token", "*": None},
}
"""Names that are rules rather than one scheme."""

KEPT = ("_scale", "_zero", "correction_bias")
"""Ends of the names of float leaves whose precision matters more than the model's dtype."""


def load_model(path: str | Path, *, mesh=None, dtype=None, quantize=None, cache: str | None = None, progress: bool | None = None) -> Model:
    """Load a decoder that `qfunc.load` can read and run it on its packed weights.

    Arguments:
        path: folder, `.gguf` file or hub id.
        mesh: a `jax.sharding.Mesh` of one axis; weights are split over it (see `qfunc.layers.parallel`).
        dtype: of the activations and float weights, `"float32"`, `"bfloat16"` or `"float16"`; by default the checkpoint's.
        quantize: for a float checkpoint, a scheme, alias or rules as `qfunc.quantize` takes them: each leaf is quantized as it is read,
            so that memory peaks near the packed model plus one leaf.
        cache: format of the key/value cache (`qfunc.layers.cache.FORMATS`); by default what the checkpoint has scales for, else float.
        progress: as in `qfunc.load`.

    Returns: `Model`. Raises: CheckpointError for a damaged or unknown checkpoint or architecture; ValueError for rules that do not fit,
    and where `quantize` meets weights that already are.
    """
    path = locate(path)
    if dtype is not None and str(jnp.dtype(DTYPES.get(dtype, dtype))) not in DTYPES.values():
        raise ValueError(f"dtype: expected float32, bfloat16 or float16, found {dtype!r}")
    if cache is not None and cache not in FORMATS:
        raise ValueError(f"cache: expected one of {', '.join(FORMATS)}, found {cache!r}")
    checkpoint = load(path, progress=progress) if quantize is None else _quantized(path, quantize, progress)
    name = str(jnp.dtype(DTYPES.get(dtype, dtype) or _own_dtype(checkpoint)))
    fields = {"cache": cache or checkpoint.kv_cache or "float"}
    try:
        config = model_config(checkpoint.config, name, **fields)
        params = adapt(_cast(checkpoint.params, jnp.dtype(name)), config)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if mesh is not None:
        from qfunc.layers.parallel import place
        params = place(params, config, mesh)
    tokenizer = tokenizer_of(path) or gguf_tokenizer(checkpoint.config.get("gguf") or {})
    return Model(params, config, tokenizer, mesh=mesh, notes=checkpoint.notes)


def tokenizer_of(path: Path):
    """The `tokenizers.Tokenizer` beside a checkpoint, None where there is no file or the package is not installed."""
    file = (path if path.is_dir() else path.parent) / "tokenizer.json"
    if not file.exists():
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    return Tokenizer.from_file(str(file))


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


class Lazy:
    """A float leaf that is read when its values are asked for: what `qfunc.quantize` takes for an array."""

    def __init__(self, leaf: Leaf):
        self.leaf, self.shape = leaf, tuple(leaf.shape)
        self.dtype = np.dtype(_NUMPY.get(leaf.tensors[0].dtype, np.float32))
        self.ndim = len(self.shape)

    def __array__(self, dtype=None, copy=None):
        array = np.asarray(self.leaf.read())
        for file in {tensor.file for tensor in self.leaf.tensors}:
            file.release([t for t in self.leaf.tensors if t.file is file])
        return array if dtype is None else array.astype(dtype)


_NUMPY = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float32}


def _quantized(path: Path, rules, progress: bool | None) -> Checkpoint:
    """A float checkpoint, quantized leaf by leaf while it is read."""
    if is_gguf(path):
        raise ValueError(f"{path}: quantize= is for float checkpoints, found a GGUF file")
    family, source = open_source(path)
    if family is not None:
        raise ValueError(f"{path}: quantize= is for float checkpoints, found one of {family.name}")
    plan = make_plan(source, None)
    tree: dict[str, Any] = {}
    for leaf in plan.leaves:
        if not leaf.tensors:
            raise refuse(path, leaf.name, "a tensor", "none")
        node = tree
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = Lazy(leaf)
    rules = ONLINE.get(rules, rules) if isinstance(rules, str) else rules
    try:
        tree = adapt(tree, model_config(source.config))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    params = quantize_params(tree, rules, progress=progress)
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)) if isinstance(leaf, Lazy) else leaf, params)
    schemes = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, QTensor))[0]:
        if isinstance(leaf, QTensor):
            schemes["/".join(key.key for key in keys)] = leaf.scheme
    source.config.setdefault("dtype", logical_dtype(source.config, plan))
    return Checkpoint(params, source.config, "float", schemes, None, tuple(plan.notes), plan.names)

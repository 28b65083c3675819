"""qfunc's own folders: what `qfunc quantize` writes, readable back to the bit.

Layout, version 1:

    qfunc.json                  {"format": "qfunc", "version": 1, "weights": "<file>", "config": {...} | null, "tensors": {<path>: <entry>}}
    qfunc-<16 hex>.safetensors  every array: `<path>` for a float leaf, `<path>#<leaf>` for the leaves of a QTensor

An entry is null for a float leaf, else the static fields of the QTensor (scheme in full, dtype, layout, pad, view). Weights are always
in the canonical layout. The JSON is written last and names its weights file, whose name no other save uses: until the rename of the
JSON the old model is whole, afterwards the new one is.
"""

from __future__ import annotations

import json
import os
import secrets
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qfunc._activation import check_activation
from qfunc._codec import encode
from qfunc._qtensor import CODECS, LEAVES, STATIC, QTensor, static_from_json, static_to_json

from ._refuse import inside, read_json, refuse
from ._write import replace_file, write_safetensors
from .safetensors import File, Tensor

INDEX = "qfunc.json"
VERSION = 1


class Native(NamedTuple):
    """A model read back: `params`, a nested dict of arrays and QTensors, and `config`, whatever JSON was saved with it (or None)."""

    params: dict
    config: dict | None


def save_native(path: str | os.PathLike, params: Mapping, config: Mapping | None = None) -> Path:
    """Write quantized parameters into the folder `path`, made if there is none; returns the path of its `qfunc.json`.

    Arguments: `params`, nested dicts with string keys whose leaves are arrays or QTensors; `config`, a JSON object to keep with them.
    A folder that holds a model of this format has it replaced; other files in it stay.
    Raises: TypeError and ValueError where the tree is no such dict, CheckpointError where a QTensor's leaves are not those of its scheme;
    all before anything is written.
    """
    folder = Path(path)
    if not isinstance(params, Mapping) or isinstance(params, QTensor):
        raise TypeError(f"params: expected nested dicts of arrays and QTensors, found {type(params).__name__}")
    leaves = dict(_walk(params, ""))
    tensors, entries = {}, {}
    for name, leaf in leaves.items():
        if isinstance(leaf, QTensor):
            leaf = _checked(folder, name, leaf.canonical)
            entries[name] = static_to_json(leaf)
            tensors |= {f"{name}#{part}": array for part, array in leaf.leaves.items()}
        else:
            entries[name], tensors[name] = None, leaf
    weights = f"qfunc-{secrets.token_hex(8)}.safetensors"
    index = {"format": "qfunc", "version": VERSION, "weights": weights, "config": config, "tensors": entries}
    text = json.dumps(index, indent=1, allow_nan=False).encode()
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / weights, lambda file: write_safetensors(file, tensors, {"format": "qfunc"}))
    replace_file(folder / INDEX, lambda file: file.write(text))
    for old in folder.glob("qfunc-????????????????.safetensors"):
        if old.name != weights:
            old.unlink()
    return folder / INDEX


def load_native(path: str | os.PathLike) -> Native:
    """Read what `save_native` wrote.

    Raises: CheckpointError where the folder is none of this format, its version is newer, or the index and the weights do not agree.
    """
    folder = Path(path)
    entries, config, file = open_index(folder)
    left: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for tensor in file.tensors.values():
        owner, _, part = tensor.name.partition("#")
        left[owner][part] = tensor
    params: dict = {}
    for name, entry in entries.items():
        *parents, last = name.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise refuse(folder / INDEX, f"tensor {name!r}", "parents that are no tensors themselves", "one that is")
        if last in node:
            raise refuse(folder / INDEX, f"tensor {name!r}", "a path of its own", "the parent of another")
        node[last] = _leaf(file.path, name, entry, left.pop(name, {}))
    if left:
        raise refuse(file.path, f"tensor {next(iter(left))!r}", f"an entry in {INDEX}", "none")
    return Native(params, config)


def open_index(folder: Path) -> tuple[dict, dict | None, File]:
    """(entries by path, configuration, weights file) of a folder, as its index names them."""
    index = read_json(inside(folder, INDEX, folder))
    if index.get("format") != "qfunc" or index.get("version") != VERSION:
        raise refuse(folder / INDEX, "format", f"qfunc, version {VERSION}", f"{index.get('format')!r}, version {index.get('version')!r}")
    entries, config = index.get("tensors"), index.get("config")
    if not isinstance(entries, dict) or not isinstance(config, dict | None):
        raise refuse(folder / INDEX, "tensors, config", "objects", f"{type(entries).__name__}, {type(config).__name__}")
    return entries, config, File(inside(folder, index.get("weights"), folder / INDEX))


FLOATS = ("float32", "float16", "bfloat16")


def _fits(name: str, leaf, shape: tuple[int, ...], dtype: np.dtype) -> bool:
    """Whether a leaf is what encoding gives; scales in floating point may have been cast with the rest of their model."""
    cast = name != "codes" and jnp.issubdtype(dtype, jnp.floating) and np.dtype(leaf.dtype).name in FLOATS
    return leaf.shape == shape and (leaf.dtype == dtype or cast)


def static_fields(where: Path, name: str, entry) -> dict:
    """The static fields of a QTensor out of its entry."""
    try:
        static = static_from_json(entry)
        if static.keys() != set(STATIC) or static["layout"] != "canonical":
            raise ValueError(f"fields {sorted(static)} of layout {static.get('layout')!r}")
        if type(static["pad"]) is not int or not 0 <= static["pad"] < 128:
            raise ValueError(f"pad {static['pad']!r}")
        scheme = static["scheme"]
        view = static["view"]
        if any(type(size) is not int or size < 1 for size in (*view.ins, *view.outs)):
            raise ValueError(f"view of {view.ins} and {view.outs}")
        check_activation(scheme.activation)
        hash((scheme, view))          # a list or an object where a word or a number should be is not hashable
        if not isinstance(scheme.name, str) or not isinstance(scheme.weight.code, str):
            raise ValueError(f"scheme {scheme.name!r} of {scheme.weight.code!r}")
        if not isinstance(static["dtype"], str) or not jnp.issubdtype(jnp.dtype(static["dtype"]), jnp.floating):
            raise ValueError(f"dtype {static['dtype']!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise refuse(where.parent / INDEX, f"tensor {name!r}", f"the fields {', '.join(STATIC)}", repr(error)) from error
    return static


def _walk(node, path: str):
    if isinstance(node, QTensor) or not isinstance(node, Mapping):
        if not isinstance(node, QTensor | np.ndarray | jax.Array):
            raise TypeError(f"{path or 'params'}: expected nested dicts of arrays and QTensors, found {type(node).__name__}")
        yield path, node
        return
    for key, child in node.items():
        if not isinstance(key, str) or not key or "/" in key or "#" in key:
            raise ValueError(f"{path or 'params'}: expected keys that are strings without '/' and '#', found {key!r}")
        yield from _walk(child, f"{path}/{key}" if path else key)


def _leaf(where: Path, name: str, entry, parts: dict[str, Tensor]):
    arrays = {part: _array(tensor.read()) for part, tensor in parts.items()}
    if entry is None:
        if arrays.keys() != {""}:
            raise refuse(where, f"tensor {name!r}", "one array", ", ".join(sorted(arrays)) or "none")
        return arrays[""]
    static = static_fields(where, name, entry)
    if not {"codes"} <= arrays.keys() <= set(LEAVES):
        raise refuse(where, f"tensor {name!r}", f"codes and leaves among {', '.join(LEAVES)}", ", ".join(sorted(arrays)) or "none")
    return _checked(where, name, QTensor(**arrays, **static))


def _array(values: np.ndarray):
    # A copy: JAX may share the memory of an aligned numpy array, and this one is a file. JAX has numbers of 64 bits only where they are
    # enabled; elsewhere they stay numpy's, whole.
    return jnp.array(values) if jax.dtypes.canonicalize_dtype(values.dtype) == values.dtype else np.array(values)


def _spreads(shape, over) -> bool:
    return len(shape) <= len(over) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(over), strict=False))


def _checked(where: Path, name: str, q: QTensor) -> QTensor:
    """The QTensor, if its leaves have the shapes and types that encoding such a weight gives."""
    try:
        *batch, rows, columns = q.matrix_shape
        spec = q.scheme.weight
        if spec.code in CODECS.decoders:
            want = {"codes": (q.codes.shape, np.dtype(np.uint8))}
        else:
            perm = jax.ShapeDtypeStruct((*batch, rows), jnp.int32) if spec.actorder else None
            shapes = jax.eval_shape(partial(encode, spec=spec), jax.ShapeDtypeStruct((*batch, columns, rows), jnp.float32), perm=perm)
            want = {n: (a.shape, np.dtype(a.dtype)) for n, a in shapes.items()}
        wrong = [f"{n} {leaf.dtype}{list(leaf.shape)} instead of {want[n][1]}{list(want[n][0])}"
                 for n, leaf in q.leaves.items() if n in want and not _fits(n, leaf, *want[n])]
        wrong += [f"no {n}" for n in want if n not in q.leaves]
        inputs = {"input_scale": (1, 1), "input_zero": (1, 1), "smooth": (rows,)}
        wrong += [f"{n} of shape {list(q.leaves[n].shape)} instead of {[*batch, *cell]}"
                  for n, cell in inputs.items() if n in q.leaves and not _spreads(q.leaves[n].shape, (*batch, *cell))]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        wrong = [str(error)]
    if wrong:
        raise refuse(where, f"tensor {name!r}", f"the leaves of {q.scheme.name}", "; ".join(wrong))
    return q

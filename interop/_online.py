"""Quantization while loading: float checkpoints and those in fp8, leaf by leaf, so that memory peaks near the packed model plus one leaf.

Names are SGLang's (`--quantization`, `--torchao-config`). A name of a checkpoint format asks of a checkpoint in that format nothing but
to be loaded. Source: SGLang, `quantization/nvfp4_online.py`, `quark_int4fp8_moe.py`, `fp8.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qfunc._errors import CheckpointError
from qfunc._qtensor import QTensor
from qfunc._quantize import quantize as quantize_params
from qfunc._schemes import ALIASES
from qfunc._spec import Scheme
from qfunc.layers.families import adapt, model_config

from ._checkpoint import Checkpoint, is_gguf, load, logical_dtype, open_source
from ._detect import METHODS
from ._load import Leaf, make_plan
from ._load import _quantized as packed_leaf
from ._refuse import refuse

ONLINE: dict[str, Mapping[str, str | None]] = {
    # Online methods that touch the experts alone.
    "quark_int4fp8_moe": {"*/experts/*": "w4afp8", "*": None},
    "nvfp4_online": {"*/experts/*": "nvfp4_online", "*": None},
}
"""Names that are rules rather than one scheme."""

FORMATS: dict[str, str] = {**{name: module.replace("_", "-") for name, module in METHODS.items()}, "quark": "quark", "gguf": "gguf",
                           "w8a8_int8": "compressed-tensors", "w8a8_fp8": "compressed-tensors", "petit_nvfp4": "modelopt"}
"""Names that checkpoints of a family answer to."""

CODES = {"fp8": "fp8", "w8a8_fp8": "fp8", "modelopt_fp8": "fp8", "blockwise_int8": "int8", "w8a8_int8": "int8", "modelopt_fp4": "fp4",
         "petit_nvfp4": "fp4"}
"""How the weights' element code begins, for names that say it: a family has checkpoints of several."""

TOGETHER = {"nvfp4_online": (("gate_proj", "up_proj"), ("w1", "w3"))}
"""Scheme names under which two layers of an expert share the scale of their tensors: it is that of both, one beside the other."""


def load_online(path: Path, asked, progress: bool | None) -> Checkpoint:
    """A checkpoint quantized by `asked` while it is read.

    Raises: ValueError where the checkpoint is quantized already in a way that is no source (all but fp8 and NVFP4 are none), or where
    `asked` is the name of a format that the checkpoint does not have; CheckpointError as `load`.
    """
    name = asked.lower() if isinstance(asked, str) else None
    family, source = (None, None) if is_gguf(path) else open_source(path)
    found = "gguf" if is_gguf(path) else "float" if family is None else family.name
    if found == "gguf":
        if name == found:
            return load(path, progress=progress)
        raise ValueError(f"{path}: quantize= is for float and fp8 checkpoints, found a GGUF file")
    if name in FORMATS and FORMATS[name] != found and name not in ALIASES and name not in ONLINE and not _is_scheme(name):
        raise ValueError(f"quantize={asked!r} is a format of checkpoints, and {path} is one of {found}; name a scheme, such as w4a16_g128")
    plan = make_plan(source, family)
    codes = {leaf.scheme.weight.code for leaf in plan.leaves if leaf.members}
    if FORMATS.get(name) == found and (name not in CODES or any(code.startswith(CODES[name]) for code in codes)):
        return load(path, progress=progress)
    tree: dict[str, Any] = {}
    for leaf in plan.leaves:
        if leaf.members:
            _check_source(path, leaf)
        elif not leaf.tensors and family is None:
            raise refuse(path, leaf.name, "a tensor", "none")
        value = Source(leaf) if leaf.tensors else leaf.read()
        if value is not None:
            _put(tree, leaf.path, value)
    rules = ONLINE.get(name, asked)
    if name in ONLINE and not any("experts" in leaf.path for leaf in plan.leaves):
        raise ValueError(f"quantize={asked!r} quantizes experts alone, and {path} has none")
    try:
        tree = adapt(tree, model_config(source.config))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    # After `adapt`, which misses what a pair has taken in.
    pairs = list(_join(tree, rules if isinstance(rules, Mapping) else {"*": rules}))
    params = quantize_params(tree, rules, progress=progress)
    for first, second in pairs:
        _part(params, first, second)
    dtype = logical_dtype(source.config, plan)

    def settled(leaf):
        return leaf.as_it_is(dtype) if isinstance(leaf, Source) else leaf if _packed(leaf) else jnp.asarray(leaf)
    params = jax.tree.map(settled, params, is_leaf=_packed)
    schemes: dict[str, Scheme] = {"/".join(key.key for key in keys): leaf.scheme for keys, leaf in jax.tree_util.tree_flatten_with_path(
        params, is_leaf=_packed)[0] if _packed(leaf)}
    source.config.setdefault("dtype", dtype)
    return Checkpoint(params, source.config, found, schemes, plan.kv_code, tuple(plan.notes), plan.names)


def _is_scheme(name: str) -> bool:
    from qfunc._schemes import scheme
    try:
        return bool(scheme(name))
    except ValueError:
        return False


def _packed(leaf) -> bool:
    return isinstance(leaf, QTensor)


def _check_source(path: Path, leaf: Leaf) -> None:
    weight = leaf.scheme.weight
    fp8 = weight.code.startswith("fp8_") and weight.granularity.kind != "group"
    if not fp8 and not (weight.code == "fp4_e2m1" and weight.scale2_dtype is not None):
        raise ValueError(f"{path}: quantize= starts from float weights, from fp8 (per tensor, channel or block) or from NVFP4; "
                         f"{leaf.name} is {leaf.scheme.name}")


class Source:
    """A leaf that is read when its values are asked for, in bfloat16 where it is packed: what `qfunc.quantize` takes for an array."""

    def __init__(self, leaf: Leaf):
        self.leaf, self.shape, self.ndim = leaf, tuple(leaf.shape), len(leaf.shape)
        self.dtype = np.dtype(ml_dtypes.bfloat16 if leaf.members else _NUMPY.get(leaf.tensors[0].dtype, np.float32))

    def __array__(self, dtype=None, copy=None):
        if self.leaf.members:
            array = np.asarray(packed_leaf(self.leaf, "bfloat16").dequantize("bfloat16"))
        else:
            array = np.asarray(self.leaf.read())
        self._release()
        return array if dtype is None else array.astype(dtype)

    def as_it_is(self, dtype: str):
        """The leaf as the checkpoint has it, an array or a QTensor."""
        if not self.leaf.members:
            return jnp.asarray(np.asarray(self))
        value = jax.tree.map(jnp.asarray, packed_leaf(self.leaf, dtype))
        self._release()
        return value

    def _release(self) -> None:
        for file in {tensor.file for tensor in self.leaf.tensors}:
            file.release([t for t in self.leaf.tensors if t.file is file])


_NUMPY = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float32}


class Pair:
    """Two leaves of one shape side by side along their outputs."""

    def __init__(self, first: Source, second: Source):
        self.both, self.dtype, self.ndim = (first, second), first.dtype, first.ndim
        self.shape = (*first.shape[:-1], first.shape[-1] + second.shape[-1])

    def __array__(self, dtype=None, copy=None):
        array = np.concatenate([np.asarray(part) for part in self.both], axis=-1)
        return array if dtype is None else array.astype(dtype)


def _put(tree: dict, path: tuple[str, ...], value) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _join(tree: dict, rules: Mapping, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Put each pair that shares a scale in the place of its first layer, and yield the paths of both."""
    for name, node in list(tree.items()):
        if isinstance(node, dict):
            yield from _join(node, rules, (*path, name))
    for scheme, pairs in TOGETHER.items():
        for pair in pairs:
            paths = [(*path, name, "kernel") for name in pair]
            leaves = [tree[name].get("kernel") if isinstance(tree.get(name), dict) else None for name in pair]
            if all(isinstance(leaf, Source) for leaf in leaves) and all(_rule(rules, p) == scheme for p in paths):
                tree[pair[0]]["kernel"] = Pair(*leaves)
                del tree[pair[1]]["kernel"]
                yield tuple(paths)


def _rule(rules: Mapping, path: tuple[str, ...]):
    return next((value for pattern, value in rules.items() if fnmatchcase("/".join(path), pattern)), None)


def _part(params: dict, first: tuple[str, ...], second: tuple[str, ...]) -> None:
    """Give the second half of a quantized pair's outputs back to its own place; their outer scale stays that of both."""
    node = params
    for key in first[:-1]:
        node = node[key]
    both = node["kernel"]
    outs = both.matrix_shape[-1] // 2
    halves = [{name: leaf[..., part, :] if leaf.shape[-2] > 1 else leaf for name, leaf in both.leaves.items()}
              for part in (slice(0, outs), slice(outs, None))]
    node["kernel"] = both.replace(**halves[0])
    _put(params, second, both.replace(**halves[1]))

"""From names in checkpoints to paths in the tree of parameters."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from .floats import ALREADY_IN_OUT, TABLES

EXPERT = re.compile(r"(?P<stack>.*\.experts)\.(?P<index>\d{1,6})\.(?P<rest>.+)")
"""A module of one expert."""

# Scales of the key/value cache as producers call them: last component, then the leaf of the attention module it becomes.
_CACHE = {
    "k_scale": "k_scale", "v_scale": "v_scale", "q_scale": "q_scale", "prob_output_scale": "prob_scale", "prob_scale": "prob_scale",
    "k_zero_point": "k_zero", "v_zero_point": "v_zero", "output_scale": "{}_scale", "kv_cache_scale": "{}_scale",
    "kv_cache_offset": "{}_zero",
    "kv_scale": "kv_scale",
}
_PROJECTION = re.compile(r"(.*)\.([kv])_proj")


def cache_scale(module: str, param: str) -> tuple[str, str] | None:
    """(attention module, leaf) of a scale of the key/value cache, None for any other tensor.

    ModelOpt, Quark and msModelSlim keep them on `k_proj` and `v_proj`; compressed-tensors and fp8 on the attention module itself.
    """
    leaf = _CACHE.get(param)
    if leaf is None:
        return None
    projection = _PROJECTION.fullmatch(module)
    if projection:
        return projection[1], leaf.format(projection[2])
    # vLLM keeps them one module further down.
    module = module.removesuffix(".attn") if module.endswith("attn.attn") else module
    return None if "{}" in leaf else (module, leaf)


def is_table(module: str) -> bool:
    """Whether a module's matrix is a table of rows, not a linear weight."""
    return any(fnmatchcase(module.rpartition(".")[2], pattern) for pattern in TABLES)


def leaf_name(module: str) -> str:
    """The leaf of a quantized weight: `kernel`, but an embedding keeps `weight`."""
    return "weight" if is_table(module) else "kernel"


def is_kernel(module: str, param: str, ndim: int) -> bool:
    """Whether a float tensor is a linear weight, stored (out, in), that becomes a kernel (in, out)."""
    return param == "weight" and ndim == 2 and not is_table(module)


def split_path(module: str) -> tuple[str, ...]:
    """The keys of a module in the tree."""
    return tuple(module.split(".")) if module else ()


__all__ = ["ALREADY_IN_OUT", "EXPERT", "cache_scale", "is_kernel", "is_table", "leaf_name", "split_path"]

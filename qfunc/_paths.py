"""Paths of leaves, spelled the same way in rules, reports, errors and calibration."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import jax

BOXED = frozenset({"kernel", "weight", "bias", "scale", "embedding"})
"""Names of flax's parameters, below which `value` is the box of a variable that was stored as nested dicts."""


def leaf_path(keys: Sequence) -> str:
    """The path of a leaf as qfunc spells it, from the key path of `jax.tree_util.tree_flatten_with_path`.

    `jax.tree_util.keystr(keys, simple=True, separator="/")` less a leading `params/` (linen) and a trailing `/value` (nnx).
    """
    path = jax.tree_util.keystr(tuple(keys), simple=True, separator="/").removeprefix("params/")
    box = path.removesuffix("/value")
    if box != path and keys[-1] != jax.tree_util.GetAttrKey("value") and box.rpartition("/")[2] not in BOXED:
        return path         # a dict's own key: attention has a `value` beside `query` and `key`
    return box


def nearest(wanted: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The `count` names most like `wanted`, best first; never empty while there are names."""
    names = list(names)
    return difflib.get_close_matches(wanted, names, n=count, cutoff=0.0)

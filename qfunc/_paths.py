"""Paths of leaves, spelled the same way in rules, reports, errors and calibration."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import jax


def leaf_path(keys: Sequence) -> str:
    """The path of a leaf as qfunc spells it, from the key path of `jax.tree_util.tree_flatten_with_path`.

    `jax.tree_util.keystr(keys, simple=True, separator="/")` less a leading `params/` (linen) and a trailing `/value` (nnx).
    """
    path = jax.tree_util.keystr(tuple(keys), simple=True, separator="/")
    return path.removeprefix("params/").removesuffix("/value")


def nearest(wanted: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The `count` names most like `wanted`, best first; never empty while there are names."""
    names = list(names)
    return difflib.get_close_matches(wanted, names, n=count, cutoff=0.0)

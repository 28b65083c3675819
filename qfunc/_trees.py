"""Arguments of a user's function, taken apart into what JAX traces and what stays as it is."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from ._qtensor import QTensor

TRACED = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, QTensor)


@dataclasses.dataclass(frozen=True)
class Static:
    """The rest of a tree whose arrays were taken out: hashable, as long as what it holds is.

    `places` are the positions of the arrays among all leaves, `paths` their key paths.
    """

    tree: Any
    others: tuple
    places: tuple[int, ...]
    paths: tuple = dataclasses.field(compare=False)


def split(tree) -> tuple[list, Static]:
    """(arrays and QTensors, rest): Python numbers, strings, functions and the like are not traced, as when a function is called."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, QTensor))
    places = tuple(i for i, (_, leaf) in enumerate(leaves) if isinstance(leaf, TRACED))
    others = tuple(leaf for _, leaf in leaves if not isinstance(leaf, TRACED))
    return [leaves[i][1] for i in places], Static(structure, others, places, tuple(leaves[i][0] for i in places))


def join(arrays, static: Static):
    """The inverse of `split`."""
    arrays, others, taken = iter(arrays), iter(static.others), set(static.places)
    leaves = [next(arrays) if i in taken else next(others) for i in range(len(taken) + len(static.others))]
    return jax.tree.unflatten(static.tree, leaves)

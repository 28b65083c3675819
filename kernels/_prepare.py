"""Layouts of backends: chosen once after loading, invertible."""

from __future__ import annotations

import jax

from qfunc._qtensor import QTensor

from ._explain import platform_of

PREPARERS: dict[str, list] = {}
"""Platform to functions (QTensor -> QTensor, or None where the backend keeps the canonical layout), the preferred first."""


def prepare(params, platform: str | None = None):
    """Lay every packed weight of a pytree out as the kernels of a platform like it best.

    `platform` is `canonical` or one of those of `explain`; by default that of JAX's default backend. Weights for which the canonical layout
    is best stay as they are. `q.canonical` (and `prepare(params, "canonical")`) undo it exactly. Raises ValueError for another name.
    """
    platform = platform_of(platform, "canonical")

    def one(leaf):
        if not isinstance(leaf, QTensor):
            return leaf
        leaf = leaf.canonical
        candidates = (preparer(leaf) for preparer in PREPARERS.get(platform, []))
        return next((laid for laid in candidates if laid is not None), leaf)

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, QTensor))

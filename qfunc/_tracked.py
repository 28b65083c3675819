"""Values of a traced function that are views of a parameter, and the small tools for evaluating equations one by one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp

from . import _views
from ._views import Axes


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """A parameter, or the part of it that one step of a loop sees.

    Fields:
        path: its path in the parameters.
        sizes: its remaining axes, by their number in the parameter, with their sizes, in order.
        packed: the `QTensor` (leading axes consumed so far removed), or None for a float array.
        batch: number of leading axes of a packed parameter, consumed ones included.
        parent, axis, index: the leaf this is a slice of along `axis`; `index` None where a scan does the slicing.
    """

    path: str
    sizes: dict[int, int]
    packed: Any = None
    batch: int = 0
    parent: Leaf | None = None
    axis: int | None = None
    index: Any = None

    def child(self, axis: int, packed=None, index=None) -> Leaf:
        """The slice of this leaf along one axis."""
        sizes = {a: n for a, n in self.sizes.items() if a != axis}
        return Leaf(self.path, sizes, packed, self.batch, self, axis, index)

    @property
    def leading(self) -> list[int]:
        """The remaining leading axes of a packed parameter."""
        return [a for a in self.sizes if a < self.batch]

    def place(self, axis: int) -> int:
        """The position of `axis` among the remaining ones."""
        return list(self.sizes).index(axis)


@dataclasses.dataclass(frozen=True, eq=False)
class Tracked:
    """A value that is a view of a leaf; `array` holds it, or is None where the leaf is packed. `dtype` is the value's."""

    leaf: Leaf
    axes: Axes
    dtype: Any
    array: Any = None

    def viewed(self, axes: Axes, array=None) -> Tracked:
        """The same leaf, seen another way."""
        return dataclasses.replace(self, axes=axes, array=array)


def track(path: str, array) -> Tracked:
    """A float parameter."""
    sizes = dict(enumerate(array.shape))
    return Tracked(Leaf(path, sizes), _views.whole(sizes), array.dtype, array)


def track_packed(path: str, q) -> Tracked:
    """A packed parameter, seen in its logical shape."""
    sizes = dict(enumerate(q.shape))
    return Tracked(Leaf(path, sizes, q, len(q.matrix_shape) - 2), _views.whole(sizes), jnp.dtype(q.dtype))


def is_packed(value) -> bool:
    """True for a view of a packed leaf."""
    return isinstance(value, Tracked) and value.leaf.packed is not None


def literal(v) -> bool:
    """True for a constant written into an equation."""
    return isinstance(v, jax.extend.core.Literal)


def opened(jaxpr) -> tuple[Any, Sequence]:
    """(jaxpr, consts) of an open or closed jaxpr."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", None) or ()


def live(jaxpr) -> list:
    """The equations that a result or an effect needs: what a function computes and drops must not be taken for a use of a weight."""
    needed = {v for v in jaxpr.outvars if not literal(v)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            needed.update(v for v in eqn.invars if not literal(v))
            kept.append(eqn)
    return kept[::-1]


def bind(eqn, values: list) -> list:
    """Evaluate one equation as it is."""
    with getattr(eqn.ctx, "manager", contextlib.nullcontext()):
        out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def where(eqn) -> str:
    """An equation for people: primitive, shapes, and the line of the program it comes from."""
    shapes = ", ".join(str(v.aval) for v in eqn.invars)
    return f"{eqn.primitive.name}({shapes}) at {jax.extend.source_info_util.summarize(eqn.source_info)}"

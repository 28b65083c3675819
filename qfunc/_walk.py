"""Evaluate a traced function equation by equation, knowing which values are views of which parameters.

`Walker.run(jaxpr, consts, args)` is `jax.core.eval_jaxpr` whose values may be `Tracked`: a parameter leaf and the view (`qfunc._views`)
that the value shows of it. Equations without tracked operands are bound as they are, so inner jits, custom derivatives and effects
stay; those with one are looked up in `RULES`. Subclasses say what a contraction is (`contract`, `pick`) and what happens where
a leaf reaches anything else (`plain`, `stray`).

A walker also takes notes: one mergeable pytree per leaf, carried out of loops and branches through their outputs (`qfunc._loops`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import _loops, _views
from ._tracked import Leaf, Tracked, bind, is_packed, literal, live
from ._views import Axes


class Walker:
    """The evaluator; see the module's docstring."""

    def __init__(self):
        self.notes: dict[Leaf, Any] = {}

    def contract(self, eqn, values: list) -> list:
        """A `dot_general`, `ragged_dot_general` or `quantized_matmul` with a tracked operand."""
        return self.stray(eqn, values)

    def pick(self, eqn, values: list) -> list:
        """A `gather` from a tracked operand, or a slice of a packed one that is no slice of its leading axes."""
        return self.stray(eqn, values)

    def stray(self, eqn, values: list, reason: str = "") -> list:
        """Any other equation with a tracked operand; by default it is evaluated on the arrays and the result is not tracked."""
        return bind(eqn, [self.plain(value, eqn) for value in values])

    def plain(self, value, eqn=None):
        """The array of a value, tracked or not."""
        return value.array if isinstance(value, Tracked) else value

    def merge(self, old, new):
        """Two notes of one leaf in one."""
        raise NotImplementedError

    def empty(self, note):
        """The note, of the same structure and shapes, that changes nothing in a merge."""
        raise NotImplementedError

    def stacked(self, leaf: Leaf, note, scanned: bool):
        """(leaf, note) outside of a scan, from a note with one leading axis of steps; `scanned` if the leaf was sliced by the scan."""
        raise NotImplementedError

    def note(self, leaf: Leaf, note) -> None:
        """Merge a note into those of a leaf."""
        self.notes[leaf] = self.merge(self.notes[leaf], note) if leaf in self.notes else note

    def capture(self, function: Callable, *args) -> tuple[Any, dict[Leaf, Any]]:
        """`function(*args)` and the notes it made, which are not merged into this walker's."""
        outer, self.notes = self.notes, {}
        try:
            return function(*args), self.notes
        finally:
            self.notes = outer

    def run(self, jaxpr, consts: Sequence, args: Sequence) -> list:
        """Evaluate a jaxpr; arguments and results may be tracked."""
        env: dict[Any, Any] = {}
        equations = live(jaxpr)
        last = {v: i for i, eqn in enumerate(equations) for v in eqn.invars if not literal(v)}
        keep = {v for v in jaxpr.outvars if not literal(v)}

        def read(v):
            return v.val if literal(v) else env[v]

        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        for i, eqn in enumerate(equations):
            values = [read(v) for v in eqn.invars]
            if any(isinstance(value, Tracked) for value in values):
                results = RULES.get(eqn.primitive.name, Walker.stray)(self, eqn, values)
            else:
                results = bind(eqn, values)
            env.update(zip(eqn.outvars, results, strict=True))
            for v in eqn.invars:
                if not literal(v) and last[v] == i and v not in keep:
                    env.pop(v, None)
        return [read(v) for v in jaxpr.outvars]


# Rules of views: the result shows the same leaf.

def _same(walker: Walker, eqn, values: list) -> list:
    """Equations that hand values on. A packed leaf skips them: a cast of the weights is the matmul's to make."""
    if len(values) != len(eqn.outvars) or not all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in eqn.outvars):
        return walker.stray(eqn, values)
    packed = any(is_packed(value) for value in values)
    arrays = [None] * len(values) if packed else bind(eqn, [walker.plain(value) for value in values])
    return [dataclasses.replace(value, dtype=v.aval.dtype, array=array) if isinstance(value, Tracked) else value if packed else array
            for value, v, array in zip(values, eqn.outvars, arrays, strict=True)]


def _view(function: Callable) -> Callable:
    """A rule from `function(eqn, axes) -> axes | None`."""
    def rule(walker: Walker, eqn, values: list) -> list:
        value, *rest = values
        axes = function(eqn, value.axes) if isinstance(value, Tracked) and not rest else None
        if axes is None:
            return walker.stray(eqn, values)
        return [value.viewed(axes, None if is_packed(value) else bind(eqn, [value.array])[0])]
    return rule


def _shape_of_result(eqn, axes: Axes) -> Axes | None:
    if eqn.params.get("dimensions") is not None and eqn.primitive.name == "reshape":
        return None
    return _views.reshape(axes, eqn.outvars[0].aval.shape)


def _slice(walker: Walker, eqn, values: list) -> list:
    """One step along whole axes of the leaf (a layer of a stack) gives a smaller leaf; slices of nothing are views."""
    value, *starts = values
    starts = starts or eqn.params["start_indices"]
    sizes = eqn.outvars[0].aval.shape
    strided = max(eqn.params.get("strides") or (1,), default=1) > 1
    if strided or not isinstance(value, Tracked) or any(isinstance(start, Tracked) for start in starts):
        return walker.stray(eqn, values)
    leaf, axes = value.leaf, list(value.axes)
    for d, (start, size, have) in enumerate(zip(starts, sizes, _views.shape(value.axes), strict=True)):
        if size == have:
            continue
        axis = axes[d][0].axis if axes[d] else None
        if size != 1 or axis is None or not _views.spans(axes[d], axis, leaf.sizes[axis]):
            return walker.stray(eqn, values)
        if leaf.packed is not None:
            if axis >= leaf.batch:
                return walker.pick(eqn, values)
            place = leaf.place(axis)
            packed = jax.tree.map(lambda a, i=start, p=place: lax.dynamic_index_in_dim(a, i, p, keepdims=False), leaf.packed)
            leaf = leaf.child(axis, packed, start)
        else:
            leaf = leaf.child(axis, index=start)
        axes[d] = ()
    array = None if is_packed(value) else bind(eqn, [walker.plain(v) for v in values])[0]
    return [Tracked(leaf, tuple(axes), value.dtype, array)]


def indexed(eqn, shape) -> int | None:
    """The one dimension of an operand from which a gather or slice takes single positions, all others whole; else None."""
    starts = eqn.params.get("start_indices")
    sizes = eqn.params["slice_sizes"] if starts is None else [b - a for a, b in zip(starts, eqn.params["limit_indices"], strict=True)]
    cut = [d for d, (size, have) in enumerate(zip(sizes, shape, strict=True)) if size != have]
    if len(cut) != 1 or sizes[cut[0]] != 1:
        return None
    numbers = eqn.params.get("dimension_numbers")
    if numbers is None:
        return cut[0]
    # Another index, into a dimension taken whole, is clamped to 0, unless out of range means dropped.
    others = len(numbers.start_index_map) > 1 and eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    plain = tuple(numbers.collapsed_slice_dims) in ((), tuple(cut)) and not numbers.operand_batching_dims
    return cut[0] if plain and cut[0] in numbers.start_index_map and not others else None


RULES: dict[str, Callable] = {
    **dict.fromkeys(("convert_element_type", "copy", "copy_p", "optimization_barrier", "sharding_constraint", "reshard",
                     "layout_constraint", "device_put", "name", "stop_gradient", "pvary", "pcast"), _same),
    "transpose": _view(lambda eqn, axes: _views.transpose(axes, eqn.params["permutation"])),
    "broadcast_in_dim": _view(lambda eqn, axes: _views.broadcast(axes, eqn.params["shape"], eqn.params["broadcast_dimensions"])),
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _view(_shape_of_result)),
    **dict.fromkeys(("slice", "dynamic_slice"), _slice),
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call"), _loops.inline),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"), _loops.inline),
    **dict.fromkeys(("remat2", "checkpoint", "remat"), _loops.remat),
    "cond": _loops.cond, "scan": _loops.scan, "while": _loops.while_,
    **dict.fromkeys(("dot_general", "ragged_dot_general", "quantized_matmul", "quantized_grouped_matmul"),
                    lambda walker, eqn, values: walker.contract(eqn, values)),
    "gather": lambda walker, eqn, values: walker.pick(eqn, values),
}
"""Primitive name to rule `(walker, eqn, values) -> results`."""

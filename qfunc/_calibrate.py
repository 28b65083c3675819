"""Calibration: run any JAX function and collect statistics of what meets each of its weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import _statistics, _views
from ._activation import QuantizedActivation, dequantize_rows
from ._paths import leaf_path
from ._progress import track as bar
from ._qtensor import QTensor
from ._statistics import Statistics, as_statistics, merge, merge_across, statistics_of
from ._tracked import Leaf, Tracked, bind, track
from ._trees import TRACED, Static, join, split
from ._walk import Walker

__all__ = ["Statistics", "as_statistics", "calibrate", "merge", "merge_across", "observe", "statistics_of"]


def calibrate(apply: Callable, params, batches: Iterable, *, progress: bool | None = None) -> dict[str, Statistics]:
    """Run `apply` over batches and collect statistics of the activations in front of every weight.

    Every `dot_general`, `ragged_dot` and quantized matmul one of whose operands is a leaf of `params` is found in the traced function,
    through casts, transposes, reshapes, inner jits, checkpoints, custom derivatives, branches and loops; the other operand is what is
    measured. Statistics of a leaf used in several matmuls merge; those of a leaf that a scan or an index slices, or that holds
    experts, keep its leading axes.

    Arguments:
        apply: any JAX function `apply(params, *batch)`; its result is not used.
        params: a pytree of float arrays or of QTensors.
        batches: an iterable of tuples of arguments, or of single arguments. Compiled once per distinct shape.
        progress: show a progress bar (needs tqdm).

    Returns: path of the leaf -> `Statistics` with K = the contracted axes of the leaf, flattened in their order. It is what
    `qfunc.quantize(..., calibration=)` takes; two such mappings merge by `merge`.

    Raises: ValueError where there is no batch, no parameter reaches a matmul, an activation is not finite (naming the path), or one
    leaf is contracted over different axes by different matmuls.
    """
    step = jax.jit(functools.partial(_step, apply), static_argnums=0)
    total: dict[str, Statistics] = {}
    for batch in bar(batches, "calibrate", progress, label=lambda _: ""):
        arrays, static = split((params, tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)))
        total = merge(total, step(static, arrays))
    if not total:
        raise ValueError("calibrate: there are no batches")
    for path, found in total.items():
        _statistics.refuse(found, path)
    return total


def observe(apply: Callable) -> Callable:
    """The function (params, *batch) -> statistics behind `calibrate`: pure, for use under jit, vmap or `shard_map`.

    Under `shard_map` with the batch sharded over the axis "data", `merge_across(observe(apply)(params, *batch), "data")` is the
    statistics of the whole batch, equal on all devices. Values are not checked.
    """
    def run(params, *batch):
        arrays, static = split((params, batch))
        return _step(apply, static, arrays)
    return run


def _step(apply: Callable, static: Static, values: list) -> dict[str, Statistics]:
    collector = Collector()
    collector.trace(apply, static, values)
    if not collector.notes:
        raise ValueError("calibrate: no parameter reaches a matmul; apply(params, *batch) must take its weights from `params`")
    return {leaf.path: note.statistics for leaf, note in collector.notes.items()}


@functools.partial(jax.tree_util.register_dataclass, data_fields=("statistics",), meta_fields=("path", "leading", "contracted"))
@dataclasses.dataclass(frozen=True, eq=False)
class Note:
    """Statistics of one leaf, with the axes of the leaf that their leading axes and their channels are."""

    statistics: Statistics
    path: str
    leading: tuple[int, ...]
    contracted: tuple[int, ...]

    def along(self, leading: tuple[int, ...]) -> Statistics:
        """The statistics with only these of the leading axes."""
        found = self.statistics
        for place in reversed(range(len(self.leading))):
            if self.leading[place] not in leading:
                found = found.reduce(place)
        return found


class Collector(Walker):
    """A walker whose notes are `Note`s; the function's values are computed unchanged."""

    def __init__(self):
        super().__init__()
        self.roles: dict[str, tuple[set[int], set[int]]] = {}

    def trace(self, apply: Callable, static: Static, values: list) -> list:
        """Walk `apply(*join(values, static))`, tracking the leaves of its first argument."""
        def call(values):
            params, batch = join(values, static)
            return [leaf for leaf in jax.tree.leaves(apply(params, *batch)) if isinstance(leaf, TRACED)]

        closed = jax.make_jaxpr(call)(values)
        args: list[Any] = []
        paths: set[str] = set()
        for value, keys in zip(values, static.paths, strict=True):
            path, weight = leaf_path(keys[1:]), keys[0].idx == 0
            if weight and path in paths:
                raise ValueError(f"two leaves have the path {path!r}")
            paths |= {path} if weight else set()
            if isinstance(value, QTensor):
                codes, *others = jax.tree.leaves(value)
                args += [track(path, codes) if weight else codes, *others]
            else:
                args.append(track(path, value) if weight and jnp.issubdtype(value.dtype, jnp.floating) else value)
        return self.run(closed.jaxpr, closed.consts, args)

    def contract(self, eqn, values: list) -> list:
        METERS[eqn.primitive.name](self, eqn, values)
        return bind(eqn, [self.plain(value) for value in values])

    def record(self, leaf: Leaf, statistics: Statistics, leading: tuple[int, ...], contracted: tuple[int, ...]) -> None:
        """Note what one matmul saw."""
        self.note(leaf, Note(statistics, leaf.path, leading, contracted))

    def note(self, leaf: Leaf, note: Note) -> None:
        # A slice by an index that a loop computes must be put in its place before the index goes out of scope.
        while leaf.index is not None:
            note = _placed(note, leaf)
            leaf = leaf.parent
        super().note(leaf, note)

    def merge(self, old: Note, new: Note) -> Note:
        if old.contracted != new.contracted:
            raise ValueError(f"{old.path}: one matmul contracts its axes {old.contracted}, another {new.contracted}; "
                             "the statistics of a weight are those of one contracted side")
        leading = tuple(axis for axis in old.leading if axis in new.leading)
        return Note(old.along(leading) + new.along(leading), old.path, leading, old.contracted)

    def empty(self, note: Note) -> Note:
        *leading, channels = note.statistics.max.shape
        return dataclasses.replace(note, statistics=_statistics.empty(tuple(leading), channels))

    def stacked(self, leaf: Leaf, note: Note, scanned: bool) -> tuple[Leaf, Note]:
        if not scanned:
            return leaf, dataclasses.replace(note, statistics=note.statistics.reduce(0))
        leading = tuple(sorted((*note.leading, leaf.axis)))
        place = leading.index(leaf.axis)
        moved = jax.tree.map(lambda a: jnp.moveaxis(a, 0, place), note.statistics)
        return leaf.parent, Note(moved, note.path, leading, note.contracted)


def _placed(note: Note, leaf: Leaf) -> Note:
    """The note of a slice, as one of its parent in which only that slice was seen."""
    leading = tuple(sorted((*note.leading, leaf.axis)))
    place, size = leading.index(leaf.axis), leaf.parent.sizes[leaf.axis]
    *rest, channels = note.statistics.max.shape
    rest.insert(place, size)
    index = jnp.clip(jnp.asarray(leaf.index), 0, size - 1)

    def put(whole, part):
        return lax.dynamic_update_index_in_dim(whole, part, index, place)

    return Note(jax.tree.map(put, _statistics.empty(tuple(rest), channels), note.statistics), note.path, leading, note.contracted)


def _dot(collector: Collector, eqn, values: list) -> None:
    left, right = values[:2]
    if isinstance(left, Tracked) and isinstance(right, Tracked):
        return          # two weights: neither is an activation
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    first = isinstance(left, Tracked)
    weight, x, dims = (left, right, ((lc, rc), (lb, rb))) if first else (right, left, ((rc, lc), (rb, lb)))
    dot = _views.dot(weight.axes, weight.leaf.sizes, x.shape, dims, first)
    if dot is None:
        return
    labels = [name for axis in (*dot.batch, *dot.contracted) for name in dot.of(axis)]
    rows = [name for name in dot.labels if name not in labels]
    lead = [name for axis in dot.batch for name in dot.of(axis)]
    order = [dot.labels.index(name) for name in (*lead, *rows, *labels[len(lead):])]
    leading = tuple(weight.leaf.sizes[axis] for axis in dot.batch)
    channels = 1
    for axis in dot.contracted:
        channels *= weight.leaf.sizes[axis]
    x = x.reshape(dot.split).transpose(order).reshape(*leading, -1, channels)
    collector.record(weight.leaf, _statistics.of_rows(x, leading), dot.batch, dot.contracted)


def _ragged(collector: Collector, eqn, values: list) -> None:
    x, weight, sizes = values[:3]
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_contract, w_contract), (x_batch, _) = numbers.dot_dimension_numbers
    if not isinstance(weight, Tracked) or isinstance(x, Tracked) or x.ndim != 2 or x_batch or len(w_contract) != 1:
        return
    (group,) = numbers.rhs_group_dimensions or (None,)
    axes = None if group is None else [_whole_axis(weight, d) for d in (group, w_contract[0])]
    if axes is None or None in axes:
        return
    x = x if x_contract[0] == 1 else x.T
    collector.record(weight.leaf, _statistics.of_groups(x, sizes), (axes[0],), (axes[1],))


def _whole_axis(value: Tracked, dimension: int) -> int | None:
    runs = value.axes[dimension]
    axis = runs[0].axis if runs else None
    return axis if axis is not None and _views.spans(runs, axis, value.leaf.sizes[axis]) else None


def _packed(collector: Collector, eqn, values: list) -> None:
    packed, parts = eqn.params["packed"], eqn.params["parts"]
    x, codes = values[:parts], values[parts]
    if not isinstance(codes, Tracked) or any(isinstance(part, Tracked) for part in x):
        return
    x = x[0] if parts == 1 else dequantize_rows(QuantizedActivation(*x), packed.scheme.activation)
    x = x[values[-1]] if eqn.params.get("gathered") else x
    contracted = (list(codes.leaf.sizes)[-1],)
    if eqn.params.get("grouped"):
        sizes = values[parts + len(packed.fields)]
        collector.record(codes.leaf, _statistics.of_groups(x, sizes), (list(codes.leaf.sizes)[0],), contracted)
        return
    axes = [_whole_axis(codes, d) for d in range(eqn.params["batch"])]
    if None in axes:
        return
    x = x.reshape(*(codes.leaf.sizes[axis] for axis in axes), -1, x.shape[-1])
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    x = x.transpose(*order, len(axes), len(axes) + 1)
    leading = tuple(sorted(axes))
    collector.record(codes.leaf, _statistics.of_rows(x, x.shape[:len(axes)]), leading, contracted)


METERS: dict[str, Callable] = {
    "dot_general": _dot, "ragged_dot_general": _ragged, "quantized_matmul": _packed, "quantized_grouped_matmul": _packed,
}
"""Primitive name to `(collector, eqn, values)`, which records what its weight saw."""

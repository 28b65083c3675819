"""Run an unchanged JAX function on packed weights.

The function is traced with the logical shapes and dtypes of its weights, then evaluated with each `dot_general`, `ragged_dot` or row
`gather` on a packed leaf replaced by `qfunc.matmul`, `qfunc.grouped_matmul` or `qfunc.take`. Whatever the function does to the
weight's axes first (transposes, folded heads, batch axes, slices of a stack) is followed, not computed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qfunc import _views
from qfunc._paths import leaf_path
from qfunc._qtensor import QTensor
from qfunc._tracked import Leaf, Tracked, is_packed, track_packed, where
from qfunc._trees import join, split
from qfunc._walk import Walker, indexed
from qfunc.kernels import grouped_matmul, matmul, take

UNKNOWN = ("raise", "dequantize")


def functional(apply: Callable, *, on_unknown: str = "raise") -> Callable:
    """A function that runs `apply` on parameters that hold `QTensor`s.

        qparams = qfunc.quantize(params, "w8a8_dynamic")
        y = qfunc.layers.functional(apply)(qparams, x)

    Arguments:
        apply: any JAX function `apply(params, *args, **kwargs)`; it sees arrays of the logical shapes and dtypes.
        on_unknown: what to do where a packed leaf reaches an operation that has no packed form: `"raise"`, or `"dequantize"` it there.

    Returns: a function of the same arguments and results. QTensors may stand anywhere in the arguments; one that is returned untouched
    comes back as it is. Python numbers, strings and functions among the arguments stay what they are. Each matmul with a packed leaf
    becomes exactly one `quantized_matmul`, in the dtype that the trace gave it; jit, vmap, scan over stacked layers and derivatives in
    the float arguments work. Custom derivatives and inner jits that no packed leaf enters are kept; others are inlined.

    Raises: ValueError, naming the path and the operation, where a packed leaf reaches another operation, or is contracted over its
    output axes.
    """
    if on_unknown not in UNKNOWN:
        raise ValueError(f"on_unknown: expected one of {', '.join(UNKNOWN)}, found {on_unknown!r}")

    @functools.wraps(apply)
    def run(params, *args, **kwargs):
        values, static = split((params, args, kwargs))
        if not any(isinstance(value, QTensor) for value in values):
            return apply(params, *args, **kwargs)
        rest: list[Any] = []

        def call(values):
            params, args, kwargs = join(values, static)
            found, others = split(apply(params, *args, **kwargs))
            rest[:] = [others]
            return found

        closed = jax.make_jaxpr(call)([_logical(value) for value in values])
        replacer = Replacer(on_unknown)
        tracked = [track_packed(_path(keys), value) if isinstance(value, QTensor) else value
                   for value, keys in zip(values, static.paths, strict=True)]
        outs = replacer.run(closed.jaxpr, closed.consts, tracked)
        return join([replacer.result(out) for out in outs], rest[0])

    return run


def _path(keys) -> str:
    return leaf_path(keys[1:]) if keys[0].idx == 0 else leaf_path(keys)


def _logical(value):
    if not isinstance(value, QTensor):
        return value
    return jax.ShapeDtypeStruct(value.shape, jnp.dtype(value.dtype))


class Replacer(Walker):
    """A walker that has no arrays for packed leaves: it binds packed matmuls where they are contracted."""

    def __init__(self, on_unknown: str):
        super().__init__()
        self.on_unknown = on_unknown

    def plain(self, value, eqn=None):
        if not is_packed(value):
            return super().plain(value, eqn)
        if self.on_unknown == "raise":
            reached = "the result of the function" if eqn is None else where(eqn)
            raise ValueError(f"{value.leaf.path}: a packed weight, {value.leaf.packed!r}, reaches {reached}, which has no packed form; "
                             "keep it in floating point by a rule, or pass on_unknown='dequantize'")
        return materialize(value)

    def result(self, value):
        """A value that the function returns."""
        untouched = is_packed(value) and value.leaf.parent is None and value.axes == _views.whole(value.leaf.sizes)
        return value.leaf.packed if untouched else self.plain(value)

    def contract(self, eqn, values: list) -> list:
        packed = [i for i, value in enumerate(values[:2]) if is_packed(value)]
        rule = PACKED.get(eqn.primitive.name)
        if rule is None or len(packed) != 1 or not jnp.issubdtype(values[1 - packed[0]].dtype, jnp.floating):
            return self.stray(eqn, values)
        out = rule(eqn, values, packed[0])
        return self.stray(eqn, values) if out is None else [out]

    def pick(self, eqn, values: list) -> list:
        alone = is_packed(values[0]) and not any(is_packed(value) for value in values[1:])
        out = _rows(eqn, *values) if alone else None
        return self.stray(eqn, values) if out is None else [out]


def roles(leaf: Leaf) -> tuple[list[int], list[int], list[int]]:
    """The remaining axes of a packed leaf, in the owner's order: (batch, contracted, output)."""
    view, rest = leaf.packed.view, [axis for axis in leaf.sizes if axis >= leaf.batch]
    first = 1 + len(view.outs if view.transposed else view.ins)
    one, two = rest[:first], rest[first:]
    return leaf.leading, *((two, one) if view.transposed else (one, two))


def materialize(value: Tracked) -> jax.Array:
    """The float array of a view of a packed leaf."""
    leaf = value.leaf
    parts = [part for dimension in _views.elementary(value.axes) for part in dimension]
    cut = sorted((part for part in parts if part[1].axis is not None), key=lambda part: (part[1].axis, -part[1].step))
    array = leaf.packed.dequantize(value.dtype).reshape([run.size for _, run in cut])
    return _place(array, [name for name, _ in cut], [(name, run.size) for name, run in parts], _views.shape(value.axes))


def _place(array, labels: list, target: list, shape) -> jax.Array:
    """Reorder the labelled dimensions of an array to those of `target` (label, size), repeat it along the labels it lacks, reshape."""
    array = array.transpose([labels.index(name) for name, _ in target if name in labels])
    sizes = [size for _, size in target]
    kept = [i for i, (name, _) in enumerate(target) if name in labels]
    return lax.broadcast_in_dim(array, sizes, kept).reshape(shape)


def _dot(eqn, values: list, place: int):
    weight, x = values[place], values[1 - place]
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    dims = ((rc, lc), (rb, lb)) if place else ((lc, rc), (lb, rb))
    leaf, q = weight.leaf, weight.leaf.packed
    dot = _views.dot(weight.axes, leaf.sizes, x.shape, dims, place == 0)
    batch, ins, outs = roles(leaf)
    real = {axis for axis, size in leaf.sizes.items() if size > 1}
    if dot is None or not (set(ins) & real <= set(dot.contracted) and set(outs) & real <= set(dot.free)):
        return None
    summed = [axis for axis in batch if axis in dot.contracted]
    seen = [axis for axis in batch if axis in dot.batch or axis in summed]
    lead = [name for axis in seen for name in dot.of(axis)]
    inner = [name for axis in ins for name in dot.of(axis)]
    rows = [name for name in dot.labels if name not in lead and name not in inner]
    sizes = dict(zip(dot.labels, dot.split, strict=True))
    x = x.reshape(dot.split).transpose([dot.labels.index(name) for name in (*lead, *rows, *inner)])
    row_sizes, columns = [sizes[name] for name in rows], q.matrix_shape[-2]
    if batch:
        x = x.reshape(*(leaf.sizes[axis] if axis in seen else 1 for axis in batch), math.prod(row_sizes), columns)
    else:
        x = x.reshape(*row_sizes, columns)
    out = eqn.outvars[0].aval
    y = matmul(x, q, out_dtype=jnp.float32 if summed else out.dtype)
    if summed:
        y = y.sum([batch.index(axis) for axis in summed]).astype(out.dtype)
    labels = [name for axis in batch if axis not in summed for name in dot.of(axis)] + rows
    labels += [name for axis in outs for name in dot.of(axis)]
    every = dict(dot.target)
    return _place(y.reshape([every[name] for name in labels]), labels, list(dot.target), out.shape)


def _ragged(eqn, values: list, place: int):
    x, weight, sizes, *rest = values
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_contract, w_contract), (x_batch, _) = numbers.dot_dimension_numbers
    if place != 1 or rest or x.ndim != 2 or x_batch or eqn.params.get("group_offset") is not None:
        return None
    leaf = weight.leaf
    batch, ins, outs = roles(leaf)
    (group,), (contract,) = numbers.rhs_group_dimensions, w_contract
    free = 3 - group - contract
    wanted = ((group, batch), (contract, ins), (free, outs))
    if len(weight.axes) != 3 or any(_axes(weight, dimension) != [a for a in axes if leaf.sizes[a] > 1] for dimension, axes in wanted):
        return None
    y = grouped_matmul(x if tuple(x_contract) == (1,) else x.T, leaf.packed, sizes, out_dtype=eqn.outvars[0].aval.dtype)
    return y


def _axes(value: Tracked, dimension: int) -> list[int] | None:
    """The axes of the leaf that make up a dimension, each whole and in its own order; None where one is cut or repeated."""
    order: list[int] = []
    runs = value.axes[dimension]
    for run in runs:
        if run.axis not in order:
            order.append(run.axis)
    grouped = [tuple(run for run in runs if run.axis == axis) for axis in order]
    if None in order or tuple(run for group in grouped for run in group) != runs:
        return None
    return order if all(_views.spans(g, axis, value.leaf.sizes[axis]) for g, axis in zip(grouped, order, strict=True)) else None


def _rows(eqn, table: Tracked, *index):
    """Rows of an embedding: single positions of all output axes of the leaf, its contracted axes whole."""
    shape = _views.shape(table.axes)
    place = indexed(eqn, shape)
    batch, ins, outs = roles(table.leaf)
    real = [axis for axis, size in table.leaf.sizes.items() if size > 1]
    if place is None or len(shape) != 2 or batch or _axes(table, place) != [a for a in outs if a in real]:
        return None
    if _axes(table, 1 - place) != [a for a in ins if a in real]:
        return None
    out, numbers = eqn.outvars[0].aval, eqn.params.get("dimension_numbers")
    ids = _ids(eqn, place, index)
    inside = jnp.clip(ids, 0, shape[place] - 1)
    rows = take(table.leaf.packed, inside).astype(out.dtype)
    if numbers is None:
        return rows.reshape(out.shape)
    if eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        fill = eqn.params["fill_value"]
        rows = jnp.where((ids == inside)[..., None], rows, jnp.nan if fill is None else fill).astype(out.dtype)
    kept = numbers.offset_dims
    # The dimension of the single position, where it is not collapsed, has size 1 and comes back by the reshape.
    hidden = kept[0] if len(kept) == 1 else kept[1 - place] - (kept[place] < kept[1 - place])
    return jnp.moveaxis(rows, -1, hidden).reshape(out.shape)


def _ids(eqn, place: int, index):
    """The positions that a gather, dynamic slice or slice asks for."""
    if eqn.primitive.name == "gather":
        return index[0][..., eqn.params["dimension_numbers"].start_index_map.index(place)]
    return jnp.asarray(index[place] if index else eqn.params["start_indices"][place])


PACKED: dict[str, Callable] = {"dot_general": _dot, "ragged_dot_general": _ragged}
"""Primitive name to `(eqn, values, which operand is packed) -> result, or None where the leaf's axes do not fit`."""

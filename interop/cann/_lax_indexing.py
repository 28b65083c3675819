"""Torch rules of lax's `gather` and `scatter` family, for all of their dimension numbers.

A window of a gather starts where an index says and is copied whole: the position of every element of the result in every dimension of the
operand is a start plus an offset, so one advanced index does it. A scatter is the same the other way round, on the flattened operand with
one more element behind its end, where updates go that are dropped. Nothing is read back to the host and nothing is written in place.
"""

from __future__ import annotations

import torch
from jax.lax import GatherScatterMode

from ._arrays import CARRIERS, torch_dtype
from ._build import UnknownPrimitive, is_literal, rule
from ._lax_elementwise import UNSIGNED, cast, every, narrowed, widened
from ._lax_shapes import carried


@rule("gather")
def _gather(eqn, scope):
    numbers, sizes, mode = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], eqn.params["mode"]
    operand, result = eqn.invars[0].aval, eqn.outvars[0].aval
    dtype = torch_dtype(operand.dtype)
    fill = eqn.params.get("fill_value")
    rows = _rows(numbers, sizes, operand.shape, result.ndim)
    drop = mode == GatherScatterMode.FILL_OR_DROP
    geometry = Geometry(numbers.start_index_map, numbers.operand_batching_dims, numbers.start_indices_batching_dims,
                        numbers.offset_dims, (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims), tuple(sizes), operand.shape,
                        result.ndim)

    def run(x, indices):
        indices = widened(indices).to(torch.int64)
        if rows is not None:
            axis, order = rows
            starts = indices[..., 0]
            limit = operand.shape[axis] - 1
            valid = (starts >= 0) & (starts <= limit) if drop else None
            picked = torch.index_select(x, axis, starts.clamp(0, limit).reshape(-1))
            picked = picked.reshape((*x.shape[:axis], *starts.shape, *x.shape[axis + 1:])).permute(order)
            valid = valid.reshape(geometry.spread(valid.shape)) if drop else None
        else:
            positions, valid = geometry.positions(indices, x.device)
            valid = valid if drop else None
            picked = x[positions]
        return picked if valid is None else torch.where(valid, picked, _filling(fill, dtype, picked))

    return every(eqn, carried(eqn, run))


def _filling(fill, dtype, like):
    """The value of elements out of range: as given, or NaN, the least signed or the largest unsigned integer."""
    if fill is None:
        kind = UNSIGNED.get(dtype)
        fill = float("nan") if dtype.is_floating_point else True if dtype == torch.bool else \
            -1 if kind is not None else 255 if dtype == torch.uint8 else torch.iinfo(dtype).min
    if like.dtype != dtype:                     # the bits of a type that torch only stores
        return torch.full((), float(fill), dtype=torch.float32, device=like.device).to(dtype).view(like.dtype) if dtype.is_floating_point \
            else torch.full((), _wrapped(int(fill), like.dtype), dtype=like.dtype, device=like.device)
    return torch.full((), fill, dtype=like.dtype, device=like.device)


def _wrapped(value: int, dtype) -> int:
    """An unsigned number as the signed one of the same bits."""
    bits = 8 * dtype.itemsize
    value &= 2**bits - 1
    return value - 2**bits if dtype.is_signed and value >> (bits - 1) else value


def _rows(numbers, sizes, shape, rank: int):
    """(axis, order of the result) of a gather that takes whole rows along one axis, None for others."""
    if len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return None
    (axis,) = numbers.start_index_map
    whole = all(size == have for i, (size, have) in enumerate(zip(sizes, shape, strict=True)) if i != axis)
    if not whole or sizes[axis] != 1 or tuple(numbers.collapsed_slice_dims) != (axis,) or not shape[axis]:
        return None
    batch = [d for d in range(rank) if d not in numbers.offset_dims]
    # The selection has the index axes where the row axis was; the result wants them at `batch`.
    order = [0] * rank
    offsets = list(numbers.offset_dims)
    for i, d in enumerate(batch):
        order[d] = axis + i
    for i, d in enumerate(offsets):
        order[d] = i if i < axis else i + len(batch)
    return axis, order


class Geometry:
    """Where the elements of windows lie, for a gather's result or a scatter's updates.

    Arguments: `starts`: the operand's dimension of each index component; `batching`, `index_batching`: dimensions that operand and
    indices share; `offsets`: dimensions of the result that run inside a window; `dropped`: dimensions of the operand that have none;
    `sizes` of the window; `shape` of the operand; `rank` of the result.
    """

    def __init__(self, starts, batching, index_batching, offsets, dropped, sizes, shape, rank: int):
        self.starts, self.batching, self.index_batching = tuple(starts), tuple(batching), tuple(index_batching)
        self.sizes, self.shape, self.rank = sizes, tuple(shape), rank
        self.batch = [d for d in range(rank) if d not in offsets]
        inside = [d for d in range(len(shape)) if d not in dropped]
        self.window = dict(zip(inside, offsets, strict=True))

    def spread(self, batch_shape) -> list[int]:
        """A shape of the batch dimensions as one of the result's rank."""
        own = [1] * self.rank
        for d, size in zip(self.batch, batch_shape, strict=True):
            own[d] = size
        return own

    def positions(self, indices, device, clamp: bool = True):
        """(index of every dimension of the operand, whether the window lies inside), broadcastable to the result."""
        batch_shape = indices.shape[:-1]
        found, valid = [], None
        for d, have in enumerate(self.shape):
            place = None
            if d in self.starts:
                start = indices[..., self.starts.index(d)]
                last = have - self.sizes[d]
                inside = (start >= 0) & (start <= last)
                valid = inside if valid is None else valid & inside
                place = (start.clamp(0, max(last, 0)) if clamp else start).reshape(self.spread(batch_shape))
            elif d in self.batching:
                axis = self.index_batching[self.batching.index(d)]
                own = [1] * self.rank
                own[self.batch[axis]] = batch_shape[axis]
                place = torch.arange(batch_shape[axis], device=device).reshape(own)
            if d in self.window and self.sizes[d] > 1 or place is None:
                own = [1] * self.rank
                if d in self.window:
                    own[self.window[d]] = self.sizes[d]
                offset = torch.arange(self.sizes[d], device=device).reshape(own)
                place = offset if place is None else place + offset
            found.append(place)
        found = tuple(torch.broadcast_tensors(*found)) if found else ()
        return found, None if valid is None else valid.reshape(self.spread(batch_shape))


_REDUCTIONS = {"scatter-add": "sum", "scatter_add": "sum", "scatter-mul": "prod", "scatter_mul": "prod", "scatter_min": "amin",
               "scatter-min": "amin", "scatter_max": "amax", "scatter-max": "amax", "scatter": None, "scatter-sub": "less"}


@rule(*_REDUCTIONS)
def _scatter(eqn, scope):
    """Where indices repeat, `scatter` leaves open which update stays; an update that is a function of what was there has no rule."""
    numbers, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
    operand, _, updates = (v.aval for v in eqn.invars)
    dropped = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    inside = [d for d in range(operand.ndim) if d not in dropped]
    sizes = [1] * operand.ndim
    for d, place in zip(inside, numbers.update_window_dims, strict=True):
        sizes[d] = updates.shape[place]
    geometry = Geometry(numbers.scatter_dims_to_operand_dims, numbers.operand_batching_dims, numbers.scatter_indices_batching_dims,
                        numbers.update_window_dims, dropped, tuple(sizes), operand.shape, updates.ndim)
    reduction, total, dtype = _REDUCTIONS[eqn.primitive.name], operand.size, torch_dtype(operand.dtype)
    if reduction is None and _combines(eqn.params["update_jaxpr"]):
        raise UnknownPrimitive(eqn, "an update by a function (`.at[].apply`)")
    clip = mode == GatherScatterMode.CLIP

    def run(x, indices, updates):
        positions, valid = geometry.positions(widened(indices).to(torch.int64), x.device)
        flat = torch.zeros((), dtype=torch.int64, device=x.device)
        for place, have in zip(positions, operand.shape, strict=True):
            flat = flat * have + place
        flat = flat.expand(updates.shape) if flat.ndim == updates.ndim else flat.reshape((1,) * updates.ndim).expand(updates.shape)
        if valid is not None and not clip:
            flat = torch.where(valid, flat, total)
        base = torch.cat([x.reshape(-1), x.new_zeros(1)])
        flat, updates = flat.reshape(-1), updates.reshape(-1)
        if reduction is None:
            out = torch.scatter(base, 0, flat, updates)
        elif reduction in ("sum", "less"):
            out = torch.scatter_add(base, 0, flat, updates if reduction == "sum" else -updates)
        else:
            out = torch.scatter_reduce(base, 0, flat, updates, reduction)
        return out[:-1].reshape(x.shape)

    if reduction is None:
        return every(eqn, carried(eqn, run))
    if dtype in UNSIGNED:
        return every(eqn, lambda x, indices, updates: narrowed(run(widened(x), indices, widened(updates)), dtype))
    if dtype in CARRIERS:                       # 8-bit floats
        return every(eqn, lambda x, indices, updates: cast(run(x.float(), indices, updates.float()), torch.float32, dtype))
    return every(eqn, run)


def _combines(jaxpr) -> bool:
    """True where a scatter's function of (old, update) is more than the update."""
    if jaxpr is None:
        return False
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    (out,) = jaxpr.outvars
    return is_literal(out) or out is not jaxpr.invars[1]

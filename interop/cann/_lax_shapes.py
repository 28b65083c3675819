"""Torch rules of lax primitives that move data: shapes, slices, concatenation, padding. None of them writes in place."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ._arrays import CARRIERS, torch_dtype
from ._build import is_literal, number, rule
from ._lax_elementwise import every
from ._program import abstract, device


def carried(eqn, function: Callable) -> Callable:
    """`function` on the bits of types that torch only stores."""
    _, dtype = abstract(eqn.outvars[0].aval)
    if dtype not in CARRIERS:
        return function
    carrier = CARRIERS[dtype]
    return lambda *operands: function(*(x.view(carrier) if x.dtype == dtype else x for x in operands)).view(dtype)


@rule("broadcast_in_dim")
def _broadcast(eqn, scope):
    shape, places = tuple(eqn.params["shape"]), eqn.params["broadcast_dimensions"]
    (v, *_) = eqn.invars
    if is_literal(v):
        value, dtype = number(v), torch_dtype(v.aval.dtype)
        return lambda: torch.full(shape, value, dtype=dtype, device=device())
    own = [1] * len(shape)
    for size, place in zip(abstract(v.aval)[0], places, strict=False):
        own[place] = size
    if _is_key(v):
        return lambda x: x.reshape(*own, 2).expand(*shape, 2)
    return lambda x: x.reshape(own).expand(shape)


def _is_key(v) -> bool:
    return not hasattr(v.aval.dtype, "itemsize") or v.aval.dtype.name.startswith("key<")


@rule("reshape", "squeeze", "expand_dims")
def _reshape(eqn, scope):
    if eqn.params.get("dimensions") is not None and eqn.primitive.name == "reshape":
        order = tuple(eqn.params["dimensions"])
        shape = abstract(eqn.outvars[0].aval)[0]
        return every(eqn, lambda x: x.permute(order).reshape(shape))
    shape = abstract(eqn.outvars[0].aval)[0]
    return every(eqn, lambda x: x.reshape(shape))


@rule("transpose")
def _transpose(eqn, scope):
    order = tuple(eqn.params["permutation"])
    return every(eqn, lambda x: x.permute(order))


@rule("rev")
def _reverse(eqn, scope):
    axes = tuple(eqn.params["dimensions"])
    return every(eqn, carried(eqn, lambda x: torch.flip(x, axes)))


@rule("slice")
def _slice(eqn, scope):
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    keys = tuple(slice(a, b, s) for a, b, s in zip(starts, limits, strides, strict=True))
    return every(eqn, lambda x: x[keys])


@rule("concatenate")
def _concatenate(eqn, scope):
    axis = eqn.params["dimension"]
    return every(eqn, carried(eqn, lambda *operands: torch.cat(operands, axis)))


@rule("stack")
def _stack(eqn, scope):
    axis = eqn.params["axis"]
    return every(eqn, carried(eqn, lambda *operands: torch.stack(operands, axis)))


@rule("unstack")
def _unstack(eqn, scope):
    axis = eqn.params["axis"]
    return every(eqn, lambda x: torch.unbind(x, axis))


@rule("tile")
def _tile(eqn, scope):
    reps = tuple(eqn.params["reps"])
    return every(eqn, carried(eqn, lambda x: x.repeat(reps)))


@rule("split")
def _split(eqn, scope):
    sizes, axis = list(eqn.params["sizes"]), eqn.params["axis"]
    return every(eqn, lambda x: torch.split(x, sizes, axis))


@rule("pad")
def _pad(eqn, scope):
    """Edges may be negative (cut off), and there may be gaps inside; a literal edge without gaps is one torch call."""
    config, (operand, fill) = eqn.params["padding_config"], eqn.invars
    _, dtype = abstract(eqn.outvars[0].aval)
    if is_literal(fill) and not is_literal(operand) and dtype not in CARRIERS:
        value = number(fill)
        return lambda x: padded(x, value, config)
    return every(eqn, carried(eqn, lambda x, fill: padded(x, fill, config)))


def padded(x, fill, config):
    """lax's pad: (low, high, inner) times `fill`, a number or a tensor without axes, at the ends of each axis and between elements."""
    if not isinstance(fill, torch.Tensor):
        if all(low >= 0 and high >= 0 and not inner for low, high, inner in config):
            edges = [edge for low, high, _ in reversed(config) for edge in (low, high)]
            if not any(edges):
                return x
            if x.dtype == torch.bool:
                return torch.nn.functional.pad(x.to(torch.uint8), edges, value=int(fill)).to(torch.bool)
            return torch.nn.functional.pad(x, edges, value=fill)
        fill = torch.full((), fill, dtype=x.dtype, device=x.device)
    for axis, (low, high, inner) in enumerate(config):
        x = _pad_axis(x, fill, axis, low, high, inner)
    return x


def _pad_axis(x, fill, axis: int, low: int, high: int, inner: int):
    if inner and x.shape[axis] > 1:
        # Each element is followed by its gap; the last gap is cut off again.
        gaps = fill.expand(*x.shape[:axis + 1], inner, *x.shape[axis + 1:])
        wide = torch.cat([x.unsqueeze(axis + 1), gaps], axis + 1).flatten(axis, axis + 1)
        x = wide.narrow(axis, 0, wide.shape[axis] - inner)
    if low < 0 or high < 0:
        first = max(-low, 0)
        x = x.narrow(axis, first, max(x.shape[axis] - first - max(-high, 0), 0))
    parts = [fill.expand(*x.shape[:axis], size, *x.shape[axis + 1:]) for size in (max(low, 0), max(high, 0))]
    return torch.cat([part for part in (parts[0], x, parts[1]) if part.shape[axis]] or [x], axis)


@rule("dynamic_slice")
def _dynamic_slice(eqn, scope):
    """Starts are clamped so that the slice lies inside; they stay on the device, where they become indices."""
    sizes, (operand, *starts) = eqn.params["slice_sizes"], eqn.invars
    shape = operand.aval.shape
    cut = [i for i, (size, have) in enumerate(zip(sizes, shape, strict=True)) if size != have]
    fixed = {i: min(max(number(starts[i]), 0), shape[i] - sizes[i]) for i in cut if is_literal(starts[i])}
    moving = [i for i in cut if i not in fixed]
    kept = tuple(slice(fixed[i], fixed[i] + sizes[i]) if i in fixed else slice(None) for i in range(len(shape)))

    def run(x, *starts):
        x = x[kept]
        for i in moving:
            start = starts[i].to(torch.int64).clamp(0, shape[i] - sizes[i])
            x = torch.index_select(x, i, (start + torch.arange(sizes[i], device=x.device)).reshape(-1))
        return x
    return every(eqn, carried(eqn, run))


@rule("dynamic_update_slice")
def _dynamic_update_slice(eqn, scope):
    """A copy of the operand with the update in it."""
    operand, update, *starts = eqn.invars
    shape, sizes = operand.aval.shape, update.aval.shape
    cut = [i for i, (size, have) in enumerate(zip(sizes, shape, strict=True)) if size != have]
    fixed = {i: min(max(number(starts[i]), 0), shape[i] - sizes[i]) for i in cut if is_literal(starts[i])}

    def place(x, update, starts, axes):
        """`update` along `axes` of x, one axis inside another."""
        if not axes:
            return update.expand(x.shape) if update.shape != x.shape else update
        axis, rest = axes[0], axes[1:]
        if axis in fixed:
            inner = x.narrow(axis, fixed[axis], sizes[axis])
            return torch.slice_scatter(x, place(inner, update, starts, rest), axis, fixed[axis], fixed[axis] + sizes[axis])
        start = starts[axis].to(torch.int64).clamp(0, shape[axis] - sizes[axis])
        rows = (start + torch.arange(sizes[axis], device=x.device)).reshape(-1)
        inner = place(torch.index_select(x, axis, rows), update, starts, rest) if rest else update
        return torch.index_copy(x, axis, rows, inner)

    return every(eqn, carried(eqn, lambda x, update, *starts: place(x, update, starts, cut)))

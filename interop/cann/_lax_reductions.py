"""Torch rules of lax reductions, cumulative operations, sorting and selection of the largest."""

from __future__ import annotations

import torch

from ._arrays import CARRIERS, torch_dtype
from ._build import UnknownPrimitive, rule
from ._lax_elementwise import EIGHT, UNSIGNED, cast, every, narrowed, widened
from ._lax_shapes import padded
from ._program import abstract


def _reduction(function):
    """`function(x, axes)`; no axes at all leave x as it is. Unsigned numbers are reduced in 64 bits, 8-bit floats in 32."""
    def factory(eqn, scope):
        axes = tuple(eqn.params["axes"])
        _, dtype = abstract(eqn.outvars[0].aval)
        if not axes:
            return every(eqn, lambda x: x)
        if dtype in UNSIGNED:
            return every(eqn, lambda x: narrowed(function(widened(x), axes), dtype))
        if dtype in EIGHT:
            return every(eqn, lambda x: cast(function(x.to(torch.float32), axes), torch.float32, dtype))
        return every(eqn, lambda x: function(x, axes).to(dtype))
    return factory


def _each(function):
    """A reduction over one axis at a time."""
    def run(x, axes):
        for axis in sorted(axes, reverse=True):
            x = function(x, axis)
        return x
    return run


def _sum(x, axes):
    return x.sum(axes) if x.is_floating_point() or x.is_complex() else x.sum(axes, dtype=x.dtype)


def _largest(x, axes):
    return x.any(axes) if x.dtype == torch.bool else x.amax(axes) if x.numel() else _nothing(x, axes, False)


def _smallest(x, axes):
    return x.all(axes) if x.dtype == torch.bool else x.amin(axes) if x.numel() else _nothing(x, axes, True)


def _nothing(x, axes, high: bool):
    """The extreme of no elements is the end of the type."""
    shape = [size for axis, size in enumerate(x.shape) if axis not in axes]
    if x.is_floating_point():
        return torch.full(shape, float("inf") if high else float("-inf"), dtype=x.dtype, device=x.device)
    ends = torch.iinfo(x.dtype)
    return torch.full(shape, ends.max if high else ends.min, dtype=x.dtype, device=x.device)


def _bitwise(function):
    """And, or, xor over an axis: by halves, since torch has no such reduction."""
    def run(x, axis):
        while x.shape[axis] > 1:
            half = x.shape[axis] // 2
            rest = x.narrow(axis, 2 * half, x.shape[axis] - 2 * half)
            x = torch.cat([function(x.narrow(axis, 0, half), x.narrow(axis, half, half)), rest], axis)
        return x.squeeze(axis)
    return _each(run)


def _logical(reduce, bitwise):
    return lambda x, axes: reduce(x, axes) if x.dtype == torch.bool else bitwise(x, axes)


_MONOIDS = {
    "sum": ("add", _sum, torch.add), "max": ("max", _largest, torch.maximum), "min": ("min", _smallest, torch.minimum),
    "prod": ("mul", _each(lambda x, axis: torch.prod(x, axis, dtype=x.dtype)), torch.mul),
    "and": ("and", _logical(lambda x, axes: x.all(axes), _bitwise(torch.bitwise_and)), torch.bitwise_and),
    "or": ("or", _logical(lambda x, axes: x.any(axes), _bitwise(torch.bitwise_or)), torch.bitwise_or),
    "xor": ("xor", _bitwise(torch.bitwise_xor), torch.bitwise_xor),
}
for _name, (_, _function, _) in _MONOIDS.items():
    rule(f"reduce_{_name}")(_reduction(_function))


@rule("reduce")
def _reduce(eqn, scope):
    """By one operation of two numbers that has a reduction of its own; where the start comes in does not matter to it."""
    body, dtype = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"]), torch_dtype(eqn.outvars[0].aval.dtype)
    name = body.eqns[0].primitive.name if len(body.eqns) == 1 and len(eqn.outvars) == 1 else None
    found = [(function, last) for monoid, function, last in _MONOIDS.values() if monoid == name]
    if not found or set(body.eqns[0].invars) != set(body.invars) or dtype in CARRIERS:
        raise UnknownPrimitive(eqn)
    (function, last), axes = found[0], tuple(eqn.params["dimensions"])
    return every(eqn, lambda x, start: [last(function(x, axes).to(dtype) if axes else x, start)])


_WINDOWS = {"reduce_window_sum": (0, lambda x: x.sum(-1)), "reduce_window_max": (False, lambda x: x.amax(-1)),
            "reduce_window_min": (True, lambda x: x.amin(-1))}


@rule(*_WINDOWS)
def _window(eqn, scope):
    """Pooling, one axis after another: windows are views of what is padded by the neutral element."""
    p, (fill, reduce) = eqn.params, _WINDOWS[eqn.primitive.name]
    _, dtype = abstract(eqn.outvars[0].aval)
    if dtype == torch.bool or dtype in UNSIGNED or dtype in EIGHT:
        raise UnknownPrimitive(eqn)
    if isinstance(fill, bool):
        fill = _nothing(torch.empty(0, dtype=dtype), (0,), fill).item()
    config = [(low, high, by - 1) for (low, high), by in zip(p["padding"], p["base_dilation"], strict=True)]
    axes = list(enumerate(zip(p["window_dimensions"], p["window_strides"], p["window_dilation"], strict=True)))

    def run(x):
        x = padded(x, fill, config)
        for axis, (size, stride, by) in axes:
            if (size, stride) != (1, 1):
                x = reduce(x.unfold(axis, (size - 1) * by + 1, stride)[..., ::by]).to(dtype)
        return x
    return every(eqn, run)


def _index(function):
    def factory(eqn, scope):
        (axis,), dtype = eqn.params["axes"], torch_dtype(eqn.params["index_dtype"])
        return every(eqn, lambda x: function(_ordered(x), axis).to(dtype))
    return factory


def _ordered(x):
    """Types that torch can compare."""
    return x.to(torch.uint8) if x.dtype == torch.bool else x.to(torch.float32) if x.dtype in EIGHT else widened(x)


rule("argmax")(_index(torch.argmax))
rule("argmin")(_index(torch.argmin))


def _cumulative(function):
    def factory(eqn, scope):
        axis, reverse = eqn.params["axis"], eqn.params["reverse"]
        _, dtype = abstract(eqn.outvars[0].aval)

        def run(x):
            x = _ordered(x) if x.dtype in EIGHT else widened(x)
            x = torch.flip(x, (axis,)) if reverse else x
            x = function(x, axis)
            x = torch.flip(x, (axis,)) if reverse else x
            return cast(x, torch.float32, dtype) if dtype in EIGHT else narrowed(x, dtype)
        return every(eqn, run)
    return factory


for _name, _function in {
    "cumsum": lambda x, axis: torch.cumsum(x, axis, dtype=x.dtype), "cumprod": lambda x, axis: torch.cumprod(x, axis, dtype=x.dtype),
    "cummax": lambda x, axis: torch.cummax(x, axis).values, "cummin": lambda x, axis: torch.cummin(x, axis).values,
    "cumlogsumexp": torch.logcumsumexp,
}.items():
    rule(_name)(_cumulative(_function))


@rule("sort")
def _sort(eqn, scope):
    """Several operands are ordered by the first `num_keys`: stable sorts from the last key to the first are one by all of them."""
    axis, keys = eqn.params["dimension"], eqn.params["num_keys"]
    dtypes = [torch_dtype(v.aval.dtype) for v in eqn.outvars]

    def run(*operands):
        if len(operands) == 1:
            values, _ = torch.sort(_ordered(operands[0]), dim=axis, stable=True)
            return [narrowed(values, dtypes[0]) if values.dtype != dtypes[0] else values]
        order = None
        for key in reversed(operands[:keys]):
            key = _ordered(key)
            key = key if order is None else torch.gather(key, axis, order)
            step = torch.sort(key, dim=axis, stable=True).indices
            order = step if order is None else torch.gather(order, axis, step)
        return [_gathered(x, axis, order) for x in operands]
    return every(eqn, run)


def _gathered(x, axis, order):
    signed = CARRIERS.get(x.dtype)
    return torch.gather(x, axis, order) if signed is None else torch.gather(x.view(signed), axis, order).view(x.dtype)


@rule("top_k")
def _top_k(eqn, scope):
    """Of equal values the first comes first, which `torch.topk` does not promise and routing to experts must keep."""
    k, axis = eqn.params["k"], eqn.params.get("axis", -1)
    axis = axis % max(eqn.invars[0].aval.ndim, 1)
    dtype = torch_dtype(eqn.outvars[1].aval.dtype)

    def run(x):
        values, order = torch.sort(_ordered(x), dim=axis, descending=True, stable=True)
        return narrowed(values.narrow(axis, 0, k), x.dtype), order.narrow(axis, 0, k).to(dtype)
    return every(eqn, run)


@rule("approx_top_k")
def _approx_top_k(eqn, scope):
    """Exact: allowed by its contract."""
    k, axis, largest = eqn.params["k"], eqn.params["reduction_dimension"], eqn.params["is_max_k"]

    def run(x):
        values, order = torch.sort(x, dim=axis, descending=largest, stable=True)
        return values.narrow(axis, 0, k), order.narrow(axis, 0, k).to(torch.int32)
    return every(eqn, run)

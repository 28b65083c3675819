"""Between the operands of a call and the arrays of a launch: what XLA does in front of a kernel and behind it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qfunc import _activation
from qfunc._codec import dynamic_map
from qfunc._codes import FP4_BNB, NF4, code

from .. import _reference
from .._dispatch import Call
from ._launch import Launch

TABLES = {"nf4": NF4, "fp4_bnb": FP4_BNB}


def activation(call: Call, *operands, quantize) -> tuple:
    """The operands of a matmul with x as the kernels take it: float or codes, smoothed and permuted.

    `quantize(x, extra, scope) -> [codes, scale(, zero)]` is asked for codes where the call quantizes x: x float, `extra` the calibrated
    (scale[, zero]), `scope` its leading axes with scales of their own. Returns (parts of x, w, sizes, bias).
    """
    x, w, sizes, bias = call.split(operands)
    spec, owner = call.spec, None
    if sizes is not None:
        owner, valid = _owners(sizes, x[0].shape[0])
    if len(x) == 1:
        (value,) = x
        if w.smooth is not None:
            value = value.astype(jnp.float32) * _by_row(w.smooth, call, value.ndim, owner).astype(jnp.float32)
        if spec is None:
            x = (value.astype(x[0].dtype),)         # the type that the launch was described with, and that is multiplied
        elif owner is None:
            x = quantize(value, _calibrated(w, spec), call.scope)
        else:
            shared = spec.granularity.kind == "tensor" or spec.outer == "tensor"
            value = jnp.where(valid[:, None], value, jnp.zeros((), value.dtype)) if shared else value
            extra = _reference._expert_scales(value.astype(jnp.float32), spec, w, sizes, owner) if shared else ()
            x = quantize(value[:, None, :] if shared else value, tuple(e for e in extra if e is not None), 1 if shared else 0)
            x = tuple(part.reshape(value.shape[0], -1) for part in x)
    if w.perm is not None:
        x = _permuted(call, tuple(x), w, owner)
    return tuple(x), w, sizes, bias


def _calibrated(w, spec) -> tuple:
    if w.input_scale is None or not (spec.granularity.kind == "tensor" or spec.outer == "tensor"):
        return ()
    return (w.input_scale,) if spec.zero is None or w.input_zero is None else (w.input_scale, w.input_zero)


def _owners(sizes, rows: int):
    ends = jnp.cumsum(sizes)
    index = jnp.arange(rows)
    return jnp.minimum(jnp.searchsorted(ends, index, side="right"), sizes.shape[0] - 1), index < ends[-1]


def _by_row(leaf, call: Call, ndim: int, owner):
    """A leaf [*batch, K] as an array that broadcasts against x."""
    return leaf[owner] if owner is not None else jnp.expand_dims(leaf, tuple(range(call.batch, ndim - 1)))


def _permuted(call: Call, x: tuple, w, owner):
    codes = x[0]
    if call.spec is not None and call.spec.granularity.kind == "group":
        # The groups of x lie in the caller's order, those of w do not: such products are made of the values.
        raise NotImplementedError("an activation quantized in groups against a permuted weight")
    order = jnp.broadcast_to(_by_row(w.perm, call, codes.ndim, owner), codes.shape)
    return jnp.take_along_axis(codes, order, -1), *x[1:]


def arrays(launch: Launch, x: tuple, w, sizes=None, bias=None, taken=None) -> list[jax.Array]:
    """The launch's input arrays of a matmul, from what `activation` returned; `taken` are the rows that it gathers."""
    shapes = dict(launch.arrays)
    value, scale, zero = (*x, None, None)[:3]
    rows = value.shape[:-1]
    given = {"x": value, "codes": w.codes, "scale": w.scale, "scale2": w.scale2, "scale_offset": w.scale_offset, "zero": w.zero,
             "bias": bias, "sizes": sizes, "rows": taken}
    if "x_scale" in shapes:
        given["x_scale"] = jnp.broadcast_to(scale, (*rows, scale.shape[-1]))
    if "x_zero" in shapes:
        given["x_zero"] = jnp.broadcast_to(zero, (*rows, 1))
    if "table" in shapes:
        given["table"] = jnp.asarray(TABLES[w.scheme.weight.code], jnp.float32)
    if "levels" in shapes:
        given["levels"] = jnp.asarray(dynamic_map())
    return [given[name].reshape(shape.shape) for name, shape in launch.arrays]


def take_arrays(launch: Launch, ids, w) -> list[jax.Array]:
    """The launch's input arrays of a `take`."""
    made = {"ids": ids, "table": TABLES.get(w.scheme.weight.code), "levels": dynamic_map(), **w.leaves}
    return [jnp.asarray(made[name]).reshape(shape.shape).astype(shape.dtype) for name, shape in launch.arrays]


def finish(launch: Launch, call: Call, y, bias=None) -> jax.Array:
    """The result of the call from the kernel's: slabs added from the first to the last, bias, cast and shape."""
    shape = (*call.x[0].shape[:-1], call.w.matrix_shape[-1])
    if launch.split > 1:
        # A sum in a fixed order: the result does not depend on which program came first.
        total = functools.reduce(jnp.add, [y[i] for i in range(launch.split)])
        if bias is not None:
            total = total + bias.astype(jnp.float32).reshape(total.shape[0], 1, -1)
        y = total.astype(call.out_dtype)
    return y.reshape(shape)


def row_arrays(launch: Launch, call: Call, x, *extra) -> tuple[list[jax.Array], tuple]:
    """The launch's inputs of a `quantize_activation`, and the scale and zero point that XLA found in front of it, in their own shape."""
    spec, names = call.spec, dict(launch.arrays)
    rows, given, zero = x.shape[:-1], None, None
    scale_in, zero_in = (*extra, None, None)[:2]
    if "given" in names:
        element, wide = code(spec.code), x.astype(jnp.float32)
        if spec.outer is not None:
            given = _activation._outer(wide, spec, element, scale_in, call.scope)
        else:
            given, zero = _activation._scale_zero(wide, spec, element, scale_in, zero_in, call.scope)
    values = {"x": x, "given": given, "given_zero": zero}
    made = [values[name] if name == "x" else jnp.broadcast_to(values[name], (*rows, 1)) for name in names]
    return [a.reshape(s.shape) for a, s in zip(made, names.values(), strict=True)], (given, zero)


def row_results(launch: Launch, call: Call, results, found: tuple) -> list[jax.Array]:
    """[codes, scale(, zero)] of a `quantize_activation` in the shapes of the reference."""
    x, made = call.x[0], dict(zip((name for name, _ in launch.results), results, strict=True))
    codes = made["codes"].reshape(x.shape)
    if "scale" not in made:
        return [part for part in (codes, *found) if part is not None]
    parts = [codes] + [made[name].reshape(*x.shape[:-1], -1) for name in ("scale", "zero") if name in made]
    return parts

"""One quantization of rows in the interpreter: codes and scales equal the reference's, bit for bit, and the float64 formula's."""

import dataclasses
import functools

import formula
import interpreter
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import products

from qfunc._codes import code
from qfunc._spec import ActivationSpec, Granularity
from qfunc.kernels import _reference
from qfunc.kernels._dispatch import Call
from qfunc.kernels.triton import _launch, _operands, _plan_rows


def spec_of(case) -> ActivationSpec:
    """The case's ActivationSpec."""
    kind, _, size = case.granularity.partition(":")
    return ActivationSpec(case.scheme, Granularity(kind, int(size or 0)), **dict(case.fields))


def values(case, rng):
    """x [.., M, K]: rows of very different size, ties, a zero row, a row of the largest and one with a NaN."""
    shape = (*case.lead, case.rows, case.columns)
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-30, 30, (*shape[:-1], 1)))
    x[..., 0, ::3] = np.round(x[..., 0, ::3])
    x[..., case.rows // 2, :] = 0
    x = np.clip(x, -1e30, 1e30)
    if case.rows > 3:
        x[..., 1, 1::2] = 6e4
        x[..., 3, 0] = np.nan
        ties = np.arange(case.columns) % 8 - 4 + 0.5
        x[..., 2, :] = ties * 0.125
    return jnp.asarray(x, jnp.dtype(case.dtype))


def rows(case, rng):
    """`quantize_activation` by the kernel."""
    spec, target, x = spec_of(case), _launch.Target.parse(case.target), values(case, rng)
    extra = ()
    if spec.mode == "static":
        extra = (jnp.full((*case.lead, 1, 1), 0.37, jnp.float32),) + ((jnp.full((*case.lead, 1, 1), 3, jnp.int32),) if spec.zero else ())
    described = Call("quantize_activation", (products.struct(x),), spec=spec, extra=tuple(map(products.struct, extra)),
                     scope=len(case.lead))
    launched = _launch.describe(described, target, _config(case, described, target))
    given, found = _operands.row_arrays(launched, described, x, *extra)
    made = [jnp.asarray(part) for part in interpreter.launch(launched, given)]
    got = _operands.row_results(launched, described, made, found)
    want = jax.jit(functools.partial(_reference.quantize_activation, described))(x, *extra)
    return compare(case, spec, x, got, want)


def compare(case, spec, x, got, want):
    """Where the scale is NaN codes mean nothing; everywhere else all bits are equal."""
    codes, scale, wanted = np.asarray(got[0]), np.asarray(got[1]), np.asarray(want[0])
    nan = np.isnan(np.broadcast_to(_wide(np.asarray(want[1]), spec, codes), codes.shape))
    raw = [np.where(nan, 0, c.view(np.uint8)) for c in (codes, wanted)]
    is_nan = [np.isnan(c.astype(np.float32)) if c.dtype.name.startswith("float8") else np.zeros(c.shape, bool) for c in (codes, wanted)]
    raw = [np.where(n, 0x7F, r) for n, r in zip(is_nan, raw, strict=True)]
    result = dict(
        shapes=[list(p.shape) == list(w.shape) and p.dtype == w.dtype for p, w in zip(got, want, strict=True)],
        codes=int(np.sum(raw[0] != raw[1])), scales=int(np.sum(~((scale == np.asarray(want[1])) | np.isnan(scale) & np.isnan(want[1])))),
        points=int(np.sum(np.asarray(got[2]) != np.asarray(want[2]))) if len(want) > 2 else 0, formula=None, seconds=None)
    plain = spec.zero is None and spec.scale_rule == "amax" and spec.outer is None and spec.rounding == "rne"
    if plain and spec.mode == "dynamic" and spec.granularity.kind != "tensor":
        finite = np.asarray(x, np.float64).reshape(-1, case.columns)
        kept = np.isfinite(finite).all(-1)
        size = spec.granularity.size if spec.granularity.kind == "group" else None
        expected, *_ = oracle.quantize_rows(finite[kept], case.scheme, size, spec.clip)
        mine = raw[0].reshape(-1, case.columns)[kept]
        expected = expected.astype(np.int64) & 0xFF
        zeroed = nan.reshape(-1, case.columns)[kept]
        signs = 0x80 if not code(case.scheme).integer and code(case.scheme).bits == 8 else 0
        same = (mine == expected) | zeroed | ((mine | signs) == (expected | signs)) & ((mine & 0x7F) == 0)
        result["formula"] = int(np.sum(~same))
    return result


def _wide(scale, spec, codes):
    return np.repeat(scale, spec.granularity.size, -1)[..., :codes.shape[-1]] if spec.granularity.kind == "group" else scale


def _config(case, described, target):
    return _launch.Config(**{**vars(_launch.default_config(described, target)), **case.config})


def fronts(case, rng):
    """RMSNorm or SwiGLU and a quantization in one launch, against the layer in float32, rounded to its type, and the same quantization."""
    spec, target = spec_of(case), _launch.Target.parse(case.target)
    x = products.floats(rng, (case.rows, case.columns), jnp.dtype(case.dtype))
    other = products.floats(rng, (case.columns,) if case.front == "rmsnorm" else x.shape, x.dtype)
    described = Call("quantize_activation", (products.struct(x),), spec=spec)
    plan = _plan_rows.adapt(described, target, _config(case, described, target))
    launched = _plan_rows.describe(described, target, plan, case.front, products.struct(other), 1e-6, 1.0 if case.rows % 2 else 0.0)
    codes, scale = interpreter.launch(launched, [x, other])

    v, w = formula.widen(x), formula.widen(other)
    if case.front == "rmsnorm":
        v = v / np.sqrt(np.mean(v * v, -1, keepdims=True) + 1e-6) * (w + (1.0 if case.rows % 2 else 0.0))
    else:
        v = v / (1 + np.exp(-v)) * w
    layer = jnp.asarray(v.astype(np.float32), x.dtype)
    inner = dataclasses.replace(described, x=(products.struct(layer),))
    want = [np.asarray(p) for p in _reference.quantize_activation(inner, layer)]
    steps = np.abs(formula.elements(codes, case.scheme) - formula.elements(want[0], case.scheme))
    # A last bit of the norm may move a value over a rounding boundary: a few codes differ, by one step.
    coarse = np.maximum(np.abs(formula.elements(want[0], case.scheme)) * (0 if code(case.scheme).integer else 0.126), 1.0)
    return dict(different=float(np.mean(steps > 0)), largest=float(np.max(steps / coarse)),
                scale=float(np.max(np.abs(scale / want[1] - 1))), seconds=None)

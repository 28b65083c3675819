"""Encode and decode a weight matrix: the pure functions that every scheme is made of.

Matrices lie here as they are stored, [..., N = out, K = in]; leading axes are batch axes and never share a scale.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from . import _pack, _scales
from ._codes import Code, code, usable
from ._numerics import decode_e8m0, divide, extreme, multiply_add, round_by
from ._spec import TENSOR, WeightSpec, group

E4M3_LARGEST, E4M3_SMALLEST = 448.0, 2.0**-9
NESTED_BLOCK = 256
"""Scales that share one outer scale in bitsandbytes' double quantization."""


def encode(w, spec: WeightSpec, perm=None) -> dict[str, jax.Array]:
    """Quantize a matrix.

    Arguments: `w` float [..., N, K], non-finite elements give NaN scales; `perm` int32 [..., K], the order in which the input channels
    are stored (act-order schemes). Returns the leaves of a `QTensor` by name: `codes` (packed), `scale` and, as the spec says,
    `zero`, `scale2`, `scale_offset`, `perm`. Jittable with `spec` static.
    """
    element = code(spec.code)
    w = w.astype(jnp.float32)
    if perm is not None:
        w = jnp.take_along_axis(w, perm[..., None, :], -1)
    leaves = SCALERS[_scaler(spec)](w, spec, element)
    # bitsandbytes divides by the scales as they were before it compressed them.
    divisor, zero = leaves.pop("divisor", None), leaves.get("zero")
    scale = outer_scale(leaves, spec) if divisor is None else divisor
    *_, rows, columns = w.shape
    scale = _scales.spread(scale, spec.granularity, rows, columns)
    if zero is not None:
        zero = _scales.spread(zero.astype(jnp.float32), spec.granularity, rows, columns)
    x = divide(w - zero if spec.zero == "float" else w, scale)
    if spec.zero == "int":
        x = round_by(x, spec.rounding) + zero
    codes = element.encode(x, spec.rounding)
    if element.packed:
        codes = _pack.pack(codes, element.bits, element.offset)
    return {"codes": codes, **leaves, **({} if perm is None else {"perm": perm})}


def decode(leaves: dict, spec: WeightSpec, columns: int) -> jax.Array:
    """The float32 matrix [..., N, K] of a QTensor's leaves, K = `columns`, in the order of the caller's input channels."""
    element = code(spec.code)
    codes = leaves["codes"]
    if element.packed:
        codes = _pack.unpack(codes, element.bits, columns)
    values = element.decode(codes)
    *_, rows, _ = values.shape
    scale = _scales.spread(outer_scale(leaves, spec), spec.granularity, rows, columns)
    if spec.zero is not None:
        zero = _scales.spread(leaves["zero"].astype(jnp.float32), spec.granularity, rows, columns)
        w = (values - zero) * scale if spec.zero == "int" else multiply_add(values, scale, zero)
    else:
        w = values * scale
    if leaves.get("perm") is not None:
        w = jnp.take_along_axis(w, jnp.argsort(leaves["perm"], -1)[..., None, :], -1)
    return w


def outer_scale(leaves: dict, spec: WeightSpec) -> jax.Array:
    """The effective float32 scale of every cell: all levels multiplied together, shape of `scale`."""
    scale = leaves["scale"]
    # A model that was cast as a whole has its outer levels in another type.
    outer, offset = (None if leaves.get(name) is None else leaves[name].astype(jnp.float32) for name in ("scale2", "scale_offset"))
    if spec.scale_dtype == "e8m0":
        scale = decode_e8m0(scale)
        if spec.scale_rule == "mx_dual":
            return scale * _scales.span(outer, spec.granularity, scale.shape[-1])
    elif spec.scale_rule == "double":
        *batch, rows, groups = scale.shape
        inner = jnp.take(jnp.asarray(dynamic_map()), scale.astype(jnp.int32), mode="clip").reshape(*batch, 1, rows * groups)
        blocks = jnp.repeat(outer, NESTED_BLOCK, -1)[..., : rows * groups]
        return multiply_add(inner, blocks, offset).reshape(*batch, rows, groups)
    scale = scale.astype(jnp.float32)
    return scale if outer is None else scale * outer


def _extremes(w, spec: WeightSpec):
    return _scales.reduce_cells(w, spec.granularity, jnp.min), _scales.reduce_cells(w, spec.granularity, jnp.max)


def _amax(w, granularity):
    return _scales.reduce_cells(jnp.abs(w), granularity, jnp.max)


def _stored(scale, spec: WeightSpec):
    dtype, scale = jnp.dtype(spec.scale_dtype), usable(scale)
    if dtype == jnp.float16:        # the only one with less range than float32; NaN and infinity, which say what the weight held, stay
        least, most = (jnp.float32(limit) for limit in (2.0**-24, 65504))
        inside = jnp.sign(scale) * jnp.clip(jnp.abs(scale), least, most)
        scale = jnp.where(jnp.isfinite(scale), inside, scale)
    return usable(scale.astype(dtype).astype(jnp.float32)).astype(dtype)


def _symmetric(w, spec: WeightSpec, element: Code) -> dict:
    return {"scale": _stored(_scales.SYMMETRIC[spec.scale_rule](*_extremes(w, spec), element), spec)}


def _affine(w, spec: WeightSpec, element: Code) -> dict:
    lo, hi = _extremes(w, spec)
    if spec.zero == "float":
        scale, zero = _scales.minmax_float(lo, hi, element)
        return {"scale": _stored(scale, spec), "zero": zero.astype(jnp.dtype(spec.scale_dtype))}
    scale, zero = _scales.minmax(lo, hi, element)
    return {"scale": _stored(scale, spec), "zero": zero.astype(jnp.uint8)}


def _microscaled(w, spec: WeightSpec, element: Code) -> dict:
    return {"scale": _scales.mx_exponent(_amax(w, spec.granularity), element, spec.scale_rule)}


def two_level(amax, outer, element: Code):
    """NVFP4's inner scale: e4m3(clip(amax / c / outer)), never below the smallest e4m3 number, so that no block divides by zero."""
    # The maximum changes nothing, but keeps XLA from making one division of two, a / c / outer = a / (c outer).
    inner = divide(jnp.maximum(divide(amax, element.highest), 0), outer)
    inner = jnp.clip(inner, E4M3_SMALLEST, E4M3_LARGEST)        # clip keeps NaN
    return inner.astype(jnp.float8_e4m3fn)


def _nested(w, spec: WeightSpec, element: Code) -> dict:
    outer = usable(divide(_amax(w, TENSOR), element.highest * E4M3_LARGEST))
    return {"scale": two_level(_amax(w, spec.granularity), outer, element), "scale2": outer}


def _dual(w, spec: WeightSpec, element: Code) -> dict:
    outer = usable(divide(_amax(w, group(_scales.DUAL_SPAN)), element.highest))
    amax = _amax(w, spec.granularity)
    inner = divide(amax, _scales.span(outer, spec.granularity, amax.shape[-1]))
    return {"scale": _scales.mx_exponent(inner, element, "mx_floor"), "scale2": outer}


def _double(w, spec: WeightSpec, element: Code) -> dict:
    """bitsandbytes' double quantization: scales less their mean, in blocks of 256, as codes of the dynamic map."""
    amax = _amax(w, spec.granularity)
    *batch, rows, groups = amax.shape
    flat = amax.reshape(*batch, 1, rows * groups)
    offset = jnp.sum(divide(flat, flat.shape[-1]), -1, keepdims=True)           # a mean whose sum does not overflow
    offset = jnp.where(jnp.isfinite(offset), offset, jnp.nan)
    centred = jnp.pad(flat - offset, [(0, 0)] * (flat.ndim - 1) + [(0, -flat.shape[-1] % NESTED_BLOCK)])
    blocks = rearrange(centred, "... (b c) -> ... b c", c=NESTED_BLOCK)
    largest = usable(extreme(jnp.max, jnp.abs(blocks), -1))
    ranks = jnp.searchsorted(jnp.asarray(dynamic_map()[1:] / 2 + dynamic_map()[:-1] / 2), divide(blocks, largest[..., None]))
    codes = ranks.reshape(centred.shape)[..., : rows * groups].reshape(*batch, rows, groups)
    return {"scale": codes.astype(jnp.uint8), "scale2": largest, "scale_offset": offset, "divisor": usable(amax)}


def check_spec(spec: WeightSpec) -> None:
    """Raise ValueError where the fields of a spec contradict each other, so that nothing is encoded by half of it."""
    element, kind = code(spec.code), _scaler(spec)
    if kind not in SCALERS:
        raise ValueError(f"scale_rule: expected one of {', '.join(_scales.RULES)}, found {spec.scale_rule!r}")
    zero = {"minmax": "int", "minmax_float": "float"}.get(spec.scale_rule)
    scales = {"mx": ("e8m0",), "mx_dual": ("e8m0",), "two_level": ("fp8_e4m3",),
              "double": ("uint8",)}.get(kind, ("float32", "float16", "bfloat16"))
    unsigned = spec.code.startswith("uint")
    expectations = (
        ("zero", spec.zero, (zero,), True),
        ("scale_dtype", spec.scale_dtype, scales, True),
        ("scale2_dtype", spec.scale2_dtype, ("float32",), kind in ("two_level", "double", "mx_dual")),
        ("code", spec.code, tuple(_scales.MX_ELEMENTS), kind in ("mx", "mx_dual")),
        ("code", spec.code, tuple(f"uint{b}" for b in range(2, 9)), unsigned or zero == "int"),
        ("code", spec.code, tuple(f"int{b}" for b in range(2, 9)), zero == "float" or unsigned and zero is None),
        ("rounding", spec.rounding, ("rne",), not element.integer and not spec.code.startswith("fp")),
    )
    for field, found, expected, applies in expectations:
        if applies and found not in expected:
            wanted = " or ".join(map(repr, expected))
            raise ValueError(f"{spec.code} by the rule {spec.scale_rule!r}: expected {field} {wanted}, found {found!r}")


SCALERS = {"symmetric": _symmetric, "affine": _affine, "mx": _microscaled, "mx_dual": _dual, "two_level": _nested, "double": _double}


def _scaler(spec: WeightSpec) -> str:
    rule = spec.scale_rule
    if rule in _scales.SYMMETRIC:
        return "symmetric"
    if rule in _scales.MX:
        return "mx"
    return "affine" if rule.startswith("minmax") else rule


@functools.cache
def dynamic_map() -> np.ndarray:
    """bitsandbytes' signed 8-bit dynamic data type: 256 ascending float32 values (Dettmers, arXiv 1511.04561; 2110.02861)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = _linspace(2**exponent + 1)
        middles = (bounds[:-1] + bounds[1:]) / np.float32(2) * np.float32(10.0 ** (exponent - 6))
        values += [*middles.tolist(), *(-middles).tolist()]
    table = np.sort(np.asarray(values, np.float32))
    assert table.shape == (256,)
    return table


def _linspace(count: int) -> np.ndarray:
    """0.1 to 1 as torch.linspace rounds it in float32, which is what the stored maps hold: from both ends, one rounding each."""
    start = np.float64(np.float32(0.1))
    step = np.float64(np.float32((np.float32(1) - np.float32(0.1)) / np.float32(count - 1)))
    i = np.arange(count)
    return np.where(i < count // 2, start + step * i, 1 - step * (count - 1 - i)).astype(np.float32)

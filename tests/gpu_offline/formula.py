"""The products in float64 numpy, from the leaves of a weight and the codes of an activation as their descriptions say."""

import numpy as np
import oracle

from qfunc._codec import dynamic_map


def widen(array):
    """An array as float64; float8 and bfloat16 included."""
    return np.asarray(np.asarray(array).astype(np.float32), np.float64)


def elements(codes, code, columns=None):
    """Values of stored codes, packed ones included."""
    codes = np.asarray(codes)
    if codes.dtype.name.startswith("float8"):
        return widen(codes)
    bits = oracle.bits_of(code)
    if columns is not None and bits < 8:
        codes = oracle.unpack(codes, bits, columns)
        if code.startswith("int"):
            return codes - 2.0 ** (bits - 1)
    return oracle.values(codes.astype(np.int64), code)


def scales(leaves, spec):
    """The effective scale of every cell of one matrix."""
    stored = np.asarray(leaves["scale"])
    if spec.scale_rule == "double":
        flat = dynamic_map().astype(np.float64)[stored.reshape(-1)]
        blocks = widen(leaves["scale2"]).reshape(-1)[np.arange(flat.size) // 256]
        return (flat * blocks + widen(leaves["scale_offset"]).reshape(-1)).reshape(stored.shape)
    values = np.where(stored == 255, np.nan, 2.0 ** (stored.astype(np.float64) - 127)) if spec.scale_dtype == "e8m0" else widen(stored)
    return values * (widen(leaves["scale2"]) if "scale2" in leaves else 1.0)


def matrix(leaves, spec, rows, columns):
    """The float64 matrix [N, K] of one packed weight."""
    scale = oracle.spread(scales(leaves, spec), spec.granularity, rows, columns)
    values = elements(leaves["codes"], spec.code, columns)
    if spec.zero is None:
        return values * scale
    zero = oracle.spread(widen(leaves["zero"]), spec.granularity, rows, columns)
    return (values - zero) * scale if spec.zero == "int" else values * scale + zero


def activation(parts, spec):
    """The float64 activation [M, K] of a float array or of (codes, scale, zero)."""
    if spec is None:
        return widen(parts[0])
    values = elements(parts[0], spec.code)
    if len(parts) > 2:
        values = values - _along(parts[2], spec, values.shape[-1])
    return values * _along(parts[1], spec, values.shape[-1])


def _along(scale, spec, columns):
    scale = widen(scale)
    return np.repeat(scale, spec.granularity.size, -1)[..., :columns] if spec.granularity.kind == "group" else scale

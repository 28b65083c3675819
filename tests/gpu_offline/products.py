"""Random operands of a matmul over the whole range of their codes, and how far a result may be from the formula."""

import jax
import jax.numpy as jnp
import numpy as np

from qfunc._codes import code
from qfunc._pack import packed_size
from qfunc._qtensor import QTensor
from qfunc._schemes import scheme
from qfunc.kernels._dispatch import Call, Packed

EPSILON = {"float32": 2.0**-22, "bfloat16": 2.0**-8, "float16": 2.0**-10}
"""Relative error of the last rounding of a result."""
TABLE_ERROR = {"bf16": 2.0**-8, "f16": 2.0**-11, "f32": 2.0**-20}
"""Relative error of a value of nf4 or fp4_bnb as an operand; all others are exact."""


def floats(rng, shape, dtype):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def stored_scale(rng, shape, kind):
    """Positive scales of a storage type, of a narrow and of the whole useful range."""
    if kind == "e8m0":
        return jnp.asarray(rng.integers(110, 140, shape), jnp.uint8)
    if kind == "uint8":
        return jnp.asarray(rng.integers(0, 256, shape), jnp.uint8)
    values = np.exp2(rng.uniform(-6, 1, shape))
    return jnp.asarray(values, jnp.float8_e4m3fn if kind == "fp8_e4m3" else jnp.dtype(kind))


def random_codes(rng, shape, name):
    """Codes of every bit pattern that is a number."""
    element = code(name)
    if element.dtype.name.startswith("float8"):
        raw = rng.integers(0, 256, shape, np.uint8)
        largest = 0x7E if name == "fp8_e4m3" else 0x7B
        return jnp.asarray(np.where((raw & 0x7F) > largest, raw & 0x87, raw).astype(np.uint8).view(element.dtype))
    if element.name in ("int8", "int4"):
        return jnp.asarray(rng.integers(element.lowest, element.highest + 1, shape), jnp.int8)
    return jnp.asarray(rng.integers(0, 2**element.bits, shape), jnp.uint8)


def weight(rng, name, columns, rows, lead=()):
    """A QTensor of random leaves; what pads the last block is random too, since no kernel may depend on it."""
    spec = scheme(name).weight
    element, granularity = code(spec.code), spec.granularity
    shape = {"tensor": (1, 1), "channel": (rows, 1), "group": (rows, -(-columns // max(granularity.size, 1))),
             "block": (-(-rows // max(granularity.out, 1)), -(-columns // max(granularity.size, 1)))}[granularity.kind]
    if element.packed:
        codes = jnp.asarray(rng.integers(0, 256, (*lead, rows, packed_size(columns, element.bits)), np.uint8))
    else:
        codes = random_codes(rng, (*lead, rows, columns), spec.code)
    leaves = {"codes": codes, "scale": stored_scale(rng, (*lead, *shape), spec.scale_dtype)}
    if spec.zero == "int":
        leaves["zero"] = jnp.asarray(rng.integers(0, 2**element.bits, (*lead, *shape)), jnp.uint8)
    elif spec.zero == "float":
        leaves["zero"] = floats(rng, (*lead, *shape), spec.scale_dtype)
    if spec.scale_rule == "double":
        leaves["scale2"] = stored_scale(rng, (*lead, 1, -(-shape[0] * shape[1] // 256)), "float32")
        leaves["scale_offset"] = stored_scale(rng, (*lead, 1, 1), "float32")
    elif spec.scale2_dtype is not None:
        leaves["scale2"] = stored_scale(rng, (*lead, *((rows, 1) if rows % 2 else (1, 1))), "float32")
    pad = -columns % 128 if element.packed else 0
    return QTensor(**leaves, scheme=scheme(name), dtype="bfloat16", pad=pad)


def activation(rng, spec, shape, dtype):
    """(float x,), or random codes with scales; the row in the middle is zero."""
    *lead, columns = shape
    middle = shape[-2] // 2
    if spec is None:
        return (floats(rng, shape, dtype).at[..., middle, :].set(0),)
    groups = -(-columns // spec.granularity.size) if spec.granularity.kind == "group" else 1
    codes = random_codes(rng, shape, spec.code)
    scale = jnp.asarray(np.exp2(rng.uniform(-8, 0, (*lead, groups))), jnp.float32)
    if spec.zero is None:
        return codes.at[..., middle, :].set(jnp.zeros((), codes.dtype)), scale
    zero = jnp.asarray(rng.integers(-128, 128, (*lead, 1)), jnp.int32)
    return codes.at[..., middle, :].set(zero[..., middle, :].astype(jnp.int8)), scale, zero


def struct(array):
    return jax.ShapeDtypeStruct(array.shape, np.dtype(array.dtype))


def call(q, x, spec, sizes=None, bias=None, out=jnp.float32):
    """The `Call` of these operands, and the operands in its order."""
    optional = [array for array in (sizes, bias) if array is not None]
    described = Call("quantized_matmul" if sizes is None else "quantized_grouped_matmul", tuple(map(struct, x)), Packed.of(q),
                     tuple(struct(leaf) for leaf in q.leaves.values()), None if sizes is None else struct(sizes),
                     None if bias is None else struct(bias), spec, (), np.dtype(out), 0 if sizes is not None else q.codes.ndim - 2,
                     0 if sizes is not None else q.codes.ndim - 2)
    return described, (*x, *q.leaves.values(), *optional)


def excess(got, want, magnitude, out, operand_error=0.0, roundings=1):
    """The largest error in units of what is allowed: 2e-6 (and the operands' own error) of the sum of magnitudes, and last roundings."""
    got, want = np.asarray(np.asarray(got).astype(np.float32), np.float64), np.asarray(want, np.float64)
    allowed = (2e-6 + operand_error) * magnitude + roundings * EPSILON[np.dtype(out).name] * np.abs(want) + 1e-30
    # What float16 does not hold is infinite; near its largest number either is right.
    over = (np.dtype(out) == np.float16) & (np.abs(want) > 65400) & (np.sign(got) == np.sign(want)) & (np.abs(got) > 65400)
    ratio = np.where(over, 0.0, np.abs(np.where(over, 0.0, got) - np.where(over, 0.0, want)) / allowed)
    return float(np.max(np.where(np.isfinite(ratio), ratio, np.inf), initial=0.0))

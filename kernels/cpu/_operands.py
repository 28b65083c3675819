"""A packed weight as the handlers take it: arrays of three axes, and numbers that say how to read them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qfunc._codec import dynamic_map
from qfunc._codes import CODES, code
from qfunc._ggml import block_type
from qfunc._qtensor import QTensor

CODE = {"int8": 0, "uint8": 1, "packed": 2, "fp4_e2m1": 3, "nf4": 3, "fp4_bnb": 3,
        "fp6_e2m3": 4, "fp6_e3m2": 5, "fp8_e4m3": 6, "fp8_e5m2": 7}
"""Element code to the handlers' enumeration; narrow integers are `packed`."""
GGML = {f"gguf:{name}": 8 for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k")}
"""ggml's types with a native decoder, and their place in the handlers' enumeration."""
SCALE = {"float32": 1, "float16": 2, "bfloat16": 3, "float8_e4m3fn": 4, "e8m0": 5, "nested": 7}
ZERO = {None: 0, "int": 1, "float": 2}
FLOATS = ("float32", "bfloat16", "float16")


def scale_kind(w: QTensor) -> str:
    """How the stored scales are to be read, a key of `SCALE` where that is known."""
    spec = w.scheme.weight
    if spec.scale_rule == "double" and w.scale_offset is not None:
        return "nested"
    return "e8m0" if spec.scale_dtype == "e8m0" else str(np.dtype(w.scale.dtype))


def refusal(w: QTensor) -> str | None:
    """Why this weight cannot be read, from its static side and shapes; None where it can."""
    spec = w.scheme.weight
    if w.layout != "canonical":
        return f"the weight is laid out for {w.layout}"
    if 0 in w.matrix_shape:
        return "an empty weight"
    if spec.code in GGML:
        return None
    if spec.code not in CODES:
        return f"there is no native decoder of {spec.code}"
    if np.dtype(w.codes.dtype).itemsize != 1:
        return f"codes of type {w.codes.dtype}"         # a model of 8-bit floats that was cast as a whole
    if scale_kind(w) not in SCALE:
        return f"scales of type {scale_kind(w)}"
    if w.zero is not None and spec.zero == "int" and np.dtype(w.zero.dtype) != np.uint8:
        return f"zero points of type {w.zero.dtype}"
    if w.zero is not None and spec.zero == "float" and w.zero.dtype != w.scale.dtype:
        return "float zero points of another type than the scales"
    return None


@functools.cache
def _table(name: str) -> np.ndarray:
    """The values of a code that is read by table: all 16, or the 32 magnitudes of a 6-bit float."""
    with jax.ensure_compile_time_eval():
        count = 16 if code(name).bits == 4 else 32
        return np.asarray(code(name).decode(jnp.arange(count, dtype=jnp.uint8)))


def three(leaf, count: int):
    """A leaf [*batch, a, b] as [count, a, b]; an empty array where it is absent."""
    return jnp.zeros((0, 1, 1), jnp.float32) if leaf is None else leaf.reshape(count, *leaf.shape[-2:])


def weight_operands(w: QTensor) -> tuple[list, dict]:
    """(operands from `codes` to `table`, attributes) of a weight in the canonical layout."""
    spec = w.scheme.weight
    *batch, columns, _ = w.matrix_shape
    count = int(np.prod(batch))
    if spec.code in GGML:
        return _ggml_operands(w, count, columns)
    element = code(spec.code)
    kind, granularity = scale_kind(w), spec.granularity
    nested, byte = kind == "nested", element.name in ("int8", "uint8")
    tabled = CODE.get(element.name, 2) in (3, 4, 5)
    # The second level is small, and float32 in every format; a model that was cast as a whole has it in another type.
    outer = None if w.scale2 is None else w.scale2.astype(jnp.float32)
    operands = [
        three(w.codes, count), three(w.scale, count), three(outer, count), three(w.zero, count),
        w.scale_offset.reshape(count).astype(jnp.float32) if nested else jnp.zeros(0, jnp.float32),
        jnp.asarray(dynamic_map()) if nested else jnp.zeros(0, jnp.float32),
        jnp.asarray(_table(element.name)) if tabled else jnp.zeros(0, jnp.float32),
    ]
    attributes = dict(
        code=np.int32(CODE[element.name if element.name in CODE else "packed"]), bits=np.int32(element.bits),
        offset=np.int32(element.offset if element.integer and not byte else 0), scale_type=np.int32(SCALE[kind]),
        zero_kind=np.int32(ZERO[spec.zero]),
        group=np.int64(granularity.size if granularity.kind in ("group", "block") else columns),
        share=np.int64({"tensor": 0, "block": granularity.out}.get(granularity.kind, 1)))
    return operands, attributes


def _ggml_operands(w: QTensor, count: int, columns: int) -> tuple[list, dict]:
    """Blocks of ggml hold their scales: the one beside them is 1."""
    absent, empty = three(None, count), jnp.zeros(0, jnp.float32)
    operands = [three(w.codes, count), jnp.ones((count, 1, 1), jnp.float32), absent, absent, empty, empty, empty]
    name = w.scheme.weight.code
    number = block_type(name.removeprefix("gguf:")).id
    whole = dict(code=GGML[name], bits=number, offset=0, scale_type=SCALE["float32"], zero_kind=ZERO[None])
    return operands, {**{key: np.int32(value) for key, value in whole.items()}, "group": np.int64(columns), "share": np.int64(0)}

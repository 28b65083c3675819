"""XLA's own products on a GPU: one pass that unpacks the weight, then the vendor's library.

For many tokens this is where the time goes into arithmetic alone and cuBLASLt or hipBLASLt are hard to beat; for a few it reads and
writes the unpacked weight, which no fused kernel does. Operands in floating point are rounded to the type of x, sums are float32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qfunc._activation import QuantizedActivation, dequantize_rows, quantize_rows
from qfunc._codec import outer_scale
from qfunc._codes import code
from qfunc._qtensor import CODECS, QTensor, dequantize_matrix

from .. import _reference
from .._dispatch import Call

PRIMITIVES = ("quantized_matmul",)
NATIVE_FP8 = ("sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx950")
"""Targets whose libraries multiply OCP's fp8 types. CDNA3 has other ones (fnuz); there the codes are multiplied as bfloat16, exactly."""


def supports(call: Call, platform: str) -> str | None:
    """None, or why XLA's own product is not used for this call."""
    return refusal(call)


def refusal(call: Call) -> str | None:
    """None, or why this call does not become one product of XLA's."""
    if call.spec is not None and call.spec.outlier_threshold is not None and not call.quantized:
        return "outlier columns are split off first"
    if _integer(call):
        spec = call.packed.scheme.weight
        grouped = spec.granularity.kind in ("group", "block") or call.spec.granularity.kind == "group"
        return "integer products in groups are not one product of XLA's" if grouped else None
    if _half(call) is None:
        return f"a result of type {np.dtype(call.out_dtype)} is multiplied in float32, by the reference"
    return None


def _integer(call: Call) -> bool:
    spec = call.packed.scheme.weight
    if call.spec is None or spec.code in CODECS.decoders or spec.zero == "float":
        return False
    return code(spec.code).integer and code(call.spec.code).integer


def _half(call: Call):
    """The 16-bit type that operands are multiplied in, or None where 16 bits are not what the caller has."""
    dtype = np.dtype(call.out_dtype if call.quantized else call.x[0].dtype)
    return dtype if dtype in (np.dtype(jnp.bfloat16), np.dtype(jnp.float16)) else None


def matmul(call: Call, *operands):
    """`quantized_matmul`: integers as the reference has them, one int8 product; fp8 codes as they are where the target multiplies them;
    everything else in the 16-bit type of x."""
    if _integer(call):
        return _reference.matmul(call, *operands)
    return _reference.batched(call, functools.partial(_product, call, _half(call)), operands)


def _product(call: Call, half, x: tuple, w: QTensor):
    w, spec = w.canonical, call.spec
    if len(x) == 1:
        value = x[0]
        if w.smooth is not None:
            value = value.astype(jnp.float32) * w.smooth.astype(jnp.float32)
        if spec is None:
            return _dot(value.astype(half), dequantize_matrix(w).astype(half))
        q = quantize_rows(value, spec, w.input_scale, w.input_zero, call.scope - call.batch)
    else:
        q = QuantizedActivation(*x)
    if spec.granularity.kind == "group":
        return _dot(dequantize_rows(q, spec).astype(half), dequantize_matrix(w).astype(half))
    # One scale a row comes off the sum, so that the codes themselves are multiplied, which 16 bits hold exactly.
    if _same_fp8(call) and w.perm is None:
        scale = jnp.broadcast_to(outer_scale(w.leaves, w.scheme.weight), (*w.codes.shape[:-1], 1))[..., 0]
        return _dot(q.codes, w.codes) * q.scale * scale
    ones = q._replace(scale=jnp.ones_like(q.scale))
    return _dot(dequantize_rows(ones, spec).astype(half), dequantize_matrix(w).astype(half)) * q.scale


def _same_fp8(call: Call) -> bool:
    spec = call.packed.scheme.weight
    plain = spec.granularity.kind in ("tensor", "channel") and spec.zero is None
    return plain and spec.code == call.spec.code and spec.code.startswith("fp8") and call.target in NATIVE_FP8


def _dot(x, w):
    """x [..., K] times w [N, K], summed in float32."""
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

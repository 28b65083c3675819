"""The quantized primitives as what specifies them: the jaxpr of their reference.

`to_torch(rules="reference")` runs all of them so. With `rules="npu"` it is how rows of a packed embedding table are read: they are decoded
on the device by ordinary operations, from the codes as the checkpoint has them; torch_npu has no operator for it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from qfunc.kernels import IMPLEMENTATIONS
from qfunc.kernels._activation import _describe as describe_activation
from qfunc.kernels._matmul import describe
from qfunc.kernels._take import describe as describe_take


def _reference(describe: Callable) -> Callable:
    def jaxpr(eqn):
        shapes = [jax.ShapeDtypeStruct(v.aval.shape, np.dtype(v.aval.dtype)) for v in eqn.invars]
        call = describe(shapes, eqn.params)
        reference = next(row for row in IMPLEMENTATIONS[eqn.primitive.name] if row.name == "reference")
        return jax.make_jaxpr(lambda *operands: reference.apply(call, *operands))(*shapes)
    return jaxpr


SPECIFICATION: dict[str, Callable] = {
    "quantized_matmul": _reference(describe), "quantized_grouped_matmul": _reference(describe),
    "quantize_activation": _reference(describe_activation), "quantized_take": _reference(describe_take),
}
"""Primitive name to `(eqn) -> ClosedJaxpr`."""

"""The quantized primitives as what specifies them: the jaxpr of their reference, for `to_torch(rules="reference")`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from qfunc.kernels import IMPLEMENTATIONS
from qfunc.kernels._activation import _describe as describe_activation
from qfunc.kernels._matmul import describe


def _reference(describe: Callable) -> Callable:
    def jaxpr(eqn):
        shapes = [jax.ShapeDtypeStruct(v.aval.shape, np.dtype(v.aval.dtype)) for v in eqn.invars]
        call = describe(shapes, eqn.params)
        run = next(row.run for row in IMPLEMENTATIONS[eqn.primitive.name] if row.name == "reference")
        return jax.make_jaxpr(lambda *operands: run(call, *operands))(*shapes)
    return jaxpr


SPECIFICATION: dict[str, Callable] = {
    "quantized_matmul": _reference(describe), "quantized_grouped_matmul": _reference(describe),
    "quantize_activation": _reference(describe_activation),
}
"""Primitive name to `(eqn) -> ClosedJaxpr`."""

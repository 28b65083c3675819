"""A quantized matmul from its float activation on: preparation by XLA, codes by the row kernel, product, finish; against the reference."""

import functools

import interpreter
import jax
import jax.numpy as jnp
import numpy as np
import products

from qfunc.kernels import _reference
from qfunc.kernels._dispatch import Call
from qfunc.kernels.triton import _launch, _operands


def whole(case, rng):
    """Calibrated leaves are random too: smoothing where x is quantized, input scales and zero points of static schemes, orders."""
    sizes = None if case.sizes is None else jnp.asarray(case.sizes, jnp.int32)
    lead, target = () if sizes is None else (len(case.sizes),), _launch.Target.parse(case.target)
    q = products.weight(rng, case.scheme, case.columns, case.outs, lead)
    spec = q.scheme.activation
    if spec is not None and spec.mode == "static":
        q = q.replace(input_scale=jnp.asarray(rng.uniform(0.02, 0.04, (*lead, 1, 1)), jnp.float32))
        q = q.replace(input_zero=jnp.full((*lead, 1, 1), 5, jnp.int32)) if spec.zero else q
    elif spec is not None:
        q = q.replace(smooth=jnp.asarray(rng.uniform(0.5, 2, (*lead, case.columns)), jnp.float32))
    if q.scheme.weight.actorder:
        q = q.replace(perm=jnp.asarray(rng.permutation(case.columns), jnp.int32))
    x = products.floats(rng, (case.rows, case.columns), jnp.dtype(case.dtype)).at[case.rows // 2].set(0)
    described, operands = products.call(q, (x,), spec, sizes)

    def quantize(value, extra, scope):
        inner = Call("quantize_activation", (products.struct(value),), spec=spec, extra=tuple(map(products.struct, extra)), scope=scope)
        launched = _launch.describe(inner, target)
        given, found = _operands.row_arrays(launched, inner, value, *extra)
        made = [jnp.asarray(part) for part in interpreter.launch(launched, given)]
        return _operands.row_results(launched, inner, made, found)

    parts, w, group_sizes, bias = _operands.activation(described, *operands, quantize=quantize)
    launched = _launch.describe(described, target, _launch.Config(block_m=16, block_n=32))
    y = interpreter.launch(launched, _operands.arrays(launched, parts, w, group_sizes, bias))
    got = np.asarray(_operands.finish(launched, described, jnp.asarray(y[0]), bias), np.float64)
    function = _reference.matmul if sizes is None else _reference.grouped_matmul
    want = np.asarray(jax.jit(functools.partial(function, described))(*operands), np.float64)
    return dict(relative=float(np.linalg.norm(got - want) / np.linalg.norm(want)), zeros=spec is None or not np.any(got[case.rows // 2]))

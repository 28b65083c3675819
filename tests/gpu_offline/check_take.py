"""Rows of a packed table in the interpreter: the bits of `qfunc.take`."""

import interpreter
import jax
import jax.numpy as jnp
import numpy as np
import products

from qfunc.kernels import take as reference_take
from qfunc.kernels._dispatch import Call, Packed
from qfunc.kernels.triton import _launch, _operands


def take(case, rng):
    """ids with repeats, negative ones and ones out of range."""
    q = products.weight(rng, case.scheme, case.columns, case.outs).replace(dtype=case.out)
    ids = jnp.asarray([0, case.outs - 1, 3, 3, -1, case.outs, -case.outs - 1], jnp.int32)
    described = Call("take", (products.struct(ids),), Packed.of(q), tuple(products.struct(leaf) for leaf in q.leaves.values()),
                     out_dtype=np.dtype(jnp.dtype(case.out)))
    target = _launch.Target.parse(case.target)
    config = _launch.Config(**{**vars(_launch.default_config(described, target)), **case.config})
    launched = _launch.describe(described, target, config)
    (got,) = interpreter.launch(launched, _operands.take_arrays(launched, ids, q))
    want = np.asarray(jax.jit(reference_take)(q, ids))
    same = (got == want) | (np.isnan(got.astype(np.float32)) & np.isnan(want.astype(np.float32)))
    return dict(different=int(np.sum(~same)), outside=bool(np.isnan(got[5:].astype(np.float32)).all()))

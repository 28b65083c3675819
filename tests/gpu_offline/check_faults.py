"""That the checks can fail: a launch with one thing wrong is noticed, by its result or by the guards around its arrays."""

import dataclasses

import formula
import interpreter
import jax.numpy as jnp
import numpy as np
import products

from qfunc.kernels.triton import _launch, _operands


def _changed(launched, name):
    """The launch with a fault."""
    constants, scalars, grid = dict(launched.constants), dict(launched.scalars), launched.grid
    if name == "offset":
        constants["OFFSET"] += 1
    elif name == "scale":
        constants["PLACE"] = 0                  # one scale for all of K, where each 128 have their own
    elif name == "step":
        scalars["K"] -= 128
    elif name == "grid":
        grid = (grid[0] - 1, *grid[1:])
    elif name in ("rows", "columns"):           # more than there are: reads and writes outside
        scalars["M" if name == "rows" else "N"] += 40
        grid = (4, *grid[1:])
    elif name == "groups":
        scalars["GROUPS"] += 1
    else:
        scalars["E"] -= 1
    return dataclasses.replace(launched, constants=constants, scalars=scalars, grid=grid)


def noticed(case, rng):
    """`sound`: the error of the right launch; `noticed`: whether the wrong one fails."""
    target, sizes = _launch.Target.parse(case.target), None if case.sizes is None else np.asarray(case.sizes, np.int32)
    lead = () if sizes is None else (len(sizes),)
    q = products.weight(rng, case.scheme, case.columns, case.outs, lead)
    x = products.activation(rng, None, (case.rows, case.columns), jnp.dtype(case.dtype))
    given = None if sizes is None else jnp.asarray(sizes)
    described, _ = products.call(q, x, None, given)
    launched = _launch.describe(described, target, _launch.Config(block_m=16, block_n=16))
    arrays = _operands.arrays(launched, x, q, given, None)
    a = formula.widen(x[0])
    stacks = [{k: np.asarray(v).reshape(-1, *v.shape[-2:])[e] for k, v in q.leaves.items()} for e in range(max(len(lead) and lead[0], 1))]
    matrices = [formula.matrix(leaves, q.scheme.weight, case.outs, case.columns) for leaves in stacks]
    owner = np.zeros(case.rows, int) if sizes is None else np.repeat(np.arange(len(sizes)), sizes)
    want = np.stack([matrices[e] @ row for e, row in zip(owner, a, strict=True)])
    magnitude = np.stack([np.abs(matrices[e]) @ np.abs(row) for e, row in zip(owner, a, strict=True)])

    def error(launch):
        y = interpreter.launch(launch, arrays)
        return products.excess(_operands.finish(launch, described, jnp.asarray(y[0])), want, magnitude, described.out_dtype)

    try:
        wrong = error(_changed(launched, case.label))
    except AssertionError:                      # the guards speak up
        wrong = np.inf
    return dict(sound=error(launched), noticed=bool(wrong > 1))

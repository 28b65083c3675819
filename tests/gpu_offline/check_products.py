"""One dense or grouped case in the interpreter: against the float64 formula and against the reference."""

import functools

import formula
import interpreter
import jax
import jax.numpy as jnp
import numpy as np
import products

from qfunc._schemes import scheme
from qfunc.kernels import _reference
from qfunc.kernels.triton import _launch, _operands, _plan_matmul


def config(case, described, target):
    base = _launch.default_config(described, target)
    return _launch.Config(**{**vars(base), **case.config})


def verdict(case, described, launched, got, want, magnitude, reference):
    """What the test asserts on."""
    dot = launched.constants["DOT"]
    table = products.TABLE_ERROR[dot] if launched.constants["CODE"] in ("nf4", "fp4_bnb") else 0.0
    middle = np.asarray(got, np.float32).reshape(*described.x[0].shape[:-1], -1)[..., case.rows // 2, :]
    return dict(
        formula=products.excess(got, want, magnitude, described.out_dtype, table),
        reference=products.excess(got, np.asarray(reference.astype(jnp.float32)), magnitude, described.out_dtype, table, 2),
        bits=bool(np.array_equal(np.asarray(got), np.asarray(reference))) if dot == "s8" and launched.constants["PLACE"] == 0
        and launched.split == 1 else None,
        zeros=case.bias or case.sizes is not None or not np.any(middle), dot=dot, seconds=None)


def dense(case, rng):
    """y = x @ w (+ bias) with leading axes, split-K, both orders of the operands."""
    spec, target = scheme(case.scheme).activation, _launch.Target.parse(case.target)
    q = products.weight(rng, case.scheme, case.columns, case.outs, case.lead)
    x = products.activation(rng, spec, (*case.lead, case.rows, case.columns), jnp.dtype(case.dtype))
    bias = products.floats(rng, (*case.lead, case.outs), jnp.dtype(case.dtype)) if case.bias else None
    described, operands = products.call(q, x, spec, None, bias, jnp.dtype(case.out))
    launched = _launch.describe(described, target, config(case, described, target))
    y = interpreter.launch(launched, _operands.arrays(launched, x, q, None, bias))
    got = _operands.finish(launched, described, jnp.asarray(y[0]), bias)
    reference = jax.jit(functools.partial(_reference.matmul, described))(*operands)

    flat = [np.asarray(leaf).reshape(-1, *leaf.shape[len(case.lead):]) for leaf in x]
    want, magnitude = [], []
    for i in range(flat[0].shape[0]) if case.lead else [0]:
        part = [leaf[i] for leaf in flat] if case.lead else [np.asarray(leaf) for leaf in x]
        leaves = {k: np.asarray(v).reshape(-1, *v.shape[-2:])[i] for k, v in q.leaves.items()}
        w = formula.matrix(leaves, q.scheme.weight, case.outs, case.columns)
        a = formula.activation(part, spec)
        extra = 0.0 if bias is None else formula.widen(bias).reshape(-1, case.outs)[i]
        want.append(a @ w.T + extra)
        magnitude.append(_magnitude(a, part, spec, w, q, leaves) + np.abs(extra))
    shape = (*case.lead, case.rows, case.outs)
    return verdict(case, described, launched, got, np.reshape(want, shape), np.reshape(magnitude, shape), reference)


def _magnitude(a, part, spec, w, q, leaves):
    """Sum of |x| |w|, zero points counted apart where kernels add them apart."""
    size = np.abs(w)
    weight = q.scheme.weight
    if weight.zero == "float":
        zero = np.abs(formula.oracle.spread(formula.widen(leaves["zero"]), weight.granularity, *w.shape))
        size = size + 2 * zero
    return np.abs(a) @ size.T


def grouped(case, rng):
    """Experts: sorted rows, empty experts, rows without one; optionally tokens gathered inside and weights on the result."""
    spec, target = scheme(case.scheme).activation, _launch.Target.parse(case.target)
    sizes = np.asarray(case.sizes, np.int32)
    experts, tokens = len(sizes), case.tokens or case.rows
    q = products.weight(rng, case.scheme, case.columns, case.outs, (experts,))
    x = products.activation(rng, spec, (tokens, case.columns), jnp.dtype(case.dtype))
    rows = rng.integers(0, tokens, case.rows) if case.tokens else np.arange(case.rows)
    routed = tuple(part[rows] for part in x)
    bias = products.floats(rng, (experts, case.outs), jnp.dtype(case.dtype)) if case.bias else None
    described, operands = products.call(q, routed, spec, jnp.asarray(sizes), bias, jnp.dtype(case.out))
    launched = _launch.describe(described, target, config(case, described, target))
    given = _operands.arrays(launched, routed, q, jnp.asarray(sizes), bias)
    weights = rng.uniform(0.1, 1, case.rows).astype(np.float32)
    if case.tokens:
        launched = _plan_matmul.routed(launched, tokens=tokens, weighted=True)
        values = {**dict(zip((name for name, _ in launched.arrays), given, strict=False)), "rows": jnp.asarray(rows, jnp.int32),
                  "weights": jnp.asarray(weights)}
        values |= {name: part[None] for name, part in zip(("x", "x_scale", "x_zero"), x, strict=False)}
        given = [values[name].reshape(shape.shape) for name, shape in launched.arrays]
    y = interpreter.launch(launched, given)
    got = jnp.asarray(y[0])
    reference = jax.jit(functools.partial(_reference.grouped_matmul, described))(*operands)

    ends = np.minimum(np.cumsum(sizes), case.rows)
    owner = np.searchsorted(ends, np.arange(case.rows), side="right")
    want, magnitude = np.zeros((case.rows, case.outs)), np.zeros((case.rows, case.outs))
    for e in range(experts):
        mine = owner == e
        leaves = {k: np.asarray(v)[e] for k, v in q.leaves.items()}
        w = formula.matrix(leaves, q.scheme.weight, case.outs, case.columns)
        part = [np.asarray(p)[mine] for p in routed]
        a = formula.activation(part, spec)
        extra = 0.0 if bias is None else formula.widen(bias)[e]
        want[mine], magnitude[mine] = a @ w.T + extra, _magnitude(a, part, spec, w, q, leaves) + np.abs(extra)
    if case.tokens:
        want, magnitude = want * weights[:, None], magnitude * weights[:, None]
        reference = (reference.astype(jnp.float32) * weights[:, None]).astype(reference.dtype)
    result = verdict(case, described, launched, got, want, magnitude, reference)
    result["zeros"] = not np.any(np.asarray(got, np.float32)[owner == experts])
    if case.tokens:
        result["bits"] = None
        result["reference"] = result["reference"] if jnp.dtype(case.out) == jnp.float32 else None       # it was rounded twice
    return result

"""`quantize` and `dequantize`: pytrees of float weights to pytrees of packed weights, and back."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _codec
from ._activation import check_activation
from ._codec import E4M3_LARGEST
from ._codes import code, usable
from ._numerics import divide
from ._orient import Orientation, Site, from_axes, orient, owner_of
from ._pack import BLOCK
from ._paths import leaf_path, nearest
from ._progress import track
from ._qtensor import CODECS, QTensor
from ._rules import match, normalise
from ._scales import minmax
from ._spec import Scheme
from ._statistics import Statistics, as_statistics, seen, spread_over

PACKED = "already quantized as"


@dataclass(frozen=True)
class Job:
    """One leaf to quantize: its scheme and the meaning of its axes."""

    path: str
    index: int
    scheme: Scheme
    orientation: Orientation


@dataclass(frozen=True)
class Plan:
    """What `quantize` will do: jobs, and the leaves that stay in floating point with the reason, by path."""

    jobs: tuple[Job, ...]
    kept: Mapping[str, str]


def quantize(params, scheme_or_rules, *, calibration=None, donate: bool = False, check: bool = True, progress: bool | None = None,
             orientations: Mapping[str, Orientation | str] | None = None):
    """Quantize the weights of any pytree.

    Arguments:
        params: dict of arrays, flax nnx state, linen params, equinox module, ...; leaves are arrays or anything with `shape`, `dtype`
            and `__array__` (a lazy source, read one leaf at a time). A single array is a pytree too.
        scheme_or_rules: a scheme (name or `Scheme`) for all weights but embeddings, norms, routers and the output layer, or an ordered
            mapping from path patterns to schemes, None (stay in floating point) or `Rule`; the first match wins.
        calibration: statistics of `qfunc.calibrate`, or raw activations [..., K], by path. Static schemes need it; schemes with a
            per-tensor scale that may be fixed (`fp8`, `nvfp4`) use it where it is given.
        donate: delete each float array as soon as it is quantized, so that memory peaks near the packed result plus one leaf.
        check: refuse weights that hold NaN or infinity (values are never checked under jit).
        progress: show a progress bar (tqdm); by default only in a terminal or notebook, and only when it takes long.
        orientations: the meaning of leaves' axes by path, where more is known than names and shapes tell (`qfunc.layers.weight_axes`
            finds it from the function that uses them); a string is the reason why a leaf stays in floating point.

    Returns: the same pytree with a `QTensor` for each quantized weight. Formula per scheme: w ~ (codes - zero) * scale, see
    `qfunc.schemes`. Computation is compiled once per distinct shape and scheme.

    Raises ValueError, before anything is changed, for an unknown scheme, a rule without effect, missing calibration, sizes that a
    group does not divide, and non-finite weights; one message lists all failing leaves by path.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_packed)
    plan = make_plan(params, scheme_or_rules, orientations)
    statistics = _statistics(plan, leaves, calibration)
    if check:
        _refuse_non_finite(plan, [leaf for _, leaf in leaves])
    out = [leaf for _, leaf in leaves]
    uses = Counter(map(id, out))                # one array may stand in several places, some of which stay in floating point
    for job in track(plan.jobs, "quantize", progress, label=lambda job: job.path):
        leaf = out[job.index]
        out[job.index] = encode_leaf(leaf, job.scheme, job.orientation, statistics.get(job.path))
        uses[id(leaf)] -= 1
        if donate and not uses[id(leaf)] and isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
            jax.block_until_ready(out[job.index])
            leaf.delete()
        del leaf
    return jax.tree.unflatten(tree, out)


def dequantize(params, dtype=None):
    """Every QTensor of a pytree as a float array in its owner's shape, computed in float32 and cast once.

    `dtype` defaults to each weight's logical dtype. A single QTensor is a pytree too. Float leaves are left as they are.
    """
    return jax.tree.map(lambda leaf: leaf.dequantize(dtype) if _is_packed(leaf) else leaf, params, is_leaf=_is_packed)


def make_plan(params, scheme_or_rules, known: Mapping[str, Orientation | str] | None = None) -> Plan:
    """Match rules and orientations without touching a value; `known` gives orientations by path that precede the table's.

    Raises ValueError as `quantize` says.
    """
    rules = normalise(scheme_or_rules)
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_packed)
    sites = {}
    for index, (keys, leaf) in enumerate(leaves):
        path = leaf_path(keys)
        if path in sites:
            raise ValueError(f"two leaves have the path {path!r}")
        sites[path] = (index, keys, leaf)
    shapes = {path: tuple(getattr(leaf, "shape", ())) for path, (_, _, leaf) in sites.items()}
    matches = match(rules, shapes)
    jobs, kept, failures = [], {}, []
    for path, (index, keys, leaf) in sites.items():
        found = matches.get(path)
        if found is None or found.scheme is None:
            kept[path] = found.reason if found else "no rule matches"
            continue
        try:
            answer = _orientation(path, keys, leaf, found, shapes, params, known or {})
            if isinstance(answer, Orientation):
                check_shape(shapes[path], found.scheme, answer)
                jobs.append(Job(path, index, found.scheme, answer))
            else:
                kept[path] = answer
        except ValueError as error:
            failures.append(f"{path or 'the array'}: {error}")
    if failures:
        raise ValueError("\n".join([f"{len(failures)} leaves cannot be quantized:"] * (len(failures) > 1) + failures))
    _refuse_idle_schemes(rules, matches, jobs, kept)
    return Plan(tuple(jobs), kept)


def _refuse_idle_schemes(rules, matches, jobs, kept) -> None:
    # What is packed by the rule's own scheme is done; by another, it is left as it is, which is no work of this rule.
    packed = [path for path, m in matches.items() if m.scheme is not None and kept.get(path) == f"{PACKED} {m.scheme.name}"]
    done = [job.path for job in jobs] + packed
    busy = {matches[path].pattern for path in done if path in matches}
    for pattern, rule in rules.items():
        if rule.scheme is None or pattern in busy or (pattern == "*" and len(rules) > 1):
            continue
        reasons = [f"{path or 'the array'} ({kept[path]})" for path, m in matches.items() if m.pattern == pattern]
        hint = "; start from float weights (qfunc.dequantize gives those back)" if any(PACKED in reason for reason in reasons) else ""
        raise ValueError(f"rule {pattern!r} quantizes nothing: " + (", ".join(reasons[:5]) or "there is no leaf") + hint)


def _orientation(path, keys, leaf, found, shapes, root, known) -> Orientation | str:
    explicit = found.pattern != "*"
    if _is_packed(leaf):
        if not explicit or leaf.scheme == found.scheme:
            return f"{PACKED} {leaf.scheme.name}"
        raise ValueError(f"{PACKED} {leaf.scheme.name}, the rule asks for {found.scheme.name}; dequantize it first")
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return f"{dtype if dtype is not None else type(leaf).__name__} is not floating point"
    shape = shapes[path]
    if found.rule.axes is not None:
        return from_axes(shape, *found.rule.axes)
    if found.rule.batch is not None:
        if len(shape) != found.rule.batch + 2:
            raise ValueError(f"the rule says {found.rule.batch} batch axes and two more, found shape {shape}")
        return Orientation(found.rule.batch)
    answer = known.get(path) or orient(Site(path, shape, owner_of(root, keys), shapes))
    if explicit and isinstance(answer, str) and len(shape) > 2 and "unknown meaning" in answer:
        raise ValueError(f"shape {shape} has {answer}")
    return answer


def check_shape(shape, scheme: Scheme, orientation: Orientation) -> None:
    """Raise ValueError, naming sizes that would fit, where a scheme cannot hold a weight of this shape."""
    if len(shape) != orientation.axes:
        raise ValueError(f"expected {orientation.axes} axes, found shape {tuple(shape)}")
    _codec.check_spec(scheme.weight)
    check_activation(scheme.activation)
    _, ins, outs = orientation.split(shape)
    columns, rows = math.prod(ins), math.prod(outs)
    if not columns or not rows:
        raise ValueError(f"an empty weight of shape {tuple(shape)}")
    if scheme.weight.code in CODECS.blocks:
        raise ValueError(f"{scheme.name} weights are read from files, not made; qfunc.schemes lists what can be made")
    granularity = scheme.weight.granularity
    fixed = scheme.weight.scale_dtype in ("e8m0", "fp8_e4m3")
    if granularity.kind == "group" and columns % granularity.size and fixed:
        raise ValueError(f"{scheme.name}: its groups of {granularity.size} do not divide the contracted size {columns} of shape "
                         f"{tuple(shape)}, and are fixed by the format")
    if granularity.kind == "group" and columns % granularity.size:
        fits = [d for d in range(min(columns, 512), 1, -1) if columns % d == 0][:6]
        raise ValueError(f"{scheme.name}: groups of {granularity.size} do not divide the contracted size {columns} "
                         f"of shape {tuple(shape)}; groups that would: {', '.join(map(str, fits)) or 'none'}")


def encode_leaf(leaf, scheme: Scheme, orientation: Orientation, statistics=None) -> QTensor:
    """The QTensor of one float leaf; `statistics` are those of its activation, or None."""
    shape, dtype = tuple(leaf.shape), jax.dtypes.canonicalize_dtype(leaf.dtype)
    batch, ins, _ = orientation.split(shape)
    columns = math.prod(ins)
    w = leaf if isinstance(leaf, (jax.Array, np.ndarray)) else np.asarray(leaf)
    perm = None
    if scheme.weight.actorder:
        perm = jnp.broadcast_to(jnp.argsort(-statistics.sq_sum, axis=-1, stable=True).astype(jnp.int32), (*batch, columns))
    leaves = _encode(w, perm, scheme.weight, orientation)
    extra = _input_scales(scheme, statistics, batch)
    packed = code(scheme.weight.code).packed
    return QTensor(**leaves, **extra, scheme=scheme, dtype=dtype.name, pad=-columns % BLOCK if packed else 0, view=orientation.view(shape))


@partial(jax.jit, static_argnums=(2, 3))
def _encode(w, perm, spec, orientation: Orientation):
    batch, ins, outs = orientation.split(w.shape)
    first, second = (outs, ins) if orientation.transposed else (ins, outs)
    matrix = w.reshape(*batch, math.prod(first), math.prod(second))
    if not orientation.transposed:
        matrix = jnp.swapaxes(matrix, -1, -2)
    return _codec.encode(matrix, spec, perm)


def _input_scales(scheme: Scheme, statistics, batch: tuple[int, ...]) -> dict[str, Any]:
    """Calibrated input_scale and input_zero [..., 1, 1] of schemes with a per-tensor scale."""
    spec = scheme.activation
    if spec is None or statistics is None or not (spec.granularity.kind == "tensor" or spec.outer == "tensor"):
        return {}
    element = code(spec.code)
    lo, hi = jnp.min(statistics.min, -1)[..., None, None] * spec.clip, jnp.max(statistics.max, -1)[..., None, None] * spec.clip
    if spec.zero == "int":
        scale, zero = minmax(lo, hi, element)
        zero = zero.astype(jnp.int32)
        return {"input_scale": jnp.broadcast_to(scale, (*batch, 1, 1)), "input_zero": jnp.broadcast_to(zero, (*batch, 1, 1))}
    top = element.highest * (E4M3_LARGEST if spec.outer else 1)
    scale = usable(divide(jnp.maximum(jnp.abs(lo), jnp.abs(hi)), top))
    return {"input_scale": jnp.broadcast_to(scale, (*batch, 1, 1))}


def _statistics(plan: Plan, leaves, calibration) -> dict[str, Any]:
    """Statistics by path for every job that can use them; ValueError where one needs them and has none."""
    found, missing = {}, []
    for job in plan.jobs:
        spec = job.scheme.activation
        needs = job.scheme.weight.actorder or (spec is not None and spec.mode == "static")
        given = None if calibration is None else calibration.get(job.path)
        if isinstance(given, Statistics) and not seen(given):
            given = None
            if needs:
                missing.append(f"{job.path or 'the array'}: {job.scheme.name} needs calibration, which saw no row of its activation")
                continue
        if given is None:
            if needs:
                near = f" (nearest given: {', '.join(nearest(job.path, calibration))})" if calibration else ""
                missing.append(f"{job.path or 'the array'}: {job.scheme.name} needs calibration, found none{near}")
            continue
        statistics = as_statistics(given, job.path)
        batch, ins, _ = job.orientation.split(leaves[job.index][1].shape)
        if statistics.min.shape[-1] != math.prod(ins):
            missing.append(f"{job.path}: calibration has {statistics.min.shape[-1]} channels, the weight contracts {math.prod(ins)}")
            continue
        found[job.path] = spread_over(statistics, batch, job.path)
    if missing:
        raise ValueError("\n".join([*missing, "pass calibration=qfunc.calibrate(apply, params, batches), or raw activations by path"]))
    return found


@jax.jit
def _all_finite(w):
    return jnp.isfinite(w.astype(jnp.float32)).all()


def _refuse_non_finite(plan: Plan, leaves) -> None:
    flags = {}
    for job in plan.jobs:
        leaf = leaves[job.index]
        if not isinstance(leaf, jax.core.Tracer):
            flags[job.path] = _all_finite(leaf if isinstance(leaf, (jax.Array, np.ndarray)) else np.asarray(leaf))
    bad = [path or "the array" for path, flag in flags.items() if not isinstance(flag, jax.core.Tracer) and not bool(flag)]
    if bad:
        raise ValueError(f"NaN or infinity in {', '.join(bad)}; nothing was quantized")


def _is_packed(leaf) -> bool:
    return isinstance(leaf, QTensor)

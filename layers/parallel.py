"""Tensor, expert and data parallel forms of a decoder: `shard_map` around the same forward pass, shardings from one table.

A mesh has one model axis, named `tp` (heads and inner sizes are split) or `ep` (heads are split, and experts go whole to their device),
and may have an axis `data`, over which texts are split. Query, key, value, gate and up are split along their outputs, the layers behind
them along their inputs, whose partial products are summed over the devices in float32; biases of those are added once. Packed weights are
split on byte and group borders and never gathered: what crosses devices are activations.

| leaf | split along outputs | split along inputs |
|---|---|---|
| codes | rows | bytes, in whole blocks of 128 codes below 8 bits |
| scale, zero per channel | rows | on every device |
| scale, zero per group or block | rows (blocks that hold several devices' rows are repeated) | groups |
| scale2; input_scale, input_zero | rows where it has them; on every device | on every device (scale2 of `mxfp4_dual`: its spans) |
| smooth | on every device | split |
| bias | split | on every device, added once |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qfunc._paths import leaf_path
from qfunc._qtensor import CODECS, QTensor
from qfunc._scales import DUAL_SPAN
from qfunc._spec import bits_of

from . import decoder
from .config import ModelConfig
from .linear import ROTATIONS

MODEL_AXES = ("tp", "ep")
TABLE: tuple[tuple[str, str], ...] = (
    ("*/experts/*", "expert"),
    *((f"*/{name}/*", "column") for name in ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "w1", "w3",
                                             "gate_up_proj")),
    *((f"*/{name}/*", "row") for name in ("o_proj", "down_proj", "w2")),
    ("lm_head/*", "column"), ("*/sinks", "heads"), ("*/self_attn/[kv]_scale", "heads"), ("*/self_attn/[kv]_zero", "heads"),
)
"""Pattern of a path to how its leaves are split; all others are on every device."""
ROWS = ("down_proj", "w2")
"""Of an expert's layers, those that are split along their inputs when the inner size is split."""


def axis_of(mesh) -> str:
    """The model axis of a mesh. Raises: ValueError where it has none or an axis of another name."""
    unknown = [name for name in mesh.axis_names if name not in (*MODEL_AXES, "data")]
    found = [name for name in mesh.axis_names if name in MODEL_AXES]
    if unknown or len(found) != 1:
        raise ValueError(f"mesh: expected one axis tp or ep, and perhaps data, found {', '.join(map(str, mesh.axis_names))}")
    return found[0]


def place(params: Mapping, config: ModelConfig, mesh):
    """The parameters on the devices of a mesh.

    Raises: ValueError, before anything moves, where heads, experts or a leaf cannot be split over the mesh; it names the path, what
    does not divide and the numbers of devices that would work.
    """
    axis = axis_of(mesh)
    count = mesh.shape[axis]
    params = jax.tree_util.tree_map_with_path(lambda keys, leaf: _cut_blocks(_kind(keys, axis), leaf, count), params, is_leaf=_packed)
    specs = shardings(params, config, mesh)
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), params, specs)


def shardings(params: Mapping, config: ModelConfig, mesh):
    """A `PartitionSpec` for every array of the parameters, QTensors of them for packed weights. Raises: as `place`."""
    axis = axis_of(mesh)
    _check_model(config, mesh.shape[axis], axis)
    failures: list[str] = []

    def one(keys, leaf):
        path = leaf_path(keys)
        try:
            return _spec(_kind(keys, axis), leaf, axis, mesh.shape[axis], path)
        except ValueError as error:
            failures.append(f"{path}: {error}")
            return P()

    specs = jax.tree_util.tree_map_with_path(one, params, is_leaf=_packed)
    if failures:
        raise ValueError(f"cannot be split over {mesh.shape[axis]} devices:\n  " + "\n  ".join(failures))
    return specs


def parallel_apply(mesh, params: Mapping, config: ModelConfig) -> Callable:
    """`qfunc.layers.decoder.apply` over a mesh: same arguments and results, for parameters that `place` put there."""
    axis = axis_of(mesh)
    count, specs = mesh.shape[axis], shardings(params, config, mesh)
    data = "data" if "data" in mesh.axis_names else None
    split_logits = "lm_head" in params and any(axis in (spec or ()) for spec in jax.tree.leaves(specs["lm_head"]))

    def run(params, ids, cache, config: ModelConfig, *, last: bool = False, pad=None):
        heads = config.num_attention_heads // count
        # Latent attention has a row for all heads, which every device keeps; the number of its key heads says nothing.
        shared = heads if config.latent is not None else config.num_key_value_heads // count
        local = config.replace(num_attention_heads=heads, num_key_value_heads=shared, axis=axis, split_experts=axis == "ep")
        cached = P(data, None, None if config.latent is not None else axis)
        cache_specs = None
        if cache is not None:
            layers = jax.tree.map(lambda _: cached, cache["layers"])
            cache_specs = {"length": P(), "layers": layers, **({"pad": P(data)} if "pad" in cache else {})}
        inner = jax.shard_map(lambda params, ids, cache, pad: decoder.apply(params, ids, cache, local, last=last, pad=pad), mesh=mesh,
                              in_specs=(specs, P(data), cache_specs, None if pad is None else P(data)), check_vma=False,
                              out_specs=(P(data, None, axis if split_logits else None), cache_specs))
        return inner(params, ids, cache, pad)

    return run


def _packed(leaf) -> bool:
    return isinstance(leaf, QTensor)


def _kind(keys, axis: str) -> str:
    path = leaf_path(keys)
    kind = next((kind for pattern, kind in TABLE if fnmatchcase(path, pattern)), "whole")
    if kind != "expert":
        return kind
    if axis == "ep":
        return "stack"
    return "row" if any(f"/{name}/" in path for name in ROWS) else "column"


def _fitting(works: Callable[[int], bool]) -> str:
    found = [n for n in range(2, 65) if works(n)]
    return ", ".join(map(str, [1, *found])) + " devices" if found else "one device alone"


def _check_model(config: ModelConfig, count: int, axis: str) -> None:
    if config.scan:
        raise ValueError("stacked layers cannot be split over a mesh; its layers are unrolled")

    def works(n: int) -> bool:
        shared = config.latent is not None or config.num_key_value_heads % n == 0
        return config.num_attention_heads % n == 0 and shared and (axis != "ep" or config.routing.experts % n == 0)
    if axis == "ep" and config.routing is None:
        raise ValueError(f"mesh: an axis ep is for models with experts, found {config.family}")
    if not works(count):
        experts = f" and {config.routing.experts} experts" if axis == "ep" else ""
        raise ValueError(f"{config.num_attention_heads} heads, {config.num_key_value_heads} key/value heads{experts} cannot be split over "
                         f"{count} devices; {_fitting(works)} would work")


def _spec(kind: str, leaf, axis: str, count: int, path: str):
    name = path.rpartition("/")[2]
    if name in ROTATIONS and kind != "whole" and count > 1:
        raise ValueError("an online rotation mixes the inputs of all devices; load it without a mesh")
    if kind == "whole" or count == 1:
        return jax.tree.map(lambda _: P(), leaf)
    if kind == "stack":
        return jax.tree.map(lambda array: P(axis), leaf)
    if kind == "heads":
        return _divided(leaf, leaf.ndim - 1, axis, count) if leaf.size > 1 else P()
    if _packed(leaf):
        return (_column if kind == "column" else _row)(leaf, axis, count, path)
    if name == "kernel":
        if path.startswith("lm_head/") and leaf.shape[-1] % count:
            return P()
        return _divided(leaf, leaf.ndim - (1 if kind == "column" else 2), axis, count)
    # Biases and other vectors of a layer: with its outputs.
    return _divided(leaf, leaf.ndim - 1, axis, count) if kind == "column" and name == "bias" and leaf.shape[-1] % count == 0 else P()


def _divided(leaf, dimension: int, axis: str, count: int):
    size = leaf.shape[dimension]
    if size % count:
        raise ValueError(f"{size} does not divide; {_fitting(lambda n: size % n == 0)} would work")
    return _at(leaf.ndim, dimension, axis)


def _at(ndim: int, dimension: int, axis: str) -> P:
    return P(*(axis if i == dimension else None for i in range(ndim)))


def _unsplittable(q: QTensor) -> str | None:
    if q.perm is not None:
        return "its inputs have an order of their own (act-order), which crosses devices"
    if q.scheme.weight.scale_rule == "double" or q.scale_offset is not None:
        return "its scales are quantized in blocks that cross rows"
    return "its layout is a backend's; split the canonical one" if q.layout != "canonical" else None


def _column(q: QTensor, axis: str, count: int, path: str):
    """Specs of a packed weight that is split along its outputs."""
    outs = q.matrix_shape[-1]
    reason = _unsplittable(q) if q.perm is None else None            # an order of the inputs stays whole
    block = q.scheme.weight.granularity.out

    def works(n: int) -> bool:
        return outs % n == 0 and (not block or outs // n % block == 0 or block % (outs // n) == 0)
    if reason is None and not works(count):
        if path.startswith("lm_head/"):
            return jax.tree.map(lambda _: P(), q)
        reason = f"{outs} outputs" + (f" in blocks of {block}" if block else "") + f" do not divide; {_fitting(works)} would work"
    if reason:
        raise ValueError(reason)
    out = {}
    for name, leaf in q.leaves.items():
        rows = name in ("codes", "scale", "zero", "scale2") and leaf.shape[-2] > 1
        # A scale of one row for all may be a block as wide as a device's share.
        out[name] = _at(leaf.ndim, leaf.ndim - 2, axis) if rows else P()
    return q.replace(**out)


def _row(q: QTensor, axis: str, count: int, path: str):
    """Specs of a packed weight that is split along its inputs."""
    ins = q.matrix_shape[-2]
    weight = q.scheme.weight
    reason, unit = _unsplittable(q), _unit(weight)

    def works(n: int) -> bool:
        return ins % n == 0 and ins // n % unit == 0
    if reason is None and not works(count):
        reason = f"{ins} inputs in units of {unit} do not divide; {_fitting(works)} would work"
    if reason is None and q.scheme.activation is not None and q.scheme.activation.granularity.kind == "group" \
            and ins // count % q.scheme.activation.granularity.size:
        size = q.scheme.activation.granularity.size
        reason = f"groups of {size} activations would be cut; {_fitting(lambda n: ins % (n * size) == 0)} would work"
    if reason:
        raise ValueError(reason)
    grouped = weight.granularity.kind in ("group", "block")
    out = {}
    for name, leaf in q.leaves.items():
        split = name in ("codes", "smooth") or (name in ("scale", "zero") and grouped) or (name == "scale2" and leaf.shape[-1] > 1)
        out[name] = _at(leaf.ndim, leaf.ndim - 1, axis) if split else P()
    return q.replace(**out)


def _unit(weight) -> int:
    """Inputs that cannot be cut: a group, a packed block of 128 codes, a ggml block."""
    if weight.code in CODECS.blocks:
        return CODECS.blocks[weight.code][0]
    packed = 128 if bits_of(weight.code) < 8 else 1
    size = weight.granularity.size if weight.granularity.kind in ("group", "block") else 1
    size = DUAL_SPAN if weight.scale_rule == "mx_dual" else size
    return max(packed, size) if max(packed, size) % min(packed, size) == 0 else packed * size


def _cut_blocks(kind: str, leaf, count: int):
    """A weight split along its outputs whose scale blocks hold the rows of several devices: those blocks' scales are repeated."""
    if not _packed(leaf) or kind != "column" or leaf.scheme.weight.granularity.kind != "block":
        return leaf
    outs, block = leaf.matrix_shape[-1], leaf.scheme.weight.granularity.out
    share = outs // count
    if outs % count or share % block == 0 or block % share:
        return leaf
    owner = jnp.arange(count) * share // block
    return leaf.replace(**{name: getattr(leaf, name)[..., owner, :] for name in ("scale", "zero") if getattr(leaf, name) is not None})

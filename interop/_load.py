"""From headers to a tree of parameters: plan every leaf, then read, repack and place them one by one, in parallel.

Planning reads headers and a few tiny tensors. Building runs in threads, a leaf each; what a leaf needs at a time is its packed self plus
one expert or one tile, and the pages of the file are given back when it is done.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import jax
import numpy as np

from qfunc._progress import track
from qfunc._qtensor import QTensor

from ._buffers import empty, owned
from ._family import Family, Source
from ._fields import unknown
from ._paths import ALREADY_IN_OUT, EXPERT, cache_scale, is_kernel, leaf_name, split_path
from ._plan import Layer, Parts
from ._refuse import refuse, short, uncollected
from .safetensors import FLOATS, Tensor

INTEGERS = {"I64": np.int32, "I32": np.int32, "BOOL": np.bool_, "U8": np.uint8, "I16": np.int16, "U16": np.uint16, "U32": np.uint32}
PACKED = frozenset({"qweight", "qzeros", "scaled_zeros", "weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2",
                    "weight_global_scale", "SCB", "absmax", "quant_map", "deq_scale", "quant_bias", "_weight_qdata"})
"""Parameters that only quantized layers have, whoever wrote them."""
WORKERS = min(8, os.cpu_count() or 1)


@dataclass
class Leaf:
    """One leaf of the result.

    Fields: `path`, its keys; `members`, the layers it stacks (one and `experts` None for a leaf without expert axis) or None; `read`, for
    float leaves; `tensors`, what it is made of; `shape`; `scheme`.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    members: tuple[Layer, ...] = ()
    stacked: bool = False
    read: Callable[[], np.ndarray | None] | None = None

    @property
    def name(self) -> str:
        """The path as a string."""
        return "/".join(self.path)

    @property
    def scheme(self):
        """The scheme of a quantized leaf, else None."""
        return self.members[0].scheme if self.members else None

    @property
    def nbytes(self) -> int:
        """Bytes in the checkpoint."""
        return sum(t.nbytes for t in self.tensors)


@dataclass
class Plan:
    """All leaves, the names that the checkpoint has for them (module -> path and expert), the cache's element type, and oddities."""

    leaves: list[Leaf] = field(default_factory=list)
    names: dict[str, tuple[tuple[str, ...], int | None]] = field(default_factory=dict)
    kv_code: str | None = None
    notes: list[str] = field(default_factory=list)


def make_plan(source: Source, family: Family | None) -> Plan:
    """Plan every tensor of a checkpoint: each becomes (part of) a leaf, or the checkpoint is refused."""
    with uncollected():
        return _make_plan(source, family)


def _make_plan(source: Source, family: Family | None) -> Plan:
    settings = family.settings(source) if family is not None else None
    if family is not None:
        _unknown_fields(source, family)
    split = family.split if family is not None else lambda name: tuple(name.rpartition(".")[::2])
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    plan = Plan(notes=source.notes)
    caches: dict[tuple[str, str], Tensor] = {}
    for name, tensor in source.files.items():
        module, param = split(name)
        scale = cache_scale(module, param)
        if scale is not None and tensor.dtype in (*FLOATS, "I8", "I32"):
            if scale in caches:
                raise refuse(tensor.file.path, name, "one scale of the cache", "another of the same name")
            caches[scale] = tensor
        elif param in modules[module]:
            raise refuse(tensor.file.path, name, "one tensor of its name", "another")
        else:
            modules[module][param] = tensor
    plan.leaves += [made for (module, leaf), tensor in caches.items() for made in _cache_leaves(module, leaf, tensor)]
    if caches and family is not None:
        plan.kv_code = family.kv_code(settings) or "fp8_e4m3"
    quantized, floats = [], []
    for module, tensors in modules.items():
        layer = family.layer(settings, Parts(module, tensors)) if family is not None and tensors else None
        if layer is None:
            floats.append((module, tensors))
        else:
            quantized.append(layer)
    in_out = source.config.get("model_type") in ALREADY_IN_OUT
    _add_layers(plan, quantized)
    _add_floats(plan, floats, family, in_out)
    _no_collisions(plan, source)
    for name, before in source.aliases.items():
        module, alias = split(name)[0], before.rpartition(".")[0]
        if module in plan.names:
            for other in (alias, alias.removesuffix(".linear")):            # a smoothed layer is named with its wrapper and without
                plan.names.setdefault(other, plan.names[module])
    return plan


def _unknown_fields(source: Source, family: Family) -> None:
    found = sorted(set(unknown(family.name, family.fields, source.quant.data)))
    if found:
        more = f" and {len(found) - 20} more" if len(found) > 20 else ""
        source.notes.append(f"fields of the configuration that are not known: {', '.join(map(short, found[:20]))}{more}")


def _cache_leaves(module: str, name: str, tensor: Tensor) -> list[Leaf]:
    """One leaf of a scale; early checkpoints have one scale for keys and values, which becomes both."""
    def read():
        array = tensor.read().astype(np.float32)
        if not np.isfinite(array).all():
            raise refuse(tensor.file.path, tensor.name, "finite numbers", "NaN or infinity")
        return array.reshape(()) if array.size == 1 else array
    size = int(np.prod(tensor.shape, dtype=np.int64))
    names = ("k_scale", "v_scale") if name == "kv_scale" else (name,)
    return [Leaf((*split_path(module), leaf), () if size == 1 else tensor.shape, () if i else (tensor,), read=read)
            for i, leaf in enumerate(names)]


def _add_layers(plan: Plan, layers: list[Layer]) -> None:
    stacks: dict[tuple[str, str], dict[int, Layer]] = defaultdict(dict)
    for layer in layers:
        match = EXPERT.fullmatch(layer.module)
        if match and str(int(match["index"])) == match["index"]:
            stacks[match["stack"], match["rest"]][int(match["index"])] = layer
        else:
            _add_layer(plan, (layer,), split_path(layer.module))
    for (stack, rest), members in stacks.items():
        ordered = [members[i] for i in sorted(members)]
        ordered = _same_order(ordered)
        whole = sorted(members) == list(range(len(members))) and len({_static(layer) for layer in ordered}) == 1
        if whole:
            _add_layer(plan, tuple(ordered), (*split_path(stack), *split_path(rest)))
            continue
        missing = [i for i in range(max(members)) if i not in members]
        why = f"are not all there (no expert {missing[0]})" if missing else "differ in scheme or shape"
        plan.notes.append(f"{stack}: the experts' {rest} {why} and are kept one by one")
        for layer in ordered:
            _add_layer(plan, (layer,), split_path(layer.module))


def _static(layer: Layer):
    return layer.scheme, layer.shape, layer.dtype, tuple(sorted(layer.extras))


def _same_order(layers: list[Layer]) -> list[Layer]:
    """Where some experts have an order of their inputs, the others get the plain one, so that they can be one stack."""
    if len({layer.scheme.weight.actorder for layer in layers}) < 2:
        return layers
    return [layer if layer.scheme.weight.actorder else replace(layer, scheme=_reordered(layer.scheme), build=_with_order(layer))
            for layer in layers]


def _reordered(scheme):
    return scheme.replace(name=f"{scheme.name}_actorder", weight_actorder=True)


def _with_order(layer: Layer):
    return lambda: {**layer.build(), "perm": np.arange(layer.shape[-2], dtype=np.int32)}


def _add_layer(plan: Plan, members: tuple[Layer, ...], keys: tuple[str, ...]) -> None:
    first, stacked = members[0], EXPERT.fullmatch(members[0].module) is not None and keys != split_path(members[0].module)
    batch = (len(members),) if stacked else ()
    path = (*keys, leaf_name(first.module))
    tensors = tuple(t for layer in members for t in layer.tensors)
    plan.leaves.append(Leaf(path, (*batch, *first.shape), tensors, members, stacked))
    for index, layer in enumerate(members):
        plan.names[layer.module] = path, index if stacked else None
    if stacked:
        plan.names[".".join(keys)] = path, None
    elif len(first.shape) == 3 and ".experts." in first.module:
        stack, _, rest = first.module.rpartition(".experts.")
        plan.names |= {f"{stack}.experts.{index}.{rest}": (path, index) for index in range(first.shape[0])}
    for name in first.extras:
        plan.leaves.append(Leaf((*keys, name), batch, (), read=_extra(members, name, stacked)))


def _extra(members: tuple[Layer, ...], name: str, stacked: bool):
    def read():
        arrays = [layer.extras[name]() for layer in members]
        if all(array is None for array in arrays):
            return None
        shape = next(array.shape for array in arrays if array is not None)
        arrays = [np.zeros(shape, np.float32) if array is None else array for array in arrays]
        return np.stack(arrays) if stacked else arrays[0]
    return read


def _add_floats(plan: Plan, modules: list, family: Family | None, in_out: bool) -> None:
    stacks: dict[tuple[str, str], dict[int, Tensor]] = defaultdict(dict)
    for module, tensors in modules:
        for param, tensor in tensors.items():
            if tensor.dtype not in FLOATS and (tensor.dtype not in INTEGERS or (param == "weight" and len(tensor.shape) == 2)):
                expected = "a float tensor, or scales beside it" if family else "a float tensor: the checkpoint names no quantization"
                raise refuse(tensor.file.path, tensor.name, expected, f"{tensor.dtype} {list(tensor.shape)} and {', '.join(tensors)}")
            if family is not None and param in family.marks:
                raise refuse(tensor.file.path, tensor.name, "a layer that the configuration makes quantized", "one that it leaves in float")
            if family is None and param in PACKED:
                raise refuse(tensor.file.path, tensor.name, "a configuration that names the quantization", "none: is config.json whole?")
            match = EXPERT.fullmatch(module)
            if match and str(int(match["index"])) == match["index"]:
                stacks[match["stack"], f"{match['rest']}.{param}"][int(match["index"])] = tensor
            else:
                _add_float(plan, module, param, (tensor,), split_path(module), False, in_out)
    for (stack, rest), members in stacks.items():
        inner, _, param = rest.rpartition(".")
        if sorted(members) == list(range(len(members))) and len({(t.dtype, t.shape) for t in members.values()}) == 1:
            ordered = tuple(members[i] for i in sorted(members))
            _add_float(plan, f"{stack}.0.{inner}", param, ordered, (*split_path(stack), *split_path(inner)), True, in_out)
            for index in sorted(members):
                plan.names.setdefault(f"{stack}.{index}.{inner}", plan.names.get(f"{stack}.{inner}", ((), None))[:1] + (index,))
            continue
        for index, tensor in members.items():
            module = f"{stack}.{index}.{inner}"
            _add_float(plan, module, param, (tensor,), split_path(module), False, in_out)


def _add_float(plan: Plan, module: str, param: str, tensors: tuple[Tensor, ...], keys, stacked: bool, in_out: bool) -> None:
    shape, kernel = tensors[0].shape, is_kernel(module, param, len(tensors[0].shape))
    turn = kernel and not in_out

    def one(tensor: Tensor) -> np.ndarray:
        array = tensor.read()
        if tensor.dtype in INTEGERS:
            narrow = array.astype(INTEGERS[tensor.dtype])
            if (narrow != array).any():
                raise refuse(tensor.file.path, tensor.name, f"integers of {INTEGERS[tensor.dtype].__name__}", "larger ones")
            return narrow
        array = array.astype(np.float32) if tensor.dtype == "F64" else array
        return array.T if turn else array

    def read() -> np.ndarray:
        return np.stack([one(t) for t in tensors]) if stacked else one(tensors[0])
    path = (*keys, "kernel" if kernel else param)
    shape = shape[::-1] if turn else shape
    plan.leaves.append(Leaf(path, (len(tensors), *shape) if stacked else shape, tensors, read=read, stacked=stacked))
    name = ".".join(keys)
    if kernel or name not in plan.names or param == "weight":
        plan.names[name] = path, None


def _no_collisions(plan: Plan, source: Source) -> None:
    """Two leaves of one path, or a leaf on the way to another, would lose one of them."""
    paths = {leaf.path for leaf in plan.leaves}
    if len(paths) != len(plan.leaves):
        seen: set = set()
        twice = next(leaf for leaf in plan.leaves if leaf.path in seen or seen.add(leaf.path))
        raise refuse(source.path, twice.name, "one leaf of this path", "two")
    for path in paths:
        for length in range(1, len(path)):
            if path[:length] in paths:
                raise refuse(source.path, "/".join(path), "parents that are no leaves", f"the leaf {'/'.join(path[:length])}")


def build(plan: Plan, dtype: str, place: Callable, progress: bool | None, dequantize: str | None) -> dict:
    """Build all leaves of a plan as nested dicts; `place(path, leaf)` puts a leaf of numpy arrays on its devices."""
    params: dict = {}
    done = _in_threads(plan.leaves, lambda leaf: _finish(leaf, dtype, place, dequantize))
    for leaf, value in track(done, "load", progress, lambda item: item[0].name):
        if value is None:
            continue
        node = params
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = value
    return params


def _finish(leaf: Leaf, dtype: str, place: Callable, dequantize: str | None):
    if leaf.members:
        value = place(leaf.name, _quantized(leaf, dtype))
        if dequantize is not None:
            value = value.dequantize(dequantize)
    else:
        array = leaf.read()
        value = None if array is None else place(leaf.name, owned(array))
        if value is not None and dequantize is not None and leaf.path[-1] == "kernel":
            value = value.astype(dequantize)
    for file in {tensor.file for tensor in leaf.tensors}:
        file.release([t for t in leaf.tensors if t.file is file])
    return value


def _quantized(leaf: Leaf, dtype: str) -> QTensor:
    first = leaf.members[0]
    static = {"scheme": first.scheme, "dtype": first.dtype or dtype, "pad": first.pad}
    if not leaf.stacked:
        return QTensor(**{name: owned(array) for name, array in first.build().items()}, **static)
    stacks: dict[str, np.ndarray] = {}
    for index, layer in enumerate(leaf.members):
        for name, array in layer.build().items():
            if name not in stacks:
                if index:
                    raise layer_error(layer, name)
                stacks[name] = empty((len(leaf.members), *array.shape), array.dtype)
            if stacks[name].shape[1:] != array.shape or stacks[name].dtype != array.dtype:
                raise layer_error(layer, name)
            stacks[name][index] = array
        if layer.tensors:
            layer.tensors[0].file.release([t for t in layer.tensors if t.file is layer.tensors[0].file])
    return QTensor(**stacks, **static)


def layer_error(layer: Layer, name: str):
    """Experts of one stack whose leaves turn out to differ."""
    return refuse(layer.tensors[0].file.path, layer.module, f"the same {name} as in expert 0", "another shape, type or none")


def _in_threads(leaves: list[Leaf], work: Callable) -> Iterable:
    """(leaf, result) as they are done, never more than the workers in flight; the first error stops the rest."""
    with ThreadPoolExecutor(WORKERS) as pool:
        waiting, todo = {}, iter(leaves)
        try:
            for leaf in todo:
                waiting[pool.submit(work, leaf)] = leaf
                if len(waiting) > WORKERS:
                    yield from _collect(waiting)
            while waiting:
                yield from _collect(waiting)
        finally:
            for future in waiting:
                future.cancel()


def _collect(waiting: dict) -> Iterable:
    finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
    for future in finished:
        yield waiting.pop(future), future.result()


def placer(shardings) -> Callable:
    """`place(path, leaf)` for `load(shardings=...)`: None, one sharding, a dict by path pattern, a nested dict, or a function."""
    if shardings is None:
        return lambda path, leaf: jax.device_put(leaf)
    if callable(shardings):
        return lambda path, leaf: jax.device_put(leaf, shardings(path, leaf))
    if isinstance(shardings, dict):
        flat = _flat_shardings(shardings)
        return lambda path, leaf: jax.device_put(leaf, _by_path(flat, path))
    return lambda path, leaf: jax.device_put(leaf, shardings)


def _flat_shardings(tree: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        out.update(_flat_shardings(value, path) if isinstance(value, dict) else {path: value})
    return out


def _by_path(shardings: dict, path: str):
    if path in shardings:
        return shardings[path]
    return next((value for pattern, value in shardings.items() if fnmatchcase(path, pattern)), None)

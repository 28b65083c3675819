"""`to_torch`: a JAX function as a torch function.

The function is traced once per structure, shapes and types of its arguments; its jaxpr becomes a list of torch instructions (`_build`)
that run where the tensors are. Quantized primitives become the operators of torch_npu through the rules of `_rules`, everything else its
torch equivalent. Between the arguments and the results nothing goes to the host.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from qfunc._paths import leaf_path
from qfunc._qtensor import QTensor

from . import (  # noqa: F401
    _lax_collective,
    _lax_control,
    _lax_dots,
    _lax_elementwise,
    _lax_indexing,
    _lax_integers,
    _lax_random,
    _lax_reductions,
    _lax_shapes,
)
from ._arrays import narrowed, numpy_dtype, to_tensor
from ._build import Builder, UnknownPrimitive
from ._program import Program
from ._specification import SPECIFICATION

PROGRAMS = 64
"""Traces that one function keeps; the oldest goes first."""


@dataclass
class Traced:
    """One trace: its program, the jaxpr it came from, and how the results are put together."""

    program: Program
    jaxpr: Any
    tree: Any
    others: tuple
    places: tuple[int, ...]


class TorchFunction:
    """A JAX function on torch tensors; see `to_torch`."""

    def __init__(self, function: Callable, rules: str, products: str, branches: str, soc: str, device, collective):
        self.function, self.rules, self.products, self.branches, self.soc = function, rules, products, branches, soc
        self.device = None if device is None else torch.device(device)
        self.collective = collective
        self._traces: OrderedDict[Any, Traced] = OrderedDict()
        update_wrapper(self, function, updated=())

    def __call__(self, *args, **kwargs):
        leaves, traced = self._prepare(args, kwargs)
        device = self.device or _device_of(leaves)
        values = []
        for leaf in leaves:
            values += _values(leaf, device)
        return _join(traced.program(values, device), traced)

    def jaxpr(self, *args, **kwargs):
        """The jaxpr that a call with these arguments runs."""
        return self._prepare(args, kwargs)[1].jaxpr

    def operations(self, *args, **kwargs) -> dict[str, int]:
        """How many instructions of each kind a call runs, loops and branches counted once: nothing is computed."""
        counts: dict[str, int] = {}
        for step in self._prepare(args, kwargs)[1].program.instructions:
            counts[step.name] = counts.get(step.name, 0) + 1
        return counts

    def _prepare(self, args, kwargs):
        found, tree = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=_is_leaf)
        leaves, places, others, signature = [], [], [], []
        for i, (keys, leaf) in enumerate(found):
            if isinstance(leaf, QTensor) and self.rules != "reference":
                raise TypeError(f"{leaf_path(keys[2:])}: {leaf!r} is not placed; place(params, device=..., soc=...) of qfunc.interop.cann "
                                "lays packed weights out for their operators, once")
            abstract = _abstract(leaf)
            if abstract is None:
                others.append(leaf)
                continue
            leaves.append(leaf)
            places.append(i)
            signature.append(abstract)
        held = [_held(leaf) for leaf in leaves]
        key = (tree, tuple(places), tuple(map(_static, others)), tuple(map(_hashable, signature)), tuple(held), jax.config.jax_enable_x64)
        traced = self._traces.get(key)
        if traced is None:
            traced = self._traces[key] = self._trace(tree, places, others, signature, held)
            if len(self._traces) > PROGRAMS:
                self._traces.popitem(last=False)
        else:
            self._traces.move_to_end(key)
        return leaves, traced

    def _trace(self, tree, places, others, signature, held) -> Traced:
        result: list[Any] = []

        def call(values):
            rest, taken, given = iter(others), set(places), iter(values)
            leaves = [next(given) if i in taken else next(rest) for i in range(len(values) + len(others))]
            args, kwargs = jax.tree.unflatten(tree, leaves)
            out, structure = jax.tree.flatten(self.function(*args, **kwargs))
            arrays = [i for i, leaf in enumerate(out) if isinstance(leaf, (jax.Array, np.ndarray, np.generic))]
            result[:] = [structure, tuple(leaf for i, leaf in enumerate(out) if i not in set(arrays)), tuple(arrays)]
            return [out[i] for i in arrays]

        axes = [] if self.collective is None else [(self.collective.axis, self.collective.size)]
        closed = jax.make_jaxpr(call, axis_env=axes)(signature)
        rules, inlined = (RULES_OF[self.rules])()
        builder = Builder(rules, inlined, self.products, self.branches, self.soc, self.collective)
        flags = [flag for abstract, own in zip(signature, held, strict=True) for flag in [own] * len(jax.tree.leaves(abstract))]
        try:
            program = builder.program(closed.jaxpr, closed.consts, flags, keep=True)
        except UnknownPrimitive as error:
            name = getattr(self.function, "__name__", self.function)
            raise NotImplementedError(f"to_torch({name}): no torch rule for\n{error}") from None
        return Traced(program, closed, *result)


def to_torch(fn: Callable, *, rules: str = "npu", products: str = "exact", branches: str = "select", soc: str = "A2",
             device=None, collective=None) -> TorchFunction:
    """A torch callable that computes what a JAX function computes.

        params = place(model.params, device="npu", soc="A2")
        logits, cache = to_torch(qfunc.layers.decoder.apply)(params, ids, None, model.config)

    Arguments:
        fn: any function of pytrees that JAX can trace.
        rules: `"npu"`: quantized primitives run as operators of torch_npu, on weights that `place` laid out. `"reference"`: they run as
            their specification, with ordinary torch operations on QTensors as they are, on any device; slow, for checks.
        products: `"exact"`: products of 16-bit operands that JAX accumulates in float32 keep that sum; `"operands"`: they are rounded to
            16 bits as the operator gives them, which is what most torch models do. See `_lax_dots`.
        branches: `"select"`: both sides of a `cond` run and the result is selected on the device; `"read"`: the condition is read.
        soc: generation for weights that `fn` closes over, which are placed when they are met; placed arguments know their own.
        device: where constants and arrays go; by default where the tensors among the arguments are.
        collective: for a function over a named axis, what `qfunc.interop.cann.Collective` gives.

    The callable takes and gives the same pytrees with torch tensors as leaves (JAX and numpy arrays are taken too, and moved). Packed
    weights must be placed. Everything that is no array (numbers, strings, None, configurations) is part of the trace, as a static
    argument of jit. int64 and float64 tensors are taken in 32 bits, as JAX takes them; gradients are not followed. The result can be
    captured by `torch.fx.experimental.proxy_tensor.make_fx` and runs on fake and meta tensors, unless a `while` loop asks for values.

    Raises: NotImplementedError, before anything runs, naming every equation that has no torch rule; TypeError for a packed weight
    that is not placed, naming its path.
    """
    for name, value, known in (("rules", rules, tuple(RULES_OF)), ("products", products, ("exact", "operands")),
                               ("branches", branches, ("select", "read"))):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, found {value!r}")
    return TorchFunction(fn, rules, products, branches, soc, device, collective)


def _npu():
    from ._rules import RULES
    return RULES, {name: jaxpr for name, jaxpr in SPECIFICATION.items() if name not in RULES and name == "quantized_take"}


RULES_OF: dict[str, Callable] = {"npu": _npu, "reference": lambda: ({}, SPECIFICATION)}
"""What `rules` may be, to (functions of quantized primitives, jaxprs that take the place of others)."""


def _is_leaf(leaf) -> bool:
    return _held(leaf) or isinstance(leaf, QTensor)


def _held(leaf) -> bool:
    """True for a placed weight."""
    return hasattr(leaf, "abstract") and hasattr(leaf, "parts")


def _abstract(leaf):
    """What a leaf is traced as; None where it is no array."""
    if _held(leaf):
        return leaf.abstract
    if isinstance(leaf, QTensor):
        return jax.tree.map(lambda part: jax.ShapeDtypeStruct(part.shape, part.dtype), leaf)
    if isinstance(leaf, torch.Tensor):
        dtype = jax.dtypes.canonicalize_dtype(numpy_dtype(leaf.dtype))
        return jax.ShapeDtypeStruct(tuple(int(size) for size in leaf.shape), dtype)
    if isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))
    return None


def _static(value):
    """A static argument as a key: 1, 1.0 and True are equal, 0.0 and -0.0 too, and NaN is not even equal to itself."""
    return type(value), repr(value) if isinstance(value, (float, complex)) else value


def _hashable(abstract):
    leaves, tree = jax.tree.flatten(abstract)
    return tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves), tree


def _device_of(leaves) -> torch.device:
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) or _held(leaf):
            return torch.device(leaf.device)
    return torch.device("cpu")


def _values(leaf, device) -> list:
    """A leaf as the values of its variables."""
    if _held(leaf):
        return list(leaf.parts)
    if isinstance(leaf, QTensor):
        return [_value(part, device) for part in jax.tree.leaves(leaf)]
    return [_value(leaf, device)]


def _value(leaf, device) -> torch.Tensor:
    if not isinstance(leaf, torch.Tensor):
        leaf = to_tensor(leaf, device)
    dtype = numpy_dtype(leaf.dtype)
    narrow = jax.dtypes.canonicalize_dtype(dtype)
    return leaf if narrow == dtype else narrowed(leaf, narrow)


def _join(values: list, traced: Traced):
    """The results as the function returned them; a packed weight that went through untouched is the placed one."""
    others, found, places = iter(traced.others), iter(values), set(traced.places)
    leaves = [next(found) if i in places else next(others) for i in range(len(values) + len(traced.others))]
    out = jax.tree.unflatten(traced.tree, leaves)
    return jax.tree.map(_settled, out, is_leaf=lambda leaf: isinstance(leaf, QTensor))


def _settled(leaf):
    if not isinstance(leaf, QTensor):
        return leaf.tensor() if hasattr(leaf, "tensor") else leaf
    parts = list(leaf.leaves.values())
    owners = {id(getattr(part, "owner", part)) for part in parts}
    if len(owners) == 1 and _held(getattr(parts[0], "owner", None)):
        return parts[0].owner
    return jax.tree.map(_settled, leaf, is_leaf=lambda part: hasattr(part, "tensor"))

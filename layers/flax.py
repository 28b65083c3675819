"""flax nnx: modules over the functions of this package, and existing models quantized without touching their code.

`Attention`, `Embedding`, `Experts`, `LayerNorm`, `Linear`, `MLP`, `MoE`, `RMSNorm` are described in `qfunc.layers.modules`.

The parameters of a copy of the model become packed, and each module that owns one directly gets a subclass of its own class, whose
methods run the original ones through `qfunc.layers.functional`. All other modules, and all state, stay what they were: attributes,
`isinstance`, `nnx.split` and `nnx.merge`, `nnx.jit` and `nnx.scan` over stacked layers work as on the float model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

import qfunc
from qfunc._orient import Orientation
from qfunc._paths import leaf_path
from qfunc._qtensor import QTensor
from qfunc._rules import match, normalise

from ._axes import weight_axes
from ._functional import functional
from .modules import MLP, Attention, Embedding, Experts, Layer, LayerNorm, Linear, MoE, RMSNorm

__all__ = ["MLP", "Attention", "Embedding", "Experts", "LayerNorm", "Linear", "MoE", "RMSNorm", "nnx_function", "packed_class",
           "quantize_nnx", "weight_axes"]


def quantize_nnx(model, scheme_or_rules, *, calibration=None, inputs: tuple | Mapping | None = None, check: bool = True,
                 progress: bool | None = None):
    """Quantize an nnx model.

        qmodel = quantize_nnx(model, "w8a8_dynamic")
        y = qmodel(x)

    Arguments:
        model: an `nnx.Module`; it is left as it is, arrays that are not quantized are shared.
        scheme_or_rules, calibration, check, progress: as in `qfunc.quantize`, on the paths of the model's `nnx.Param`s. Weights of
            modules that the table `KERNELS` does not know stay in floating point unless `inputs` are given or a rule names them.
            Statistics come from `qfunc.calibrate(*nnx_function(model), batches)`.
        inputs: arguments of `model.__call__`, as a tuple, or a mapping of keyword arguments in which `args` are the positional ones;
            with them the model is traced and the axes of all its parameters are known exactly.

    Returns: a new model of the same structure.

    Raises: as `qfunc.quantize`; ValueError when called, by path, where a packed weight of a module of one's own meets an operation that
    has no packed form.
    """
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    if inputs is None:
        known = _known(model, params, scheme_or_rules)
    else:
        keywords = dict(inputs) if isinstance(inputs, Mapping) else {"args": inputs}
        apply, _ = nnx_function(model)
        known = weight_axes(apply, params, *keywords.pop("args", ()), **keywords)
    packed = qfunc.quantize(params, scheme_or_rules, calibration=calibration, check=check, progress=progress, orientations=known)
    out = nnx.merge(graph, packed, rest, copy=True)
    for _, module in nnx.iter_modules(out):
        if not isinstance(module, Layer) and any(_holds(value) for value in vars(module).values()):
            object.__setattr__(module, "__class__", packed_class(type(module)))
    return out


def nnx_function(model, method: str = "__call__") -> tuple[Callable, Any]:
    """(apply, params) of an nnx model: `apply(params, *args, **kwargs)` calls the method on a copy with these `nnx.Param`s.

    What `qfunc.calibrate`, `qfunc.report` and everything else that speaks of functions takes; changes of other state are dropped.
    """
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def apply(params, *args, **kwargs):
        return getattr(nnx.merge(graph, params, rest, copy=True), method)(*args, **kwargs)

    return apply, params


def _holds(value) -> bool:
    return isinstance(value, nnx.Variable) and isinstance(value.get_raw_value(), QTensor)


# Orientation by class: module, size of each of its kernel's axes from the front.

def _linear(module: nnx.Linear, shape) -> Orientation:
    return Orientation(len(shape) - 2)


def _general(module: nnx.LinearGeneral, shape) -> Orientation:
    return Orientation(len(shape) - len(module.in_features) - len(module.out_features), len(module.in_features), len(module.out_features))


def _einsum(module: nnx.Einsum, shape) -> Orientation | str:
    if not module.einsum_str or "." in module.einsum_str:
        return f"the kernel of an nnx.Einsum {module.einsum_str!r}"
    inputs, _, out = module.einsum_str.replace(" ", "").partition("->")
    x, kernel = inputs.split(",")
    kinds = ["batch" if c in x and c in out else "in" if c in x else "out" for c in kernel]
    batch, ins, outs = (kinds.count(kind) for kind in ("batch", "in", "out"))
    extra = len(shape) - len(kernel)
    for transposed, order in ((False, ("in",) * ins + ("out",) * outs), (True, ("out",) * outs + ("in",) * ins)):
        if ins and outs and kinds == ["batch"] * batch + list(order):
            return Orientation(batch + extra, ins, outs, transposed)
    # One matrix after another along an output axis in front, as in "BTD,NDH->BTNH".
    if kinds == ["out"] + ["in"] * ins + ["out"] * (outs - 1) and outs > 1:
        return Orientation(1 + extra, ins, outs - 1)
    return f"the kernel of an nnx.Einsum {module.einsum_str!r}"


def _embed(module: nnx.Embed | Embedding, shape) -> Orientation:
    return Orientation(len(shape) - 2, transposed=True)


def _own_linear(module: Linear, shape) -> Orientation:
    return Orientation(len(shape) - 2)


KERNELS: tuple[tuple[type, str, Callable], ...] = (
    (Linear, "kernel", _own_linear),
    (Embedding, "weight", _embed),
    (nnx.LinearGeneral, "kernel", _general),
    (nnx.Linear, "kernel", _linear),
    (nnx.Einsum, "kernel", _einsum),
    (nnx.Embed, "embedding", _embed),
)
"""Class, attribute, and `(module, shape) -> Orientation | reason to stay in floating point`, for the modules of flax."""


def _known(model, params, rules) -> dict[str, Orientation | str]:
    """The orientation of every parameter by the class of its module."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    shapes = {leaf_path(keys): tuple(leaf.shape) for keys, leaf in leaves}
    named = {path for path, found in match(normalise(rules), shapes).items() if found.pattern != "*"}
    known: dict[str, Orientation | str] = {}
    for keys, module in nnx.iter_modules(model):
        for name, value in vars(module).items():
            path = "/".join(map(str, (*keys, name)))
            if not isinstance(value, nnx.Param) or path not in shapes:
                continue
            row = next((row for kind, attribute, row in KERNELS if isinstance(module, kind) and attribute == name), None)
            if row is not None:
                known[path] = row(module, shapes[path])
            elif path not in named:
                known[path] = f"a parameter of {type(module).__name__}"
    return known


# Classes whose methods run on packed parameters.

@functools.cache
def packed_class(kind: type) -> type:
    """The subclass of an nnx module class that runs its public methods, and `__call__`, on packed parameters."""
    methods = {}
    for base in reversed(kind.__mro__):
        if base in (object, nnx.Module, nnx.Pytree) or not issubclass(base, nnx.Module):
            continue
        for name, value in vars(base).items():
            if inspect.isfunction(value) and (name == "__call__" or not name.startswith("_")):
                methods[name] = _through(value)
    face = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind)(kind.__name__, (kind,), {**methods, **face})


def _through(function: Callable) -> Callable:
    """The method, run on a copy of the module whose packed parameters are traced as arrays; other state is brought back."""
    @functools.wraps(function)
    def method(self, *args, **kwargs):
        if not any(_holds(value) for value in vars(self).values()):
            return function(self, *args, **kwargs)
        leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=_is_node)
        nodes = [leaf for leaf in leaves if _is_node(leaf)]
        graph, state = nnx.split((self, nodes))

        def run(state, others):
            module, copies = nnx.merge(graph, state, copy=True)
            one, other = iter(copies), iter(others)
            args, kwargs = jax.tree.unflatten(tree, [next(one if _is_node(leaf) else other) for leaf in leaves])
            out = function(module, *args, **kwargs)
            return out, nnx.state((module, copies))

        out, new = functional(run)(state, [leaf for leaf in leaves if not _is_node(leaf)])
        _bring_back((self, nodes), state, new)
        return out

    return method


def _is_node(leaf) -> bool:
    return isinstance(leaf, nnx.Pytree)


def _bring_back(target, old, new) -> None:
    """Update only the variables that the call changed: others may belong to an outer trace and must not be written."""
    before = dict(nnx.to_flat_state(old))
    changed = [(path, value) for path, value in nnx.to_flat_state(new) if path not in before or _raw(value) is not _raw(before[path])]
    if changed:
        nnx.update(target, nnx.from_flat_state(changed))


def _raw(value):
    return value.get_raw_value() if isinstance(value, nnx.Variable) else value

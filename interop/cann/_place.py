"""`place`: every packed weight of a pytree laid out once for the operator that runs it, on the device it runs on; `restore` undoes it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import jax
import jax.numpy as jnp
import numpy as np
import torch

from qfunc._qtensor import QTensor, View, dequantize_matrix
from qfunc.kernels._dispatch import Packed

from . import _kinds, _soc
from ._layouts import LAYOUTS, Source
from ._leaves import leaves_of, to_numpy, to_torch
from ._npu import format_cast
from ._placed import Placed, matrix_shape
from ._quantize import composed

INPUT_LEAVES = {"smooth": torch.float32, "perm": torch.int64, "input_scale": torch.float32, "input_zero": torch.int32}
"""Leaves that act on the activation, and their types on the device."""
SIXTEEN = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class PlacementError(ValueError):
    """Weights that cannot be placed. `refused` lists (path, why) for each; nothing was placed."""

    def __init__(self, refused: Sequence[tuple[str, str]]):
        self.refused = list(refused)
        lines = "".join(f"\n  {path}: {why}" for path, why in self.refused)
        super().__init__(f"{len(self.refused)} weight{'s' * (len(self.refused) != 1)} cannot be placed:{lines}")


def place(params, device: str = "npu", soc: str = "A2", *, dtype: str | None = None, dequantize: bool | str | Iterable[str] = False,
          dual: str | Iterable[str] = (), experts: str | None = None):
    """Lay the packed weights of a pytree out for the NPU and move everything there.

    Arguments:
        params: pytree of QTensors and arrays; ShapeDtypeStruct leaves are placed on the meta device, to be judged without memory.
        device: a torch device: `npu`, `npu:1`, or `cpu` and `meta` where a host has registered torch_npu's operators.
        soc: `A2` (910B), `A3` (910C) or `A5` (950).
        dtype: `bfloat16` or `float16`, the type of the activations that meet the weights; by default each weight's logical type, and
            bfloat16 where that is float32. Scales of weight-only formats are rounded to it, as the operator demands.
        dequantize: False refuses what no operator of the generation computes; True turns such weights into `dtype` instead, whose
            activations then stay in floating point; patterns (`fnmatch`, on the whole path) say for which weights, and do it always.
            Weight-only formats without an operator (GGUF, nf4, fp8 and the like) are dequantized in any case: the result is the same.
        dual: patterns of MXFP4 weights for the dual-level operator of A5, which gives activations (and the weight, where it has one) a
            second, float32 scale over 512 inputs: finer than the scheme says. SGLang runs its online `mxfp4` so.
        experts: pattern of the paths whose last three axes are a stack of experts, by default those with a segment `experts`; other
            leading axes are layers, placed one by one.

    Returns: the tree with `Placed` for every QTensor and torch tensors for arrays; typed PRNG keys stay as they are, `to_torch` takes
    them. The same QTensor placed twice is the same `Placed`.

    Raises: PlacementError (a ValueError) that lists every weight that was refused, each with the rule it breaks and what would do instead.
    """
    _soc.check_soc(soc)
    wanted, doubled = _pattern_list(dequantize), _pattern_list(dual)
    target, given = torch.device(device), SIXTEEN[_checked_dtype(dtype)] if dtype is not None else None
    paths, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    refused, plans = [], []
    for path, leaf in paths:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not isinstance(leaf, QTensor):
            plans.append(lambda leaf=leaf: _plain(leaf, target))
            continue
        stack = len(leaf.matrix_shape) > 2 and ("experts" in name.split("/") if experts is None else fnmatchcase(name, experts))
        forced = any(fnmatchcase(name, pattern) for pattern in wanted)
        two = any(fnmatchcase(name, pattern) for pattern in doubled)
        why = refusal(leaf.scheme, leaf.matrix_shape, soc, stack, two)
        if why is not None and not (forced or dequantize is True):
            refused.append((name, why))
        named = {"soc": soc, "dequantize": forced or why is not None, "experts": stack, "dual": two}
        plans.append(lambda leaf=leaf, named=named: _placed(leaf, target, given, named))
    if refused:
        raise PlacementError(refused)
    return jax.tree_util.tree_unflatten(treedef, [plan() for plan in plans])


def restore(tree):
    """The inverse of `place`: QTensors and numpy arrays, bit for bit."""
    back = {Placed: lambda leaf: leaf.restore(), torch.Tensor: to_numpy}
    return jax.tree.map(lambda leaf: next((f(leaf) for kind, f in back.items() if isinstance(leaf, kind)), leaf), tree,
                        is_leaf=lambda leaf: isinstance(leaf, Placed))


def refusal(scheme, shape: tuple[int, ...], soc: str, experts: bool = False, dual: bool = False) -> str | None:
    """Why a weight (..., in, out) of a scheme cannot run on a generation as it is, with what would do instead; None where it can."""
    *batch, columns, rows = shape
    kind = _kinds.kind_of(scheme, experts, columns, rows, dual)
    if kind is None:
        return (f"{scheme.name}: no operator computes this scheme on any generation; quantize to w8a8_dynamic, w4a16_g128 (A2, A3) or "
                "mxfp8 (A5), or pass dequantize=True")
    why = _soc.refusal(kind, soc, experts)
    if why is not None:
        return f"{scheme.name}: {why}"
    broken = _kinds.misalignment(kind, scheme, experts, columns, rows, batch[-1] if experts and batch else 1)
    if broken is None:
        return None
    return (f"{scheme.name} as {kind}, (K, N) = ({columns}, {rows}) needs {broken}; leave it in floating point or pass "
            "dequantize=True")


def _checked_dtype(dtype: str) -> str:
    if dtype not in SIXTEEN:
        raise ValueError(f"dtype: expected bfloat16 or float16, found {dtype!r}")
    return dtype


def _pattern_list(dequantize) -> list[str]:
    if isinstance(dequantize, bool):
        return []
    return [dequantize] if isinstance(dequantize, str) else list(dequantize)


def _plain(leaf, device: torch.device):
    if isinstance(leaf, torch.Tensor):
        return leaf.to(device)
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape") or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    tensor = to_torch(leaf)
    return tensor if tensor.is_meta else tensor.to(device)


_CACHE: dict = {}


def _placed(w: QTensor, device: torch.device, given, named: dict) -> Placed:
    packed, leaves = leaves_of(w)
    dtype = given or SIXTEEN.get(packed.dtype, torch.bfloat16)
    if any(leaf.is_meta for leaf in leaves.values()):
        return place_leaves(packed, leaves, device=torch.device("meta"), dtype=dtype, view=w.view, **named)
    # Every leaf counts: weights may share codes and differ in scales.
    own = list(w.leaves.values())
    key = (tuple(map(id, own)), packed, w.view, device, dtype, *named.values())
    held = _CACHE.get(key)
    if held is not None and all(ref() is leaf for ref, leaf in zip(held[0], own, strict=True)):
        return held[1]
    placed = place_leaves(packed, leaves, device=device, dtype=dtype, view=w.view, **named)
    try:
        _CACHE[key] = [weakref.ref(leaf, lambda _, held=_CACHE: held.pop(key, None)) for leaf in own], placed
    except TypeError:                                   # a leaf that cannot be watched cannot be recognised again
        pass
    return placed


def place_leaves(packed: Packed, leaves: dict[str, torch.Tensor], *, soc: str, device: torch.device, dtype: torch.dtype,
                 dequantize: bool = False, experts: bool = False, dual: bool = False, view: View | None = None) -> Placed:
    """Place one weight given as its canonical leaves; the arguments are those of `place`, already checked and decided."""
    shape = matrix_shape(packed, leaves["codes"].shape)
    own = 3 if experts else 2
    specs = {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in leaves.items()}
    base = Placed("float", packed, shape, specs, soc, device, dtype, experts=experts, view=view or View())
    if len(shape) > own:
        base.children = [place_leaves(packed, {name: leaf[i] for name, leaf in leaves.items()}, soc=soc, device=device, dtype=dtype,
                                      dequantize=dequantize, experts=experts, dual=dual) for i in range(shape[0])]
        base.kind = base.children[0].kind if base.children else "float"
        base.note = base.children[0].note if base.children else ""
        return base
    columns, rows = shape[-2:]
    kind = _kinds.kind_of(packed.scheme, experts, columns, rows, dual)
    if dequantize or kind in (None, "float"):
        return _dequantized(base, leaves, kind)
    base.kind = kind

    def put(tensor):
        return tensor if tensor.device == device else tensor.to(device)

    laid = LAYOUTS[kind](Source(packed, leaves, columns, rows, experts, dtype, put))
    for name, number in INPUT_LEAVES.items():
        if name in leaves:
            laid.operands.setdefault(name, leaves[name].to(number))
    base.operands = {name: put(tensor) for name, tensor in laid.operands.items()}
    base.meta, base.codes = laid.meta, laid.codes
    own_scales = "each row is divided by the static scale of its expert" if experts and kind == "w8a8_static" else ""
    slow = own_scales or composed(packed.scheme.activation)
    base.note = f"activations are quantized by elementwise operations: {slow}" if slow else ""
    base.kept = {name: leaf for name, leaf in leaves.items() if name != "codes"}
    return base


def _dequantized(base: Placed, leaves: dict[str, torch.Tensor], kind: str | None) -> Placed:
    """A 16-bit matrix [.., N, K]; the order of the inputs is in it. Smoothing is not: rows that several weights share have it already."""
    *batch, columns, rows = base.shape
    if any(leaf.is_meta for leaf in leaves.values()):
        weight = torch.empty((*batch, rows, columns), dtype=base.dtype, device="meta")
    elif batch:
        slices = [_matrix(base.packed, {name: leaf[i] for name, leaf in leaves.items()}, base.dtype) for i in range(batch[0])]
        weight = torch.stack(slices) if slices else torch.empty((0, rows, columns), dtype=base.dtype)
    else:
        weight = _matrix(base.packed, leaves, base.dtype)
    weight = weight.to(base.device)
    base.operands = {"weight": format_cast(weight) if base.experts else weight}
    if "smooth" in leaves:
        base.operands["smooth"] = leaves["smooth"].to(INPUT_LEAVES["smooth"]).to(base.device)
    base.kept = dict(leaves)
    scheme = base.packed.scheme
    lost = f", its activations stay in floating point instead of {scheme.activation.code}" if scheme.activation is not None else ""
    base.note = f"{scheme.name} is dequantized to {str(base.dtype).removeprefix('torch.')}{lost}"
    return base


_decode = jax.jit(dequantize_matrix)      # op by op, a block format compiles a hundred small programs


def _matrix(packed: Packed, leaves: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    q = packed.build([jnp.asarray(to_numpy(leaf)) for leaf in leaves.values()])
    return torch.from_numpy(np.array(_decode(q))).to(dtype)

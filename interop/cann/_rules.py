"""What the interpreter of a jaxpr does with qfunc's own primitives: one rule each, from the equation's operands to torch.

A rule takes the parameters of the equation and its operands in order, torch tensors or `Part`s of placed weights and quantized rows, and
gives a list, one value for each of the equation's results. Nothing is changed in place.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable

import torch

from qfunc.kernels._dispatch import Packed

from . import _linear
from ._grouped import grouped_matmul
from ._leaves import torch_dtype
from ._npu import to_host
from ._place import SIXTEEN, PlacementError, place_leaves, refusal
from ._placed import Part, Placed, matrix_shape
from ._quantize import Rows, rows_of


def quantize_activation(params: dict, operands, *, soc: str) -> list:
    """Rows to be quantized when a matmul asks for them, as the parts (codes, scale[, zero]) of one `Rows`."""
    x, *extra = (part.tensor() if isinstance(part, Part) else part for part in operands)
    scale, zero = (*extra, None, None)[:2]
    return Rows(x, params["spec"], scale=scale, zero=zero, scope=params["scope"]).parts()


def quantized_matmul(params: dict, operands, *, soc: str) -> list:
    """x @ w by the operator of the placed weight; batch axes of w are run one by one.

    Scales and scheme are each weight's own. (SGLang gives a fused layer the scheme of its first shard and the input scale of its last.)
    """
    x, w, _, bias = _split(params, operands, soc)
    batch, scope, out_dtype = params["batch"], params["scope"], torch_dtype(params["out_dtype"])
    x = rows_of(x, params["packed"].scheme.activation if len(x) > 1 else None, scope=scope)
    if not batch:
        return [_linear.linear(w, x, bias, out_dtype, scope)]
    w = w.form(False)
    out = []
    for index in itertools.product(*map(range, w.shape[:batch])):
        one = [w, x, bias]
        for i in index:
            one = [None if value is None else value[i] for value in one]
        out.append(_linear.linear(*one, out_dtype, scope - batch))
    shape = (*w.shape[:batch], *x.shape[batch:-1], w.shape[-1])
    return [torch.stack(out).reshape(shape) if out else torch.zeros(shape, dtype=out_dtype, device=w.device)]


def quantized_grouped_matmul(params: dict, operands, *, soc: str) -> list:
    """Rows sorted by expert times their experts' matrices; rows beyond the sizes are zero."""
    rows = None
    if params["gathered"]:
        *operands, rows = operands
        rows = rows.tensor() if isinstance(rows, Part) else rows
    x, w, sizes, bias = _split(params, operands, soc)
    x = rows_of(x, None if len(x) == 1 else params["packed"].scheme.activation)
    if rows is not None:
        x = x.take(rows) if isinstance(x, Rows) else x.index_select(0, rows)
    return [grouped_matmul(w, x, sizes, bias, torch_dtype(params["out_dtype"]))]


def _split(params: dict, operands, soc: str):
    """Operands of a matmul as (parts of x, placed weight, sizes, bias)."""
    packed, parts = params["packed"], params["parts"]
    count = parts + len(packed.fields)
    rest = [part.tensor() if isinstance(part, Part) else part for part in operands[count:]]
    sizes = rest.pop(0) if params.get("grouped") else None
    return tuple(operands[:parts]), _weight(packed, operands[parts:count], soc, sizes is not None), sizes, rest.pop(0) if rest else None


def _weight(packed: Packed, leaves, soc: str, experts: bool) -> Placed:
    """The placed weight of these operands; plain tensors, the leaves of a weight that a function closes over, are placed here."""
    owners = {id(leaf.owner): leaf.owner for leaf in leaves if isinstance(leaf, Part) and isinstance(leaf.owner, Placed)}
    if len(owners) == 1 and all(isinstance(leaf, Part) for leaf in leaves):
        return next(iter(owners.values()))
    tensors = {name: leaf.tensor() if isinstance(leaf, Part) else leaf for name, leaf in zip(packed.fields, leaves, strict=True)}
    return _remembered(packed, tensors, soc, experts)


_CLOSED: dict = {}


def _remembered(packed: Packed, leaves: dict[str, torch.Tensor], soc: str, experts: bool) -> Placed:
    codes = leaves["codes"]
    key = (id(codes), packed, soc, experts)
    held = _CLOSED.get(key)
    if held is not None and held[0]() is codes and all(ref() is leaf for ref, leaf in zip(held[1], leaves.values(), strict=True)):
        return held[2]
    shape = matrix_shape(packed, codes.shape)
    why = refusal(packed.scheme, shape, soc, experts)
    if why is not None:
        raise PlacementError([("a weight that is closed over or computed", why)])
    # Bits are rearranged on the host, where every shift and mask exists.
    host = {name: to_host(leaf) for name, leaf in leaves.items()}
    dtype = SIXTEEN.get(packed.dtype, torch.bfloat16)
    placed = place_leaves(packed, host, soc=soc, device=codes.device, dtype=dtype, experts=experts)
    _CLOSED[key] = weakref.ref(codes, lambda _, held=_CLOSED: held.pop(key, None)), [weakref.ref(leaf) for leaf in leaves.values()], placed
    return placed


RULES: dict[str, Callable] = {
    "quantize_activation": quantize_activation, "quantized_matmul": quantized_matmul, "quantized_grouped_matmul": quantized_grouped_matmul,
}
"""Primitive name to rule(params, operands, *, soc) -> list of results."""

"""Torch rules of lax collectives over the one axis that `to_torch(collective=)` knows."""

from __future__ import annotations

import torch

from ._build import UnknownPrimitive, rule
from ._lax_elementwise import every
from ._program import device


def _collective(eqn, scope, names):
    """The hook, where the equation is over its axis alone."""
    found = scope.builder.collective
    names = names if isinstance(names, (tuple, list)) else (names,)
    if found is None or tuple(names) != (found.axis,) or eqn.params.get("axis_index_groups") is not None:
        known = "none" if found is None else found.axis
        raise UnknownPrimitive(eqn, f"a collective over {', '.join(map(str, names))}: to_torch(collective=) knows {known}")
    return found


def _each(eqn, reduce):
    """The reduction of every operand; how many there are depends on the version of JAX."""
    return (lambda *operands: [reduce(x) for x in operands]) if eqn.primitive.multiple_results else every(eqn, reduce)


@rule("psum", "psum_invariant")
def _psum(eqn, scope):
    return _each(eqn, _collective(eqn, scope, eqn.params["axes"]).sum)


@rule("pmax")
def _pmax(eqn, scope):
    return _each(eqn, _collective(eqn, scope, eqn.params["axes"]).max)


@rule("all_gather")
def _all_gather(eqn, scope):
    hook, axis, tiled = _collective(eqn, scope, eqn.params["axis_name"]), eqn.params["all_gather_dimension"], eqn.params["tiled"]
    return lambda x: hook.gather(x if tiled else x.unsqueeze(axis), axis)


@rule("axis_index")
def _axis_index(eqn, scope):
    hook = _collective(eqn, scope, eqn.params["axis_name"])
    return lambda: torch.full((), hook.rank, dtype=torch.int32, device=device())

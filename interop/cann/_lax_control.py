"""Torch rules of loops and branches.

A scan is its steps one after the other. A branch is chosen without asking the device: both sides are computed and the result is selected,
unless a side holds a loop that asks (it might not end) or `branches="read"` was asked for. A while loop must know when it ends: each
step reads one truth value, the only thing that crosses to the host inside a program, and graph capture refuses it. Under `vmap` the loops
run together until the last one ends; those that have ended keep their state.
"""

from __future__ import annotations

import torch

from ._arrays import CARRIERS, is_abstract
from ._build import rule
from ._program import abstract, device


@rule("scan")
def _scan(eqn, scope):
    p = eqn.params
    consts, carry = p["num_consts"], p["num_carry"]
    held = [scope.is_held(v) for v in eqn.invars]
    # What a step hands to the next is a tensor.
    held[consts:consts + carry] = [False] * carry
    body = scope.program(p["jaxpr"].jaxpr, p["jaxpr"].consts, held)
    length, reverse, shapes = p["length"], p["reverse"], [v.aval for v in eqn.outvars[carry:]]

    def run(*operands):
        fixed, state, xs = operands[:consts], [_plain(v) for v in operands[consts:consts + carry]], operands[consts + carry:]
        rows = [None] * length
        for i in (range(length - 1, -1, -1) if reverse else range(length)):
            out = body([*fixed, *state, *(x[i] for x in xs)], device())
            state, rows[i] = out[:carry], out[carry:]
        return [*state, *(_stacked([row[j] for row in rows], aval) for j, aval in enumerate(shapes))]
    run.held = True
    return run


def _plain(value):
    return value if isinstance(value, torch.Tensor) else value.tensor()


def _stacked(rows, aval):
    shape, dtype = abstract(aval)
    if not rows:
        return torch.zeros(shape, dtype=dtype, device=device())
    carrier = CARRIERS.get(dtype)
    return torch.stack(rows) if carrier is None else torch.stack([row.view(carrier) for row in rows]).view(dtype)


@rule("while")
def _while(eqn, scope):
    p = eqn.params
    first, second = p["cond_nconsts"], p["body_nconsts"]
    held = [scope.is_held(v) for v in eqn.invars]
    state_held = [False] * (len(eqn.invars) - first - second)
    test = scope.program(p["cond_jaxpr"].jaxpr, p["cond_jaxpr"].consts, [*held[:first], *state_held])
    body = scope.program(p["body_jaxpr"].jaxpr, p["body_jaxpr"].consts, [*held[first:first + second], *state_held])

    def run(*operands):
        state = [_plain(v) for v in operands[first + second:]]
        while True:
            (going,) = test([*operands[:first], *state], device())
            if is_abstract(going):
                raise RuntimeError("a while loop ends by a value that exists only when the program runs: it cannot be captured in a graph "
                                   "or followed with fake tensors; capture what stands inside of it")
            if not bool(going.any()):
                return state
            after = body([*operands[first:first + second], *state], device())
            state = [_where(going.reshape(*going.shape, *[1] * (b.ndim - going.ndim)), a, b) for a, b in zip(after, state, strict=True)] \
                if going.ndim else after
    run.held = True
    return run


@rule("cond")
def _cond(eqn, scope):
    branches = eqn.params["branches"]
    held = [scope.is_held(v) for v in eqn.invars[1:]]
    programs = [scope.program(branch.jaxpr, branch.consts, held) for branch in branches]
    read = scope.builder.branches == "read" or any(_asks(branch.jaxpr) for branch in branches)

    def run(which, *operands):
        if read:
            if is_abstract(which):
                raise RuntimeError("a branch that must be read (branches='read', or a loop in it) cannot be captured in a graph")
            return programs[min(max(int(which), 0), len(programs) - 1)](operands, device())
        results = [program(operands, device()) for program in programs]
        out = results[0]
        for i, result in enumerate(results[1:], 1):
            # The index is clamped, so the last branch also stands for everything beyond.
            taken = which if which.dtype == torch.bool else which >= i
            out = [_where(taken, a, b) for a, b in zip(result, out, strict=True)]
        return out
    run.held = True
    return run


def _where(which, a, b):
    carrier = CARRIERS.get(a.dtype)
    return torch.where(which, a, b) if carrier is None else torch.where(which, a.view(carrier), b.view(carrier)).view(a.dtype)


def _asks(jaxpr) -> bool:
    """True where a jaxpr holds a while loop, at any depth."""
    return any(eqn.primitive.name == "while" or any(_asks(inner) for inner in _inner(eqn)) for eqn in jaxpr.eqns)


def _inner(eqn):
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            found = getattr(item, "jaxpr", item)
            if hasattr(found, "eqns"):
                yield found

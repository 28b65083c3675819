"""Rules of `qfunc._walk` for calls, branches and loops that a tracked value enters.

Each is evaluated again by the JAX function it came from, with the walker run inside of it: a scan stays a scan. What the walker notes
inside leaves through extra outputs: per step of a scan, merged in the carry of a while loop, as the union over branches of a cond.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import _views
from ._tracked import Leaf, Tracked, opened


def inline(walker, eqn, values: list) -> list:
    jaxpr, consts = opened(next(eqn.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params))
    return walker.run(jaxpr, consts, values)


def remat(walker, eqn, values: list) -> list:
    """A checkpointed call stays one, so that its activations are recomputed in a derivative as the author wanted."""
    jaxpr, consts = opened(eqn.params["jaxpr"])
    traced = [i for i, value in enumerate(values) if not isinstance(value, Tracked)]
    keys: list[Leaf] = []

    def body(*arrays):
        args = list(values)
        for i, array in zip(traced, arrays, strict=True):
            args[i] = array
        outs, notes = walker.capture(walker.run, jaxpr, consts, args)
        keys[:] = list(notes)
        return [walker.plain(out, eqn) for out in outs], list(notes.values())

    prevent = eqn.params.get("prevent_cse", True)
    again = jax.checkpoint(body, prevent_cse=prevent if isinstance(prevent, bool) else any(prevent), policy=eqn.params.get("policy"))
    outs, notes = again(*[values[i] for i in traced])
    for leaf, note in zip(keys, notes, strict=True):
        walker.note(leaf, note)
    return outs


def cond(walker, eqn, values: list) -> list:
    index, *operands = values
    if isinstance(index, Tracked) or eqn.params.get("branches_platforms"):
        return walker.stray(eqn, values)
    branches = [opened(branch) for branch in eqn.params["branches"]]

    def evaluate(branch):
        outs, notes = walker.capture(walker.run, *branch, operands)
        return [walker.plain(out, eqn) for out in outs], notes

    # What a branch notes is known only by tracing it; all must return the union.
    union: dict[Leaf, Any] = {}
    for branch in branches:
        for leaf, note in _noted(evaluate, branch).items():
            union[leaf] = jax.eval_shape(walker.merge, union[leaf], note) if leaf in union else note

    def arm(branch):
        def call():
            outs, notes = evaluate(branch)
            empty = {leaf: walker.empty(note) for leaf, note in union.items()}
            return outs, [walker.merge(empty[leaf], notes[leaf]) if leaf in notes else empty[leaf] for leaf in union]
        return call

    outs, notes = lax.switch(index, [arm(branch) for branch in branches])
    for leaf, note in zip(union, notes, strict=True):
        walker.note(leaf, note)
    return outs


def _noted(evaluate, branch) -> dict:
    """The notes of a branch, as shapes."""
    keys: list[Leaf] = []

    def probe():
        _, notes = evaluate(branch)
        keys[:] = list(notes)
        return list(notes.values())

    shapes = jax.eval_shape(probe)
    return dict(zip(keys, shapes, strict=True))


def _fixed(jaxpr, first: int, count: int, values: list) -> list[bool]:
    """Which of the carried values a loop's body hands on unchanged, among the tracked ones."""
    return [isinstance(values[i], Tracked) and jaxpr.outvars[i] is jaxpr.invars[first + i] for i in range(count)]


def _carry(walker, eqn, values: list, fixed: list[bool], offset: int) -> list:
    """The carried values that change, as arrays of the types that the loop declares."""
    return [_typed(walker.plain(value, eqn), eqn.invars[offset + i]) for i, value in enumerate(values) if not fixed[i]]


def _typed(value, v):
    return value if isinstance(value, jax.Array) else jnp.asarray(value, v.aval.dtype)


def _merged(fixed: list[bool], constant: list, changing) -> list:
    changing = iter(changing)
    return [value if kept else next(changing) for kept, value in zip(fixed, constant, strict=True)]


def _scan_counts(params) -> tuple[int, int]:
    """(constants, carried values) of a scan; jax 0.11 describes them by a tree."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def scan(walker, eqn, values: list) -> list:
    jaxpr, closed = opened(eqn.params["jaxpr"])
    n_consts, n_carry = _scan_counts(eqn.params)
    consts, init, xs = values[:n_consts], values[n_consts:n_consts + n_carry], values[n_consts + n_carry:]
    fixed = _fixed(jaxpr, n_consts, n_carry, init)
    slices = [_per_step(walker, eqn, x, v) for x, v in zip(xs, eqn.invars[n_consts + n_carry:], strict=True)]
    children = {make.leaf for _, make in slices if isinstance(make, Tracked)}
    keys: list[Leaf] = []

    def body(carry, steps):
        xs = [_step(make, step) for (_, make), step in zip(slices, steps, strict=True)]
        args = [*consts, *_merged(fixed, init, carry), *xs]
        outs, notes = walker.capture(walker.run, jaxpr, closed, args)
        keys[:] = list(notes)
        carry = [walker.plain(out, eqn) for out, kept in zip(outs[:n_carry], fixed, strict=True) if not kept]
        return carry, ([walker.plain(out, eqn) for out in outs[n_carry:]], list(notes.values()))

    carry, (ys, notes) = lax.scan(body, _carry(walker, eqn, init, fixed, n_consts), [x for x, _ in slices],
                                  length=eqn.params["length"], reverse=eqn.params["reverse"], unroll=eqn.params["unroll"])
    for leaf, note in zip(keys, notes, strict=True):
        walker.note(*walker.stacked(leaf, note, leaf in children))
    return [*_merged(fixed, init, carry), *ys]


def _per_step(walker, eqn, value, v) -> tuple[Any, Tracked | None]:
    """(what lax.scan slices, the tracked value of one step): the leading dimension must be one whole axis of the leaf."""
    if not isinstance(value, Tracked):
        return _typed(value, v), None
    first, leaf = value.axes[0], value.leaf
    # A stack of one layer has no elements to follow; any leading axis of size 1 is as good as another.
    single = [a for a, size in leaf.sizes.items() if size == 1 and (leaf.packed is None or a < leaf.batch)]
    axis = first[0].axis if first else next(iter(single), None)
    if axis is None or not _views.spans(first, axis, leaf.sizes[axis]) or (leaf.packed is not None and axis >= leaf.batch):
        return walker.plain(value, eqn), None
    if leaf.packed is None:
        return value.array, Tracked(leaf.child(axis), value.axes[1:], value.dtype)
    place = leaf.place(axis)
    return jax.tree.map(lambda a: jnp.moveaxis(a, place, 0), leaf.packed), Tracked(leaf.child(axis), value.axes[1:], value.dtype)


def _step(make: Tracked | None, step):
    if make is None:
        return step
    if isinstance(step, jax.Array):
        return dataclasses.replace(make, array=step)
    return dataclasses.replace(make, leaf=dataclasses.replace(make.leaf, packed=step))


def while_(walker, eqn, values: list) -> list:
    (cond, cond_closed), (body, body_closed) = opened(eqn.params["cond_jaxpr"]), opened(eqn.params["body_jaxpr"])
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, body_consts, init = values[:n_cond], values[n_cond:n_cond + n_body], values[n_cond + n_body:]
    fixed = _fixed(body, n_body, len(init), init)
    start = _carry(walker, eqn, init, fixed, n_cond + n_body)
    keys: list[Leaf] = []

    def step(carry):
        outs, notes = walker.capture(walker.run, body, body_closed, [*body_consts, *_merged(fixed, init, carry)])
        keys[:] = list(notes)
        return [walker.plain(out, eqn) for out, kept in zip(outs, fixed, strict=True) if not kept], list(notes.values())

    _, shapes = jax.eval_shape(step, start)

    def again(state):
        carry, old = state
        carry, new = step(carry)
        return carry, [walker.merge(a, b) for a, b in zip(old, new, strict=True)]

    def proceed(state):
        # Notes of the condition would be those of one evaluation more than there are steps; conditions hold no matmuls worth one.
        (result,), _ = walker.capture(walker.run, cond, cond_closed, [*cond_consts, *_merged(fixed, init, state[0])])
        return walker.plain(result, eqn)

    carry, notes = lax.while_loop(proceed, again, (start, [walker.empty(shape) for shape in shapes]))
    for leaf, note in zip(keys, notes, strict=True):
        walker.note(leaf, note)
    return _merged(fixed, init, carry)

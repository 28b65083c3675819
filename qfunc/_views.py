"""Views of a leaf: which axes of which parameter an intermediate array of a traced function shows.

Reshapes, transposes and broadcasts of a weight only move its axes. A view writes every dimension of such an array as a row-major
product of `Run`s, each a stretch of one axis of the leaf, so that a matmul that meets the array, however folded, can be told in the
leaf's own axes. Axes of size 1 carry no elements to follow and have no runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


class Run(NamedTuple):
    """`size` positions, `step` elements apart, along one axis of a leaf; `axis` None repeats the same elements `size` times."""

    axis: int | None
    size: int
    step: int


Axes = tuple[tuple[Run, ...], ...]
"""A view: for each dimension of the array, its runs, major first."""


def whole(sizes: dict[int, int]) -> Axes:
    """The view that shows a leaf as it is; `sizes` maps the axes of the leaf to their sizes, in order."""
    return tuple((Run(axis, size, 1),) if size > 1 else () for axis, size in sizes.items())


def shape(axes: Axes) -> tuple[int, ...]:
    """The shape of the array."""
    return tuple(math.prod(run.size for run in runs) for runs in axes)


def spans(runs: tuple[Run, ...], axis: int, size: int) -> bool:
    """True if the dimension `runs` is all of one axis of a leaf, in order."""
    steps = [run.step for run in runs]
    return all(run.axis == axis for run in runs) and steps == sorted(steps, reverse=True) and math.prod(run.size for run in runs) == size


def transpose(axes: Axes, permutation) -> Axes:
    """The view of `jnp.transpose(array, permutation)`."""
    return tuple(axes[i] for i in permutation)


def broadcast(axes: Axes, sizes, dims) -> Axes:
    """The view of `lax.broadcast_in_dim(array, sizes, dims)`."""
    source = dict(zip(dims, axes, strict=True))
    out = []
    for i, size in enumerate(sizes):
        runs = source.get(i, ())
        have = math.prod(run.size for run in runs)
        out.append(runs if have == size else (Run(None, size, 0),))
    return tuple(out)


def reshape(axes: Axes, sizes) -> Axes | None:
    """The view of `array.reshape(sizes)`; None where a new dimension would cut a run unevenly."""
    if 0 in sizes:
        return None
    pending = [run for runs in axes for run in runs]
    out: list[tuple[Run, ...]] = []
    for size in reversed(tuple(sizes)):
        runs: list[Run] = []
        while size > 1:
            if not pending:
                return None
            axis, length, step = pending.pop()
            inner = math.gcd(length, size)
            if inner != min(length, size):
                return None
            runs.append(Run(axis, inner, step))
            if length > inner:
                pending.append(Run(axis, length // inner, step * inner))
            size //= inner
        out.append(tuple(reversed(runs)))
    return tuple(reversed(out))


def label(run: Run, place: tuple) -> tuple:
    """A name for the positions of a run, the same wherever the run turns up; repeats are told apart by their place."""
    return ("leaf", run.axis, run.step) if run.axis is not None else ("repeat", *place)


def elementary(axes: Axes) -> list[list[tuple[tuple, Run]]]:
    """Per dimension, the (label, run) of its parts."""
    return [[(label(run, (i, j)), run) for j, run in enumerate(runs)] for i, runs in enumerate(axes)]


@dataclass(frozen=True)
class Dot:
    """A `dot_general` of an array x with a view of a leaf, told in the leaf's axes.

    Fields:
        split: shape of x with each dimension cut into its elementary parts.
        labels: names of those parts: `("leaf", axis, step)`, `("repeat", ...)` or `("x", dim)`.
        contracted, batch, free: axes of the leaf that are summed over, shared with x, and only the leaf's.
        runs: the runs of every axis, by decreasing step.
        target: the labels of the result's elementary parts in order, with their sizes.
    """

    split: tuple[int, ...]
    labels: tuple[tuple, ...]
    contracted: tuple[int, ...]
    batch: tuple[int, ...]
    free: tuple[int, ...]
    runs: dict[int, tuple[Run, ...]]
    target: tuple[tuple[tuple, int], ...]

    def of(self, axis: int) -> list[tuple]:
        """The labels of one axis of the leaf, major first."""
        return [("leaf", axis, run.step) for run in self.runs.get(axis, ())]


def dot(axes: Axes, sizes: dict[int, int], x_shape, dims, leaf_first: bool) -> Dot | None:
    """What a `dot_general` does to the leaf.

    Arguments:
        axes: the view of the leaf's operand; sizes: the leaf's axes and their sizes; x_shape: shape of the other operand.
        dims: `((leaf_contract, x_contract), (leaf_batch, x_batch))`.
        leaf_first: the leaf's operand is the left one, which decides the order of the result's dimensions.

    Returns None where the leaf's axes are not used whole: a sum over part of an axis, or over repeated elements.
    """
    (w_contract, x_contract), (w_batch, x_batch) = dims
    parts = elementary(axes)
    role = {d: "contracted" for d in w_contract} | {d: "batch" for d in w_batch}
    use: dict[int, set[str]] = {}
    runs: dict[int, list[Run]] = {}
    for d, dimension in enumerate(parts):
        for _, run in dimension:
            if run.axis is None:
                if role.get(d) == "contracted":
                    return None
                continue
            use.setdefault(run.axis, set()).add(role.get(d, "free"))
            runs.setdefault(run.axis, []).append(run)
    if any(len(roles) > 1 for roles in use.values()):
        return None
    if any(math.prod(run.size for run in rs) != sizes[axis] for axis, rs in runs.items()):
        return None
    pair = dict(zip((*x_contract, *x_batch), (*w_contract, *w_batch), strict=True))
    split, labels, x_free = [], [], []
    for d, size in enumerate(x_shape):
        if d in pair:
            for name, run in parts[pair[d]]:
                labels.append(name)
                split.append(run.size)
        else:
            labels.append(("x", d))
            split.append(size)
            x_free.append((("x", d), size))
    w_free = [(name, run.size) for d, dimension in enumerate(parts) if d not in role for name, run in dimension]
    w_shared = [(name, run.size) for d in w_batch for name, run in parts[d]]
    target = w_shared + (w_free + x_free if leaf_first else x_free + w_free)
    by_role = {r: tuple(sorted(a for a, roles in use.items() if roles == {r})) for r in ("contracted", "batch", "free")}
    ordered = {axis: tuple(sorted(rs, key=lambda run: -run.step)) for axis, rs in runs.items()}
    return Dot(tuple(split), tuple(labels), **by_role, runs=ordered, target=tuple(target))

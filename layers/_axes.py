"""Which axes of each parameter a function contracts, found by tracing it: the exact answer where names and shapes cannot tell."""

from __future__ import annotations

from collections.abc import Callable

import jax

from qfunc._calibrate import Collector
from qfunc._orient import Orientation, from_axes
from qfunc._trees import split
from qfunc._views import spans
from qfunc._walk import indexed


def weight_axes(apply: Callable, params, *args, **kwargs) -> dict[str, Orientation | str]:
    """How `apply(params, *args, **kwargs)` uses its weights; nothing is computed.

    Arguments: `params`, a pytree of float arrays; the others as `apply` takes them, arrays or `jax.ShapeDtypeStruct`s.

    Returns: for each floating point leaf of two or more axes, by path, an `Orientation`: contracted axes by what the matmuls (or, of an
    embedding, the gathers of rows) do, leading axes that loops, `vmap` or experts go through as batch axes. A string says why a leaf
    cannot be packed: it meets no matmul, or other operations as well. `qfunc.quantize(..., orientations=)` takes it.
    """
    surveyor = Surveyor()
    values, static = split((params, ((args, kwargs),)))

    def survey(values):
        surveyor.trace(lambda params, rest: apply(params, *rest[0], **rest[1]), static, values)

    jax.eval_shape(survey, values)
    shapes = surveyor.shapes
    return {path: _orientation(shape, surveyor.uses.get(path, set()), surveyor.strays.get(path))
            for path, shape in shapes.items() if len(shape) > 1}


def _orientation(shape, uses: set, stray: str | None) -> Orientation | str:
    if stray:
        return f"it meets {stray}"
    if not uses:
        return "it meets no matmul"
    contracted = {ins for _, ins in uses}
    if len(contracted) > 1:
        return f"its matmuls contract different axes, {' and '.join(map(str, sorted(contracted)))}"
    (ins,) = contracted
    ins = set(ins) | {axis for axis, size in enumerate(shape) if size == 1 and not ins}
    batch = set.union(*(set(batch) for batch, _ in uses)) - ins
    # An output axis in front of the contracted ones, with others behind them, is one matrix after another: a batch axis.
    if max(ins, default=0) < len(shape) - 1:
        batch |= set(range(min(ins)))
    outs = [axis for axis in range(len(shape)) if axis not in ins | batch]
    if batch != set(range(len(batch))):
        return f"its batch axes {tuple(sorted(batch))} do not lead"
    try:
        return from_axes(shape, sorted(ins), outs)
    except ValueError as error:
        return str(error)


class Surveyor(Collector):
    """A collector that remembers how leaves are used instead of what they meet."""

    def __init__(self):
        super().__init__()
        self.uses: dict[str, set[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
        self.strays: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.met: set[str] = set()

    def run(self, jaxpr, consts, args) -> list:
        if not self.shapes:
            self.shapes = {value.leaf.path: tuple(value.leaf.sizes.values()) for value in args if hasattr(value, "leaf")}
        return super().run(jaxpr, consts, args)

    def record(self, leaf, statistics, leading, contracted) -> None:
        consumed = []
        above = leaf
        while above.parent is not None:
            consumed.append(above.axis)
            above = above.parent
        self.met.add(leaf.path)
        self.uses.setdefault(leaf.path, set()).add((tuple(sorted({*consumed, *leading})), tuple(contracted)))

    def contract(self, eqn, values: list) -> list:
        self.met = set()
        out = super().contract(eqn, values)
        self._unmet(eqn, values)
        return out

    def pick(self, eqn, values: list) -> list:
        table = values[0]
        self.met = set()
        place = indexed(eqn, table.array.shape) if hasattr(table, "leaf") and len(table.axes) == 2 else None
        if place is not None:
            runs = table.axes[1 - place]
            axis = runs[0].axis if runs else None
            if axis is not None and spans(runs, axis, table.leaf.sizes[axis]):
                self.record(table.leaf, None, (), (axis,))
        self._unmet(eqn, values)
        return super().stray(eqn, [value.array if hasattr(value, "leaf") else value for value in values])

    def plain(self, value, eqn=None):
        if eqn is not None and hasattr(value, "leaf"):
            self.strays.setdefault(value.leaf.path, eqn.primitive.name)
        return super().plain(value, eqn)

    def _unmet(self, eqn, values) -> None:
        for value in values:
            if hasattr(value, "leaf") and value.leaf.path not in self.met:
                self.strays.setdefault(value.leaf.path, eqn.primitive.name)

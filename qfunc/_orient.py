"""Which axes of somebody's parameter are contracted: a table by owner and by name of the leaf.

Every ecosystem lays its weights out in its own way; rows are tried in order and the first that knows the leaf decides. A row gives an
`Orientation`, or the reason why the leaf stays in floating point.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ._qtensor import View


@dataclass(frozen=True)
class Orientation:
    """How the axes of a leaf divide, in the owner's order.

    Fields: `batch` leading axes (layers, experts), then `ins` contracted and `outs` output axes; where `transposed` is set the output
    axes come before the contracted ones.
    """

    batch: int = 0
    ins: int = 1
    outs: int = 1
    transposed: bool = False

    def split(self, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """(batch, in, out) sizes of a leaf."""
        first = self.outs if self.transposed else self.ins
        head, one, two = shape[:self.batch], shape[self.batch:self.batch + first], shape[self.batch + first:]
        return (tuple(head), tuple(two), tuple(one)) if self.transposed else (tuple(head), tuple(one), tuple(two))

    def view(self, shape: Sequence[int]) -> View:
        """The `View` that gives the leaf's own shape back."""
        _, ins, outs = self.split(shape)
        return View(self.transposed, ins[1:], outs[1:])

    @property
    def axes(self) -> int:
        """Axes that a leaf of this orientation has."""
        return self.batch + self.ins + self.outs


@dataclass(frozen=True)
class Site:
    """A leaf in its surroundings: path, shape, the class that owns it, the shapes of all leaves by path."""

    path: str
    shape: tuple[int, ...]
    owner: str = ""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict, compare=False)

    @property
    def segments(self) -> list[str]:
        """The path, cut at its slashes."""
        return self.path.split("/")

    @property
    def name(self) -> str:
        """Last segment: the leaf's own name."""
        return self.segments[-1]

    def sibling(self, *tail: str) -> tuple[int, ...] | None:
        """Shape of a leaf whose path differs in its last segments, or None."""
        return self.shapes.get("/".join([*self.segments[:-len(tail)], *tail]))


CONVOLUTION = re.compile(r"conv(?!erted)", re.IGNORECASE)


def _equinox(site: Site):
    """equinox.nn: Linear and the recurrent cells hold (out, in); convolutions and norms stay."""
    if not site.owner.startswith("equinox.nn."):
        return None
    kind = site.owner.rsplit(".", 1)[1]
    if kind in ("Linear", "GRUCell", "LSTMCell", "Embedding") and site.name.startswith("weight"):
        return Orientation(len(site.shape) - 2, transposed=True)
    return f"a parameter of equinox.nn.{kind}"


def _convolution(site: Site):
    return "a convolution" if any(CONVOLUTION.match(segment) for segment in site.segments) and len(site.shape) > 2 else None


def _additive(site: Site):
    return "added, not multiplied" if site.name in ("bias", "b", "scale", "gamma", "beta", "sinks") else None


def _attention(site: Site):
    """flax attention: query, key and value (d, heads, size) fold the last axes into out, `out` (heads, size, d) the first into in.

    Stacked plain layers (layers, in, out) may bear the same names; the bias, or the partner's shape, tells them apart.
    """
    if site.name != "kernel" or len(site.segments) < 2 or len(site.shape) not in (3, 4):
        return None
    parent, batch = site.segments[-2], len(site.shape) - 3
    core, bias = site.shape[batch:], site.sibling("bias")
    if parent in ("query", "key", "value"):
        partner = site.sibling("out", "kernel")
        folded = bias[batch:] == core[1:] if bias else partner is not None and partner[batch:] == (*core[1:], core[0])
        return Orientation(batch, 1, 2) if batch or folded else None
    if parent == "out":
        partner = site.sibling("query", "kernel")
        folded = len(bias) == batch + 1 if bias else bool(partner) and partner[batch:] == (core[2], *core[:2])
        return Orientation(batch, 2, 1) if folded else None
    return None


def _kernel(site: Site):
    """`kernel` is (in, out) in flax and here; of more axes, the bias tells which are folded: it has the batch and output axes.

    Without a bias, a third axis in front stacks layers or experts.
    """
    count, bias = len(site.shape), site.sibling("bias")
    if site.name != "kernel":
        return None
    if bias is None or count == 2:
        return Orientation(count - 2) if count in (2, 3) else None
    fits = [Orientation(batch, ins, count - batch - ins) for batch in range(count - 1) for ins in range(1, count - batch)
            if bias == site.shape[:batch] + site.shape[batch + ins:]]
    return fits[0] if len(fits) == 1 else None


def _weight(site: Site):
    """`weight` is (out, in) in torch and Hugging Face checkpoints, and (vocab, hidden) in their embeddings, as flax's `embedding` is."""
    if site.name == "embedding" and len(site.shape) == 2 or site.name == "weight" and len(site.shape) in (2, 3):
        return Orientation(len(site.shape) - 2, transposed=True)
    return None


def _matrix(site: Site):
    return Orientation() if len(site.shape) == 2 else None


TABLE: tuple[Callable[[Site], Orientation | str | None], ...] = (_equinox, _convolution, _additive, _attention, _kernel, _weight, _matrix)
"""Rows in order: each gives an Orientation, a reason to stay in floating point, or None when it does not know the leaf."""


def orient(site: Site) -> Orientation | str:
    """The orientation of a leaf, or the reason why it stays in floating point."""
    if len(site.shape) < 2:
        return "fewer than two axes"
    for row in TABLE:
        answer = row(site)
        if answer is not None:
            return answer
    return f"{len(site.shape)} axes of unknown meaning; a qfunc.Rule with axes= or batch= can tell"


def from_axes(shape: Sequence[int], ins: Sequence[int], outs: Sequence[int]) -> Orientation:
    """The orientation that a rule's `axes=(ins, outs)` names; every other axis is a leading batch axis.

    ValueError where they do not fit.
    """
    count = len(shape)
    ins, outs = [i % count for i in ins], [o % count for o in outs]
    batch = count - len(ins) - len(outs)
    for transposed, order in ((False, [*ins, *outs]), (True, [*outs, *ins])):
        if ins and outs and order == list(range(batch, count)):
            return Orientation(batch, len(ins), len(outs), transposed)
    raise ValueError(f"axes in {tuple(ins)} and out {tuple(outs)} of {count}: expected neighbours at the end, in order")


def owner_of(root, keys: Sequence) -> str:
    """`package.module.Class` of the object that holds the leaf at a key path, for equinox `equinox.nn.Class`; empty for containers."""
    node = root
    for key in keys[:-1]:
        try:
            node = getattr(node, key.name) if hasattr(key, "name") else node[key.key if hasattr(key, "key") else key.idx]
        except (AttributeError, KeyError, IndexError, TypeError):
            return ""
    for kind in type(node).__mro__:         # a subclass of a known layer has its axes
        if kind.__module__.startswith("equinox.nn."):
            return f"equinox.nn.{kind.__name__}"
    return f"{type(node).__module__}.{type(node).__name__}"

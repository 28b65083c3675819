"""What became of each weight: a table of a placed pytree."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from ._placed import Placed
from ._soc import ROWS


@dataclass(frozen=True)
class Line:
    """One placed weight: its path, scheme, (..., in, out), the kind and operator that it runs on, bytes on the device, and its note."""

    path: str
    scheme: str
    shape: tuple[int, ...]
    kind: str
    operator: str
    nbytes: int
    note: str


class Explanation(tuple):
    """A tuple of `Line`, printed as a table; equal notes once, below it."""

    def __repr__(self) -> str:
        if not self:
            return "no placed weight"
        notes = {note: f"[{i}]" for i, note in enumerate(dict.fromkeys(line.note for line in self if line.note), 1)}
        rows = [("path", "scheme", "shape", "MB", "runs on", ""), *(
            (line.path, line.scheme, str(line.shape), f"{line.nbytes / 1e6:.2f}", line.operator, notes.get(line.note, ""))
            for line in self)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*table, *(f"{mark} {note}" for note, mark in notes.items())])


def explain(tree) -> Explanation:
    """How every weight of a placed pytree runs: which operator, how many bytes, and what a user should know of it."""
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, Placed))[0]
    return Explanation(
        Line(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.scheme.name, leaf.shape, leaf.kind, ROWS[leaf.kind].operator,
             leaf.nbytes, leaf.note) for path, leaf in found if isinstance(leaf, Placed))

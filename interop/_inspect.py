"""What a checkpoint holds, told from headers alone: format, schemes by module, bits per weight, sizes, oddities."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from qfunc._spec import Scheme

from ._checkpoint import gguf_file, is_gguf, locate, plan_folder
from ._load import Leaf, Plan

NUMBER = re.compile(r"(?<![A-Za-z0-9_])\d+(?![A-Za-z0-9])")


@dataclass(frozen=True)
class Row:
    """Modules of one pattern and scheme: `pattern` (numbers as `*`), `count` of leaves, `scheme` (None: float), `dtype` of float leaves,
    `shape` of the first, `weights` in all, `nbytes` in the checkpoint."""

    pattern: str
    count: int
    scheme: Scheme | None
    dtype: str
    shape: tuple[int, ...]
    weights: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.nbytes / max(self.weights, 1)


@dataclass(frozen=True)
class Inspection:
    """A checkpoint as its headers describe it; `str()` is a table.

    Fields: `path`; `format`; `config`; `rows`; `schemes` (path to scheme); `tensors` and `nbytes`, how many and how large; `kv_cache`,
    the element type of the cache it has scales for; `notes`, what is odd.
    """

    path: Path
    format: str
    config: dict = field(repr=False)
    rows: tuple[Row, ...]
    schemes: dict[str, Scheme] = field(repr=False)
    tensors: int
    nbytes: int
    kv_cache: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Number of weights in all."""
        return sum(row.weights for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight over the whole checkpoint."""
        return 8 * self.nbytes / max(self.weights, 1)

    def __str__(self) -> str:
        head = [f"{self.path}: {self.format}, {self.tensors} tensors, {_size(self.nbytes)}, {self.weights / 1e6:,.1f} million weights, "
                f"{self.bits_per_weight:.2f} bits per weight"]
        model = self.config.get("model_type")
        if model:
            layers, size = (self.config.get(key, "?") for key in ("num_hidden_layers", "hidden_size"))
            head.append(f"model: {model}, {layers} layers, hidden size {size}")
        if self.kv_cache:
            head.append(f"key/value cache: {self.kv_cache}, scales in the checkpoint")
        cells = [["module", "count", "scheme", "shape", "bits", "size"]]
        cells += [[row.pattern, str(row.count), row.scheme.name if row.scheme else row.dtype, " x ".join(map(str, row.shape)),
                   f"{row.bits_per_weight:.2f}", _size(row.nbytes)] for row in self.rows]
        widths = [max(len(line[i]) for line in cells) for i in range(6)]
        sides = [str.ljust, str.rjust, str.ljust, str.rjust, str.rjust, str.rjust]
        table = ["  ".join(side(cell, w) for side, cell, w in zip(sides, line, widths, strict=True)).rstrip() for line in cells]
        return "\n".join([*head, *table, *(f"note: {note}" for note in self.notes)])

    __repr__ = __str__


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""


def inspect(path: str | Path) -> Inspection:
    """Look into a checkpoint without loading it.

    Arguments: `path` as for `qfunc.load`. Returns: `Inspection`. Raises: CheckpointError as `load` does for headers and configurations
    that are damaged or not understood; the numbers themselves are not looked at.
    """
    path = locate(path)
    if is_gguf(path):
        from ._gguf_file import GgufFiles
        from .gguf import plan_gguf
        files = GgufFiles(gguf_file(path))
        plan, config = plan_gguf(files)
        return _report(path, "gguf", config, plan, len(files.tensors), sum(t.nbytes for t in files.tensors.values()))
    if (path / "qfunc.json").exists():
        return _native(path)
    whole = plan_folder(path)
    return _report(path, whole.format, whole.config, whole.plan, whole.tensors, whole.nbytes)


def _report(path: Path, name: str, config: dict, plan: Plan, tensors: int, nbytes: int) -> Inspection:
    groups: dict[tuple, list[Leaf]] = defaultdict(list)
    for leaf in plan.leaves:
        groups[NUMBER.sub("*", leaf.name), leaf.scheme, leaf.tensors[0].dtype if leaf.tensors else ""].append(leaf)
    rows = [Row(pattern, len(leaves), scheme, "" if scheme else dtype, leaves[0].shape, sum(math.prod(leaf.shape) for leaf in leaves),
                sum(leaf.nbytes for leaf in leaves))
            for (pattern, scheme, dtype), leaves in groups.items() if any(leaf.tensors for leaf in leaves)]
    rows.sort(key=lambda row: -row.nbytes)
    notes = list(plan.notes) + _mixed(plan)
    return Inspection(path, name, config, tuple(rows), {leaf.name: leaf.scheme for leaf in plan.leaves if leaf.members}, tensors, nbytes,
                      plan.kv_code, tuple(notes))


def _mixed(plan: Plan) -> list[str]:
    """A note where one projection has several schemes over the layers."""
    found: dict[str, set[str]] = defaultdict(set)
    for leaf in plan.leaves:
        if leaf.name.endswith(("/kernel", "/weight")):
            found[NUMBER.sub("*", leaf.name)].add(leaf.scheme.name if leaf.scheme else "float")
    return [f"{pattern}: {', '.join(sorted(names))} in different layers" for pattern, names in found.items() if len(names) > 1]


def _native(path: Path) -> Inspection:
    from qfunc._qtensor import CODECS

    from ._refuse import refuse
    from .native import open_index, static_fields
    entries, config, file = open_index(path)
    parts: dict[str, list] = defaultdict(list)
    for tensor in file.tensors.values():
        parts[tensor.name.partition("#")[0]].append(tensor)
    plan = Plan()
    for name, entry in entries.items():
        tensors, codes = tuple(parts[name]), file.tensors.get(f"{name}#codes")
        if entry is None or codes is None:
            plan.leaves.append(Leaf(tuple(name.split("/")), tensors[0].shape if tensors else (), tensors))
            continue
        static = static_fields(file.path, name, entry)
        code = static["scheme"].weight.code
        if len(codes.shape) < 2:
            raise refuse(file.path, codes.name, "a matrix of codes", list(codes.shape))
        try:
            columns = CODECS.columns(code, codes.shape[-1]) - static["pad"]
        except (KeyError, ValueError):
            raise refuse(file.path, codes.name, "a code that is known", repr(code)) from None
        plan.leaves.append(_Shown(tuple(name.split("/")), (*codes.shape[:-2], columns, codes.shape[-2]), tensors,
                                  shown=static["scheme"]))
    return _report(path, "qfunc", config or {}, plan, len(file.tensors), sum(t.nbytes for t in file.tensors.values()))


@dataclass
class _Shown(Leaf):
    """A leaf of qfunc's own format, whose scheme stands in the index."""

    shown: Scheme | None = None

    @property
    def scheme(self):
        return self.shown

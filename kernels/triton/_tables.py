"""Tuning tables: which tiles a call gets, as data per device, kernel, format and shape.

A table is a JSON file; the first of these that knows the format answers: the folder that `QFUNC_TRITON_TABLES` names, the user's own
(`qfunc.kernels.triton.tune` writes there), the package's. Rows of the nearest number of tokens are taken, of those the nearest (N, K);
tiles carry over as they are, and `split_k` is scaled so that about as many programs run as in the row. Where no table knows the format,
`_launch.default_config` has a formula.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .. import _dispatch
from .._dispatch import Call
from . import _image, _launch, _target
from ._launch import Config, Target

PACKAGE = Path(__file__).parent / "tables"
FIELDS = tuple(field.name for field in dataclasses.fields(Config))
COLUMNS = ("m", "n", "k", *FIELDS, "us")
BUCKETS = tuple(2**i for i in range(14))
"""Numbers of tokens (of an expert, where there are several) that tables have rows for: 1 to 8192."""


@dataclass(frozen=True)
class Row:
    """One entry: shape, config, and the microseconds measured (None where the row was not measured)."""

    m: int
    n: int
    k: int
    config: Config
    us: float | None


@dataclass(frozen=True)
class Table:
    """One file.

    Fields:
        device: name of the device as JAX gives it, such as `NVIDIA H200`; target: what its kernels are compiled for.
        triton: version that the rows were measured or checked with.
        sources: fingerprint of the kernels that were measured, or None.
        provenance: where the rows come from, in words.
        formats: format (see `format_of`) to rows.
        xla_from: format to the number of tokens from which XLA's own product is taken.
    """

    device: str
    target: str
    triton: str
    sources: str | None
    provenance: str
    formats: dict[str, tuple[Row, ...]]
    xla_from: dict[str, int]

    def to_json(self) -> dict:
        """JSON types; rows as lists in the order of `COLUMNS`."""
        rows = {name: [[r.m, r.n, r.k, *dataclasses.astuple(r.config), r.us] for r in rows] for name, rows in self.formats.items()}
        return {"device": self.device, "target": self.target, "triton": self.triton, "sources": self.sources,
                "provenance": self.provenance, "columns": list(COLUMNS), "xla_from": self.xla_from, "formats": rows}

    @classmethod
    def from_json(cls, data: dict, where: str = "table") -> Table:
        """The inverse; ValueError that names the file, what was expected and what found."""
        expected = {f.name for f in dataclasses.fields(cls)} | {"columns"}
        if set(data) != expected:
            raise ValueError(f"{where}: expected the fields {sorted(expected)}, found {sorted(data)}")
        if tuple(data["columns"]) != COLUMNS:
            raise ValueError(f"{where}: expected the columns {COLUMNS}, found {tuple(data['columns'])}")
        formats = {name: tuple(_row(values, f"{where}: {name}, row {i}") for i, values in enumerate(rows))
                   for name, rows in data["formats"].items()}
        fields = {key: value for key, value in data.items() if key not in ("columns", "formats")}
        return cls(**fields, formats=formats)

    def dumps(self) -> str:
        """The file's text: one line for each row, so that differences can be read."""
        data = self.to_json()
        formats = data.pop("formats")
        head = json.dumps(data, indent=1)[:-2]
        bodies = [f"  {json.dumps(name)}: [\n" + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n  ]"
                  for name, rows in formats.items()]
        return head + ',\n "formats": {\n' + ",\n".join(bodies) + "\n }\n}\n"


def _row(values, where: str) -> Row:
    if len(values) != len(COLUMNS):
        raise ValueError(f"{where}: expected {len(COLUMNS)} values {COLUMNS}, found {len(values)}")
    named = dict(zip(COLUMNS, values, strict=True))
    for name in ("m", "n", "k", "block_m", "block_n", "block_k", "split_k", "num_warps", "num_stages"):
        if not isinstance(named[name], int) or named[name] < 1:
            raise ValueError(f"{where}: expected a positive integer {name}, found {named[name]!r}")
    for name in ("block_m", "block_n", "block_k", "num_warps"):
        if named[name] & (named[name] - 1):
            raise ValueError(f"{where}: expected a power of two as {name}, found {named[name]}")
    return Row(named["m"], named["n"], named["k"], Config(**{name: named[name] for name in FIELDS}), named["us"])


def user_dir() -> Path:
    """Where a user's own tables lie and are written: `$QFUNC_TRITON_TABLES`, or beside the cache of images."""
    own = os.environ.get("QFUNC_TRITON_TABLES")
    return Path(own) if own else _image.cache_dir().parent / "tables"


def read(path: Path) -> Table:
    """One file; ValueError where it is not a table."""
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    return Table.from_json(data, str(path))


@functools.lru_cache(maxsize=16)
def _folder(path: Path) -> tuple[Table, ...]:
    return tuple(read(file) for file in sorted(path.glob("*.json"))) if path.is_dir() else ()


def reload() -> None:
    """Read the files again, after tables were written, for every call that is lowered from now on."""
    _folder.cache_clear()
    tables.cache_clear()
    _dispatch.forget()


@functools.lru_cache(maxsize=64)
def tables(target: str, device: str | None = None, user: Path | None = None) -> tuple[Table, ...]:
    """The tables for a device, the first to be asked first: the user's before the package's, the device's own before others of its
    target, the target's before others of its generation."""
    every = [table for folder in (user or user_dir(), PACKAGE) for table in _folder(folder)]
    serving = [t for t in every if serves(t, target)]
    return tuple(sorted(serving, key=lambda t: (t.target != target, device is not None and t.device != device)))


def serves(table: Table, target: str) -> bool:
    """Whether a table's tiles are for this target: its own, or one of its generation that has no less shared memory."""
    own, theirs = (_launch.SHARED_MEMORY.get(name, 0) for name in (target, table.target))
    return table.target == target or _generation(table.target) == _generation(target) and own >= theirs


def _generation(target: str) -> str:
    return target[:4] if target.startswith("gfx") else target[:-1]


def device_name(target: str) -> str | None:
    """The name of the device that is here, where it is of this target."""
    from jax.extend import backend
    platform = "rocm" if target.startswith("gfx") else "cuda"
    client = backend.backends().get(platform)
    kinds = {d.device_kind for d in client.local_devices()} if client is not None and _target.target_of(platform) == target else set()
    return next(iter(kinds)) if len(kinds) == 1 else None


def format_of(call: Call, group: bool = True) -> str:
    """kernel/weight code/group/activation, such as `dense/int4/g128/bfloat16` and `dense/int8/g0/int8`; g0 is one scale per channel."""
    x = call.spec.code if call.spec is not None else str(call.x[0].dtype)
    if call.primitive == "quantize_activation":
        granularity = call.spec.granularity
        return f"rows/{call.x[0].dtype}/g{granularity.size}/{call.spec.code}"
    if call.primitive == "take":
        return f"take/{call.packed.scheme.weight.code}/g{call.packed.scheme.weight.granularity.size}/{call.out_dtype}"
    kernel = "grouped" if call.sizes is not None else "dense"
    granularity = call.packed.scheme.weight.granularity
    size = f"/g{granularity.size}" if group else ""
    return f"{kernel}/{call.packed.scheme.weight.code}{size}/{x}"


def shape_of(call: Call) -> tuple[int, int, int]:
    """(M, N, K): tokens (of one expert on average), output channels, contracted size."""
    if call.primitive == "take":
        return call.x[0].shape[0], *call.w.matrix_shape[::-1]
    columns = call.x[0].shape[-1]
    if call.primitive == "quantize_activation":
        return math.prod(call.x[0].shape[:-1]), columns, columns
    tokens = math.prod(call.x[0].shape[call.batch:-1])
    if call.sizes is not None:
        tokens = -(-tokens // call.sizes.shape[0])
    return max(tokens, 1), call.w.matrix_shape[-1], columns


def config(call: Call, target: str) -> Config:
    """The config of a call: from the tables, or by the formula; legal for the call in either case."""
    machine = Target.parse(target)
    found = lookup(tables(target, device_name(target), user_dir()), format_of(call), shape_of(call))
    return _launch.adapt(call, machine, found or _launch.default_config(call, machine))


def lookup(asked: Iterable[Table], name: str, shape: tuple[int, int, int]) -> Config | None:
    """The config of the nearest row of the first table that knows the format; None where none does."""
    for table in asked:
        rows = table.formats.get(name)
        if rows:
            return _interpolated(rows, shape)
    return None


def _interpolated(rows: tuple[Row, ...], shape: tuple[int, int, int]) -> Config:
    m, n, k = shape
    # The nearest number of tokens decides first, since it decides the tile; ties go to the larger.
    nearest = min({row.m for row in rows}, key=lambda other: (abs(math.log2(other / m)), -other))
    row = min((row for row in rows if row.m == nearest), key=lambda r: (abs(math.log2(r.n / n)) + abs(math.log2(r.k / k)), -r.n, -r.k))
    if (row.n, row.k) == (n, k):
        return row.config
    given = row.config
    theirs = _tiles(row.m, row.n, given) * given.split_k
    wanted = theirs / _tiles(m, n, given) if given.split_k > 1 else 1
    split = 2 ** max(round(math.log2(wanted)), 0)
    while split > 1 and k // split < 256:
        split //= 2
    return dataclasses.replace(given, split_k=split)


def _tiles(m: int, n: int, config: Config) -> int:
    return -(-m // config.block_m) * -(-n // config.block_n)


def xla_from(call: Call, target: str) -> int | None:
    """The number of tokens from which XLA's own product is the faster one for this format; None: never."""
    name = format_of(call, group=False)
    for table in tables(target, device_name(target), user_dir()):
        if name in table.xla_from:
            return table.xla_from[name]
    return None

"""The GGUF container: header, metadata, tensor table, alignment. Every count is checked against the bytes that are left before it is used.

Layout (ggml's `gguf.md`): magic "GGUF", uint32 version (2 or 3), uint64 tensors, uint64 metadata pairs; pairs of string, uint32 type,
value; tensors of string, uint32 axes, uint64 sizes (fastest first), uint32 ggml type, uint64 offset; padding to `general.alignment`; data.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from qfunc._ggml import BY_ID, BlockType

from ._mapped import MappedFile
from ._refuse import inside, refuse, regular_size, uncollected

# Value types of metadata by number: their struct format and numpy type.
SCALARS = {0: ("B", np.uint8), 1: ("b", np.int8), 2: ("H", np.uint16), 3: ("h", np.int16), 4: ("I", np.uint32), 5: ("i", np.int32),
           6: ("f", np.float32), 7: ("?", np.bool_), 10: ("Q", np.uint64), 11: ("q", np.int64), 12: ("d", np.float64)}
STRING, ARRAY = 8, 9
MAX_NESTING, MAX_AXES, MAX_NAME = 4, 4, 2**16
# Bytes that one pair, one tensor record and one string take at least.
LEAST_PAIR, LEAST_TENSOR, LEAST_STRING = 13, 32, 8
MOST_PAIRS, MOST_TENSORS, MOST_STRINGS = 10**5, 10**5, 2**21
"""Far above what any model has (the strings of a whole file); every one of them becomes Python objects larger than its bytes."""
INTEGER_TYPES = {26: np.int32, 27: np.int64}
"""ggml's integer types without a block decoder."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor, not read yet: `shape` in row-major order (slowest axis first), `type` None for the integer types of `kind`."""

    name: str
    shape: tuple[int, ...]
    type: BlockType | None
    kind: int
    offset: int
    nbytes: int
    file: GgufFile

    @property
    def dtype(self) -> str:
        """The ggml type by name."""
        return self.type.name if self.type is not None else np.dtype(INTEGER_TYPES[self.kind]).name

    def raw(self) -> np.ndarray:
        """The bytes, uint8 [..., row bytes], as a read-only view of the mapped file; integers in their own type."""
        flat = np.frombuffer(self.file.memory, np.uint8, self.nbytes, self.offset)
        if self.type is None:
            return flat.view(INTEGER_TYPES[self.kind]).reshape(self.shape)
        return flat.reshape(*self.shape[:-1], -1)


class _Cursor:
    """Reads the header, never past its end."""

    def __init__(self, memory, size: int, path: Path):
        self.memory, self.size, self.path, self.at = memory, size, path, 0
        self.strings = MOST_STRINGS

    def need(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise refuse(self.path, what, f"{count} more bytes at byte {self.at}", f"{self.size - self.at}")

    def take(self, form: str, what: str):
        size = struct.calcsize(form)
        self.need(size, what)
        values = struct.unpack_from("<" + form, self.memory, self.at)
        self.at += size
        return values[0]

    def string(self, what: str, limit: int | None = None) -> str:
        length = self.take("Q", what)
        if limit is not None and length > limit:
            raise refuse(self.path, what, f"a string of at most {limit} bytes", length)
        self.need(length, what)
        data = bytes(self.memory[self.at: self.at + length])
        self.at += length
        return data.decode("utf-8", "replace" if limit is None else "strict")

    def strings_of(self, count: int, what: str) -> list[str]:
        """Many strings; a vocabulary has hundreds of thousands, so nothing is called for each."""
        out, unpack, memory, at, size = [], struct.Struct("<Q").unpack_from, self.memory, self.at, self.size
        for _ in range(count):
            length = unpack(memory, at)[0] if size - at >= 8 else size
            at += 8
            if length > size - at:
                self.at = min(at, size)
                self.need(length, what)
            out.append(memory[at: at + length].decode("utf-8", "replace"))
            at += length
        self.at = at
        return out

    def count(self, what: str, least: int, most: int = 2**48) -> int:
        value = self.take("Q", what)
        most = min(most, (self.size - self.at) // least)
        if value > most:
            raise refuse(self.path, what, f"at most {most}", value)
        return value

    def value(self, kind: int, what: str, depth: int = 0):
        if kind in SCALARS:
            return self.take(SCALARS[kind][0], what)
        if kind == STRING:
            return self.string(what)
        if kind != ARRAY:
            raise refuse(self.path, what, "a value type from 0 to 12", kind)
        if depth == MAX_NESTING:
            raise refuse(self.path, what, f"arrays at most {MAX_NESTING} deep", "more")
        inner = self.take("I", what)
        if inner in SCALARS:
            dtype = np.dtype(SCALARS[inner][1])
            length = self.count(what, dtype.itemsize)
            array = np.frombuffer(self.memory, dtype, length, self.at).copy()
            self.at += length * dtype.itemsize
            return array
        length = self.count(what, LEAST_STRING if inner == STRING else 12, self.strings)
        self.strings -= length
        if inner == STRING:
            return self.strings_of(length, what)
        return [self.value(inner, what, depth + 1) for _ in range(length)]


class GgufFile(MappedFile):
    """One GGUF file: `path`, `metadata` (numbers, strings, lists of strings, numpy arrays), `tensors` by name."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.size = regular_size(self.path)
        if self.size < 24:
            raise refuse(self.path, "", "a GGUF header of 24 bytes", f"{self.size} bytes")
        try:
            with uncollected():
                self._read()
        except UnicodeDecodeError as error:
            raise refuse(self.path, "name", "UTF-8", error) from None

    def _read(self) -> None:
        cursor = _Cursor(self.memory, self.size, self.path)
        if self.memory[:8] == b"version ":
            raise refuse(self.path, "", "the weights themselves", "a pointer of Git LFS to them; `git lfs pull` fetches them")
        if self.memory[:4] != b"GGUF":
            raise refuse(self.path, "magic", "b'GGUF'", repr(bytes(self.memory[:4])))
        cursor.at = 4
        version = cursor.take("I", "version")
        if version not in (2, 3):
            big = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            raise refuse(self.path, "version", "2 or 3, little endian", "a big-endian file" if big else version)
        count = cursor.count("number of tensors", LEAST_TENSOR, MOST_TENSORS)
        pairs = cursor.count("number of metadata pairs", LEAST_PAIR, MOST_PAIRS)
        self.metadata: dict = {}
        for _ in range(pairs):
            key = cursor.string("metadata key", MAX_NAME)
            if key in self.metadata:
                raise refuse(self.path, f"metadata {key!r}", "one entry", "a duplicate")
            self.metadata[key] = cursor.value(cursor.take("I", f"metadata {key!r}"), f"metadata {key!r}")
        align = self.metadata.get("general.alignment", 32)
        if not isinstance(align, int) or isinstance(align, bool) or align < 1 or align & (align - 1) or align > 2**20:
            raise refuse(self.path, "general.alignment", "a power of two up to 2**20", repr(align))
        records = [self._record(cursor) for _ in range(count)]
        start = -(-cursor.at // align) * align
        self.tensors: dict[str, GgufTensor] = {}
        for record in records:
            tensor = self._tensor(*record, start, align)
            if tensor.name in self.tensors:
                raise refuse(self.path, f"tensor {tensor.name!r}", "one tensor of its name", "a duplicate")
            self.tensors[tensor.name] = tensor
        for before, after in pairwise(sorted(self.tensors.values(), key=lambda t: t.offset)):
            if before.offset + before.nbytes > after.offset:
                raise refuse(self.path, f"tensors {before.name!r} and {after.name!r}", "data without overlaps", "an overlap")

    def _record(self, cursor: _Cursor):
        name = cursor.string("tensor name", MAX_NAME)
        axes = cursor.take("I", f"tensor {name!r}")
        if not 1 <= axes <= MAX_AXES:
            raise refuse(self.path, f"tensor {name!r}", f"1 to {MAX_AXES} axes", axes)
        sizes = [cursor.take("Q", f"tensor {name!r}") for _ in range(axes)]
        return name, sizes, cursor.take("I", f"tensor {name!r}"), cursor.take("Q", f"tensor {name!r}")

    def _tensor(self, name: str, sizes: list[int], kind: int, offset: int, start: int, align: int) -> GgufTensor:
        where = f"tensor {name!r}"
        record = BY_ID.get(kind)
        if record is None and kind not in INTEGER_TYPES:
            raise refuse(self.path, where, "a known ggml type", kind)
        elements, width = (record.elements, record.bytes) if record is not None else (1, np.dtype(INTEGER_TYPES[kind]).itemsize)
        if any(not 0 < size < 2**48 for size in sizes):
            raise refuse(self.path, where, "sizes from 1 to 2**48", sizes)
        if sizes[0] % elements:
            raise refuse(self.path, where, f"rows of whole blocks of {elements} for {record.name}", sizes[0])
        nbytes = math.prod(sizes) // elements * width
        if offset % align:
            raise refuse(self.path, where, f"an offset that {align} divides", offset)
        if start + offset + nbytes > self.size:
            raise refuse(self.path, where, f"{nbytes} bytes of {record.name if record else 'integers'} {sizes[::-1]} within the file",
                         f"{max(self.size - start - offset, 0)} from offset {offset}")
        return GgufTensor(name, tuple(sizes[::-1]), record, kind, start + offset, nbytes, self)


class GgufFiles:
    """A GGUF file and the other parts of it where it is split: `metadata` of the first, `tensors` of all."""

    def __init__(self, path: str | Path):
        first = GgufFile(path)
        self.parts, self.metadata = [first], first.metadata
        count = first.metadata.get("split.count", 1)
        name = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", first.path.name)
        if isinstance(count, int) and count > 1:
            if name is None or int(name[3]) != count or int(name[2]) != 1:
                raise refuse(first.path, "split.count", f"the first of {count} files, named ...-00001-of-{count:05}.gguf", first.path.name)
            for i in range(2, count + 1):
                part = inside(first.path.parent, f"{name[1]}-{i:05}-of-{name[3]}.gguf", first.path)
                self.parts.append(GgufFile(part))
        self.tensors: dict[str, GgufTensor] = {}
        for part in self.parts:
            for tensor in part.tensors.values():
                if tensor.name in self.tensors:
                    raise refuse(part.path, f"tensor {tensor.name!r}", "one tensor of its name", "another in an earlier part")
                self.tensors[tensor.name] = tensor
        total = first.metadata.get("split.tensors.count", len(self.tensors))
        if isinstance(total, int) and total != len(self.tensors):
            raise refuse(first.path, "split.tensors.count", f"{len(self.tensors)} tensors, as the parts have", total)

    @property
    def path(self) -> Path:
        """The first file."""
        return self.parts[0].path

"""A safetensors reader over mmap: every dtype as numpy (ml_dtypes) views of the file, nothing copied, nothing trusted.

The format: 8 bytes of header length N (little endian), N bytes of JSON `{name: {"dtype", "shape", "data_offsets": [begin, end]}}` with an
optional `__metadata__` of strings, then the data; offsets count from the end of the header and tile the data without holes
(https://github.com/huggingface/safetensors, README, "Format"). Checked before anything is mapped: the header's length and JSON,
duplicate names, dtypes, shapes against sizes, overlaps, holes and the end of the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np

from ._mapped import MappedFile
from ._refuse import JSON_LIMIT, inside, parse_json, read_json, refuse, regular_size, short, uncollected

# Bits of one element, and the numpy type it is read as. Elements below a byte are read as bytes: their last axis is in bytes.
DTYPES: dict[str, tuple[int, np.dtype]] = {name: (bits, np.dtype(kind)) for name, bits, kind in (
    ("BOOL", 8, np.bool_), ("U8", 8, np.uint8), ("I8", 8, np.int8), ("U16", 16, np.uint16), ("I16", 16, np.int16), ("U32", 32, np.uint32),
    ("I32", 32, np.int32), ("U64", 64, np.uint64), ("I64", 64, np.int64), ("F16", 16, np.float16), ("BF16", 16, ml_dtypes.bfloat16),
    ("F32", 32, np.float32), ("F64", 64, np.float64), ("C64", 64, np.complex64), ("F8_E4M3", 8, ml_dtypes.float8_e4m3fn),
    ("F8_E5M2", 8, ml_dtypes.float8_e5m2), ("F8_E4M3FNUZ", 8, ml_dtypes.float8_e4m3fnuz), ("F8_E5M2FNUZ", 8, ml_dtypes.float8_e5m2fnuz),
    ("F8_E8M0", 8, ml_dtypes.float8_e8m0fnu), ("F4", 4, np.uint8), ("F6_E2M3", 6, np.uint8), ("F6_E3M2", 6, np.uint8),
)}
KNOWN = f"a dtype among {', '.join(DTYPES)}"
FLOATS = frozenset({"F16", "BF16", "F32", "F64"})


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file, not read yet.

    Fields: `name`; `dtype` as the file spells it; `shape` as the file declares it; `offset` from the start of the file and `nbytes`;
    `file`, the open file it lies in.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    file: File

    def read(self) -> np.ndarray:
        """A read-only view of the mapped file; elements below one byte come as uint8 with the last axis in bytes."""
        bits, kind = DTYPES[self.dtype]
        shape = self.shape if bits >= 8 else (*self.shape[:-1], self.shape[-1] * bits // 8)
        flat = np.frombuffer(self.file.memory, np.uint8, self.nbytes, self.offset) if self.nbytes else np.zeros(0, np.uint8)
        return flat.view(kind).reshape(shape)


class File(MappedFile):
    """One safetensors file: `path`, `size`, `metadata` (strings) and `tensors` (name to `Tensor`, in the order of the data)."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.size = regular_size(self.path)
        with uncollected():
            header, start = self._header()
            self.metadata = self._metadata(header.pop("__metadata__", {}))
            found = sorted((self._tensor(name, entry, start) for name, entry in header.items()), key=lambda t: (t.offset, t.nbytes))
            self._tile(found, start)
            self.tensors: dict[str, Tensor] = {t.name: t for t in found}

    def _header(self) -> tuple[dict, int]:
        with open(self.path, "rb") as stream:
            length = stream.read(8)
            if len(length) < 8:
                raise refuse(self.path, "header length", "8 bytes", len(length))
            if length == b"version ":
                raise refuse(self.path, "", "the weights themselves", "a pointer of Git LFS to them; `git lfs pull` fetches them")
            count = int.from_bytes(length, "little")
            if not 2 <= count <= min(JSON_LIMIT, self.size - 8):
                raise refuse(self.path, "header length", f"2 to {min(JSON_LIMIT, self.size - 8)} bytes", count)
            data = stream.read(count)
        if data[:1] != b"{":
            raise refuse(self.path, "header", "a JSON object", repr(data[:20]))
        header = parse_json(data, self.path)
        if not isinstance(header, dict):
            raise refuse(self.path, "header", "a JSON object", type(header).__name__)
        return header, 8 + count

    def _metadata(self, value) -> dict[str, str]:
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise refuse(self.path, "__metadata__", "an object of strings", short(value))
        return value

    def _tensor(self, name: str, entry, start: int) -> Tensor:
        def need(good: bool, expected: str, found):
            if not good:
                raise refuse(self.path, f"tensor {short(name)}", expected, found if isinstance(found, str) else short(found))
        need(isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}, "dtype, shape and data_offsets", entry)
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        need(isinstance(dtype, str) and dtype in DTYPES, KNOWN, [dtype])
        need(isinstance(shape, list) and len(shape) <= 32, "a shape", shape)
        need(isinstance(offsets, list) and len(offsets) == 2, "two data_offsets", offsets)
        for number in (*shape, *offsets):
            if type(number) is not int or not 0 <= number < 2**62:
                need(False, "non-negative integers below 2**62 in shape and data_offsets", [number])
        begin, end = offsets
        bits = DTYPES[dtype][0]
        total = math.prod(shape) * bits
        if not begin <= end <= self.size - start:
            need(False, f"data_offsets within the {self.size - start} bytes of data", f"[{begin}, {end}]")
        need(total % 8 == 0 and (bits >= 8 or (bool(shape) and shape[-1] * bits % 8 == 0)), "rows of whole bytes", [dtype, shape])
        if total // 8 != end - begin:
            need(False, f"{total // 8} bytes for {dtype} {shape}", f"{end - begin}")
        return Tensor(name, dtype, tuple(shape), start + begin, end - begin, self)

    def _tile(self, tensors: list[Tensor], start: int) -> None:
        for before, after in pairwise(tensors):
            if before.offset + before.nbytes != after.offset:
                kind = "an overlap" if before.offset + before.nbytes > after.offset else "a gap"
                raise refuse(self.path, f"tensors {before.name!r} and {after.name!r}", "data without overlaps or gaps", kind)
        first = tensors[0].offset if tensors else self.size
        last = tensors[-1].offset + tensors[-1].nbytes if tensors else start
        if tensors and first != start or last != self.size:
            raise refuse(self.path, "data", f"tensors that fill the file from byte {start} to {self.size}", f"{first} to {last}")


class Files(Mapping):
    """The tensors of several files as one mapping from name to `Tensor`; `notes`, what is odd about them."""

    def __init__(self, files: list[File], folder: Path | None = None):
        self.files = files
        self.folder = folder or files[0].path.parent
        self.notes: list[str] = []
        self._tensors: dict[str, Tensor] = {}
        for file in files:
            for name, tensor in file.tensors.items():
                if name in self._tensors:
                    other = self._tensors[name].file.path.name
                    raise refuse(file.path, f"tensor {name!r}", "a name of its own", f"the same name in {other}")
                self._tensors[name] = tensor

    def under(self, tensors: dict[str, Tensor]) -> Files:
        """The same files, their tensors under other names."""
        out = copy(self)
        out._tensors = tensors
        return out

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of all files, later files winning."""
        return {key: value for file in self.files for key, value in file.metadata.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self._tensors.values())


def open_folder(folder: str | Path) -> Files:
    """All tensors of a checkpoint folder.

    With an index (`*.safetensors.index.json`) exactly its shards are read, and every tensor must be where the index says; without one,
    every `*.safetensors` of the folder. CheckpointError for missing shards and tensors, names that leave the folder, two indices.
    """
    folder = Path(folder)
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise refuse(folder, "index", "one *.safetensors.index.json", ", ".join(p.name for p in indices))
    if indices:
        return _indexed(folder, indices[0])
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    # Some repositories carry the weights twice, once in the original code's layout.
    names = [n for n in names if n != "consolidated.safetensors"] or names
    if not names:
        raise refuse(folder, "", "a .safetensors file", "none")
    _all_shards(folder, names)
    return Files([File(inside(folder, name, folder)) for name in names], folder)


def _all_shards(folder: Path, names: list[str]) -> None:
    """Shards without an index still say by their names how many they are."""
    found: dict[tuple[str, str], set[int]] = {}
    for name in names:
        match = re.fullmatch(r"(.*)-(\d{1,6})-of-(\d{1,6})\.safetensors", name)
        if match:
            found.setdefault((match[1], match[3]), set()).add(int(match[2]))
    for (stem, total), numbers in found.items():
        if max(numbers) > int(total):
            raise refuse(folder, stem, f"shards up to {total}", f"shard {max(numbers)}")
        if len(numbers) < int(total) and min(numbers) > 0:
            first = next(i for i in range(1, int(total) + 1) if i not in numbers)
            raise refuse(folder, f"{stem}-{first:0{len(total)}}-of-{total}.safetensors", f"{int(total)} shards", len(numbers))


def _indexed(folder: Path, index: Path) -> Files:
    where = read_json(inside(folder, index.name, folder)).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise refuse(index, "weight_map", "an object from tensor to file", short(where))
    shards = {}
    for tensor, name in where.items():
        if not isinstance(name, str):
            raise refuse(index, f"weight_map[{tensor!r}]", "a file name", short(name))
        shards.setdefault(name, []).append(tensor)
    if len(shards) > 100_000:
        raise refuse(index, "weight_map", "at most 100000 files", len(shards))
    files = []
    for name in sorted(shards):
        file = File(inside(folder, name, index))
        missing = [t for t in shards[name] if t not in file.tensors]
        if missing:
            raise refuse(index, f"tensor {missing[0]!r}", f"the tensor in {name}", "none of that name there")
        files.append(file)
    found = Files(files, folder)
    more = [name for name in found if name not in where]
    if more:
        found.notes.append(f"{len(more)} tensors of the shards are not in {index.name}, such as {more[0]!r}; they are read all the same")
    return found

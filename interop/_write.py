"""Writing files so that an interrupted save leaves what was there before: write beside, flush to the disk, rename."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .safetensors import DTYPES

NAMES = {kind: name for name, (bits, kind) in DTYPES.items() if bits == 8 * kind.itemsize}
"""numpy types to their names in safetensors files."""


def replace_file(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Make `path` a file that `write` fills, all at once: the old file stays until the new one is on the disk."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Put the names of a folder on the disk, where the system can (Windows cannot open a folder)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_safetensors(file: BinaryIO, tensors: Mapping, metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays by name as a safetensors file; arrays of JAX come to the host one at a time.

    Raises: ValueError for a type that the format has no name for, before anything is written.
    """
    header, place = {"__metadata__": dict(metadata)} if metadata else {}, 0
    for name, array in tensors.items():
        dtype = np.dtype(array.dtype)
        if dtype not in NAMES:
            raise ValueError(f"{name}: safetensors has no name for {dtype}")
        size = array.size * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(array.shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)         # readers map the data: it should begin aligned
    file.write(len(text).to_bytes(8, "little") + text)
    for array in tensors.values():
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

"""ggml's block types as data: one record a type, with its decoder.

A GGUF tensor is rows of blocks; a block holds a fixed number of elements in a fixed number of bytes. Types, numbers and sizes are those
of ggml's `ggml.h`; decoding gives ggml's own floats bit for bit (`to_float` of the reference implementation), eager and jitted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp

from . import _ggml_grids as grids
from . import _ggml_plain as plain
from ._paths import nearest


@dataclass(frozen=True)
class BlockType:
    """One ggml type.

    Fields: `name` in lower case; `id`, its number in tensor headers; `elements` and `bytes` of one block; `decode`, a function from
    uint8 [..., n, bytes] to float32 [..., n, elements].
    """

    name: str
    id: int
    elements: int
    bytes: int
    decode: Callable

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element, scales included."""
        return 8 * self.bytes / self.elements


_ROWS = (
    ("f32", 0, 1, 4, plain.f32), ("f16", 1, 1, 2, plain.f16), ("q4_0", 2, 32, 18, plain.q4_0), ("q4_1", 3, 32, 20, plain.q4_1),
    ("q5_0", 6, 32, 22, plain.q5_0), ("q5_1", 7, 32, 24, plain.q5_1), ("q8_0", 8, 32, 34, plain.q8_0), ("q8_1", 9, 32, 36, plain.q8_1),
    ("q2_k", 10, 256, 84, plain.q2_k), ("q3_k", 11, 256, 110, plain.q3_k), ("q4_k", 12, 256, 144, plain.q4_k),
    ("q5_k", 13, 256, 176, plain.q5_k), ("q6_k", 14, 256, 210, plain.q6_k), ("q8_k", 15, 256, 292, plain.q8_k),
    ("iq2_xxs", 16, 256, 66, grids.iq2_xxs), ("iq2_xs", 17, 256, 74, grids.iq2_xs), ("iq3_xxs", 18, 256, 98, grids.iq3_xxs),
    ("iq1_s", 19, 256, 50, grids.iq1_s), ("iq4_nl", 20, 32, 18, grids.iq4_nl), ("iq3_s", 21, 256, 110, grids.iq3_s),
    ("iq2_s", 22, 256, 82, grids.iq2_s), ("iq4_xs", 23, 256, 136, grids.iq4_xs), ("i8", 24, 1, 1, plain.i8), ("i16", 25, 1, 2, plain.i16),
    ("f64", 28, 1, 8, plain.f64), ("iq1_m", 29, 256, 56, grids.iq1_m), ("bf16", 30, 1, 2, plain.bf16), ("tq1_0", 34, 256, 54, plain.tq1_0),
    ("tq2_0", 35, 256, 66, plain.tq2_0), ("mxfp4", 39, 32, 17, plain.mxfp4), ("nvfp4", 40, 64, 36, plain.nvfp4),
    ("q1_0", 41, 128, 18, plain.q1_0), ("q2_0", 42, 64, 18, plain.q2_0),
)
TYPES: dict[str, BlockType] = {row[0]: BlockType(*row) for row in _ROWS}
"""Every type by name."""

BY_ID: dict[int, BlockType] = {record.id: record for record in TYPES.values()}
"""Every type by its number in a GGUF tensor header."""


def block_type(name: str) -> BlockType:
    """The record of a type, by its name in any case; ValueError names the nearest otherwise."""
    record = TYPES.get(name.lower())
    if record is None:
        raise ValueError(f"ggml type {name!r} is unknown; the nearest are {', '.join(nearest(name.lower(), TYPES))}")
    return record


def row_bytes(name: str, columns: int) -> int:
    """Bytes of one row of `columns` elements; ValueError where the row is not whole blocks."""
    record = block_type(name)
    if columns % record.elements:
        raise ValueError(f"a row of ggml type {record.name} holds a multiple of {record.elements} elements, found {columns}")
    return columns // record.elements * record.bytes


def columns_of(name: str, size: int) -> int:
    """Elements in a row of `size` bytes; ValueError where the row is not whole blocks."""
    record = block_type(name)
    if size % record.bytes:
        raise ValueError(f"a row of ggml type {record.name} is a multiple of {record.bytes} bytes, found {size}")
    return size // record.bytes * record.elements


def decode(raw, type_name: str, columns: int):
    """Decode rows of blocks.

    Arguments: `raw` uint8 [..., row_bytes(type_name, columns)] as the rows lie in a GGUF file; `type_name` such as "q4_k" and `columns`
    are static. Returns float32 [..., columns] with ggml's own bits. ValueError where the row length does not fit.
    """
    record = block_type(type_name)
    raw = jnp.asarray(raw)
    if raw.dtype != jnp.uint8 or raw.shape[-1:] != (row_bytes(type_name, columns),):
        raise ValueError(f"ggml type {record.name} with {columns} columns: expected uint8 [..., {row_bytes(type_name, columns)}], "
                         f"found {raw.dtype} {list(raw.shape)}")
    blocks = raw.reshape(*raw.shape[:-1], columns // record.elements, record.bytes)
    return record.decode(blocks).reshape(*raw.shape[:-1], columns)

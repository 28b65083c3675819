"""Sparse weights of compressed-tensors: the values that are not zero, and a bit for every place.

`shape` int64 [2] (or [2, 1]), `bitmask` uint8 [N, ceil(K / 8)], least significant bit first, `compressed`, the values row by row:
[N, K / 2] in `sparse-24-bitmask`, whose rows keep two of every four, flat in `sparse-bitmask`, which has `row_offsets` [N], too.
Source: compressed-tensors 0.10, `compressors/sparse_compressors/sparse_24_bitmask.py` and `sparse_bitmask.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ._plan import Parts
from .safetensors import File, Tensor

FORMATS = ("sparse-24-bitmask", "sparse-bitmask")
MARK = "bitmask"


@dataclass(frozen=True)
class Spread:
    """A sparse weight that looks like a dense tensor; `read` puts the values in their places."""

    parts: Parts
    shape: tuple[int, int]
    bits: Tensor
    values: Tensor
    offsets: Tensor | None

    @property
    def dtype(self) -> str:
        """That of the values."""
        return self.values.dtype

    @property
    def file(self) -> File:
        """Where the values lie."""
        return self.values.file

    def read(self) -> np.ndarray:
        """The dense matrix [N, K]."""
        mask = np.unpackbits(self.bits.read(), axis=-1, count=self.shape[1], bitorder="little").view(np.bool_)
        counts, values = mask.sum(1), self.values.read()
        wrong = (counts * 2 != self.shape[1]).any() if self.offsets is None else (np.cumsum(counts) - counts != self.offsets.read()).any()
        if wrong or counts.sum() != values.size:
            raise self.parts.fail(MARK, f"one bit for each of the {values.size} values, row by row", f"{counts.sum()} bits")
        out = np.zeros(self.shape, values.dtype)
        kind = np.dtype(f"u{values.dtype.itemsize}")
        out.view(kind)[mask] = values.reshape(-1).view(kind)
        return out


def spread(parts: Parts) -> Parts:
    """The parts of a layer with its sparse weight as `weight`."""
    shape = parts.take("shape", ("I64", "I32"), [(2,), (2, 1)]).read().reshape(-1)
    outs, ins = (int(n) for n in shape)
    if not 0 < outs < 2**31 or not 0 < ins < 2**31:
        raise parts.fail("shape", "two positive numbers", [outs, ins])
    bits = parts.take(MARK, "U8", (outs, -(-ins // 8)))
    flat = "row_offsets" in parts
    values = parts.take("compressed", ("F8_E4M3", "F8_E5M2", "I8"), ndim=1 if flat else 2)
    if not flat and values.shape != (outs, ins // 2):
        raise parts.fail("compressed", f"shape [{outs}, {ins // 2}]", list(values.shape))
    offsets = parts.take("row_offsets", ("I64", "I32"), (outs,)) if flat else None
    return Parts(parts.module, {**parts.left, "weight": Spread(parts, (outs, ins), bits, values, offsets)})

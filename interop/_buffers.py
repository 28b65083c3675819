"""Host arrays that JAX can take over without a copy: on a CPU it shares memory that starts on a cache line, and copies everything else."""

from __future__ import annotations

import math

import numpy as np

LINE = 64


def empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An uninitialized array whose memory starts on a cache line."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    return raw[start: start + size].view(dtype).reshape(shape)


def owned(array: np.ndarray) -> np.ndarray:
    """The array in memory of its own that starts on a cache line; a view into a mapped file is always copied."""
    if array.flags.c_contiguous and array.flags.writeable and array.ctypes.data % LINE == 0:
        return array
    out = empty(array.shape, array.dtype)
    out[...] = array
    return out

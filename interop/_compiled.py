"""The repacking of checkpoints by the compiled library, where there is one; `_streams` and `_repack` do the same in numpy.

The library's functions run without Python's lock, so that several leaves are converted at once.
"""

from __future__ import annotations

import ctypes
import functools
import warnings

import numpy as np

from qfunc._pack import packed_size

from ._buffers import empty

_SIZE, _FLAG, _DATA = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
SIGNATURES = {
    "qfunc_repack_stream": (_DATA, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE, _FLAG, _DATA, _FLAG, _DATA, _SIZE),
    "qfunc_repack_awq": (_DATA, _SIZE, _SIZE, _SIZE, _FLAG, _DATA, _SIZE),
}


@functools.cache
def functions() -> dict | None:
    """The library's functions by name; None, after one FallbackWarning, where it is not there or was built before they were."""
    from qfunc.kernels import FallbackWarning
    from qfunc.kernels.cpu import _library
    path = _library._find()
    try:
        library = ctypes.CDLL(str(path)) if path is not None else None
        found = {name: getattr(library, name) for name in SIGNATURES}
    except (OSError, AttributeError) as error:
        reason = "qfunc was installed without its native kernels" if path is None else f"{error}; install qfunc again"
        warnings.warn(f"checkpoints are repacked by numpy, several times slower: {reason}", FallbackWarning, stacklevel=2)
        return None
    for name, function in found.items():
        function.argtypes, function.restype = SIGNATURES[name], None
    return found


def stream(words: np.ndarray, bits: int, columns: int, order: np.ndarray | None, fill: int, axis: int) -> np.ndarray | None:
    """`_streams.column_stream` (axis 0) or `row_stream` (axis 1); None where there is no compiled one."""
    if functions() is None or words.dtype != np.uint32 or 0 in words.shape:
        return None
    count, outs = words.shape[axis], words.shape[1 - axis]
    if 32 * count < bits * columns or any(stride % 4 for stride in words.strides):
        return None
    order = None if order is None else np.ascontiguousarray(order, np.int32)
    if order is not None and (order.shape != (columns,) or order.min() < 0 or order.max() >= columns):
        return None
    out = empty((outs, columns if bits == 8 else packed_size(columns, bits)), np.uint8)
    step, apart = (words.strides[i] // 4 for i in (axis, 1 - axis))
    functions()["qfunc_repack_stream"](words.ctypes.data, step, apart, count, outs, columns, bits,
                                       None if order is None else order.ctypes.data, fill, out.ctypes.data, out.shape[1])
    return out


def awq(words: np.ndarray, fill: int) -> np.ndarray | None:
    """`_repack.awq_columns`; None where there is no compiled one."""
    if functions() is None or words.dtype != np.uint32 or 0 in words.shape or words.strides[1] != 4 or words.strides[0] % 4:
        return None
    columns, groups = words.shape
    out = empty((8 * groups, packed_size(columns, 4)), np.uint8)
    functions()["qfunc_repack_awq"](words.ctypes.data, words.strides[0] // 4, groups, columns, fill, out.ctypes.data, out.shape[1])
    return out

"""The launch of `take`: rows of a packed embedding table, decoded. `take` is no primitive yet: a `Call` of that name describes it."""

from __future__ import annotations

import dataclasses

import numpy as np

from qfunc._codes import CODES, code

from .._dispatch import Call
from ._launch import POINTER, Config, Kernel, Launch, Target, struct
from ._plan_matmul import FLOATS, SCALES, WEIGHT, WHOLE, code_kind, scale_kind, second_kind

TAKE = Kernel("take", "qfunc.kernels.triton._take", "take", ("ids", *WEIGHT), ("y",), ("T", "N", "K", "ROW", "GROUPS"),
              ("BK", "CODE", "BITS", "OFFSET", "ZERO", "SCALE", "SCALE2", "GROUP", "SHARE"))


def refusal(call: Call, target: Target) -> str | None:
    """None, or why the kernel does not read this table; `call.x` is (ids,), int32 [T], already flat."""
    w, spec, ids = call.w, call.packed.scheme.weight, call.x[0]
    if call.packed.layout != "canonical":
        return f"the table is laid out for {call.packed.layout}"
    if spec.code not in CODES:
        return f"there is no GPU decoder of {spec.code}"
    if len(w.matrix_shape) != 2 or w.perm is not None:
        return "a table with leading axes or in an order of its own"
    if ids.ndim != 1 or np.dtype(ids.dtype) != np.int32 or str(np.dtype(call.out_dtype)) not in FLOATS:
        return f"ids {ids.dtype} {ids.shape} to {np.dtype(call.out_dtype)}"
    if scale_kind(w) not in SCALES:
        return f"scales of type {scale_kind(w)}"
    if 0 in (*w.matrix_shape, *ids.shape) or max(*w.matrix_shape, *ids.shape) >= 2**30:
        return f"a table {w.matrix_shape} and ids {ids.shape}"
    return None


def default_config(call: Call, target: Target) -> Config:
    """A thousand columns a program."""
    return Config(block_m=1, block_n=16, block_k=1024, num_warps=4, num_stages=1)


def adapt(call: Call, target: Target, config: Config) -> Config:
    """Columns in a power of two."""
    return dataclasses.replace(config, block_k=1 << (max(config.block_k, 16) - 1).bit_length(), split_k=1)


def describe(call: Call, target: Target, config: Config) -> Launch:
    """ids [T] to y [T, K]."""
    w, spec, count = call.w, call.packed.scheme.weight, call.x[0].shape[0]
    columns, rows = w.matrix_shape
    element, granularity, kind = code(spec.code), spec.granularity, scale_kind(w)
    arrays = {"ids": call.x[0]} | {name: leaf for name in WEIGHT if (leaf := getattr(w, name, None)) is not None}
    if kind == "nested":
        arrays |= {"levels": struct((256,), np.float32), "scale_offset": struct((1,), np.float32)}
    if element.name in ("nf4", "fp4_bnb"):
        arrays["table"] = struct((16,), np.float32)
    arrays = {name: arrays[name] for name in TAKE.inputs if name in arrays}
    types = {name: POINTER[str(np.dtype(array.dtype))] for name, array in arrays.items()}
    types["y"] = POINTER[str(np.dtype(call.out_dtype))]
    grouped = granularity.kind in ("group", "block") and granularity.size < columns
    constants = dict(BK=config.block_k, CODE=code_kind(element.name), BITS=element.bits, OFFSET=element.offset if element.integer else 0,
                     ZERO=spec.zero or "none", SCALE=SCALES[kind], SCALE2=second_kind(w, kind),
                     GROUP=granularity.size if grouped else WHOLE, SHARE={"tensor": 0, "block": granularity.out}.get(granularity.kind, 1))
    scalars = dict(T=count, N=rows, K=columns, ROW=w.codes.shape[-1], GROUPS=w.scale.shape[-1])
    grid = (count, -(-columns // config.block_k), 1)
    # The two roundings of q s + z are the formula's: no fused operation.
    return Launch(TAKE, tuple(arrays.items()), types, (("y", struct((count, columns), call.out_dtype)),), scalars, constants, grid,
                  config.num_warps, config.num_stages, fusion=False)

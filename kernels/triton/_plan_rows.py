"""The launches of `quantize_activation`, alone or behind an RMSNorm or SwiGLU."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from qfunc import _scales
from qfunc._codec import E4M3_LARGEST, E4M3_SMALLEST
from qfunc._codes import code

from .._dispatch import Call
from ._launch import POINTER, Config, Kernel, Launch, Target, struct

ROWS = Kernel("quantize_rows", "qfunc.kernels.triton._activation", "quantize_rows",
              ("x", "up", "gain", "given", "given_zero"), ("codes", "scale", "zero"), ("M", "K", "GROUPS"),
              ("BR", "BK", "SPREAD", "FRONT", "EPS", "SHIFT", "CELL", "GROUP", "CODE", "LOW", "HIGH", "DIVISOR", "CLIP", "RULE", "EMAX",
               "EXPONENT", "MANTISSA", "ROUNDING", "ASYMMETRIC", "INNER_LOW", "INNER_HIGH"))
MINIFLOATS = {"fp8_e4m3": (4, 3), "fp8_e5m2": (5, 2), "fp6_e2m3": (2, 3), "fp6_e3m2": (3, 2), "fp4_e2m1": (2, 1)}
"""Exponent and mantissa bits of the small floats."""
CHUNK = 4096
"""Elements of a row that one program holds at once."""


def refusal(call: Call, target: Target) -> str | None:
    """None, or why the kernel does not quantize this activation."""
    spec, x = call.spec, call.x[0]
    if str(np.dtype(x.dtype)) not in ("bfloat16", "float16", "float32"):
        return f"x of type {np.dtype(x.dtype)}"
    if 0 in x.shape:
        return "an empty activation"
    if max(math.prod(x.shape[:-1]), x.shape[-1]) >= 2**30:
        return f"an axis of x {x.shape}, which 32-bit indices do not reach safely"
    if -(-x.shape[-1] // CHUNK) > 65535:
        return f"rows of {x.shape[-1]}, more chunks than one launch has room for"
    size = spec.granularity.size
    if spec.granularity.kind == "group" and (size & (size - 1) or not 16 <= size <= CHUNK):
        return f"groups of {size}: expected a power of two from 16 to {CHUNK}"
    if spec.zero is not None and (spec.granularity.kind == "group" or not code(spec.code).integer):
        return "zero points for groups of the activation"
    if spec.outer is not None and spec.granularity.kind != "group":
        return f"an outer scale over scales per {spec.granularity.kind}"
    if spec.outer is None and spec.scale_rule not in ("amax", "amax_half", "minmax", *_scales.INVERSE, *_scales.MX):
        return f"activation scales by the rule {spec.scale_rule!r}"
    return None


def default_config(call: Call, target: Target) -> Config:
    """One row and as much of it as fits."""
    columns = call.x[0].shape[-1]
    return Config(block_m=1, block_n=16, block_k=min(1 << max(columns - 1, 15).bit_length(), CHUNK), num_warps=4, num_stages=2)


def adapt(call: Call, target: Target, config: Config) -> Config:
    """Chunks that are powers of two and hold whole groups."""
    size = call.spec.granularity.size if call.spec.granularity.kind == "group" else 16
    chunk = 1 << (max(config.block_k, size) - 1).bit_length()
    return dataclasses.replace(config, block_k=min(chunk, CHUNK), split_k=1)


def describe(call: Call, target: Target, config: Config, front: str = "none", gain=None, eps: float = 0.0, shift: float = 0.0) -> Launch:
    """The launch that makes codes [M, K] and, where the scale comes from the data of a token or group, scale [M, G] and zero [M, 1].

    `front`: `none`; `rmsnorm`, x / rms(x) (gain + shift), with `gain` a struct [K]; `swiglu`, silu(x) up with one more array [M, K].
    Other scales (per tensor, calibrated, outer ones) come as the array `given` [M, 1].
    """
    spec, x = call.spec, call.x[0]
    element = code(spec.code)
    rows, columns = math.prod(x.shape[:-1]), x.shape[-1]
    cell = "given" if spec.granularity.kind == "tensor" else spec.granularity.kind
    group = spec.granularity.size if cell == "group" else 1
    groups = -(-columns // group) if cell == "group" else 1
    exponent, mantissa = MINIFLOATS.get(spec.code, (0, 0))
    spared = spec.zero is None and spec.mode == "dynamic" and spec.scale_rule == "amax"

    arrays = {"x": struct((rows, columns), x.dtype)}
    if front == "swiglu":
        arrays["up"] = struct((rows, columns), x.dtype)
    if front == "rmsnorm":
        arrays["gain"] = struct((columns,), gain.dtype)
    if cell == "given" or spec.outer is not None:
        arrays["given"] = struct((rows, 1), np.float32)
    if cell == "given" and spec.zero is not None:
        arrays["given_zero"] = struct((rows, 1), np.int32)
    results = {"codes": struct((rows, columns), np.dtype(np.int8) if element.integer else element.dtype)}
    if cell != "given":
        results["scale"] = struct((rows, groups), np.float32)
    if cell != "given" and spec.zero is not None:
        results["zero"] = struct((rows, 1), np.int32)
    types = {name: POINTER[str(np.dtype(array.dtype))] for name, array in (arrays | results).items()}

    spread = front != "rmsnorm" and cell != "token"
    constants = dict(
        BR=config.block_m, BK=config.block_k, SPREAD=spread, FRONT=front, EPS=float(eps), SHIFT=float(shift), CELL=cell, GROUP=group,
        CODE="int" if element.integer else spec.code, LOW=float(-element.highest if spared else element.lowest),
        HIGH=float(element.highest), DIVISOR=divisor(spec, element), CLIP=float(np.float32(spec.clip)), ROUNDING=spec.rounding,
        RULE="two_level" if spec.outer is not None else spec.scale_rule, EMAX=_scales.MX_ELEMENTS.get(spec.code, (0, 0))[0],
        EXPONENT=exponent, MANTISSA=mantissa,
        ASYMMETRIC=spec.zero is not None, INNER_LOW=E4M3_SMALLEST, INNER_HIGH=E4M3_LARGEST)
    grid = (-(-rows // config.block_m), -(-columns // config.block_k) if spread else 1, 1)
    return Launch(ROWS, tuple(arrays.items()), types, tuple(results.items()), dict(M=rows, K=columns, GROUPS=groups), constants, grid,
                  config.num_warps, config.num_stages, fusion=False)


def divisor(spec, element) -> float:
    """What amax (or the whole range, with a zero point) is divided by."""
    if spec.zero is not None:
        return float(element.highest - element.lowest)
    return float(element.highest + (0.5 if spec.scale_rule in ("amax_half", "amax_half_inverse") else 0))

"""The bridge from a Triton kernel to a jitted JAX function: one compiled image, one custom call.

The custom call is jaxlib's own `triton_kernel_call_ffi`. Its payload is a protocol buffer that the constructors of `jaxlib.gpu_triton`
write; where no GPU plugin is installed (lowering for a machine elsewhere) `_encode` writes the same bytes. These are private names of
jaxlib, so a test holds both writers equal, and jax-triton is the way out (`QFUNC_TRITON_BRIDGE=jax-triton`).
"""

from __future__ import annotations

import functools
import importlib
import linecache
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._image import Image, KernelError, Program, compiled, function

TARGET = "triton_kernel_call_ffi"
"""The custom call of XLA that runs an image."""
JAX_TRITON_TARGET = "triton_kernel_call"
GRID_LIMIT = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class Operand:
    """The next array of the call."""


@dataclass(frozen=True)
class Result:
    """Result `index`; `zero` clears it before the kernel starts."""

    index: int
    zero: bool = False


@dataclass(frozen=True)
class Scalar:
    """A number known when the call is lowered; `kind` as Triton names it (`i32`, `i64`, `fp32`, ...)."""

    value: int | float | bool
    kind: str


def call(program: Program, arguments: Sequence[Operand | Result | Scalar], grid: Sequence[int], arrays: Sequence[Any],
         results: Sequence[jax.ShapeDtypeStruct], *, target: str, label: str | None = None) -> list[jax.Array]:
    """Run a program in the function that is being traced.

    Arguments:
        arguments: what each run-time argument of the kernel is, in its order; as many `Operand` as there are `arrays`.
        grid: up to three counts of programs.
        arrays, results: what the kernel reads, and the shapes and types of what it writes (uninitialised unless `Result.zero`).
        target: as `target_of` gives it.
        label: the name that the custom call bears in the lowered text; by default the kernel's.

    Returns the results; without a launch, zeros, where every result is empty or the grid is. Raises KernelError.
    """
    grid = (*grid, 1, 1)[:3]
    if not all(grid) or all(math.prod(r.shape) == 0 for r in results):
        return [jnp.zeros(r.shape, r.dtype) for r in results]
    if any(count > limit for count, limit in zip(grid, GRID_LIMIT, strict=True)):
        raise KernelError(f"{program.name}: a grid of {grid} programs, the device takes at most {GRID_LIMIT}")
    count = sum(isinstance(a, Operand) for a in arguments)
    run_time = [name for name, kind in program.signature if kind != "constexpr"]
    if count != len(arrays) or len(arguments) != len(run_time):
        raise KernelError(f"{program.name} has {len(run_time)} run-time arguments; described are {len(arguments)}, "
                          f"{count} of them arrays, given are {len(arrays)} arrays")
    if os.environ.get("QFUNC_TRITON_BRIDGE") == "jax-triton":
        return _call_jax_triton(program, arguments, grid, arrays, results, target)
    image = compiled(program, target)
    aligned = [name in program.divisible for name in run_time]
    sizes = [math.prod(r.shape) * np.dtype(r.dtype).itemsize for r in results]
    opaque = zlib.compress(_payload(program, image, arguments, aligned, sizes, grid))
    return list(jax.ffi.ffi_call(TARGET, list(results))(*arrays, name=label or program.name, opaque=opaque))


def _code_or_path(program: Program, image: Image) -> str:
    if not image.target.startswith("gfx"):
        return image.code.decode()
    # jaxlib reads an HSACO from the path that stands in the place of the PTX, and then deletes the file: each call has its own.
    handle, path = tempfile.mkstemp(suffix=".hsaco", prefix=f"qfunc-{program.key(image.target)[:12]}-")
    with os.fdopen(handle, "wb") as file:
        file.write(image.code)
    return path


def _payload(program: Program, image: Image, arguments, aligned, sizes, grid) -> bytes:
    code = _code_or_path(program, image)
    capability = int(image.target.removeprefix("sm_")) if image.target.startswith("sm_") else 0
    kernel = (image.name, image.warps, 1, image.shared, code, "", capability)
    # One entry per argument: (bytes to clear, alignment) of an array, or a number and its type.
    parameters = [(a.value, a.kind) if isinstance(a, Scalar) else (sizes[a.index] if isinstance(a, Result) and a.zero else 0,
                                                                   16 if whole else 0)
                  for a, whole in zip(arguments, aligned, strict=True)]
    plugin = _plugin()
    if plugin is None:
        return _encode(kernel, grid, parameters, program.name)
    make = [plugin.create_scalar_parameter if isinstance(kind, str) else plugin.create_array_parameter for _, kind in parameters]
    built = [m(*p) for m, p in zip(make, parameters, strict=True)]
    return plugin.TritonKernelCall(plugin.TritonKernel(*kernel), *grid, built).to_proto(program.name, b"")


@functools.cache
def _plugin():
    module = importlib.import_module("jaxlib.gpu_triton")
    return module if hasattr(module, "TritonKernelCall") else None


_SCALARS = {"i1": (2, "varint"), "i32": (3, "varint"), "u32": (4, "varint"), "i64": (5, "varint"), "u64": (6, "varint"),
            "fp32": (7, "<f"), "fp64": (8, "<d")}


def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, value) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3) + _varint(value)


def _encode(kernel, grid, parameters, label: str) -> bytes:
    """jaxlib's `TritonAnyKernelCall` (jaxlib/gpu/triton.proto); fields that are zero are left out, as proto3 does."""
    name, warps, ctas, shared, code, _, capability = kernel
    image = _field(1, name.encode()) + _field(2, warps) + (_field(3, shared) if shared else b"") + _field(4, code.encode())
    image += (_field(6, capability) if capability else b"") + _field(10, ctas)
    body = _field(1, image) + b"".join(_field(2 + i, count) for i, count in enumerate(grid))
    for value, kind in parameters:
        if not isinstance(kind, str):
            inner = (_field(1, value) if value else b"") + (_field(2, kind) if kind else b"")
            body += _field(5, _field(1, inner))
            continue
        number, how = _SCALARS[kind]
        wire = _varint(number << 3) + _varint(int(value)) if how == "varint" else (
            _varint(number << 3 | (5 if how == "<f" else 1)) + struct.pack(how, value))
        body += _field(5, wire)
    return _field(1, body) + _field(3, b"")[:0] + _field(4, label.encode())


def _call_jax_triton(program: Program, arguments, grid, arrays, results, target: str) -> list[jax.Array]:
    """The same call made by jax-triton, which clears TRITON_CACHE_DIR when it is imported."""
    kept = os.environ.pop("TRITON_CACHE_DIR", None)
    import jax_triton
    os.environ.pop("TRITON_CACHE_DIR", None)
    if kept:
        os.environ["TRITON_CACHE_DIR"] = kept
    names = [name for name, kind in program.signature if kind != "constexpr"]
    named = list(zip(names, arguments, strict=True))
    inputs = [name for name, a in named if isinstance(a, Operand)]
    scalars = [(name, np.float32(a.value) if a.kind == "fp32" else a.value) for name, a in named if isinstance(a, Scalar)]
    outputs = sorted(((a.index, name, a.zero) for name, a in named if isinstance(a, Result)))
    order = (*inputs, *(name for name, _ in scalars), *(name for _, name, _ in outputs), *(name for name, _ in program.constexprs))
    capability = {"compute_capability": int(target.removeprefix("sm_"))} if target.startswith("sm_") else {}
    return list(jax_triton.triton_call(
        *arrays, *(value for _, value in scalars), kernel=_reordered(program, order), out_shape=list(results), grid=tuple(grid),
        name=program.name, num_warps=program.warps, num_stages=program.stages,
        zeroed_outputs=tuple(index for index, _, zero in outputs if zero), **capability, **dict(program.options),
        **dict(program.constexprs)))


@functools.cache
def _reordered(program: Program, order: tuple[str, ...]):
    """The kernel with its arguments in jax-triton's order (arrays, numbers, results, constants), as a function that calls it."""
    import triton
    import triton.language as tl
    constants = {name for name, _ in program.constexprs}
    parameters = ", ".join(f"{name}: tl.constexpr" if name in constants else name for name in order)
    own = ", ".join(name for name, _ in program.signature)
    text = f"def {program.name}({parameters}):\n    inner({own})\n"
    file = f"<{program.kernel} for jax-triton, {len(order)} arguments, {hash(order) & 0xffffff:x}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)     # triton.jit reads the source of what it compiles
    space = {"inner": function(program), "tl": tl, "triton": triton, "__name__": __name__}
    exec(compile(text, file, "exec"), space)
    return triton.jit(space[program.name])

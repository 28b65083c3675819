"""Triton's interpreter, repaired for tests, and the launcher of a `Launch` on CPU arrays. TRITON_INTERPRET=1 must be set before import.

The interpreter keeps bfloat16 as 16-bit integers and multiplies the bit patterns, truncates casts to it, trips over numpy >= 2.4 in
`range` of a run-time value, loses subnormals of fp8, and has no inline PTX (`ptx.py` executes ours). The repair replaces methods with
ones that go through float32, rounds casts to even, and sums integer products in float64, which is exact for every sum that int32 holds.
"""

import importlib
import inspect
import os

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("the interpreter is chosen when triton is imported: set TRITON_INTERPRET=1 in a process of its own")

import jax.numpy as jnp
import numpy as np
import ptx
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

BF16 = tl.bfloat16
FP8 = {tl.float8e4nv: jnp.float8_e4m3fn, tl.float8e5: jnp.float8_e5m2}
Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder


def widen(handle):
    """The float32 values of a bfloat16 or fp8 handle; other handles' own data."""
    if handle.dtype.scalar in FP8:
        return handle.data.view(FP8[handle.dtype.scalar]).astype(np.float32)
    return (handle.data.astype(np.uint32) << 16).view(np.float32) if handle.dtype.scalar == BF16 else handle.data


def narrow(values):
    """A bfloat16 handle of float32 values, rounded to nearest even."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return Handle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), BF16)


class Results(list):
    """What an operation with several results returns."""

    get_result = list.__getitem__


def _repair():
    binary, cast, dot = Builder.binary_op, Builder.cast_impl, Builder.create_dot

    def binary_op(self, left, right, op):
        if left.dtype.scalar != BF16 or right.dtype.scalar != BF16:
            return binary(self, left, right, op)
        value = op(widen(left), widen(right))
        return Handle(value, tl.int1) if value.dtype == bool else narrow(value)

    def cast_impl(self, source, kind):
        old, new = source.dtype.scalar, kind.scalar
        if old == BF16 and new != BF16:
            wide = Handle(widen(source), tl.float32)
            return wide if new == tl.float32 else cast(self, wide, kind)
        if new == BF16 and old != BF16:
            return narrow(source.data.astype(np.float32))
        return cast(self, source, kind)

    def create_dot(self, left, right, total, precision, imprecise):
        if left.dtype.scalar.is_int():
            value = (left.data.astype(np.float64) @ right.data.astype(np.float64)).astype(total.data.dtype)
            return Handle(value + total.data, total.dtype.scalar)
        if left.dtype.scalar in FP8 or BF16 in (left.dtype.scalar, right.dtype.scalar):
            return Handle(widen(left) @ widen(right) + total.data, total.dtype.scalar)
        return dot(self, left, right, total, precision, imprecise)

    def create_inline_asm(self, text, constraints, values, kinds, pure, pack):
        (kind,) = kinds
        kind = kind.scalar if hasattr(kind, "scalar") else kind
        made = ptx.elementwise(text, constraints, [value.data for value in values], kind.primitive_bitwidth // 8, pack)
        data = made if kind == BF16 else made.view({tl.float16: np.float16, tl.int8: np.int8}[kind])
        return Results([Handle(data, kind)])

    Builder.binary_op, Builder.cast_impl, Builder.create_dot = binary_op, cast_impl, create_dot
    Builder.create_inline_asm = create_inline_asm
    if not hasattr(Builder, "get_bf16"):
        Builder.get_bf16 = lambda self, value: narrow(np.array([value], np.float32))
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor, *scope):
        patched = patch(tensor, *scope)
        setter = scope[0].set_attr if scope else setattr
        setter(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))
        return patched

    interpreter._patch_lang_tensor = patch_tensor


_repair()


GUARD = 4096
"""Bytes in front of and behind every array that hold a pattern: what is read there makes a result wrong, what is written there is found."""


class Guarded:
    """An array in the middle of a larger buffer of bytes 0xFF (NaN as any float, -1 as an integer)."""

    def __init__(self, array, pointer: str):
        array = np.ascontiguousarray(array)
        self.dtype, self.shape, size = array.dtype, array.shape, array.nbytes
        self.buffer = np.full(size + 2 * GUARD, 0xFF, np.uint8)
        self.buffer[GUARD:GUARD + size] = array.reshape(-1).view(np.uint8)
        inner = torch.from_numpy(self.buffer)[GUARD:GUARD + size]
        self.tensor = inner.view(TORCH[pointer]).reshape(self.shape)

    @property
    def array(self):
        """The array as numpy; AssertionError where something was written outside of it."""
        size = self.buffer.size - 2 * GUARD
        assert (self.buffer[:GUARD] == 0xFF).all() and (self.buffer[GUARD + size:] == 0xFF).all(), "a kernel wrote outside of an array"
        return self.buffer[GUARD:GUARD + size].view(self.dtype).reshape(self.shape)


TORCH = {"*i8": torch.int8, "*u8": torch.uint8, "*i32": torch.int32, "*fp32": torch.float32, "*fp16": torch.float16,
         "*bf16": torch.bfloat16, "*fp8e4nv": torch.float8_e4m3fn, "*fp8e5": torch.float8_e5m2}


def poisoned(struct):
    """An output that is wrong wherever a kernel does not write: NaN, or the byte 0xAA."""
    dtype = np.dtype(struct.dtype)
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1:
        return np.full(struct.shape, np.nan, dtype)
    return np.full(int(np.prod(struct.shape)) * dtype.itemsize, 0xAA, np.uint8).view(dtype).reshape(struct.shape)


def launch(described, arrays):
    """Run a `Launch` on these arrays (in its order); returns its outputs as numpy arrays."""
    kernel = described.kernel
    function = getattr(importlib.import_module(kernel.module), kernel.function)
    assert tuple(inspect.signature(function.fn).parameters) == kernel.arguments, kernel
    types, held = described.signature, {}
    for (name, struct), array in zip(described.arrays, arrays, strict=True):
        assert tuple(array.shape) == struct.shape and array.dtype == struct.dtype, (name, array.shape, array.dtype, struct)
        held[name] = Guarded(np.asarray(array), types[name])
    held |= {name: Guarded(poisoned(struct), types[name]) for name, struct in described.results}
    values = {**described.constexprs, **{name: guarded.tensor for name, guarded in held.items()}, **described.scalars}
    function[described.grid](*(values[name] for name in kernel.arguments))
    return [held[name].array.copy() for name, _ in described.results]

"""Triton's interpreter, repaired for tests, and the launcher of a `Launch` on CPU arrays. TRITON_INTERPRET=1 must be set before import.

The interpreter keeps bfloat16 as 16-bit integers and multiplies the bit patterns, truncates casts to it, and trips over numpy >= 2.4 in
`range` of a run-time value. The repair replaces four methods with ones that go through float32, rounds casts to even, and sums integer
products in float64, which is exact for every sum that int32 holds.
"""

import importlib
import os

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("the interpreter is chosen when triton is imported: set TRITON_INTERPRET=1 in a process of its own")

import jax.numpy as jnp
import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

BF16 = tl.bfloat16
Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder


def widen(handle):
    """The float32 values of a bfloat16 handle; other handles' own data."""
    return (handle.data.astype(np.uint32) << 16).view(np.float32) if handle.dtype.scalar == BF16 else handle.data


def narrow(values):
    """A bfloat16 handle of float32 values, rounded to nearest even."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return Handle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), BF16)


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
        if BF16 in (left.dtype.scalar, right.dtype.scalar):
            return Handle(widen(left) @ widen(right) + total.data, total.dtype.scalar)
        return dot(self, left, right, total, precision, imprecise)

    Builder.binary_op, Builder.cast_impl, Builder.create_dot = binary_op, cast_impl, create_dot
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


def to_torch(array):
    """A JAX or numpy array as a torch tensor of the same bits; fp8 as bytes, bfloat16 as bfloat16."""
    array = np.ascontiguousarray(array)
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype.name.startswith("float8"):
        return torch.from_numpy(array.view(np.uint8))
    return torch.from_numpy(array.copy())


def to_numpy(tensor, dtype):
    """The inverse of `to_torch`."""
    dtype = np.dtype(dtype)
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(dtype)
    return tensor.numpy().view(dtype)


def poisoned(struct):
    """An output that is wrong wherever a kernel does not write: NaN, or the byte 0xAA."""
    dtype = np.dtype(struct.dtype)
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1:
        return to_torch(np.full(struct.shape, np.nan, dtype))
    return to_torch(np.full(int(np.prod(struct.shape)) * dtype.itemsize, 0xAA, np.uint8).view(dtype).reshape(struct.shape))


def launch(described, arrays):
    """Run a `Launch` on these arrays (in its order); returns its outputs as numpy arrays."""
    kernel = described.kernel
    function = getattr(importlib.import_module(kernel.module), kernel.function)
    given = {}
    for (name, struct), array in zip(described.arrays, arrays, strict=True):
        assert tuple(array.shape) == struct.shape and array.dtype == struct.dtype, (name, array.shape, array.dtype, struct)
        given[name] = to_torch(array)
    outputs = {name: poisoned(struct) for name, struct in described.results}
    values = {**described.constexprs, **given, **outputs, **described.scalars}
    types = described.signature
    for name, value in list(values.items()):
        if types[name] in ("*fp8e4nv", "*fp8e5"):
            values[name] = value.view(torch.float8_e4m3fn if types[name] == "*fp8e4nv" else torch.float8_e5m2)
    function[described.grid](*(values[name] for name in kernel.arguments))
    return [to_numpy(outputs[name], struct.dtype) for name, struct in described.results]

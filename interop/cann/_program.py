"""A program: torch instructions on numbered slots, and how they run.

Slots hold tensors, or values that are `held` in an operator's own form (see `_build`). Constants are moved to a device once, unless a graph
is being captured, and what nobody reads any more is let go of at once.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
import torch

from ._arrays import to_tensor, torch_dtype


@dataclass(frozen=True)
class Instruction:
    """One step: slots of the operands, the function, slots of the results, and those that nobody reads afterwards."""

    name: str
    run: Callable
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    avals: tuple[Any, ...]
    many: bool
    drop: tuple[int, ...] = ()


@dataclass
class Program:
    """Instructions with the slots of their constants, arguments and results."""

    instructions: list[Instruction]
    size: int
    constants: dict[int, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    held: tuple[bool, ...]
    tensors: dict[Any, dict[int, torch.Tensor]] = field(default_factory=dict)
    storages: dict[Any, frozenset] = field(default_factory=dict)
    checked: bool = False

    def __call__(self, args: Sequence, device) -> list:
        """Run on tensors (and held values); results may be held where `held` says so."""
        values: list[Any] = [None] * self.size
        for slot, value in self._constants(device).items():
            values[slot] = value
        for slot, value in zip(self.inputs, args, strict=True):
            values[slot] = value
        token = _current.set(device)
        try:
            for step in self.instructions:
                out = step.run(*[values[i] for i in step.inputs])
                if not step.many:
                    out = (out,)
                if not self.checked:
                    _check(step, out)
                for slot, value in zip(step.outputs, out, strict=True):
                    values[slot] = value
                for slot in step.drop:
                    values[slot] = None
        finally:
            _current.reset(token)
        self.checked = True
        results, constants = [values[slot] for slot in self.outputs], self._kept(device)
        # A constant is for every call, and on the host the array of JAX itself: a caller who writes to a result must not reach it.
        return [v.clone() if constants and torch.is_tensor(v) and _storage(v) in constants else v for v in results]

    def _kept(self, device) -> frozenset:
        """The storages of the constants that are kept from call to call."""
        key = str(device)
        if key not in self.tensors or _capturing():
            return frozenset()
        if key not in self.storages:
            self.storages[key] = frozenset(map(_storage, self.tensors[key].values()))
        return self.storages[key]

    def _constants(self, device) -> dict:
        if not self.constants:
            return self.constants
        if _capturing():
            # A tensor from outside of a capture is foreign to it; one made inside becomes a constant of its graph.
            return {slot: _fresh(value, device) for slot, value in self.constants.items()}
        key = str(device)
        if key not in self.tensors:
            self.tensors[key] = {slot: to_tensor(value, device) for slot, value in self.constants.items()}
        return self.tensors[key]


_current: contextvars.ContextVar = contextvars.ContextVar("qfunc_torch_device")


def device():
    """Where the program that runs creates tensors from nothing."""
    return _current.get()


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _capturing() -> bool:
    from torch.utils._python_dispatch import _get_current_dispatch_mode
    return _get_current_dispatch_mode() is not None


def _fresh(value, device) -> torch.Tensor:
    array = np.asarray(value) if not isinstance(value, jax.Array) or not jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key) \
        else np.asarray(jax.random.key_data(value))
    dtype = torch_dtype(array.dtype)
    if array.dtype.kind == "V" or array.dtype.name not in ("bool", "int8", "int16", "int32", "int64", "uint8", "float16", "float32"):
        signed = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[array.dtype.itemsize]
        return torch.tensor(array.view(signed), device=device).view(dtype)
    return torch.tensor(array, dtype=dtype, device=device)


def _check(step: Instruction, out) -> None:
    """The first run of a program holds every rule to the shapes and types that JAX derived."""
    for value, aval in zip(out, step.avals, strict=True):
        if hasattr(value, "tensor"):                # held in an operator's own form
            continue
        if not isinstance(value, torch.Tensor):
            raise AssertionError(f"the torch rule of {step.name} gave {type(value).__name__}, expected a tensor")
        shape, dtype = abstract(aval)
        if tuple(value.shape) != shape or value.dtype != dtype:
            raise AssertionError(f"the torch rule of {step.name} gave {value.dtype} {tuple(value.shape)}, JAX has {dtype} {shape}")


def abstract(aval) -> tuple[tuple[int, ...], torch.dtype]:
    """(shape, torch dtype) of an abstract value; a PRNG key is its uint32 words."""
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return (*aval.shape, 2), torch.uint32
    return tuple(aval.shape), torch_dtype(aval.dtype)


def with_drops(steps: list[Instruction], keep: set[int]) -> list[Instruction]:
    """The same steps, each letting go of what nobody reads after it."""
    seen, out = set(keep), []
    for step in reversed(steps):
        drop = tuple(slot for slot in {*step.inputs, *step.outputs} if slot not in seen)
        seen.update(step.inputs)
        out.append(replace(step, drop=drop))
    return out[::-1]

"""What is launched for a call: kernel, arguments, compile-time constants and grid, in plain Python.

This is the one description that the bridge into XLA compiles and calls, that the interpreter checks against the reference, and that
the ahead-of-time checks compile for every target, so that what is proved is what runs. Nothing here imports triton.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field
from typing import Any

import jax

from .._dispatch import Call


@dataclass(frozen=True)
class Target:
    """A kind of device: `backend` is `cuda` or `hip`; `arch` the compute capability as an integer (90), or AMD's name (`gfx942`)."""

    backend: str
    arch: int | str

    @classmethod
    def parse(cls, name: str) -> Target:
        """From `sm_90` or `gfx942`; ValueError for anything else."""
        if match := re.fullmatch(r"sm_(\d+)a?", name):
            return cls("cuda", int(match[1]))
        if re.fullmatch(r"gfx\w+", name):
            return cls("hip", name)
        raise ValueError(f"a target is sm_<capability> or gfx<name>, found {name!r}")

    def __str__(self) -> str:
        return f"sm_{self.arch}" if self.backend == "cuda" else self.arch

    @property
    def warp_size(self) -> int:
        """Threads of one warp."""
        return 32 if self.backend == "cuda" else 64

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that one block may have (CUDA programming guide, table of capabilities; AMD CDNA3 and CDNA4 guides)."""
        return SHARED_MEMORY[str(self)]


SHARED_MEMORY = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376,
                 "gfx942": 65536, "gfx950": 163840}
"""Targets that the kernels are compiled and checked for."""


POINTER = {"int8": "*i8", "uint8": "*u8", "int32": "*i32", "float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16",
           "float8_e4m3fn": "*u8", "float8_e5m2": "*u8"}
"""Triton's pointer type of an array; fp8 goes as bytes, which kernels decode, unless the target multiplies it."""


@dataclass(frozen=True)
class Config:
    """The choices that change speed and not the result (but for the order of float32 sums, by `split_k`).

    Fields:
        block_m, block_n: tile of tokens (or rows of an activation) and of output channels; powers of two of at least 16.
        block_k: contracted elements of one product of tiles, for 8-bit codes; packed codes go by their planes.
        split_k: programs that share the contracted axis of one tile; their sums are added in a fixed order.
        num_warps, num_stages: Triton's options.
        swapped: compute W x A^T, the unpacked weight as the left operand.
    """

    block_m: int = 16
    block_n: int = 64
    block_k: int = 128
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3
    swapped: bool = True


@dataclass(frozen=True)
class Kernel:
    """A jit function and its arguments in order: input arrays, output arrays, 32-bit integers, compile-time constants.

    `module` is imported, and `function` looked up in it, only where triton is present.
    """

    name: str
    module: str
    function: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    scalars: tuple[str, ...]
    constants: tuple[str, ...]

    @property
    def arguments(self) -> tuple[str, ...]:
        """All names, in the order of the function's parameters."""
        return self.inputs + self.outputs + self.scalars + self.constants


@dataclass(frozen=True)
class Launch:
    """One launch.

    Fields:
        kernel: the record of the function.
        arrays: (name, ShapeDtypeStruct) of the inputs that are present, in order; `_operands.arrays` makes them from a call's operands.
        types: Triton's type of every pointer by name; fp8 arrays that the target cannot multiply are read as `*u8`.
        results: (name, ShapeDtypeStruct) of the outputs that are present, in order.
        scalars: values of the integers; constants: values of the compile-time constants.
        grid, num_warps, num_stages: as Triton has them.
        fusion: whether the compiler may fuse a product and a sum into one rounding.
        split: slabs that `_operands.finish` adds; 1 where the kernel writes the result itself.
    """

    kernel: Kernel
    arrays: tuple[tuple[str, Any], ...]
    types: dict[str, str] = field(hash=False)
    results: tuple[tuple[str, Any], ...]
    scalars: dict[str, int] = field(hash=False)
    constants: dict[str, Any] = field(hash=False)
    grid: tuple[int, int, int]
    num_warps: int = 4
    num_stages: int = 3
    split: int = 1
    fusion: bool = True

    @property
    def signature(self) -> dict[str, str]:
        """Argument name to Triton's type; absent arrays and compile-time constants are `constexpr`."""
        types = {**self.types, **dict.fromkeys(self.kernel.scalars, "i32")}
        return {name: types.get(name, "constexpr") for name in self.kernel.arguments}

    @property
    def constexprs(self) -> dict[str, Any]:
        """Values of all `constexpr` arguments: None for an absent array."""
        return {name: self.constants.get(name) for name, kind in self.signature.items() if kind == "constexpr"}

    @property
    def divisible(self) -> tuple[str, ...]:
        """Arguments known to be multiples of 16: every array (XLA aligns them to 256 bytes) and the scalars that are."""
        return tuple(name for name in self.kernel.arguments if name in self.types or self.scalars.get(name, 1) % 16 == 0)

    @property
    def attrs(self) -> dict[tuple[int], list]:
        """`divisible` as `triton.compiler.ASTSource` takes it."""
        order = self.kernel.arguments
        return {(order.index(name),): [["tt.divisibility", 16]] for name in self.divisible}

    @property
    def outputs(self) -> tuple[Any, ...]:
        """The ShapeDtypeStructs of the results."""
        return tuple(struct for _, struct in self.results)

    @property
    def options(self) -> dict[str, int | bool]:
        """Keyword arguments of `triton.compile(options=...)`."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": self.fusion}


PLANS = {"quantized_matmul": "_plan_matmul", "quantized_grouped_matmul": "_plan_matmul", "quantize_activation": "_plan_rows",
         "take": "_plan_take"}
"""Primitive to the module that describes its launches."""


def _plan(call: Call):
    return importlib.import_module(f".{PLANS[call.primitive]}", __package__)


def refusal(call: Call, target: Target) -> str | None:
    """None, or why no kernel takes this call on this target, in words that a user understands."""
    if str(target) not in SHARED_MEMORY:
        return f"the kernels were not checked for {target}, only for {', '.join(SHARED_MEMORY)}"
    if call.primitive not in PLANS:
        return f"there is no kernel of {call.primitive}"
    return _plan(call).refusal(call, target)


def describe(call: Call, target: Target, config: Config | None = None) -> Launch:
    """The launch of a call that `refusal` accepts; NotImplementedError with the reason where it does not.

    A matmul whose activation is float but is to be quantized is described with its codes: they come from a launch (or primitive) of
    its own, `_operands.activation`. `config` is adapted to the call where it must be (`adapt`); None takes `default_config`.
    """
    if (reason := refusal(call, target)) is not None:
        raise NotImplementedError(f"{call.primitive} on {target}: {reason}")
    return _plan(call).describe(call, target, adapt(call, target, config or default_config(call, target)))


def default_config(call: Call, target: Target) -> Config:
    """The tiles that a call gets where no tuning table knows better."""
    return _plan(call).default_config(call, target)


def adapt(call: Call, target: Target, config: Config) -> Config:
    """A config in which this call is legal: tiles no smaller than the hardware's, split_k no larger than the steps there are."""
    return _plan(call).adapt(call, target, config)


def struct(shape, dtype) -> jax.ShapeDtypeStruct:
    """A ShapeDtypeStruct."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype)

"""Compile a `Launch` for a target without a GPU, and read what came out: registers, spills, shared memory, matrix instructions."""

import functools
import importlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
NOTED = {"cuda": r"(wgmma\.mma_async[\w.]*|mma\.sync[\w.]*|tcgen05\.mma[\w.:]*|div\.\w+\.f32)", "hip": r"(v_mfma_\w+|v_div_fixup_f32)"}
"""Products of matrices, and divisions: of those only the correctly rounded ones may appear where codes are made."""


@dataclass(frozen=True)
class Compiled:
    """`registers` of a thread, `spills` (bytes of local memory, or spilled vector registers on AMD), `shared` bytes, matrix `instructions`
    and divisions by name, `from_registers`: how many of Hopper's products take their left operand from registers, `flushes`: whether any
    operation flushes subnormal numbers to zero."""

    registers: int
    spills: int
    shared: int
    instructions: tuple[str, ...]
    from_registers: int
    flushes: bool


def compile_launch(launch, target) -> Compiled:
    """Compile for a `Target`; triton's own errors pass through."""
    function = getattr(importlib.import_module(launch.kernel.module), launch.kernel.function)
    assert tuple(function.arg_names) == launch.kernel.arguments, (function.arg_names, launch.kernel.arguments)
    order = launch.kernel.arguments
    constants = {(order.index(name),): value for name, value in launch.constexprs.items()}
    source = ASTSource(fn=function, signature=launch.signature, constexprs=constants, attrs=launch.attrs)
    made = triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp_size), options=launch.options)
    return (_nvidia if target.backend == "cuda" else _amd)(made)


def _nvidia(made) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    ptx = made.asm["ptx"]
    names = tuple(sorted({name.replace(".sync.aligned", "") for name in re.findall(NOTED["cuda"], ptx)}))
    held = len(re.findall(r"wgmma\.mma_async[^;{]*\{[^}]*\},\s*\{", ptx))
    return Compiled(registers, stack + local, made.metadata.shared, names, held, ".ftz" in ptx)


def _amd(made) -> Compiled:
    text = made.asm["amdgcn"]
    count = functools.partial(_largest, text)
    return Compiled(count("vgpr_count"), count("vgpr_spill_count"), made.metadata.shared,
                    tuple(sorted(set(re.findall(NOTED["hip"], text)))), 0, bool(re.search(r"float_denorm_mode_32 [012]", text)))


def _largest(text: str, key: str) -> int:
    return max(int(value) for value in re.findall(rf"\.{key}:\s*(\d+)", text))

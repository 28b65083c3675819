"""The few PTX instructions of `kernels/triton/_ptx.py` on numpy arrays, as the PTX ISA (section 9.7) defines them."""

import re

import ml_dtypes
import numpy as np


def prmt(a, b, selector):
    """Four bytes out of the eight of (b, a): each nibble of the selector names one, its upper bit asks for that byte's sign instead."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    out = np.zeros_like(a)
    for i in range(4):
        pick = (selector >> np.uint32(4 * i)) & np.uint32(0xF)
        byte = ((both >> ((pick & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(0xFF)).astype(np.uint32)
        byte = np.where(pick & np.uint32(8), np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0)), byte)
        out |= byte << np.uint32(8 * i)
    return out


def fma(kind):
    """a b + c of both halves of registers, rounded once: float64 holds the product, and every sum that our programs make of one."""
    def run(a, b, c):
        x, y, z = (np.ascontiguousarray(v).view(kind).astype(np.float64) for v in (a, b, c))
        with np.errstate(all="ignore"):
            return (x * y + z).astype(kind).view(np.uint32)
    return run


OPERATIONS = {
    "cvt.u32.u16": lambda a: a & 0xFFFF, "fma.rn.bf16x2": fma(ml_dtypes.bfloat16), "fma.rn.f16x2": fma(np.float16),
    "mov.b32": lambda a: a, "and.b32": lambda a, b: a & b, "or.b32": lambda a, b: a | b, "xor.b32": lambda a, b: a ^ b,
    "add.u32": lambda a, b: a + b, "sub.u32": lambda a, b: a - b, "shl.b32": lambda a, b: a << b, "shr.u32": lambda a, b: a >> b,
    "prmt.b32": prmt,
}


def run(text: str, outputs: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Execute a block `{ ... }` on uint32 arrays; `$0` ... are the outputs, then the inputs. KeyError for what is not known."""
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def value(name):
        return np.full_like(inputs[0], int(name, 16) if name.startswith("0x") else int(name)) if name[0].isdigit() else registers[name]

    for statement in text.strip().removeprefix("{").removesuffix("}").split(";"):
        statement = statement.strip()
        if not statement or statement.startswith(".reg"):
            continue
        operation, operands = statement.split(None, 1)
        target, *sources = re.split(r"\s*,\s*", operands)
        registers[target] = OPERATIONS[operation](*map(value, sources)).astype(np.uint32)
    return [registers[f"${i}"] for i in range(outputs)]


def elementwise(text: str, constraints: str, values: list[np.ndarray], width: int, pack: int) -> np.ndarray:
    """`tl.inline_asm_elementwise` with inputs of one byte, `pack` to a register; results of `width` bytes, unsigned."""
    shape, size = values[0].shape, values[0].size
    assert all(v.itemsize == 1 and v.shape == shape for v in values), "one register of bytes for each input"
    assert set(constraints.replace("=r", "").strip(",").split(",")) == {{4: "r", 2: "h"}[pack]}, "a register as wide as its bytes"
    words = [np.resize(v.reshape(-1).view(np.uint8), -(-size // pack) * pack).view(f"<u{pack}").astype(np.uint32) for v in values]
    outputs = constraints.count("=")
    assert outputs * 4 == pack * width, "the results fill their registers"
    made = np.ascontiguousarray(np.stack(run(text, outputs, words), -1))
    return made.reshape(-1).view({1: np.uint8, 2: np.uint16}[width])[:size].reshape(shape)

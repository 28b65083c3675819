"""The few PTX instructions of `kernels/triton/_ptx.py` on numpy arrays, as the PTX ISA (section 9.7) defines them."""

import re

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


OPERATIONS = {
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
    assert pack == 4 and all(v.itemsize == 1 and v.shape == shape for v in values), "one register of four bytes for each input"
    words = [np.ascontiguousarray(np.resize(v.reshape(-1).view(np.uint8), -(-size // 4) * 4)).view("<u4") for v in values]
    outputs = constraints.count("=")
    assert outputs == width, "four results fill as many registers as each has bytes"
    made = np.stack(run(text, outputs, words), -1)
    return made.reshape(-1).view({1: np.uint8, 2: np.uint16}[width])[:size].reshape(shape)

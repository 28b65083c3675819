"""Codes in torch: out of the canonical packing and into the ones that Ascend's operators read. Shifts and masks, on any device or meta.

CANN carries eight int4 in an int32 along the last axis, two's complement, the lowest nibble first; two e2m1 in a byte, low nibble first.
Both are the same bytes: pairs of consecutive nibbles.
"""

from __future__ import annotations

import torch

from qfunc._codes import code as element_code
from qfunc._pack import BLOCK, planes


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """`qfunc._pack.unpack`: uint8 [..., P] to unsigned codes uint8 [..., columns]."""
    blocks = packed.reshape(*packed.shape[:-1], -1, 16 * bits)
    codes = None
    for width, low, start in planes(bits):
        part = blocks[..., start:start + 16 * width]
        digits = torch.cat([(part >> shift) & (2**width - 1) for shift in range(0, 8, width)], -1)
        codes = digits if codes is None else codes | (digits << low)
    return codes.reshape(*packed.shape[:-1], -1)[..., :columns]


def pack(codes: torch.Tensor, bits: int, fill: int) -> torch.Tensor:
    """`qfunc._pack.pack`: unsigned codes uint8 [..., K] to uint8 [..., ceil(K / 128) 16 bits], the last block completed with `fill`."""
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % BLOCK), value=fill)
    blocks = codes.reshape(*codes.shape[:-1], -1, BLOCK)
    parts = []
    for width, low, _ in planes(bits):
        digits = ((blocks >> low) & (2**width - 1)).unflatten(-1, (8 // width, 16 * width))
        byte = digits[..., 0, :]
        for i in range(1, 8 // width):
            byte = byte | (digits[..., i, :] << (i * width))
        parts.append(byte)
    return torch.cat(parts, -1).flatten(-2)


def signed(codes: torch.Tensor, name: str, columns: int) -> torch.Tensor:
    """Stored integer codes [..., N, P] as int8 [..., N, K], moved down by half the range where they are unsigned.

    An unsigned code u of b bits becomes u - 2^(b-1), which is what an operator multiplies; its zero point moves along.
    """
    element = element_code(name)
    if element.packed:
        return unpack(codes, element.bits, columns).to(torch.int8) - 2 ** (element.bits - 1)
    return codes if codes.dtype == torch.int8 else (codes ^ 128).view(torch.int8)


def stored(values: torch.Tensor, name: str) -> torch.Tensor:
    """The inverse of `signed`."""
    element = element_code(name)
    if element.packed:
        return pack((values + 2 ** (element.bits - 1)).to(torch.uint8), element.bits, element.offset)
    return values if name == "int8" else values.view(torch.uint8) ^ 128


def pairs(nibbles: torch.Tensor) -> torch.Tensor:
    """Nibbles uint8 or int8 [..., n], two's complement in their low bits, as bytes [..., n / 2], the first of two low."""
    nibbles = nibbles.view(torch.uint8) & 15
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).contiguous()


def nibbles(data: torch.Tensor) -> torch.Tensor:
    """The inverse of `pairs`: bytes [..., n / 2] to uint8 [..., n] from 0 to 15."""
    data = data.view(torch.uint8)
    return torch.stack([data & 15, data >> 4], -1).flatten(-2)


def int4x8(values: torch.Tensor) -> torch.Tensor:
    """int8 values from -8 to 7, [..., n], as int32 [..., n / 8]."""
    return pairs(values).view(torch.int32)


def from_int4x8(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `int4x8`: int8 [..., n]."""
    values = nibbles(words.contiguous().view(torch.uint8)).view(torch.int8)
    return values - ((values & 8) << 1)


def float_bits(x: torch.Tensor) -> torch.Tensor:
    """float32 bits as int64 with an empty upper half: how CANN takes scales of int4 products."""
    return x.to(torch.float32).contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def short_float(x: torch.Tensor) -> torch.Tensor:
    """float32 rounded to the 10 bits of mantissa that the fixed-point pipe keeps of a 64-bit scale (it drops the low 13)."""
    bits = x.to(torch.float32).contiguous().view(torch.int32)
    return ((bits + (0x0FFF + ((bits >> 13) & 1))) & ~0x1FFF).view(torch.float32)

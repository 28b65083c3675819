"""The canonical packing: codes of 2 to 7 bits along the last axis, in blocks of 128, as bit planes of 4, 2 and 1 bits.

A code of b bits is cut into the binary digits of b, widest first: 7 = 4 + 2 + 1, 5 = 4 + 1, 3 = 2 + 1; its low bits lie in the first
plane. In a block of 128 codes the plane of width p takes 16 p bytes, and its byte j holds the codes j, 16p + j, 2 * 16p + j, ...
from the low bits up. So 4-bit codes lie as (j, 64 + j) in byte j: both nibbles of 64 bytes are runs of 64 codes, which a vector
register unpacks with one mask and one shift, and a block of any width takes 16 b bytes.

Shifts and masks only: bitcasts to 4-bit types give wrong values on XLA's CPU backend where the packed array is a constant.
"""

from __future__ import annotations

from itertools import pairwise

import jax.numpy as jnp
from einops import rearrange, repeat

BLOCK = 128
"""Codes in one packed block."""


def planes(bits: int) -> tuple[tuple[int, int, int], ...]:
    """The planes of a code of `bits` bits, as (width, lowest bit of the code, first byte of the plane in a block)."""
    if not 1 <= bits <= 7:
        raise ValueError(f"packed codes have 1 to 7 bits, found {bits}")
    out, low, start = [], 0, 0
    for width in (4, 2, 1):
        if bits & width:
            out.append((width, low, start))
            low, start = low + width, start + 16 * width
    return tuple(out)


def packed_size(columns: int, bits: int) -> int:
    """Bytes of one packed row of `columns` codes: 16 bits ceil(columns / 128)."""
    return -(-columns // BLOCK) * 16 * bits


def unpacked_size(size: int, bits: int) -> int:
    """Codes, padding included, in a packed row of `size` bytes; ValueError where `size` is not whole blocks."""
    if size % (16 * bits):
        raise ValueError(f"a packed row of {bits}-bit codes is a multiple of {16 * bits} bytes, found {size}")
    return size // (16 * bits) * BLOCK


def pack(codes, bits: int, fill: int = 0):
    """Pack unsigned codes.

    Arguments: `codes` uint8 [..., K] below 2**bits (numpy or JAX; the result is of the same kind); `fill` pads the last block.
    Returns: uint8 [..., ceil(K / 128) * 16 * bits].
    """
    xp = _module(codes)
    pad = -codes.shape[-1] % BLOCK
    if pad:
        codes = xp.concatenate([codes, xp.full((*codes.shape[:-1], pad), fill, xp.uint8)], -1)
    blocks = rearrange(codes.astype(xp.uint8), "... (n k) -> ... n k", k=BLOCK)
    parts = []
    for width, low, _ in planes(bits):
        digits = (blocks >> xp.uint8(low)) & xp.uint8(2**width - 1)
        digits = rearrange(digits, "... (i j) -> ... i j", i=8 // width)
        byte = digits[..., 0, :]
        for i in range(1, 8 // width):
            byte = byte | (digits[..., i, :] << xp.uint8(i * width))
        parts.append(byte)
    return rearrange(xp.concatenate(parts, -1), "... n b -> ... (n b)")


def unpack(packed, bits: int, columns: int):
    """The inverse of `pack`: uint8 [..., P] to uint8 codes [..., columns]; numpy or JAX."""
    xp = _module(packed)
    blocks = rearrange(packed, "... (n b) -> ... n b", b=16 * bits)
    bounds = [start for _, _, start in planes(bits)] + [16 * bits]
    codes = 0
    for (width, low, _), (start, stop) in zip(planes(bits), pairwise(bounds), strict=True):
        part = repeat(blocks[..., start:stop], "... j -> ... i j", i=8 // width)
        shift = (xp.arange(8 // width) * width).astype(xp.uint8)[:, None]
        digits = (part >> shift) & xp.uint8(2**width - 1)
        codes = codes | (rearrange(digits, "... i j -> ... (i j)") << xp.uint8(low))
    return rearrange(codes, "... n k -> ... (n k)")[..., :columns]


def _module(array):
    import numpy as np
    return np if isinstance(array, np.ndarray) else jnp

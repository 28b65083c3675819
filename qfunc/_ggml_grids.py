"""Decoders of ggml's codebook types (IQ): rows of a lattice table, signs kept apart, nested scales.

The tables are data (points found by clustering), taken at run time from the `gguf` package, which carries them under the MIT licence.
Each decoder takes blocks uint8 [..., n, bytes] and returns float32 [..., n, 256] (32 for IQ4_NL), bit for bit ggml's floats.
"""

from __future__ import annotations

from functools import cache

import jax.numpy as jnp
import numpy as np

from ._ggml_bits import bits, digits, flat, half, halves, lookup, split, words
from ._ggml_plain import grouped, nibbles

F32 = jnp.float32
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@cache
def grid(name: str) -> np.ndarray:
    """The lattice table of a type, float32 [rows, 4 or 8]."""
    from gguf import quants
    record = getattr(quants, name)
    record.init_grid()
    return np.array(record.grid, np.float32).reshape(record.grid_shape)


def signs(mask):
    """Sign bits uint8 [..., n] to factors +-1, float32 [..., 8 n]."""
    return 1 - 2 * bits(mask).astype(F32)


def even_signs(index):
    """7-bit sign indices to sign bytes: the eighth bit makes the number of minus signs even."""
    parity = index ^ (index >> 4)
    parity = parity ^ (parity >> 2)
    return (index | ((parity ^ (parity >> 1)) & 1) << 7).astype(jnp.uint8)


def lattice(table, index, scale, sign):
    """scale * table row * sign, with one scale [..., g] for every g-th part of the elements."""
    return grouped(scale, flat(lookup(table, index)) * sign)


def packed_signs(word):
    """Four 7-bit sign indices in the low 28 bits of each word: uint32 [..., n] to factors [..., 32 n]."""
    index = (word[..., None] >> np.array([0, 7, 14, 21], np.uint32)) & 127
    return signs(even_signs(flat(index)))


def nibble_pairs(data):
    """Bytes to their nibbles in order: low, high, low, high."""
    return flat((data[..., None] >> np.array([0, 4], np.uint8)) & np.uint8(15)).astype(F32)


def iq2_xxs(b):
    pair = split(words(b[..., 2:], 4), 8)
    index = flat((pair[..., 0, None] >> np.array([0, 8, 16, 24], np.uint32)) & 255)
    scale = halves(b[..., :2]) * (0.5 + (pair[..., 1] >> 28).astype(F32)) * 0.25
    return lattice(grid("IQ2_XXS"), index, scale, packed_signs(pair[..., 1]))


def iq2_xs(b):
    word = words(b[..., 2:66], 2)
    scale = halves(b[..., :2]) * (0.5 + nibble_pairs(b[..., 66:74])) * 0.25
    return lattice(grid("IQ2_XS"), word & 511, scale, signs(even_signs(word >> 9)))


def iq2_s(b):
    high = flat((b[..., 66:74, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3)
    index = b[..., 2:34].astype(jnp.uint32) | high.astype(jnp.uint32) << 8
    scale = halves(b[..., :2]) * (0.5 + nibble_pairs(b[..., 74:82])) * 0.25
    return lattice(grid("IQ2_S"), index, scale, signs(b[..., 34:66]))


def iq3_xxs(b):
    word = words(b[..., 66:98], 4)
    scale = halves(b[..., :2]) * (0.5 + (word >> 28).astype(F32)) * 0.5
    return lattice(grid("IQ3_XXS"), b[..., 2:66], scale, packed_signs(word))


def iq3_s(b):
    index = b[..., 2:66].astype(jnp.uint32) | bits(b[..., 66:74]).astype(jnp.uint32) << 8
    scale = halves(b[..., :2]) * (1 + 2 * nibble_pairs(b[..., 106:110]))
    return lattice(grid("IQ3_S"), index, scale, signs(b[..., 74:106]))


def shifted(table, index, scale, delta):
    """scale * (table row + delta), delta [..., r] shared by equal runs of rows."""
    rows = flat(lookup(table, index))
    return grouped(scale, flat(split(rows, delta.shape[-1]) + delta[..., None]))


def iq1_s(b):
    word = words(b[..., 34:50], 2)
    index = b[..., 2:34].astype(jnp.uint32) | flat((word[..., None] >> np.array([0, 3, 6, 9], np.uint32)) & 7) << 8
    scale = halves(b[..., :2]) * (2 * ((word >> 12) & 7).astype(F32) + 1)
    return shifted(grid("IQ1_S"), index, scale, 0.125 - 0.25 * (word >> 15).astype(F32))


def iq1_m(b):
    word = words(b[..., 48:56], 2)
    # The float16 scale is spread over the top nibbles of the four words, lowest nibble first.
    tops = word >> 12
    d = half(tops[..., 0:1] | tops[..., 1:2] << 4 | tops[..., 2:3] << 8 | tops[..., 3:4] << 12)
    scale = d * (2 * flat((word[..., None] >> np.array([0, 3, 6, 9], np.uint32)) & 7).astype(F32) + 1)
    high = flat((b[..., 32:48, None] >> np.array([0, 4], np.uint8)) & np.uint8(15)).astype(jnp.uint32)
    index = b[..., :32].astype(jnp.uint32) | (high & 7) << 8
    return shifted(grid("IQ1_M"), index, scale, 0.125 - 0.25 * (high >> 3).astype(F32))


def iq4_nl(b):
    return halves(b[..., :2]) * lookup(IQ4_VALUES, nibbles(b[..., 2:]))


def iq4_xs(b):
    high = (words(b[..., 2:4], 2) >> np.arange(0, 16, 2, dtype=np.uint32)) & 3
    scale = halves(b[..., :2]) * (nibble_pairs(b[..., 4:8]) + 16 * high.astype(F32) - 32)
    codes = flat(digits(split(b[..., 8:], 8), (0, 4), 15), 3)
    return grouped(scale, lookup(IQ4_VALUES, codes))

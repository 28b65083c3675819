"""Other people's packings to the canonical one, in numpy, a few rows at a time so that the intermediate steps stay in cache.

Canonical 4-bit rows put the codes j and 64 + j of each block of 128 into byte j. Every common packing of nibbles is a sequence of
bytes whose two nibbles are consecutive codes, the low one first (a 32-bit word holds four such bytes), so the work is always the same:
spread the nibbles of two bytes over two bytes each, and put the second above the first.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qfunc._pack import BLOCK, pack, packed_size

from . import _compiled
from ._buffers import empty
from ._streams import turn

TILE = 2**18
"""Bytes of output that are converted at a time."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of an AWQ word is the column AWQ_ORDER[i] of its eight."""


def _spread(data: np.ndarray, high_first: bool) -> np.ndarray:
    """The two nibbles of every byte as the two bytes of a uint16, the first one below."""
    out = data.astype(np.uint16)
    shifted = out << np.uint16(8 if high_first else 4)
    if high_first:
        np.right_shift(out, np.uint16(4), out=out)
    np.bitwise_or(out, shifted, out=out)
    return np.bitwise_and(out, np.uint16(0x0F0F), out=out)


def join(low: np.ndarray, high: np.ndarray, high_first: bool = False) -> np.ndarray:
    """Bytes with the nibbles of `low` below those of `high`, in order: two uint8 arrays to one of uint16, two bytes in each."""
    out, other = _spread(low, high_first), _spread(high, high_first)
    np.left_shift(other, np.uint16(4), out=other)
    return np.bitwise_or(out, other, out=out)


def _bytes(words: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(words).view(np.uint8)


def tiles(rows: int, row_bytes: int):
    """Slices of rows of about TILE bytes."""
    step = max(1, TILE // max(row_bytes, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _blocks(columns: int) -> int:
    return -(-columns // BLOCK)


def _pad_tail(out: np.ndarray, columns: int, fill: int) -> None:
    """Set the codes after `columns` in 4-bit canonical rows to `fill`."""
    last = columns % BLOCK
    if last:
        tail = out[..., -64:]
        low, high = np.arange(64) >= last, np.arange(64, 128) >= last
        keep = (np.where(low, 0, 15) | np.where(high, 0, 240)).astype(np.uint8)
        tail[...] = (tail & keep) | ((fill | fill << 4) & ~keep)


def nibble_rows(data: np.ndarray, columns: int, fill: int = 0, flip: int = 0, high_first: bool = False) -> np.ndarray:
    """Rows of nibbles, low one first unless `high_first`, to canonical rows.

    `data` uint8 [N, B], B >= columns / 2; `flip` is xor-ed to every code (8 turns two's complement into offset binary).
    """
    count = _blocks(columns)
    out = empty((data.shape[0], count * 64), np.uint8)
    for rows in tiles(len(data), out.shape[1]):
        part = np.ascontiguousarray(data[rows])
        if part.shape[1] != count * 64:
            whole = np.zeros((len(part), count * 64), np.uint8)
            whole[:, : min(part.shape[1], count * 64)] = part[:, : count * 64]
            part = whole
        halves = part.reshape(len(part), count, 2, 32)
        out[rows] = join(halves[:, :, 0], halves[:, :, 1], high_first).view(np.uint8).reshape(len(part), -1)
    return _finish(out, columns, fill, flip)


def _finish(out: np.ndarray, columns: int, fill: int, flip: int) -> np.ndarray:
    if flip:
        np.bitwise_xor(out, np.uint8(flip | flip << 4), out=out)
    _pad_tail(out, columns, fill)
    return out


def word_columns(words: np.ndarray, columns: int, fill: int = 0) -> np.ndarray:
    """GPTQ's 4-bit packing to canonical rows: `words` uint32 [K / 8, N], eight consecutive inputs of one output a word."""
    count, outs = _blocks(columns), words.shape[1]
    if len(words) != count * 16:
        words = np.concatenate([words, np.zeros((count * 16 - len(words), outs), words.dtype)])
    out = empty((outs, count, 8), np.uint64)
    for block in range(count):
        part = words[16 * block: 16 * block + 16]
        for span in tiles(outs, 64):
            out[span, block] = join(_bytes(part[:8, span]), _bytes(part[8:, span])).view(np.uint64).T
    return _finish(out.view(np.uint8).reshape(outs, -1), columns, fill, 0)


def awq_columns(words: np.ndarray, fill: int = 0) -> np.ndarray:
    """AWQ's packing to canonical rows: `words` uint32 [K, N / 8], eight outputs of one input a word, in AWQ_ORDER."""
    out = _compiled.awq(words, fill)
    return _awq_columns(words, fill) if out is None else out


def _awq_columns(words: np.ndarray, fill: int) -> np.ndarray:
    columns, groups = words.shape
    count, pairs = _blocks(columns), -(-groups // 2)
    out = empty((2 * pairs * 8, count * 64), np.uint8)
    places = out.view(np.uint64).reshape(pairs, 2, 8, count, 8)
    for block in range(count):
        for span in tiles(pairs, 1024):
            part = words[BLOCK * block: BLOCK * block + BLOCK, 2 * span.start: 2 * span.stop]
            missing = (BLOCK - len(part), -part.shape[1] % 2)
            part = np.pad(part, [(0, m) for m in missing]) if any(missing) else part
            for first, lanes in enumerate(_merged(part[:64], part[64:])):
                turned = turn(lanes.view(np.uint64).reshape(8, 8, -1)).reshape(8, 2, 4, -1)
                for byte in range(4):
                    places[span, :, AWQ_ORDER[2 * byte + first], block] = turned[:, :, byte].transpose(2, 1, 0)
    return _finish(out[: 8 * groups], columns, fill, 0)


def _merged(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nibbles of `low` below those of `high`, the even and the odd nibbles of every word apart, a byte each."""
    mask = np.array(0x0F0F0F0F, np.uint32)
    even, odd = high & mask, low >> np.uint32(4)
    np.left_shift(even, np.uint32(4), out=even)
    np.bitwise_or(even, low & mask, out=even)
    np.bitwise_and(odd, mask, out=odd)
    np.bitwise_or(odd, high & ~mask, out=odd)
    return even, odd


def row_pairs(data: np.ndarray, flip: int = 8) -> np.ndarray:
    """Nibbles packed along the rows (byte row i: rows 2i low, 2i + 1 high; two's complement) to canonical rows [2 N', ...]."""
    pairs, columns = data.shape
    count = _blocks(columns)
    out = empty((pairs, 2, count, 64), np.uint8)
    for rows in tiles(pairs, count * 128):
        part = data[rows].view(np.uint8)
        if columns % BLOCK:
            part = np.pad(part, ((0, 0), (0, count * BLOCK - columns)))
        part = part.reshape(len(part), count, 2, 64)
        low, high = part[:, :, 0], part[:, :, 1]
        out[rows, 0] = (low & 15) | (high << 4)
        out[rows, 1] = (low >> 4) | (high & 240)
    return _finish(out.reshape(2 * pairs, -1), columns, 8, flip)


def byte_codes(codes: np.ndarray, bits: int, offset: int, fill: int) -> np.ndarray:
    """One code a byte to canonical rows: stored code = byte + offset (mod 256)."""
    rows, columns = codes.shape
    out = empty((rows, packed_size(columns, bits)), np.uint8)
    for span in tiles(rows, 4 * columns):
        part = codes[span].view(np.uint8)
        out[span] = pack(part + np.uint8(offset) if offset else part, bits, fill)
    return out


def stream(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes out of a dense bit stream along the last axis, least significant bit first: uint32 [..., W] to uint8 [..., count]."""
    groups = -(-count // 32)
    if words.shape[-1] < groups * bits:
        words = np.concatenate([words, np.zeros((*words.shape[:-1], groups * bits - words.shape[-1]), words.dtype)], -1)
    part = words[..., : groups * bits].reshape(*words.shape[:-1], groups, bits)
    out = np.empty((*words.shape[:-1], groups, 32), np.uint8)
    for j in range(32):
        word, shift = divmod(j * bits, 32)
        code = part[..., word] >> np.uint32(shift)
        if shift + bits > 32:
            code |= part[..., word + 1] << np.uint32(32 - shift)
        out[..., j] = code & np.uint32(2**bits - 1)
    return out.reshape(*words.shape[:-1], -1)[..., :count]


def padded_words(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes out of words that hold floor(32 / bits) codes each, the rest being padding."""
    each = 32 // bits
    shift = (np.arange(each) * bits).astype(np.uint32)
    codes = (words[..., None] >> shift) & np.uint32(2**bits - 1)
    return codes.reshape(*words.shape[:-1], -1)[..., :count].astype(np.uint8)


def by_rows(data: np.ndarray, unpack: Callable, bits: int, columns: int, fill: int, each: int = 1) -> np.ndarray:
    """Canonical rows of any packing that `unpack(rows of data) -> uint8 codes [n, columns]` understands; 8-bit codes stay bytes.

    `each`: rows of the result that a row of the data holds.
    """
    size = columns if bits == 8 else packed_size(columns, bits)
    out = empty((each * len(data), size), np.uint8)
    for rows in tiles(len(data), 8 * each * columns):
        codes = unpack(data[rows])
        out[each * rows.start: each * rows.stop] = codes if bits == 8 else pack(codes, bits, fill)
    return out


def six_bit_bytes(data: np.ndarray, columns: int) -> np.ndarray:
    """Four 6-bit codes in three bytes, little endian: uint8 [..., 3 columns / 4] to codes [..., columns]."""
    part = data.reshape(*data.shape[:-1], -1, 3).astype(np.uint32)
    word = part[..., 0] | part[..., 1] << 8 | part[..., 2] << 16
    codes = (word[..., None] >> np.arange(0, 24, 6, dtype=np.uint32)) & 63
    return codes.reshape(*data.shape[:-1], -1)[..., :columns].astype(np.uint8)


def unswizzle(scale: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Block scales out of Blackwell's tiled layout (cuBLAS, "1D block scaling factors layout"): any shape to [rows, columns].

    Tiles of 128 rows by 4 scales; within one, row r and scale c lie at 16 (r % 32) + 4 (r // 32) + c.
    """
    tall, wide = -(-rows // 128), -(-columns // 4)
    tiled = scale.reshape(tall, wide, 32, 4, 4)
    return np.ascontiguousarray(tiled.transpose(0, 3, 2, 1, 4).reshape(tall * 128, wide * 4)[:rows, :columns])

"""Bit streams of any width along the inputs to canonical rows: compiled where the native library is there, else in numpy, many bytes to
an operation.

The bytes of a stream that runs down the rows of a matrix lie side by side for all columns, so that one shift of 64-bit words works on
eight columns at once; what it carries over from the neighbouring column is masked away. Turning the result into rows is a
transposition of bytes, done in tiles of eight by eight inside of 64-bit words (Hacker's Delight, 7-3).
"""

from __future__ import annotations

import numpy as np

from qfunc._pack import BLOCK, packed_size, planes

from . import _compiled
from ._buffers import empty

COLUMNS = 4096
"""Columns that are converted at a time: a block of 128 codes of them stays in a core's cache."""
_TURNS = tuple((np.uint64(shift), np.array(mask, np.uint64)) for shift, mask in
               ((32, 0x00000000FFFFFFFF), (16, 0x0000FFFF0000FFFF), (8, 0x00FF00FF00FF00FF)))


def turn(words: np.ndarray, spare: np.ndarray | None = None) -> np.ndarray:
    """Transpose every 8 x 8 bytes in place: uint64 [m, 8, n], m times eight rows of 8 n bytes.

    Afterwards the word [i, e, g] holds, lowest byte first, column 8 g + e of the eight rows [i].
    """
    count, _, width = words.shape
    spare = np.empty(4 * count * width, np.uint64) if spare is None else spare.reshape(-1)[: 4 * count * width]
    for shift, mask in _TURNS:
        apart = int(shift) // 8
        pairs = words.reshape(count * 4 // apart, 2, apart * width)
        first, second = pairs[:, 0], pairs[:, 1]
        swapped = np.right_shift(first, shift, out=spare.reshape(first.shape))
        np.bitwise_xor(swapped, second, out=swapped)
        np.bitwise_and(swapped, mask, out=swapped)
        np.bitwise_xor(second, swapped, out=second)
        np.left_shift(swapped, shift, out=swapped)
        np.bitwise_xor(first, swapped, out=first)
    return words


def _every(byte: int) -> np.ndarray:
    return np.array(byte * 0x0101010101010101, np.uint64)


def _shifted(words: np.ndarray, left: int, out: np.ndarray) -> np.ndarray:
    if left >= 0:
        return np.left_shift(words, np.uint64(left), out=out)
    return np.right_shift(words, np.uint64(-left), out=out)


class Tile:
    """The memory in which a tile of columns is converted, used again for every block: [rows / 8, 8, columns / 8] words."""

    def __init__(self, bits: int, rows: int, columns: int):
        self.bits, self.width = bits, -(-columns // 8)
        self.data = np.empty((bits * rows // 8, 8 * self.width), np.uint8)
        self.codes = np.empty((rows // 8, 8, self.width), np.uint64)
        self.packed = np.empty((2 * bits, 8, self.width), np.uint64)
        self.spare = np.empty((rows // 8, 8, self.width), np.uint64)

    def split(self, words: np.ndarray) -> None:
        """Take the bytes of words that run down the rows: uint32 [W, n]; what is missing is 0."""
        count, columns = words.shape
        there = self.data[: 4 * count, :columns].reshape(count, 4, columns)
        there[...] = words.astype("<u4", copy=False).view(np.uint8).reshape(count, columns, 4).transpose(0, 2, 1)
        self.data[: 4 * count, columns:] = 0
        self.data[4 * count:] = 0

    def unpack(self) -> np.ndarray:
        """The codes of the stream in `data`, [rows / 8, 8, columns / 8]; they may be written to."""
        source = self.data.view(np.uint64).reshape(-1, self.bits, self.width)
        if self.bits == 8:
            return source
        rest = self.spare.reshape(8, *source[:, 0].shape)[0]
        for place in range(8):
            code = self.codes[:, place]
            byte, shift = divmod(self.bits * place, 8)
            inside = min(self.bits, 8 - shift)
            np.bitwise_and(_shifted(source[:, byte], -shift, code), _every(2**inside - 1), out=code)
            if inside < self.bits:
                np.bitwise_and(_shifted(source[:, byte + 1], inside, rest), _every(2**self.bits - 2**inside), out=rest)
                np.bitwise_or(code, rest, out=code)
        return self.codes

    def pack(self, codes: np.ndarray) -> np.ndarray:
        """`qfunc._pack.pack` of one block: codes [16, 8, columns / 8] to bytes [2 bits, 8, columns / 8]."""
        if self.bits == 8:
            return codes
        for width, low, start in planes(self.bits):
            plane = self.packed[start // 8: start // 8 + 2 * width]
            for i, digits in enumerate(codes.reshape(8 // width, 2 * width, 8, -1)):
                part = _shifted(digits, i * width - low, plane if i == 0 else self.spare[: 2 * width])
                np.bitwise_and(part, _every((2**width - 1) << i * width), out=part)
                if i:
                    np.bitwise_or(plane, part, out=plane)
        return self.packed


def column_stream(words: np.ndarray, bits: int, columns: int, order: np.ndarray | None = None, fill: int = 0) -> np.ndarray:
    """GPTQ's packing of any width to canonical rows (bytes for 8 bits): a bit stream along the first axis, uint32 [K b / 32, N].

    `order` int [K]: the order in which the inputs are to be stored. `fill`: the code that completes the last block.
    """
    out = _compiled.stream(words, bits, columns, order, fill, 0)
    return _column_stream(words, bits, columns, order, fill) if out is None else out


def row_stream(words: np.ndarray, bits: int, columns: int, order: np.ndarray | None = None, fill: int = 0) -> np.ndarray:
    """A bit stream along each row, uint32 [N, W], to canonical rows; otherwise as `column_stream`."""
    out = _compiled.stream(words, bits, columns, order, fill, 1)
    return _row_stream(words, bits, columns, order, fill) if out is None else out


def _row_stream(words: np.ndarray, bits: int, columns: int, order, fill: int) -> np.ndarray:
    size = columns if bits == 8 else packed_size(columns, bits)
    out = empty((len(words), size), np.uint8)
    for start in range(0, len(words), 1024):
        part = words[start: start + 1024, : -(-columns * bits // 32)]
        out[start: start + 1024] = _column_stream(np.ascontiguousarray(part.T), bits, columns, order, fill)
    return out


def _column_stream(words: np.ndarray, bits: int, columns: int, order, fill: int) -> np.ndarray:
    outs, count = words.shape[1], -(-columns // BLOCK)
    size = columns if bits == 8 else packed_size(columns, bits)
    out = empty((-(-outs // 8) * 8, -(-size // 8) * 8), np.uint8)
    step = min(outs, COLUMNS if order is None else max(64, COLUMNS // count // 8 * 8))
    tile = Tile(bits, BLOCK, step)
    for start in range(0, outs, step):
        part = words[:, start: start + step]
        if -(-part.shape[1] // 8) != tile.width:
            tile = Tile(bits, BLOCK, part.shape[1])
        places = out[start: start + 8 * tile.width].view(np.uint64).reshape(tile.width, 8, -1)
        for block, codes in enumerate((_plain if order is None else _ordered)(part, tile, columns, count, order)):
            last = columns - BLOCK * block
            for row in range(last, BLOCK):
                codes[row // 8, row % 8] = _every(fill)
            turned = turn(tile.pack(codes), tile.spare)
            at = 2 * bits * block
            room = min(len(turned), places.shape[2] - at)
            places[:, :, at: at + room] = turned[:room].transpose(2, 1, 0)
    if out.shape == (outs, size):
        return out
    whole = empty((outs, size), np.uint8)
    whole[...] = out[:outs, :size]
    return whole


def _plain(words: np.ndarray, tile: Tile, columns: int, count: int, order):
    """The codes of one block after the other."""
    each = 4 * tile.bits
    for block in range(count):
        tile.split(words[each * block: each * block + each])
        yield tile.unpack()


def _ordered(words: np.ndarray, tile: Tile, columns: int, count: int, order: np.ndarray):
    whole = Tile(tile.bits, BLOCK * count, words.shape[1])
    whole.split(words)
    rows = whole.unpack().reshape(BLOCK * count, -1)
    wanted = np.zeros(BLOCK * count, np.intp)
    wanted[:columns] = order
    for places in wanted.reshape(count, BLOCK):
        np.take(rows, places, axis=0, out=tile.codes.reshape(BLOCK, -1), mode="clip")
        yield tile.codes


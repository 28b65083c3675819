"""Every packing of the outside world, written down a second time in plain numpy, becomes the canonical one."""

import ctypes.util

import numpy as np
import pytest

import qfunc
from qfunc._pack import pack
from qfunc.interop import _compiled
from qfunc.interop import _repack as repack
from qfunc.interop import _streams as streams
from qfunc.kernels.cpu import _library

SIZES = [(16, 128), (24, 256), (8, 40), (16, 200), (40, 1024)]


@pytest.fixture(params=["compiled", "numpy"])
def implementation(request, monkeypatch):
    """The compiled repacking, where it was built, and the one in numpy."""
    if request.param == "numpy":
        monkeypatch.setattr(_compiled, "functions", lambda: None)
    elif _compiled.functions() is None:
        pytest.skip("no compiled repacking")
    return request.param


def codes(rows, columns, bits, seed=0):
    return np.random.default_rng(seed).integers(0, 2**bits, (rows, columns)).astype(np.uint8)


def bit_stream(values, bits):
    """Codes [n, k] as a stream of bits along the last axis, least significant first, in uint32 words."""
    spread = ((values[..., None] >> np.arange(bits)) & 1).reshape(len(values), -1)
    spread = np.pad(spread, ((0, 0), (0, -spread.shape[1] % 32)))
    return np.packbits(spread, axis=-1, bitorder="little").view(np.uint32)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_nibbles(rows, columns):
    c = codes(rows, columns, 4)
    want = pack(c, 4, 8)
    low_first = c[:, 0::2] | c[:, 1::2] << 4
    assert np.array_equal(repack.nibble_rows(low_first, columns, 8), want)
    assert np.array_equal(repack.nibble_rows(low_first, columns, 8, 8), pack(c ^ 8, 4, 8))
    high_first = c[:, 1::2] | c[:, 0::2] << 4
    assert np.array_equal(repack.nibble_rows(high_first, columns, 8, high_first=True), want)
    assert np.array_equal(repack.nibble_rows(bit_stream(c, 4).view(np.uint8), columns, 8), want)
    assert np.array_equal(repack.row_pairs((c[0::2] | c[1::2] << 4).view(np.int8)), pack(c ^ 8, 4, 8))
    assert np.array_equal(repack.byte_codes(c.astype(np.int8) - np.int8(8), 4, 8, 8), want)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_words_along_the_inputs(rows, columns):
    c = codes(rows, columns, 4)
    words = np.ascontiguousarray(bit_stream(c, 4).T)
    assert np.array_equal(repack.word_columns(words, columns, 8), pack(c, 4, 8))


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_awq_words(implementation, rows, columns):
    c = codes(rows, columns, 4)
    words = np.zeros((columns, rows // 8), np.uint32)
    for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= c.T[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
    assert np.array_equal(repack.awq_columns(words, 8), pack(c, 4, 8))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_streams(implementation, rows, columns, bits):
    c = codes(rows, columns, bits)
    words = bit_stream(c, bits)
    assert np.array_equal(repack.stream(words, bits, columns), c)
    want = c if bits == 8 else pack(c, bits, 1)
    order = np.random.default_rng(1).permutation(columns)
    down = np.ascontiguousarray(words.T)
    order = np.random.default_rng(1).permutation(columns)
    for got in (streams.column_stream(down, bits, columns, fill=1), streams.row_stream(words, bits, columns, fill=1)):
        assert np.array_equal(got, want) and got.ctypes.data % 64 == 0
    for got in (streams.column_stream(down, bits, columns, order, 1), streams.row_stream(words, bits, columns, order, 1)):
        assert np.array_equal(got, c[:, order] if bits == 8 else pack(c[:, order], bits, 1))
    rows_ = repack.by_rows(words, lambda part: repack.stream(part, bits, columns), bits, columns, 1)
    assert np.array_equal(rows_, want)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_streams_of_more_outputs_than_a_tile(implementation, bits):
    c = codes(streams.COLUMNS + 40, 160, bits)
    words = bit_stream(c, bits)
    want = c if bits == 8 else pack(c, bits, 2)
    assert np.array_equal(streams.column_stream(np.ascontiguousarray(words.T), bits, 160, fill=2), want)
    assert np.array_equal(streams.row_stream(words, bits, 160, fill=2), want)


@pytest.mark.skipif(_compiled.functions() is None, reason="no compiled repacking")
def test_the_compiled_code_is_never_asked_to_read_beyond_its_words():
    words = np.zeros((3, 8), np.uint32)
    assert _compiled.stream(words, 3, 33, None, 0, 0) is None
    assert _compiled.stream(words, 3, 32, np.full(32, 32), 0, 0) is None
    assert _compiled.stream(words, 3, 32, np.arange(31), 0, 0) is None
    assert _compiled.stream(words, 3, 32, np.arange(32), 0, 0) is not None


@pytest.mark.parametrize("outs", [8, 24, 520])
def test_awq_words_of_any_number_of_groups(implementation, outs):
    c = codes(outs, 256, 4)
    words = np.zeros((256, outs // 8), np.uint32)
    for nibble, column in enumerate(repack.AWQ_ORDER):
        words |= c.T[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
    assert np.array_equal(repack.awq_columns(words), pack(c, 4))


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_padded_words(bits):
    c, each = codes(8, 100, bits), 32 // bits
    padded = np.pad(c, ((0, 0), (0, -100 % each))).reshape(8, -1, each).astype(np.uint32)
    words = (padded << (np.arange(each) * bits).astype(np.uint32)).sum(-1).astype(np.uint32)
    assert np.array_equal(repack.padded_words(words, bits, 100), c)


def test_six_bits_in_three_bytes():
    c = codes(4, 64, 6)
    word = (c.reshape(4, 16, 4).astype(np.uint32) << np.arange(0, 24, 6, dtype=np.uint32)).sum(-1)
    data = np.stack([word & 255, word >> 8 & 255, word >> 16], -1).astype(np.uint8).reshape(4, 48)
    assert np.array_equal(repack.six_bit_bytes(data, 64), c)


@pytest.mark.parametrize(("rows", "columns"), [(128, 4), (256, 16), (200, 6), (1, 1)])
def test_tiled_scales(rows, columns):
    scale = np.random.default_rng(0).integers(0, 256, (rows, columns)).astype(np.uint8)
    tall, wide = -(-rows // 128) * 128, -(-columns // 4) * 4
    padded = np.zeros((tall, wide), np.uint8)
    padded[:rows, :columns] = scale
    tiled = np.zeros(tall * wide, np.uint8)
    for r in range(tall):
        for c in range(wide):
            tile = (r // 128) * (wide // 4) + c // 4
            tiled[512 * tile + 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4] = padded[r, c]
    assert np.array_equal(repack.unswizzle(tiled.reshape(wide, tall), rows, columns), scale)


def test_results_start_on_a_cache_line_so_that_jax_need_not_copy():
    for out in (repack.nibble_rows(np.zeros((8, 64), np.uint8), 128), repack.awq_columns(np.zeros((128, 4), np.uint32)),
                streams.column_stream(np.zeros((12, 16), np.uint32), 3, 128), repack.word_columns(np.zeros((16, 8), np.uint32), 128)):
        assert out.ctypes.data % 64 == 0


@pytest.mark.parametrize("path", [None, ctypes.util.find_library("m")])
def test_a_slower_repacking_is_told(monkeypatch, path):
    monkeypatch.setattr(_library, "_find", lambda: path)
    with pytest.warns(qfunc.kernels.FallbackWarning, match="repacked by numpy.*(native kernels|qfunc_repack_stream)"):
        assert _compiled.functions.__wrapped__() is None

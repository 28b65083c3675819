"""The canonical packing against its description, bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qfunc import _pack

SHAPES = st.tuples(st.sampled_from([(), (1,), (3,), (2, 3), (0,), (2, 1, 2)]), st.integers(1, 300))
pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")


def draw(shape, bits, seed):
    return np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint8)


@settings(max_examples=60)
@given(SHAPES, st.integers(1, 7), st.integers(0, 2**32 - 1), st.data())
def test_round_trip_size_and_every_bit(shape, bits, seed, data):
    lead, columns = shape
    fill = data.draw(st.integers(0, 2**bits - 1))
    codes = draw((*lead, columns), bits, seed)
    packed = _pack.pack(codes, bits, fill)
    assert type(packed) is np.ndarray and packed.dtype == np.uint8
    assert packed.shape == (*lead, -(-columns // 128) * 16 * bits) and packed.shape[-1] == _pack.packed_size(columns, bits)
    np.testing.assert_array_equal(_pack.unpack(packed, bits, columns), codes)
    np.testing.assert_array_equal(oracle.unpack(packed, bits, columns), codes)
    whole = _pack.unpacked_size(packed.shape[-1], bits)
    assert np.all(oracle.unpack(packed, bits, whole)[..., columns:] == fill), "the last block is padded with the fill"


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("columns", [1, 128, 300])
def test_jax_equals_numpy_and_constant_equals_argument(rng, bits, columns):
    codes = rng.integers(0, 2**bits, (2, 3, columns)).astype(np.uint8)
    fill = 2 ** (bits - 1)
    packed = _pack.pack(codes, bits, fill)
    pack = jax.jit(lambda c: _pack.pack(c, bits, fill))
    unpack = jax.jit(lambda p: _pack.unpack(p, bits, columns))
    np.testing.assert_array_equal(_pack.pack(jnp.asarray(codes), bits, fill), packed)
    np.testing.assert_array_equal(pack(codes), packed)
    np.testing.assert_array_equal(unpack(packed), codes)
    np.testing.assert_array_equal(jax.jit(lambda: _pack.unpack(jnp.asarray(packed), bits, columns))(), codes)
    np.testing.assert_array_equal(jax.jit(lambda: _pack.pack(jnp.asarray(codes), bits, fill))(), packed)
    np.testing.assert_array_equal(jax.vmap(unpack)(jnp.asarray(packed)), codes)


def test_four_bits_lie_as_documented():
    codes = np.arange(128).astype(np.uint8) % 16
    codes[64:] = 15 - codes[64:]
    packed = _pack.pack(codes, 4)
    assert packed.tolist() == [int(codes[j]) | int(codes[64 + j]) << 4 for j in range(64)]


def test_two_bits_lie_as_documented(rng):
    codes = rng.integers(0, 4, 128).astype(np.uint8)
    assert _pack.pack(codes, 2).tolist() == [sum(int(codes[32 * i + j]) << 2 * i for i in range(4)) for j in range(32)]


def test_three_bits_are_a_plane_of_two_and_a_plane_of_one(rng):
    codes = rng.integers(0, 8, 128).astype(np.uint8)
    packed = _pack.pack(codes, 3).tolist()
    assert packed[:32] == [sum((int(codes[32 * i + j]) & 3) << 2 * i for i in range(4)) for j in range(32)]
    assert packed[32:] == [sum((int(codes[16 * i + j]) >> 2) << i for i in range(8)) for j in range(16)]


def test_seven_bits_are_three_planes(rng):
    codes = rng.integers(0, 128, 128).astype(np.uint8)
    packed = _pack.pack(codes, 7).tolist()
    assert packed[:64] == [(int(codes[j]) & 15) | (int(codes[64 + j]) & 15) << 4 for j in range(64)]
    assert packed[64:96] == [sum((int(codes[32 * i + j]) >> 4 & 3) << 2 * i for i in range(4)) for j in range(32)]
    assert packed[96:] == [sum((int(codes[16 * i + j]) >> 6) << i for i in range(8)) for j in range(16)]


@pytest.mark.parametrize("bits", [0, 8, 9])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match="1 to 7 bits"):
        _pack.pack(np.zeros(128, np.uint8), bits)


def test_a_row_of_part_of_a_block_is_refused():
    with pytest.raises(ValueError, match="multiple of 48"):
        _pack.unpacked_size(47, 3)

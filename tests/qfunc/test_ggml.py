"""Every ggml type decodes to the floats of the `gguf` package (and of ggml, for types it lacks), bit for bit, in every way of calling."""

from functools import partial

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qfunc import _ggml

ORACLE = [name for name in _ggml.TYPES if name not in ("f64", "i8", "i16", "q8_1", "q8_k", "q1_0", "q2_0")]


def random_rows(name, seed=0, rows=7, blocks=5):
    raw = np.random.default_rng(seed).integers(0, 256, (rows, blocks, _ggml.TYPES[name].bytes), np.uint8)
    if name == "q8_k":
        raw[..., 3] |= 0x20         # a scale of 2^-63 at least: what XLA makes of subnormal numbers depends on when it computes
    return raw.reshape(rows, -1)


def same(got, want):
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    nan = np.isnan(want)
    return np.array_equal(np.isnan(got), nan) and np.array_equal(got.view(np.uint32)[~nan], want.view(np.uint32)[~nan])


@pytest.mark.parametrize("name", ORACLE)
def test_random_bytes_equal_the_gguf_package(name):
    raw = random_rows(name)
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name.upper()])
    decode = partial(_ggml.decode, type_name=name, columns=want.shape[1])
    assert same(decode(raw), want)
    assert same(jax.jit(decode)(raw), want)


@pytest.mark.parametrize("name", _ggml.TYPES)
def test_closed_over_equals_passed_as_argument(name):
    raw = jnp.asarray(random_rows(name, 1))
    columns = _ggml.columns_of(name, raw.shape[1])
    assert same(jax.jit(lambda: _ggml.decode(raw, name, columns))(), jax.jit(lambda r: _ggml.decode(r, name, columns))(raw))


def test_mxfp4_keeps_subnormals_and_extremes():
    raw = np.array([[e] + [0x21 + 0x11 * i for i in range(14)] + [0x0F, 0xF7] for e in (0, 1, 2, 3, 127, 253, 254, 255)], np.uint8)
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.MXFP4)
    assert np.any((want != 0) & (np.abs(want) < 2**-126))
    assert same(jax.jit(partial(_ggml.decode, type_name="mxfp4", columns=32))(raw), want)


def test_double_rounds_to_nearest_even():
    rng = np.random.default_rng(3)
    values = rng.integers(0, 2**64, 4000, np.uint64).view(np.float64)
    ties = (1 + np.arange(64) * 2.0**-24) * np.repeat([1.0, 2.0**-126, 2.0**-130, 2.0**-149, 2.0**127], 64)[:, None].reshape(5, 64)
    edges = [0.0, -0.0, np.inf, -np.inf, np.nan, 2.0**-150, 1.5 * 2.0**-150, 2.0**-151]
    values = np.concatenate([values, ties.ravel(), -ties.ravel(), edges])
    values = np.concatenate([values, rng.standard_normal(2000) * np.exp2(rng.integers(-152, -120, 2000))])
    with np.errstate(all="ignore"):
        want = values.astype(np.float32)
    got = jax.jit(partial(_ggml.decode, type_name="f64", columns=len(values)))(values.view(np.uint8)[None])
    assert same(got[0], want)


def test_types_agree_with_the_package_table():
    for name, record in _ggml.TYPES.items():
        if name in ("q8_1", "q2_0"):       # the package counts 40 bytes for Q8_1 and has no Q2_0
            continue
        kind = gguf.GGMLQuantizationType[name.upper()]
        assert (record.id, (record.elements, record.bytes)) == (kind.value, gguf.GGML_QUANT_SIZES[kind])


@pytest.mark.parametrize(("raw", "name", "columns", "message"), [
    (np.zeros((2, 18), np.uint8), "q4_9", 32, "q4_0"),
    (np.zeros((2, 18), np.uint8), "q4_0", 33, "multiple of 32"),
    (np.zeros((2, 19), np.uint8), "q4_0", 32, r"\[\.\.\., 18\]"),
    (np.zeros((2, 18), np.int8), "q4_0", 32, "uint8"),
])
def test_refusals_name_what_was_expected(raw, name, columns, message):
    with pytest.raises(ValueError, match=message):
        _ggml.decode(raw, name, columns)

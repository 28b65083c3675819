"""Quantized weights against the formulas in float64 (tests/support/oracle.py): scales, zero points, codes and round trips, bit for bit."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import qfunc

SCHEMES = ["w2a16", "w3a16_g32", "w4a16", "w4a16_g32", "w5a16_g64", "w6a16_g96", "w7a16", "w8a16_tensor", "w8a16_g32", "w8a8_dynamic",
           "w2a16_g32_asym", "w3a16_g96_asym", "w4a16_g32_asym", "w5a16_asym", "w6a16_g32_asym", "w8a16_asym", "w8a8_block", "int4wo_g32",
           "fp8", "fp8_dynamic", "fp8_block", "fp8_w8a16_g32", "fp8_e5m2", "fp8_e5m2_block", "mxfp8", "mxfp8_e5m2", "mxfp6",
           "mxfp6_e3m2", "mxfp4", "nvfp4", "nf4", "fp4_bnb"]
SHAPE = (192, 37)           # one and a half packed blocks, an odd output; one shape for many tests, since each shape is compiled
LARGER = ["w3a16_g32", "w5a16_g64", "w6a16_g96", "w8a8_block", "fp8_block", "w4a16_g32_asym", "mxfp4", "nvfp4", "fp8"]
dequantize = jax.jit(lambda q: q.dequantize(jnp.float32))


@functools.cache
def scheme(name, rule=""):
    found = qfunc.scheme(name)
    return found.replace(weight_scale_rule=rule) if rule else found


def matrices(leaf):
    leaf = np.asarray(leaf)
    return leaf.reshape(-1, *leaf.shape[-2:])


def stored_codes(q, matrix):
    """The codes of one matrix [N, K], in the terms of the oracle."""
    code, columns = q.scheme.weight.code, q.shape[-2]
    bits = oracle.bits_of(code)
    if bits == 8:
        return matrix.view(np.uint8).astype(np.int64) if code.startswith("fp") else matrix.astype(np.int64)
    codes = oracle.unpack(matrix, bits, columns)
    return codes - 2 ** (bits - 1) if code.startswith("int") else codes


def scale_values(q):
    """The effective scale of every cell in float64, from the stored leaves."""
    scale = np.asarray(q.scale)
    if q.scheme.weight.scale_dtype == "e8m0":
        return matrices(np.where(scale == 255, np.nan, 2.0 ** (scale.astype(np.float64) - 127)))
    scale = scale.astype(np.float64)
    return matrices(scale if q.scale2 is None else oracle.f32(scale * np.asarray(q.scale2, np.float64)))


def check_against_formula(w, q):
    """Scale by the rule, codes by the stored scale, decoding by the stored codes."""
    spec, got = q.scheme.weight, matrices(np.swapaxes(np.asarray(dequantize(q)), -1, -2))
    zeros = [None] * len(got) if q.zero is None else matrices(np.asarray(q.zero).astype(np.float64))
    floats = matrices(np.swapaxes(np.asarray(w, np.float64), -1, -2))
    for matrix, codes, scale, zero, back in zip(floats, matrices(q.codes), scale_values(q), zeros, got, strict=True):
        want_scale, want_zero = oracle.scales(matrix, spec)
        tolerance = 2.0**-8 if spec.scale_dtype == "bfloat16" else 3e-7 if spec.zero else 0
        np.testing.assert_allclose(scale, want_scale, rtol=tolerance, atol=0)
        wide = functools.partial(oracle.spread, granularity=spec.granularity, rows=matrix.shape[0], columns=matrix.shape[1])
        offset = 0.0 if zero is None else wide(zero)
        if spec.zero == "int":
            # A quotient beside a half may fall to either side, as far as float32 knows a number below 2^b.
            bits, (lo, _) = oracle.bits_of(spec.code), oracle.extremes(matrix, spec.granularity)
            quotient = np.clip(-np.minimum(lo, 0) / scale, 0, 2**bits - 1)
            assert np.all(zero == np.round(zero)) and np.all(np.abs(zero - quotient) <= 0.5 + 2.0 ** (bits - 23))
        if spec.zero == "float":
            np.testing.assert_allclose(zero, want_zero, rtol=2.0**-8, atol=np.abs(matrix).max() * 2.0**-8)
            x = oracle.f32(oracle.f32(matrix - offset) / wide(scale))
        else:
            x = oracle.f32(matrix / wide(scale))
        want = oracle.encode(x, spec.code, offset)
        stored = stored_codes(q, codes)
        if spec.code in oracle.TABLES:                          # the midpoints of a table are rounded to float32
            wrong = oracle.TABLES[spec.code][stored] != oracle.TABLES[spec.code][want]
            assert wrong.mean() < 1e-3
            want = stored
        np.testing.assert_array_equal(stored, want)
        numbers = oracle.values(stored, spec.code)
        if spec.zero == "float":
            expected = oracle.f32(numbers * wide(scale)) + offset
        else:
            expected = (numbers - offset) * wide(scale)
        np.testing.assert_array_equal(back, oracle.f32(expected))


def weight(rng, shape, dtype=np.float32):
    w = rng.standard_normal(shape) * np.exp(rng.uniform(-3, 3, (*shape[:-2], 1, shape[-1]))) / math.sqrt(shape[-2])
    return jnp.asarray(w.astype(np.float32)).astype(dtype)


@pytest.mark.parametrize("name", SCHEMES)
def test_formula(rng, name):
    w = weight(rng, SHAPE)
    q = qfunc.quantize({"kernel": w}, name)["kernel"]
    assert q.shape == SHAPE and q.dtype == "float32"
    check_against_formula(w, q)


@pytest.mark.parametrize("name", LARGER)
def test_formula_over_leading_axes_and_many_blocks(rng, name):
    w = weight(rng, (2, 2, 576, 130))
    q = qfunc.quantize({"kernel": w}, {"kernel": qfunc.Rule(name, batch=2)})["kernel"]
    assert q.shape == w.shape
    check_against_formula(w, q)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["w8a16", "w4a16_g32_asym", "fp8_block", "mxfp4", "nvfp4", "nf4"])
def test_narrow_floats_are_quantized_as_the_float32_they_are(rng, name, dtype):
    w = weight(rng, SHAPE, dtype)
    q = qfunc.quantize({"kernel": w}, name)["kernel"]
    assert q.dtype == np.dtype(dtype).name and q.dequantize().dtype == dtype
    check_against_formula(w, q)


@pytest.mark.parametrize("name", ["w8a8_block", "fp8_block", "w8a16", "w4a16", "w3a16_asym", "fp8"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (130, 129)])
def test_sizes_that_nothing_divides(rng, name, shape):
    w = weight(rng, shape)
    check_against_formula(w, qfunc.quantize({"kernel": w}, name)["kernel"])


@pytest.mark.parametrize("rule", ["amax", "amax_half", "full_range"])
@pytest.mark.parametrize("name", ["w2a16", "w4a16_g32", "w8a16"])
def test_symmetric_rules(rng, name, rule):
    w = weight(rng, (96, 24))
    check_against_formula(w, qfunc.quantize({"kernel": w}, scheme(name, rule))["kernel"])


@pytest.mark.parametrize(("name", "rule"), [*((name, rule) for name in ("mxfp8", "mxfp4") for rule in (
    "mx_floor", "mx_even", "mx_even1", "mx_ceil", "mx_rceil")), ("mxfp6", "mx_even"),
    ("mxfp6_e3m2", "mx_ceil"), ("mxfp8_e5m2", "mx_floor")])
def test_mx_rules(rng, name, rule):
    w = np.array(weight(rng, (64, 40)))
    w[0] = np.float32([6, 7, 4, 3, 448, 480, 7.5, 7.75] * 5) * 2.0 ** rng.integers(-20, 20, 40)      # block maxima on the thresholds
    w[1:32] *= 1e-8
    check_against_formula(w, qfunc.quantize({"kernel": jnp.asarray(w)}, scheme(name, rule))["kernel"])


def test_groups_of_one_element_are_exact(rng):
    w = weight(rng, (24, 16))
    for name in ("w4a16_g1", "nf4_g1"):
        back = qfunc.quantize({"kernel": w}, name)["kernel"].dequantize()
        np.testing.assert_allclose(back, w, rtol=2e-7)


@pytest.mark.parametrize("name", [*SCHEMES, "nf4_dq", "fp4_bnb_dq"])
def test_zeros_and_zero_groups(rng, name):
    w = np.array(weight(rng, SHAPE))
    zero = qfunc.quantize({"kernel": jnp.zeros(SHAPE)}, name)["kernel"]
    assert not np.any(np.asarray(dequantize(zero))) and all(np.all(np.isfinite(np.asarray(v, np.float32))) for v in zero.leaves.values())
    w[:, 5] = 0
    w[96:, 7] = 0
    back = np.asarray(dequantize(qfunc.quantize({"kernel": jnp.asarray(w)}, name)["kernel"]))
    assert np.all(np.isfinite(back)) and not np.any(back[:, 5]) and not np.any(back[96:, 7])


@pytest.mark.parametrize("size", [1e38, 3e-38])
@pytest.mark.parametrize("name", [*SCHEMES, "nf4_dq"])
def test_extremes_stay_finite_and_close(rng, name, size):
    w = jnp.asarray((rng.uniform(-1, 1, SHAPE) * size).astype(np.float32))
    q = qfunc.quantize({"kernel": w}, name)["kernel"]
    back = np.asarray(dequantize(q))
    assert np.all(np.isfinite(back)) and np.all(np.abs(back) <= 2.01 * size)
    assert all(np.all(np.isfinite(np.asarray(leaf, np.float32))) for leaf in q.leaves.values())
    if size == 1e38:
        limit = {2: 0.7, 3: 0.35}.get(oracle.bits_of(q.scheme.weight.code), 0.2)
        assert np.linalg.norm((back - w) / size) <= limit * np.linalg.norm(np.asarray(w) / size)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_refused_by_name_and_are_nan_under_jit(rng, poison):
    w = weight(rng, (96, 8)).at[40, 3].set(poison)
    params = {"layers": {"3": {"up": {"kernel": w}}}, "good": {"kernel": jnp.ones((96, 8))}}
    with pytest.raises(ValueError, match="NaN or infinity in layers/3/up/kernel"):
        qfunc.quantize(params, "w8a16")
    for name in ("w8a16", "w4a16_g32_asym", "int4wo_g32", "fp8", "mxfp4", "nvfp4", "nf4", "w8a8_block"):
        q = jax.jit(lambda w, name=name: qfunc.quantize(w, name if name != "nf4" else "nf4_g32"))(w)
        back = np.asarray(dequantize(q))
        assert np.isnan(back[40, 3]), f"{name}: a poisoned weight became {back[40, 3]}"
        if q.scheme.weight.granularity.kind == "group" and q.scale2 is None:
            assert np.isfinite(back[:32]).all() and np.isfinite(back[:, 4:]).all(), f"{name}: other groups keep their scales"


BITS = {"w8a16": 8, "w4a16_g32": 4 + 1, "w3a16_g32": 3 + 1, "w5a16_g32": 5 + 1, "w4a16_g32_asym": 4 + 1 + 8 / 32, "int4wo_g32": 4 + 1,
        "mxfp4": 4.25, "mxfp6": 6.25, "mxfp8": 8.25, "nvfp4": 4.5, "nf4": 4.5, "nf4_dq": 4.125, "w8a8_block": 8, "fp8": 8, "w7a16": 7}


@pytest.mark.parametrize("name", BITS)
def test_bits_are_counted_truthfully(rng, name):
    shape = (256, 384)
    q = qfunc.quantize({"kernel": weight(rng, shape)}, name)["kernel"]
    held = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(q))
    assert q.nbytes == held and q.bits_per_weight == 8 * held / q.size
    assert BITS[name] <= q.bits_per_weight < BITS[name] + 0.2


def test_a_partial_block_costs_a_whole_one(rng):
    q = qfunc.quantize({"kernel": weight(rng, (130, 8))}, "w4a16")["kernel"]
    assert q.pad == 126 and q.codes.shape == (8, 128) and q.nbytes == 8 * 128 + 8 * 4


@pytest.mark.parametrize("name", ["w4a16_g32_asym", "nvfp4", "nf4_dq", "fp8"])
def test_a_stack_is_its_layers_however_it_is_made(rng, name):
    w = weight(rng, (3, 64, 9))
    stack = qfunc.quantize({"kernel": w}, name)["kernel"]
    mapped = jax.vmap(lambda w: qfunc.quantize(w, name))(w)
    traced = jax.jit(lambda w: qfunc.quantize({"kernel": w}, name)["kernel"])(w)
    shapes = jax.eval_shape(lambda w: qfunc.quantize({"kernel": w}, name)["kernel"], w)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(shapes)] == [(a.shape, a.dtype) for a in jax.tree.leaves(stack)]
    for e in range(3):
        one = qfunc.quantize({"kernel": w[e]}, name)["kernel"]
        for made in (stack[e], mapped[e], traced[e]):
            assert jax.tree.structure(made) == jax.tree.structure(one)
            for mine, theirs in zip(jax.tree.leaves(made), jax.tree.leaves(one), strict=True):
                np.testing.assert_array_equal(np.asarray(mine, np.float32), np.asarray(theirs, np.float32))

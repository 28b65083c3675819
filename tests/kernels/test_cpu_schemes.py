"""Every scheme on the native kernels against the reference, on shapes that no tile divides."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import both

import qfunc
from qfunc.kernels import _dispatch
from qfunc.kernels.cpu import _library

pytestmark = pytest.mark.skipif(_library.isa() is None, reason=f"no native kernels: {_library.load()[1]}")

SHAPES = ((1, 256, 40), (6, 768, 33), (19, 512, 65))
"""(rows of x, in, out): one row, few rows (both decode) and panels with a remainder."""


def relative(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


def quantized(rng, name, columns, rows, lead=()):
    w = jnp.asarray(rng.standard_normal((*lead, columns, rows), np.float32) / np.sqrt(columns))
    x = jnp.asarray(rng.standard_normal((16, columns), np.float32))
    spec = qfunc.scheme(name)
    needs = spec.weight.actorder or (spec.activation is not None and spec.activation.mode == "static")
    return qfunc.quantize({"kernel": w}, name, calibration={"kernel": x} if needs else None)["kernel"]


def integer(name):
    spec = qfunc.scheme(name)
    return spec.activation is not None and "int" in spec.weight.code and "int" in spec.activation.code


@pytest.mark.parametrize("name", list(qfunc.schemes))
def test_equals_the_reference(rng, name):
    rows, columns, outs = SHAPES[rng.integers(len(SHAPES))]
    q = quantized(rng, name, columns, outs)
    x = jnp.asarray(rng.standard_normal((rows, columns), np.float32)).at[:, 5].multiply(8)
    x = x if rows == 1 else x.at[rows // 2].set(0)
    told = qfunc.explain(functools.partial(qfunc.matmul, w=q), x, platform="cpu")
    assert [c.implementation for c in told] == ["native"], told
    native, reference = both(qfunc.matmul, x, q)
    limit = 1e-6 if integer(name) and name != "llm_int8" else 1e-5
    assert relative(native, reference) <= limit
    assert np.any(reference[0]) and (rows == 1 or not np.any(native[rows // 2])), "a zero row must stay zero"


@pytest.mark.parametrize("name", ["w8a8_dynamic", "w4a8_dynamic", "w4a4_dynamic", "w3a8_dynamic"])
def test_int32_sums_bit_for_bit(rng, name):
    """One scale on each side: the float32 result is a function of the int32 sum, so equal bits mean equal sums and equal codes."""
    q = quantized(rng, name, 700, 50)
    for rows in (1, 7, 40):
        native, reference = both(qfunc.matmul, jnp.asarray(rng.standard_normal((rows, 700), np.float32)), q)
        np.testing.assert_array_equal(native, reference)


SPECS = {name: qfunc.scheme(name).activation for name in (
    "w8a8_dynamic", "w4a4_dynamic", "w8a8_block", "w8a8_dynamic_tensor", "fp8", "fp8_dynamic", "fp8_block", "fp8_e5m2_dynamic", "mxfp8",
    "mxfp8_e5m2", "mxfp6_a6", "mxfp4", "mxfp4_dual", "nvfp4", "nvfp4_token")}
RULES = {rule: dataclasses.replace(SPECS["mxfp4"], scale_rule=rule, code=code) for rule, code in (
    ("mx_floor", "fp4_e2m1"), ("mx_even", "fp6_e3m2"), ("mx_even1", "fp8_e4m3"), ("mx_ceil", "fp6_e2m3"), ("mx_ceil_x", "fp4_e2m1"))}


@pytest.mark.parametrize("name", [*SPECS, *RULES])
def test_small_float_codes_bit_for_bit(rng, name):
    """Codes and scales as the reference makes them, over all magnitudes, halves of every step, zeros, and a part of a group."""
    spec = {**SPECS, **RULES}[name]
    columns = 400 if spec.scale_rule != "mx_dual" else 1200            # more than one outer scale, and a part of one
    x = rng.standard_normal((3, 11, columns), np.float32) * np.exp2(rng.integers(-30, 30, (3, 11, 1)))
    x[0] = np.round(x[0] / np.abs(x[0]).max() * 48) / 8                 # many ties
    x[1, 2], x[1, 3, :100], x[2, 4, 7] = 0, -0.0, 1e30
    if spec.clip == 1 and "int" in spec.code:
        spec = dataclasses.replace(spec, clip=0.9)
    native, reference = both(lambda x: qfunc.quantize_activation(x, spec), jnp.asarray(x, jnp.float32))
    assert native.codes.dtype == reference.codes.dtype
    np.testing.assert_array_equal(np.asarray(native.codes).view(np.uint8), np.asarray(reference.codes).view(np.uint8))
    np.testing.assert_array_equal(native.scale, reference.scale)


@pytest.mark.parametrize("name", ["w8a8_dynamic", "fp8_dynamic", "fp8_e5m2_dynamic", "fp8", "mxfp8", "mxfp6_a6", "nvfp4"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_activation_codes_are_shared(rng, name, dtype):
    spec = qfunc.scheme(name).activation
    x = jnp.asarray(rng.standard_normal((3, 11, 384), np.float32) * np.exp2(rng.integers(-30, 30, (3, 11, 1))), dtype).at[1, 2].set(0)
    native, reference = both(lambda x: qfunc.quantize_activation(x, spec), x)
    np.testing.assert_array_equal(np.asarray(native.codes).view(np.uint8), np.asarray(reference.codes).view(np.uint8))
    np.testing.assert_array_equal(native.scale, reference.scale)
    q = quantized(rng, name, 384, 31)
    again, want = both(lambda x: qfunc.matmul(qfunc.quantize_activation(x, q), q, out_dtype=jnp.float32), x)
    assert relative(again, want) <= (1e-6 if integer(name) else 1e-5)


GGML = {"q4_0": (32, 18, (0,)), "q4_1": (32, 20, (0, 2)), "q5_0": (32, 22, (0,)), "q5_1": (32, 24, (0, 2)), "q8_0": (32, 34, (0,)),
        "q4_k": (256, 144, (0, 2)), "q5_k": (256, 176, (0, 2)), "q6_k": (256, 210, (208,))}
"""Type to the elements and bytes of a block, and where its half precision numbers are."""


@pytest.mark.parametrize("name", GGML)
def test_blocks_of_ggml(rng, name):
    """Random bytes as codes, under scales of ordinary size."""
    elements, size, halves = GGML[name]
    columns, outs = 768 if elements == 256 else 416, 33
    blocks = rng.integers(0, 256, (outs, columns // elements, size), np.uint8)
    for at in halves:
        blocks[..., at:at + 2] = rng.normal(0, 0.1, blocks.shape[:2]).astype(np.float16)[..., None].view(np.uint8)
    q = qfunc.QTensor(jnp.asarray(blocks.reshape(outs, -1)), scheme=qfunc.scheme(f"gguf:{name}"))
    for rows in (1, 3, 7, 20):
        x = jnp.asarray(rng.standard_normal((rows, columns), np.float32))
        (told,) = qfunc.explain(qfunc.matmul, x, q, platform="cpu")
        assert told.implementation == "native", told
        assert relative(*both(qfunc.matmul, x, q)) <= 1e-5


def test_sums_longer_than_int32(rng):
    """Products of the largest codes over a K that no int32 sum could hold."""
    columns = 134_000
    w = jnp.asarray(np.sign(rng.standard_normal((columns, 3))) * 127, jnp.float32).at[:, 0].set(-127)
    x = jnp.asarray(np.sign(rng.standard_normal((9, columns))) * 127, jnp.float32).at[0].set(-127)
    q = qfunc.quantize({"kernel": w}, "w8a8_dynamic")["kernel"]
    for rows in (1, 9):
        native, reference = both(qfunc.matmul, x[:rows], q)
        assert relative(native, reference) <= 1e-6 and float(native[0, 0]) > 2.0**31


@pytest.mark.parametrize("name", ["w8a8_dynamic", "w4a16_g128", "fp8_dynamic"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_types_and_bias(rng, name, dtype):
    q = quantized(rng, name, 256, 51)
    for rows in (2, 37):
        x, bias = jnp.asarray(rng.standard_normal((rows, 256)), dtype), jnp.asarray(rng.standard_normal(51), dtype)
        native, reference = both(lambda x, q, b: qfunc.matmul(x, q, bias=b), x, q, bias)
        assert native.dtype == dtype and relative(native, reference) < 3e-3
        wide = both(lambda x, q, b: qfunc.matmul(x, q, bias=b, out_dtype=jnp.float32), x, q, bias)
        assert relative(*wide) < 1e-5


@pytest.mark.parametrize("name", ["w8a8_dynamic", "w4a16_g128", "w8a8_static", "fp8", "llm_int8", "nvfp4", "w8a8_dynamic_tensor"])
def test_stacks_and_batches(rng, name):
    q = quantized(rng, name, 256, 33, (3,)) if "static" not in name else quantized(rng, name, 256, 33)
    x = jnp.asarray(rng.standard_normal((3, 5, 256), np.float32))
    native, reference = both(qfunc.matmul, x, q)
    assert relative(native, reference) < 1e-5
    one = jax.tree.map(lambda a: a[0], q) if len(q.matrix_shape) == 3 else q
    native, reference = both(jax.vmap(lambda x: qfunc.matmul(x, one)), x)
    assert relative(native, reference) < 1e-5


@pytest.mark.parametrize("name", ["w8a8_dynamic", "w4a16_g32", "w4a8_dynamic", "mxfp4", "fp8", "nvfp4", "llm_int8", "w8a8_dynamic_tensor"])
def test_experts(rng, name):
    q = quantized(rng, name, 256, 70, (5,))
    x = jnp.asarray(rng.standard_normal((40, 256), np.float32))
    bias = jnp.asarray(rng.standard_normal((5, 70), np.float32))
    for sizes in ([7, 0, 12, 1, 18], [0, 0, 0, 0, 0], [40, 0, 0, 0, 0], [1, 1, 1, 1, 1]):
        call = functools.partial(qfunc.grouped_matmul, group_sizes=jnp.asarray(sizes), bias=bias)
        assert {c.implementation for c in qfunc.explain(call, x, q, platform="cpu")} == {"native"}
        native, reference = both(call, x, q)
        assert relative(native, reference) < 1e-5
        assert not np.any(np.asarray(native)[sum(sizes):])


def test_no_rows(rng):
    q = quantized(rng, "w8a8_dynamic", 256, 33)
    native, _ = both(qfunc.matmul, jnp.zeros((0, 256)), q)
    assert native.shape == (0, 33)
    native, _ = both(qfunc.matmul, jnp.ones((256,)), q)
    assert native.shape == (33,)


@pytest.mark.parametrize("name", ["w8a8_dynamic", "w8a16", "w4a16_g128", "fp8_w8a16"])
def test_nan_and_infinity_stay_in_their_row(rng, name):
    q = quantized(rng, name, 256, 33)
    for rows in (3, 20):
        x = jnp.asarray(rng.standard_normal((rows, 256), np.float32)).at[1, 7].set(jnp.nan).at[2, 9].set(jnp.inf)
        native, reference = both(qfunc.matmul, x, q)
        assert np.all(np.isnan(native[1])) and not np.any(np.isfinite(np.asarray(native)[2]))
        keep = np.asarray([m for m in range(rows) if m not in (1, 2)])
        assert relative(np.asarray(native)[keep], np.asarray(reference)[keep]) < 1e-5
    poisoned = q.replace(scale=q.scale.at[3].set(jnp.nan))
    native, _ = both(qfunc.matmul, x, poisoned)
    assert np.all(np.isnan(np.asarray(native)[:, 3])) and np.all(np.isfinite(np.asarray(native)[0, :3]))


@pytest.mark.parametrize("name", ["fp8_dynamic", "fp8_e5m2_dynamic", "mxfp8", "mxfp6", "mxfp6_a6", "mxfp4", "mxfp4_dual", "mxfp4_a8",
                                  "nvfp4_token"])
def test_small_floats_keep_nan_and_infinity_in_their_row(rng, name):
    """Also where both sides are multiplied as whole numbers, which have no NaN: the scale carries it."""
    q = quantized(rng, name, 256, 33)
    for rows in (3, 20):
        x = jnp.asarray(rng.standard_normal((rows, 256), np.float32)).at[1, 7].set(jnp.nan).at[2, 9].set(jnp.inf)
        native, reference = (np.asarray(y) for y in both(qfunc.matmul, x, q))
        np.testing.assert_array_equal(np.isnan(native), np.isnan(reference))
        finite = np.isfinite(reference)
        assert not finite[1].any() and finite[0].all()
        assert relative(native[finite], reference[finite]) < 1e-5


@pytest.mark.parametrize("group", [16, 32, 128, 256, 20, *(pytest.param(g, marks=pytest.mark.slow) for g in (64, 512, 96))])
@pytest.mark.parametrize(("weight", "activation"), [
    ("w8a8_dynamic", "w8a8_block"), ("w4a16_g32_asym", "w8a8_dynamic"), ("fp8_dynamic", "fp8_block"), ("mxfp4", "mxfp4"),
    ("mxfp6_a6", "mxfp8")])
def test_segments_of_any_length(rng, group, weight, activation):
    """Groups on both sides, equal ones and ones of 64 within larger ones, over a K that ends within a tile."""
    columns, outs, own = group * max(3, 640 // group | 1), 29, 64 if group in (256, 512) else group
    base, other = qfunc.scheme(weight), qfunc.scheme(activation).activation
    if other.granularity.kind != "token":
        other = dataclasses.replace(other, granularity=qfunc.Granularity("group", own))
    grouped = dataclasses.replace(base.weight, granularity=qfunc.Granularity("group", group))
    made = base.replace(name="mixed", weight=grouped, activation=other)
    q = qfunc.quantize({"kernel": jnp.asarray(rng.standard_normal((columns, outs), np.float32) / 16)}, made)["kernel"]
    for rows in (7, 40):
        x = jnp.asarray(rng.standard_normal((rows, columns), np.float32))
        told = qfunc.explain(functools.partial(qfunc.matmul, w=q), x, platform="cpu")
        assert [c.implementation for c in told] == ["native"], told
        assert relative(*both(qfunc.matmul, x, q)) <= 1e-5


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_scale_over_all_rows_is_spoilt_by_any_of_them(rng, name, bad):
    """Rows are looked at in several tasks; whichever has the number, in front or behind, no row is finite in the reference."""
    q = quantized(rng, name, 256, 33)
    for rows in (3, 700):
        for row in (0, rows // 2, rows - 1):
            x = jnp.asarray(rng.standard_normal((rows, 256), np.float32)).at[row, 7].set(bad)
            for result in both(qfunc.matmul, x, q):
                assert not np.isfinite(np.asarray(result)).any(), (rows, row)


@pytest.mark.parametrize(("weight", "kind"), [("w8a16", "token"), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (
    ("w8a16", "group"), ("w4a16_g32", "token"), ("w4a16_g32", "group"), ("w3a16_g64", "token"), ("w4a16_g64_asym", "group")))])
def test_outlier_columns(rng, weight, kind):
    """LLM.int8 over other weights, the first and the last column among them; NaN is none, infinity is one; both stay in their rows."""
    granularity = qfunc.scheme("llm_int8").activation.granularity if kind == "token" else qfunc.scheme("w8a8_block").activation.granularity
    base = qfunc.scheme("llm_int8").replace(name="mixed", weight=qfunc.scheme(weight).weight, activation_granularity=granularity)
    columns, outs = 320, 37
    q = qfunc.quantize({"kernel": jnp.asarray(rng.standard_normal((columns, outs), np.float32) / 16)}, base)["kernel"]
    for rows in (1, 6, 40):
        x = np.clip(rng.standard_normal((3, rows, columns)), -5, 5).astype(np.float32)
        x[0, 0, [0, 7, columns - 1]], x[1, -1, 150] = (-30, 6, 200), 40      # every matrix of a batch has outliers of its own
        told = qfunc.explain(functools.partial(qfunc.matmul, w=q), jnp.asarray(x[0]), platform="cpu")
        assert [c.implementation for c in told] == ["native"], told
        native, reference = both(lambda x: jnp.stack([qfunc.matmul(m, q) for m in x]), jnp.asarray(x))
        np.testing.assert_array_equal(both(jax.vmap(lambda x: qfunc.matmul(x, q)), jnp.asarray(x))[0], native)
        assert relative(native, reference) <= 1e-5
        half = [np.asarray(y, np.float32) for y in both(functools.partial(qfunc.matmul, w=q, out_dtype=jnp.bfloat16), jnp.asarray(x[0]))]
        np.testing.assert_allclose(*half, rtol=2**-7, atol=1e-5 * np.abs(half[1]).max())
    x[0, 1, 3], x[0, 2, 9] = np.nan, np.inf
    native, reference = (np.asarray(y) for y in both(qfunc.matmul, jnp.asarray(x[0]), q))
    keep = [m for m in range(rows) if m not in (1, 2)]
    assert not np.any(np.isfinite(native[2])) and relative(native[keep], reference[keep]) <= 1e-5
    np.testing.assert_array_equal(np.isnan(native[1]), np.isnan(reference[1]))


def test_refusals_have_reasons(rng):
    q = quantized(rng, "w4a8_dynamic_g6", 252, 33)
    with qfunc.use("native"), pytest.raises(NotImplementedError, match="multiple of 4"):
        qfunc.matmul(jnp.ones((2, 252)), q)
    assert relative(warned(jnp.ones((2, 252)), q), referenced(jnp.ones((2, 252)), q)) == 0


def warned(x, q):
    with pytest.warns(_dispatch.FallbackWarning, match="multiple of 4"):
        _dispatch._warn.cache_clear()
        return qfunc.matmul(x, q)


def referenced(x, q):
    with qfunc.use("reference"):
        return qfunc.matmul(x, q)

"""quantize_activation of every scheme against the formulas in float64, and what batching must never do to its scales."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

import qfunc

TOKEN = {"w8a8_dynamic": "int8", "w4a4_dynamic": "int4", "fp8_dynamic": "fp8_e4m3", "fp8_e5m2_dynamic": "fp8_e5m2"}
GROUP = {"w8a8_block": ("int8", 128), "fp8_block": ("fp8_e4m3", 128), "fp8_e5m2_block": ("fp8_e5m2", 128)}
TENSOR = {"fp8": "fp8_e4m3", "fp8_e5m2": "fp8_e5m2"}
MX = {"mxfp8": "fp8_e4m3", "mxfp8_e5m2": "fp8_e5m2", "mxfp6_a6": "fp6_e2m3", "mxfp4": "fp4_e2m1"}
SHARED = {**TOKEN, **TENSOR, **MX, **{name: code for name, (code, _) in GROUP.items()}, "nvfp4": "fp4_e2m1", "nvfp4_token": "fp4_e2m1"}
quantize = jax.jit(qfunc.quantize_activation, static_argnums=1)


def activation(rng, *shape):
    x = rng.standard_normal(shape) * np.exp(rng.uniform(-4, 4, (*shape[:-1], 1)))
    x[..., rng.integers(0, shape[-1], 2)] *= 20
    x[..., 2, :] = 0
    return x.astype(np.float32)


def bits(codes):
    codes = np.asarray(codes)
    return (codes.view(np.uint8) if codes.dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2) else codes).astype(np.int64)


@pytest.mark.parametrize("name", [*TOKEN, *GROUP])
@pytest.mark.parametrize("shape", [(5, 300), (3, 4, 128), (3, 1)])
def test_rows_and_groups(rng, name, shape):
    x = activation(rng, *shape)
    code, size = GROUP[name] if name in GROUP else (TOKEN[name], None)
    codes, scale, zero = quantize(x, name)
    want_codes, want_scale, _ = oracle.quantize_rows(x.astype(np.float64), code, size)
    assert zero is None and scale.dtype == jnp.float32 and scale.shape == want_scale.shape
    np.testing.assert_array_equal(scale, want_scale)
    np.testing.assert_array_equal(bits(codes), want_codes)
    assert codes.dtype == {"int8": jnp.int8, "int4": jnp.int8, "fp8_e4m3": jnp.float8_e4m3fn, "fp8_e5m2": jnp.float8_e5m2}[code]


@pytest.mark.parametrize("name", TENSOR)
@pytest.mark.parametrize("shape", [(6, 96), (2, 3, 40), (50,)])
def test_one_scale_for_all_rows(rng, name, shape):
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32) if len(shape) == 1 else activation(rng, *shape)
    codes, scale, _ = quantize(x, name)
    want = oracle.f32(np.abs(x).max().astype(np.float64) / oracle.top(TENSOR[name]))
    assert scale.shape == (1,) * len(shape) and float(scale.reshape(())) == want
    np.testing.assert_array_equal(bits(codes), oracle.encode(oracle.f32(x / want), TENSOR[name]))


@pytest.mark.parametrize("name", MX)
def test_microscaling(rng, name):
    x, code = activation(rng, 4, 96), MX[name]
    codes, scale, _ = quantize(x, name)
    amax = np.abs(x).reshape(4, 3, 32).max(-1).astype(np.float64)
    want = 2.0 ** oracle.mx_exponent(amax, code, "mx_rceil")
    np.testing.assert_array_equal(scale, want)
    np.testing.assert_array_equal(bits(codes), oracle.encode(x / np.repeat(want, 32, -1), code))


@pytest.mark.parametrize(("name", "axes"), [("nvfp4", None), ("nvfp4_token", -1)])
def test_two_levels(rng, name, axes):
    x = activation(rng, 5, 64).astype(np.float64)
    codes, scale, _ = quantize(x.astype(np.float32), name)
    outer = oracle.f32(np.abs(x).max(axes, keepdims=True) / 2688)
    outer = np.where(outer == 0, 1.0, outer)
    inner = np.clip(oracle.f32(oracle.f32(np.abs(x).reshape(5, 4, 16).max(-1) / 6) / outer), 2.0**-9, 448)
    grid = oracle.magnitudes("fp8_e4m3")
    want = oracle.f32(grid[oracle.nearest_even(inner, grid)] * outer)
    np.testing.assert_array_equal(scale, want)
    np.testing.assert_array_equal(bits(codes), oracle.encode(oracle.f32(x / np.repeat(want, 16, -1)), "fp4_e2m1"))


@pytest.mark.parametrize(("name", "code"), [("w8a8_static", "int8"), ("fp8_static", "fp8_e4m3")])
def test_static_scales_come_from_outside(rng, name, code):
    x = activation(rng, 4, 40)
    with pytest.raises(ValueError, match="calibrated scale"):
        qfunc.quantize_activation(x, name)
    codes, scale, _ = qfunc.quantize_activation(x, name, scale=0.0625)
    assert scale.shape == (1, 1) and float(scale[0, 0]) == 0.0625
    np.testing.assert_array_equal(bits(codes), oracle.encode(x.astype(np.float64) / 0.0625, code))


def test_asymmetric_rows(rng):
    spec = qfunc.ActivationSpec("int8", zero="int")
    x = activation(rng, 6, 50) + np.float32(3)
    x[2] = 0
    codes, scale, zero = (np.asarray(part) for part in quantize(x, spec))
    lo, hi = np.minimum(x.min(-1, keepdims=True), 0).astype(np.float64), np.maximum(x.max(-1, keepdims=True), 0).astype(np.float64)
    want = np.where(hi == lo, 1.0, (hi - lo) / 255)
    np.testing.assert_allclose(scale, want, rtol=3e-7)
    assert zero.dtype == np.int32 and zero.shape == scale.shape
    np.testing.assert_array_equal(codes, np.clip(np.round(oracle.f32(x / scale.astype(np.float64))) + zero, -128, 127))
    back = (codes - zero) * scale.astype(np.float64)
    assert np.all(np.abs(back - x) <= 1.01 * scale) and not np.any(back[2])


def test_static_asymmetric(rng):
    x = activation(rng, 4, 40)
    codes, scale, zero = qfunc.quantize_activation(x, "w8a8_static_asym", scale=0.5, zero=-7)
    assert zero.dtype == jnp.int32 and zero.shape == (1, 1)
    np.testing.assert_array_equal(codes, np.clip(np.round(x / 0.5) - 7, -128, 127))


@pytest.mark.parametrize("rounding", ["rha", "trunc"])
def test_other_roundings(rng, rounding):
    x = activation(rng, 5, 64)
    codes, scale, _ = quantize(x, qfunc.ActivationSpec("int8", rounding=rounding))
    y = oracle.f32(x.astype(np.float64) / np.asarray(scale, np.float64))
    want = np.trunc(y) if rounding == "trunc" else np.sign(y) * np.floor(np.abs(y) + 0.5)
    np.testing.assert_array_equal(codes, np.clip(want, -127, 127))


@pytest.mark.parametrize("code", ["int8", "fp8_e4m3"])
def test_clip(rng, code):
    x = activation(rng, 5, 64)
    codes, scale, _ = quantize(x, qfunc.ActivationSpec(code, clip=0.75))
    want_codes, want_scale, _ = oracle.quantize_rows(x.astype(np.float64), code, clip=0.75)
    np.testing.assert_array_equal(scale, want_scale)
    np.testing.assert_array_equal(bits(codes), want_codes)


def test_other_rules_use_the_lowest_code():
    x = np.array([[-1.0, 0.25, 0.5], [1.0, 0.25, 0.5]], np.float32)
    codes, scale, _ = qfunc.quantize_activation(x, qfunc.ActivationSpec("int8", scale_rule="full_range"))
    np.testing.assert_array_equal(scale, [[1 / 128], [-1 / 128]])
    np.testing.assert_array_equal(codes, [[-128, 32, 64], [-128, -32, -64]])
    _, scale, _ = qfunc.quantize_activation(x, qfunc.ActivationSpec("int8", scale_rule="amax_half"))
    np.testing.assert_allclose(scale, 1 / 127.5, rtol=1e-7)


@pytest.mark.parametrize("mapping", ["SYMMETRIC", "ASYMMETRIC"])
def test_torchao_multiplies_by_the_inverse_of_the_scale(rng, mapping):
    torch = pytest.importorskip("torch")
    granularity = pytest.importorskip("torchao.quantization.granularity")
    from torchao.quantization import Int8Tensor
    from torchao.quantization.quant_primitives import MappingType
    x = activation(rng, 200, 96)
    x[3:6] *= np.float32([[1e-6], [1e-3], [1e6]])                      # below and above torchao's smallest scale
    theirs = Int8Tensor.from_hp(torch.from_numpy(x), granularity.PerRow(), MappingType[mapping])
    symmetric = mapping == "SYMMETRIC"
    zero, rule = (None, "amax_half_inverse") if symmetric else ("int", "minmax_inverse")
    spec = qfunc.ActivationSpec("int8", zero=zero, scale_rule=rule)
    for run in (quantize, qfunc.quantize_activation):
        codes, scale, zero = run(x, spec)
        # Of torchao's asymmetric tensors, those with a smallest scale are not the ones that are recorded (`IntxUnpackedToInt8Tensor`).
        seen = np.flatnonzero((theirs.scale.numpy()[:, 0] > 2**-23) | symmetric)
        np.testing.assert_array_equal(np.asarray(codes)[seen], theirs.qdata.numpy()[seen])
        np.testing.assert_array_equal(np.asarray(scale)[seen], theirs.scale.numpy()[seen])
        assert symmetric or (np.asarray(zero)[seen] == theirs.zero_point.numpy()[seen]).all()
    if symmetric:                                                          # by division the largest elements of some rows get other codes
        other = quantize(x, qfunc.ActivationSpec("int8", scale_rule="amax_half"))[0]
        assert (np.asarray(other) != theirs.qdata.numpy()).any()


@pytest.mark.parametrize("name", SHARED)
def test_batching_never_merges_scales(rng, name):
    x = activation(rng, 3, 2, 4, 128)
    x[1] *= 50
    x[:, 1] *= 9
    alone = [[[np.asarray(p, np.float32) for p in quantize(x[i, j], name)[:2]] for j in range(2)] for i in range(3)]

    def one(x):
        return qfunc.quantize_activation(x, name)[:2]

    def check(got, where):
        for i in range(3):
            for j in range(2):
                for mine, theirs in zip(where(got, i, j), alone[i][j], strict=True):
                    np.testing.assert_array_equal(np.asarray(mine, np.float32), theirs)

    check(jax.jit(jax.vmap(jax.vmap(one)))(x), lambda q, i, j: [p[i, j] for p in q])
    turned = jax.jit(jax.vmap(jax.vmap(one, in_axes=1, out_axes=2), in_axes=2, out_axes=1))(x.transpose(2, 1, 0, 3))
    check(turned, lambda q, i, j: [p[:, i, :, j] for p in q])


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_without_vmap_a_leading_axis_is_rows_of_one_tensor(rng, name):
    x = activation(rng, 3, 4, 64)
    got, flat = quantize(x, name), quantize(x.reshape(12, 64), name)
    np.testing.assert_array_equal(bits(got.codes).reshape(12, 64), bits(flat.codes))


@pytest.mark.parametrize("name", ["fp8", "w8a8_dynamic"])
def test_a_stack_of_weights_keeps_the_scales_of_its_layers_apart(rng, name):
    w = jnp.asarray(rng.standard_normal((3, 64, 8)), jnp.float32)
    q = qfunc.quantize({"kernel": w}, name)["kernel"].replace(smooth=jnp.asarray(rng.uniform(0.5, 2, (3, 64)), jnp.float32))
    x = activation(rng, 3, 5, 64) * np.float32([1, 30, 900])[:, None, None]
    got = qfunc.quantize_activation(x, q)
    for e in range(3):
        one = qfunc.quantize_activation(x[e], q[e])
        np.testing.assert_array_equal(bits(got.codes[e]), bits(one.codes))
        np.testing.assert_array_equal(got.scale[e], one.scale)
    np.testing.assert_array_equal(qfunc.matmul(got, q), qfunc.matmul(x, q))
    before = np.stack([x, 5 * x])
    both = qfunc.quantize_activation(before, q)
    assert both.codes.shape == before.shape
    np.testing.assert_array_equal(qfunc.matmul(both, q), qfunc.matmul(before, q))


@pytest.mark.parametrize("name", SHARED)
def test_no_rows_zero_rows_and_poison(name):
    assert qfunc.quantize_activation(jnp.zeros((0, 128)), name).codes.shape == (0, 128)
    zero = qfunc.quantize_activation(jnp.zeros((3, 128)), name)
    assert not np.any(np.asarray(zero.codes, np.float32)) and np.all(np.isfinite(np.asarray(zero.scale)))
    x = jnp.ones((3, 128)).at[1, 5].set(jnp.nan)
    scale = np.asarray(qfunc.quantize_activation(x, name).scale)
    assert np.isnan(scale[min(1, scale.shape[0] - 1)]).any(), "a poisoned row must not look healthy"


def test_what_cannot_be_quantized_says_so():
    x = jnp.ones((2, 64))
    for spec, words in (("w4a16_g32", "floating point"), ("llm_int8", "outlier"), ("w8a8_dynamik", "w8a8_dynamic")):
        with pytest.raises(ValueError, match=words):
            qfunc.quantize_activation(x, spec)
    q = qfunc.quantize({"kernel": jnp.ones((32, 8))}, "w8a8_dynamic")["kernel"]
    with pytest.raises(ValueError, match=r"32.*\(2, 64\)"):
        qfunc.quantize_activation(x, q)

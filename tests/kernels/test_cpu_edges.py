"""The edges of the native kernels: leaves of other types, sums near their limit, codes of NaN, and operands that the handlers refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import both
from near import near

import qfunc
from qfunc import ActivationSpec, Granularity
from qfunc.kernels.cpu import _library

pytestmark = pytest.mark.skipif(_library.isa() is None, reason=f"no native kernels: {_library.load()[1]}")


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["nf4_dq", "nvfp4", "nvfp4_a16", "mxfp4_dual", "w4a16_g128_asym", "w8a8_static_asym"])
def test_a_model_that_was_cast_as_a_whole(rng, name, dtype):
    x, w = normal(rng, 5, 512), normal(rng, 512, 40) / 20
    q = qfunc.quantize({"kernel": w}, name, calibration={"kernel": x})["kernel"]
    q = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf, q)
    near(*both(qfunc.matmul, x, q))
    near(*both(qfunc.take, q, jnp.asarray([3, 0, 39])))


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("activation", ["w8a8_dynamic", "fp8_dynamic", "mxfp8", "nvfp4"])
def test_blocks_of_ggml_meet_quantized_activations(rng, activation, rows):
    blocks = rng.integers(0, 256, (33, 4, 18), np.uint8)
    blocks[..., :2] = rng.normal(0, 0.1, (33, 4)).astype(np.float16)[..., None].view(np.uint8)
    scheme = qfunc.scheme("gguf:q4_0").replace(name="mixed", activation=qfunc.scheme(activation).activation)
    near(*both(qfunc.matmul, normal(rng, rows, 128), qfunc.QTensor(jnp.asarray(blocks.reshape(33, -1)), scheme=scheme)))


@pytest.mark.parametrize(("rule", "zero"), [("amax_half_inverse", None), ("minmax_inverse", "int"), ("amax", None)])
def test_codes_of_one_scale_bit_for_bit(rng, rule, zero):
    spec = ActivationSpec("int8", Granularity("tensor"), scale_rule=rule, zero=zero)
    for _ in range(20):
        x = normal(rng, 50, 70)
        chosen = qfunc.quantize_activation(x, spec)
        with qfunc.use("reference"):
            reference = qfunc.quantize_activation(x, spec)
        np.testing.assert_array_equal(chosen.codes, reference.codes)
        np.testing.assert_array_equal(chosen.scale, reference.scale)


@pytest.mark.parametrize("name", ["fp8_e5m2_dynamic", "fp8_dynamic", "mxfp8", "mxfp8_e5m2"])
def test_nan_has_the_code_of_a_cast(rng, name):
    x = normal(rng, 4, 96).at[1, 40].set(jnp.nan).at[2, 7].set(-jnp.nan)
    native, reference = both(lambda x: qfunc.quantize_activation(x, name), x)
    np.testing.assert_array_equal(np.asarray(native.codes).view(np.uint8), np.asarray(reference.codes).view(np.uint8))


@pytest.mark.parametrize("rows", [1, 9])
def test_int32_sums_near_their_limit(rng, rows):
    columns = 100_000
    codes = jnp.asarray(np.where(rng.random((5, columns)) < 0.001, -127, 127), jnp.int8)
    q = dataclasses.replace(qfunc.quantize({"kernel": normal(rng, columns, 5)}, "w8a8_dynamic")["kernel"], codes=codes)
    x = jnp.asarray(np.where(rng.random((rows, columns)) < 0.001, -1, 1), jnp.float32)
    native, reference = both(qfunc.matmul, x, q)
    near(native, reference, 1e-6)
    exact = 127.0 * np.asarray(x, np.float64) @ np.asarray(codes, np.float64).T
    assert exact.max() > 0.98 * 127**2 * columns
    near(native, exact * np.asarray(q.scale, np.float64)[:, 0] / 127, 1e-6)


def test_a_folder_without_the_library_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv(_library.FOLDER, str(tmp_path))
    isa, reason = _library.load.__wrapped__()
    assert isa is None and str(tmp_path) in reason and _library.FOLDER in reason


BYTES, ONES = jnp.ones((1, 5, 128), jnp.int8), jnp.ones((1, 5, 1))
EMPTY, ABSENT = jnp.zeros(0, jnp.float32), jnp.zeros((0, 1, 1), jnp.float32)
NONE, GROUP, GIVEN = 0, 3, 4
NESTED = {"scale": ONES.astype(jnp.uint8), "outer": jnp.ones((1, 1, 1)), "mean": jnp.ones(1), "map": jnp.ones(256), "scale_type": 7}


def handler(mode=NONE, code=0, bits=8, scale_type=1, zero_kind=0, share=1, x_group=128, codes=BYTES, scale=ONES, columns=128, **operands):
    """`qfunc_matmul` of ones, 6 x 128 by 128 x 5, called as no lowering of ours does."""
    x = jnp.ones((1, 6, columns))
    found = {name: operands.get(name, default) for name, default in (
        ("x_scale", EMPTY), ("x_zero", EMPTY), ("codes", codes), ("scale", scale), ("outer", ABSENT), ("zero", ABSENT), ("mean", EMPTY),
        ("map", EMPTY), ("table", EMPTY), ("bias", EMPTY), ("sizes", EMPTY))}
    small = dict(code=code, bits=bits, offset=0, scale_type=scale_type, zero_kind=zero_kind, mode=mode, rule=0, mantissa=0, exponent=0,
                 sign=0, bump=0, emax=0)
    large = dict(group=columns, share=share, x_group=min(x_group, columns), limit=131071, together=0)
    floats = dict(clip=1, lowest=-127, highest=127, divisor=1, threshold=0)
    attributes = {name: kind(value) for kind, group in ((np.int32, small), (np.int64, large), (np.float32, floats))
                  for name, value in group.items()}
    return jax.ffi.ffi_call("qfunc_matmul", jax.ShapeDtypeStruct((1, 6, 5), jnp.float32))(x, *found.values(), **attributes)


@pytest.mark.parametrize(("call", "message"), [
    ({"code": 8, "bits": 2, "columns": 100, "codes": jnp.zeros((1, 5, 0), jnp.uint8), "share": 5}, "codes do not have the shape"),
    ({"code": 8, "bits": 60, "codes": jnp.zeros((1, 5, 0), jnp.uint8)}, "codes do not have the shape"),
    ({"code": 3, "bits": 3, "codes": jnp.zeros((1, 5, 48), jnp.uint8), "table": jnp.ones(16)}, "another number of bits"),
    ({"code": 4, "bits": 4, "codes": jnp.zeros((1, 5, 64), jnp.uint8), "table": jnp.ones(32)}, "another number of bits"),
    ({"code": 2, "bits": 8}, "another number of bits"),
    ({"code": 0, "bits": 4, "codes": jnp.zeros((1, 5, 64), jnp.int8)}, "another number of bits"),
    ({"code": 9}, "unknown weight code"),
    ({"scale_type": 0, "scale": ONES.astype(jnp.int8)}, "unknown type of scale"),
    ({"scale_type": 8}, "unknown type of scale"),
    ({"scale_type": 2}, "another type than announced"),
    ({"share": -1}, "scale must be"),
    ({"zero_kind": 3}, "unknown kind of zero point"),
    ({"zero_kind": 1, "zero": ONES}, "zero must have the shape of scale"),
    ({**NESTED, "mean": jnp.ones(1, jnp.bfloat16)}, "nested scales need their levels"),
    ({**NESTED, "map": jnp.ones(256, jnp.uint8)}, "nested scales need their levels"),
    ({"mode": GIVEN, "x_group": 32, "x_scale": jnp.ones(6)}, "one of a whole row"),
    ({"mode": GROUP, "x_group": 32, "x_zero": jnp.zeros(6, jnp.int32)}, "groups of x have no zero points"),
    ({"mode": 7}, "unknown activation"),
])
def test_handlers_refuse_what_they_cannot_read(call, message):
    with pytest.raises(Exception, match=message):
        handler(**call).block_until_ready()


@pytest.mark.parametrize("call", [{}, NESTED, {"mode": GIVEN, "x_scale": jnp.ones(6)}, {"mode": GROUP, "x_group": 32}])
def test_handlers_take_what_they_can(call):
    handler(**call).block_until_ready()

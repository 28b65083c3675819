"""Every element code against ml_dtypes, bitsandbytes and the definitions in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

from qfunc import _codes, _numerics

DTYPES = {"fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2, "fp4_e2m1": ml_dtypes.float4_e2m1fn,
          "fp6_e2m3": ml_dtypes.float6_e2m3fn, "fp6_e3m2": ml_dtypes.float6_e3m2fn}
FLOATS, TABLES = list(DTYPES), ["nf4", "fp4_bnb"]
INTS = [f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 9)]


def encode(name, x, rounding="rne"):
    return np.asarray(jax.jit(lambda x: _codes.CODES[name].encode(x, rounding))(jnp.asarray(x, jnp.float32)))


def decode(name, codes):
    return np.asarray(jax.jit(_codes.CODES[name].decode)(jnp.asarray(codes)))


def bits(codes):
    return codes.view(np.uint8) if codes.dtype.itemsize == 1 and codes.dtype != np.uint8 else codes


def hard_cases(name, rng):
    """All numbers of the format, all midpoints, their neighbours on both sides, beyond the range, and noise, with both signs."""
    grid = oracle.magnitudes(name)
    exact = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2]).astype(np.float32)
    near = np.concatenate([exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))])
    near = near[np.abs(near) > 1e-30]                                       # XLA on CPU takes float32 subnormals for zero
    noise = rng.standard_normal(4000) * np.exp(rng.uniform(-15, 15, 4000))
    x = np.concatenate([[0, 1e30, 3.4e38], near, noise]).astype(np.float32)
    return np.concatenate([x, -x])


@pytest.mark.parametrize("name", FLOATS)
def test_floats_equal_ml_dtypes_bit_for_bit_and_saturate(rng, name):
    x = hard_cases(name, rng)
    largest = float(ml_dtypes.finfo(DTYPES[name]).max)
    want = np.clip(x, -largest, largest).astype(DTYPES[name])
    np.testing.assert_array_equal(bits(encode(name, x)), want.view(np.uint8))
    np.testing.assert_array_equal(bits(encode(name, x)), oracle.encode(x.astype(np.float64), name))
    np.testing.assert_array_equal(np.asarray(_codes.CODES[name].encode(jnp.asarray(x))), encode(name, x), err_msg="eager equals jit")


@pytest.mark.parametrize("name", FLOATS)
def test_every_code_decodes_as_ml_dtypes_says(name):
    codes = np.arange(2 ** _codes.CODES[name].bits, dtype=np.uint8)
    want = codes.view(DTYPES[name]).astype(np.float32)
    stored = codes.view(DTYPES[name]) if _codes.CODES[name].bits == 8 else codes
    np.testing.assert_array_equal(decode(name, stored), want)
    constant = jax.jit(lambda: _codes.CODES[name].decode(jnp.asarray(stored)))
    np.testing.assert_array_equal(np.asarray(constant()), want)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(bits(encode(name, want[finite])), codes[finite])


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("rounding", ["rha", "trunc"])
def test_other_roundings_of_floats(rng, name, rounding):
    x = hard_cases(name, rng)
    grid, magnitude = oracle.magnitudes(name), np.abs(x.astype(np.float64))
    middles = (grid[1:] + grid[:-1]) / 2
    index = np.searchsorted(middles if rounding == "rha" else grid[1:], magnitude, side="right")
    np.testing.assert_array_equal(decode(name, encode(name, x, rounding)), np.copysign(grid[index], x))


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_nan_stays_nan_in_fp8_and_overflow_never_makes_one(name):
    codes = encode(name, np.array([np.nan, np.inf, -np.inf, 1e38, 465.0, 57345.0], np.float32))
    values = decode(name, codes)
    assert np.isnan(values[0]) and np.all(np.isfinite(values[1:]))


@pytest.mark.parametrize("name", INTS)
def test_integers_clip_and_round_half_to_even(rng, name):
    width, signed = int(name[-1]), name.startswith("int")
    low, high = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if signed else (0, 2**width - 1)
    halves = np.arange(low - 3, high + 4) + 0.5
    x = np.concatenate([halves, np.nextafter(halves, 0), np.nextafter(halves, 1e9), rng.uniform(low - 2, high + 2, 500), [1e30, -1e30]])
    x = x.astype(np.float32)
    want = np.clip(np.round(x.astype(np.float64)), low, high)
    codes = encode(name, x)
    assert codes.dtype == (np.int8 if name == "int8" else np.uint8)
    np.testing.assert_array_equal(decode(name, codes), want)
    np.testing.assert_array_equal(codes, want if not signed or width == 8 else want - low, err_msg="below 8 bits as offset binary")


@pytest.mark.parametrize("rounding", ["rne", "rha", "trunc"])
def test_rounding_against_float64(rng, rounding):
    halves = np.arange(-70, 70) + 0.5
    x = np.concatenate([halves, np.nextafter(halves, -1e9, dtype=np.float32), np.nextafter(halves, 1e9, dtype=np.float32),
                        [0.49999997, -0.49999997, 2**23 + 1, 0.0], rng.uniform(-300, 300, 1000)]).astype(np.float32)
    y = x.astype(np.float64)
    want = {"rne": np.round(y), "rha": np.sign(y) * np.floor(np.abs(y) + 0.5), "trunc": np.trunc(y)}[rounding]
    np.testing.assert_array_equal(jax.jit(lambda x: _numerics.round_by(x, rounding))(x), want)


def test_division_is_correctly_rounded_however_it_is_compiled(rng):
    x = (rng.standard_normal((64, 96)) * np.exp(rng.uniform(-9, 9, (64, 96)))).astype(np.float32)
    for shape in ((), (64, 1), (1, 96), (1, 1), (64, 96)):
        y = rng.uniform(0.1, 9, shape).astype(np.float32)
        want = (x.astype(np.float64) / y).astype(np.float32)
        np.testing.assert_array_equal(_numerics.divide(x, y), want, err_msg=f"eager {shape}")
        np.testing.assert_array_equal(jax.jit(_numerics.divide)(x, y), want, err_msg=f"jit {shape}")
        np.testing.assert_array_equal(jax.jit(lambda x, y=y: _numerics.divide(x, y))(x), want, err_msg=f"constant {shape}")
        stacked = jax.jit(jax.vmap(_numerics.divide, in_axes=(0, None)))(np.stack([x, -x]), y)
        np.testing.assert_array_equal(stacked, np.stack([want, -want]), err_msg=f"vmap {shape}")
        both = jax.jit(jax.vmap(_numerics.divide))(np.stack([x, -x]), np.stack([y, y]))
        np.testing.assert_array_equal(both, np.stack([want, -want]), err_msg=f"vmap of both {shape}")
    for constant in (127.0, 7.5, 448.0, 6.0):
        want = (x.astype(np.float64) / constant).astype(np.float32)
        np.testing.assert_array_equal(jax.jit(lambda x, c=constant: _numerics.divide(x, c))(x), want)


def test_products_and_sums_keep_both_roundings(rng):
    x, y, z = (rng.standard_normal(5000).astype(np.float32) for _ in range(3))
    want = x * y + z                                                            # numpy rounds twice
    np.testing.assert_array_equal(jax.jit(_numerics.multiply_add)(x, y, z), want)
    np.testing.assert_array_equal(_numerics.multiply_add(x, y, z), want)


def test_e8m0_is_ml_dtypes_for_all_256_bytes():
    byte = np.arange(256, dtype=np.uint8)
    want = byte.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    for function in (_numerics.decode_e8m0, jax.jit(_numerics.decode_e8m0)):
        np.testing.assert_array_equal(np.asarray(function(jnp.asarray(byte))).view(np.int32)[:255], want.view(np.int32)[:255])
        assert np.isnan(np.asarray(function(jnp.asarray(byte)))[255])
    np.testing.assert_array_equal(jax.jit(lambda: _numerics.decode_e8m0(jnp.asarray(byte)))(), want)


@pytest.mark.parametrize("name", TABLES)
def test_tables_equal_bitsandbytes(rng, name):
    import torch
    from bitsandbytes import functional
    kind = name.removesuffix("_bnb")
    table = functional.get_4bit_type(kind, device="cpu").numpy()
    np.testing.assert_array_equal(decode(name, np.arange(16, dtype=np.uint8)), table)
    x = np.clip(rng.standard_normal(64 * 512) * 0.4, -1, 1).astype(np.float32)
    x[::64] = rng.choice([-1, 1], 512)                                         # so that every block of 64 has amax 1
    packed, state = functional.quantize_4bit(torch.from_numpy(x), blocksize=64, quant_type=kind)
    packed = packed.numpy().reshape(-1)
    theirs = np.stack([packed >> 4, packed & 15], -1).reshape(-1)
    ours = encode(name, x)
    middle = np.sort(table.astype(np.float64))
    middle = (middle[1:] + middle[:-1]) / 2
    clear = np.abs(x[:, None] - middle).min(-1) > 1e-6                          # they compare with rounded midpoints
    np.testing.assert_array_equal(table[ours][clear], table[theirs][clear])
    np.testing.assert_array_equal(decode(name, theirs), functional.dequantize_4bit(torch.from_numpy(packed), state).numpy().reshape(-1))
    assert clear.mean() > 0.99


@pytest.mark.parametrize("name", TABLES)
def test_tables_take_the_nearest_value(rng, name):
    table = oracle.TABLES[name]
    x = np.concatenate([table, rng.uniform(-1.5, 1.5, 3000), [0.0, -0.0]]).astype(np.float32)
    got = decode(name, encode(name, x)).astype(np.float64)
    distance = np.abs(x[:, None].astype(np.float64) - table)
    np.testing.assert_allclose(np.abs(got - x), distance.min(-1), atol=1e-7)


def test_unknown_code_lists_those_there_are():
    with pytest.raises(ValueError, match="fp3.*int2.*nf4"):
        _codes.code("fp3")

"""Linear layers that share one quantization of their input: the same numbers and derivatives as apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from near import near

import qfunc
from qfunc.layers.linear import linear, linears


def layers(rng, scheme, count=3):
    def floats(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)
    params = [{"kernel": floats(64, 32 + 8 * i), "bias": floats(32 + 8 * i)} for i in range(count)]
    return qfunc.quantize(params, scheme)


@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "fp8_dynamic", "mxfp8", "w4a16_g32", "fp8"])
def test_sharing_changes_neither_values_nor_derivatives(rng, scheme):
    params = layers(rng, scheme)
    x = jnp.asarray(rng.standard_normal((5, 64)), jnp.float32)
    for got, want in zip(linears(params, x), [linear(p, x) for p in params], strict=True):
        near(got, want, 1e-6)
    seed = [jnp.asarray(rng.standard_normal(y.shape), jnp.float32) for y in linears(params, x)]
    (shared,) = jax.vjp(lambda x: linears(params, x), x)[1](seed)
    (apart,) = jax.vjp(lambda x: [linear(p, x) for p in params], x)[1](seed)
    near(shared, apart)
    assert np.abs(shared).max() > 1


def test_the_input_is_quantized_once(rng):
    params = layers(rng, "w8a8_dynamic")
    told = qfunc.explain(lambda x: linears(params, x), jnp.ones((5, 64)))
    counts = {}
    for choice in told:
        counts[choice.primitive] = counts.get(choice.primitive, 0) + choice.count
    assert counts == {"quantize_activation": 1, "quantized_matmul": 3}


def test_calibrated_scales_of_their_own_are_not_shared(rng):
    floats = [{"kernel": jnp.asarray(rng.standard_normal((64, 32)), jnp.float32)} for _ in range(2)]
    x = jnp.asarray(rng.standard_normal((5, 64)), jnp.float32)
    params = qfunc.quantize(floats, "w8a8_static", calibration={"0/kernel": x, "1/kernel": 3 * x})
    for got, p in zip(linears(params, x), params, strict=True):
        np.testing.assert_array_equal(got, linear(p, x))

"""`mxfp4_dual`: powers of two for 32 elements under a float32 for 512, against a plain float64 loop."""

import warnings

import jax
import numpy as np
import pytest
from near import near

import qfunc
from qfunc._codec import outer_scale

VALUES = np.array([0, .5, 1, 1.5, 2, 3, 4, 6])


def by_hand(row):
    """(scale of every element, its value) of one row, in float64 but for the scales."""
    scales, values = np.zeros(len(row)), np.zeros(len(row))
    for start in range(0, len(row), 512):
        span = row[start: start + 512]
        outer = np.float32(np.abs(span).max() / np.float32(6)) or np.float32(1)
        for at in range(0, len(span), 32):
            block = (span[at: at + 32] / outer).astype(np.float32)
            amax = np.abs(block).max()
            scale = 2.0 ** (np.frexp(amax)[1] - 3) if amax else 1.0         # floor(log2(amax)) - 2, which log2 rounds up below 2^-3
            inside = np.clip(span[at: at + 32] / (scale * outer), -6, 6)
            nearest = np.abs(np.abs(inside)[:, None] - VALUES).argmin(1)
            scales[start + at: start + at + 32] = scale * outer
            values[start + at: start + at + 32] = np.sign(inside) * VALUES[nearest] * scale * outer
    return scales, values


@pytest.mark.parametrize("columns", [pytest.param(512, marks=pytest.mark.slow), pytest.param(1024, marks=pytest.mark.slow), 96, 800])
def test_weights_and_activations_by_the_formula(columns, rng):
    w = (rng.standard_normal((columns, 6)) * np.exp(2 * rng.standard_normal((columns, 1)))).astype(np.float32)
    w[:32] = 0
    q = qfunc.quantize({"up": {"kernel": w}}, "w4a4_mxfp4_dualscale")["up"]["kernel"]
    assert q.scheme.name == "mxfp4_dual" and q.scale.shape == (6, columns // 32) and q.scale2.shape == (6, -(-columns // 512))
    scales, values = map(np.stack, zip(*(by_hand(row) for row in w.T), strict=True))
    assert np.allclose(np.repeat(outer_scale(q.leaves, q.scheme.weight), 32, 1), scales, rtol=1e-6)
    got = np.asarray(q.dequantize("float32")).T
    # A value in the middle between two codes may fall to either side.
    assert np.mean(np.abs(got - values) > 1e-5 * np.abs(values).max()) < 2e-3
    x = qfunc.quantize_activation(w.T, "mxfp4_dual")
    assert np.array_equal(x.scale, outer_scale(q.leaves, q.scheme.weight))


def test_what_ascends_operator_gives_for_eights():
    x = qfunc.quantize_activation(np.full((1, 512), 8, np.float32), "mxfp4_dual")
    assert np.allclose(x.scale, 8 / 6) and (x.codes == 7).all()


def test_zeros_and_poison(rng):
    w = rng.standard_normal((1024, 4)).astype(np.float32)
    w[:512, 1], w[600, 2] = 0, np.nan
    q = jax.jit(lambda w: qfunc.quantize({"up": {"kernel": w}}, "mxfp4_dual"))(w)["up"]["kernel"]
    got = np.asarray(q.dequantize("float32"))
    assert (got[:512, 1] == 0).all() and np.isnan(got[600, 2]) and np.isfinite(got[:, 3]).all()


def test_the_product_is_that_of_the_dequantized_sides(rng):
    w, x = rng.standard_normal((1024, 24)).astype(np.float32), rng.standard_normal((5, 1024)).astype(np.float32)
    q = qfunc.quantize({"up": {"kernel": w}}, "mxfp4_dual")["up"]["kernel"]
    a = qfunc.quantize_activation(x, "mxfp4_dual")
    table = np.concatenate([VALUES, -VALUES])
    rounded = table[np.asarray(a.codes)] * np.repeat(np.asarray(a.scale, np.float64), 32, -1)
    want = rounded @ np.asarray(q.dequantize("float32"), np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # where there are no native kernels, the reference says so
        got = np.asarray(jax.jit(qfunc.matmul)(x, q))
    near(got, want)


def test_slices_and_files_keep_the_outer_scales(tmp_path, rng):
    from qfunc.interop import load_native, save_native
    w = rng.standard_normal((3, 1024, 8)).astype(np.float32)
    stack = qfunc.quantize({"experts": {"up_proj": {"kernel": w}}}, "mxfp4_dual")["experts"]["up_proj"]["kernel"]
    assert stack.scale2.shape == (3, 8, 2)
    assert np.array_equal(stack[1].dequantize("float32"), stack.dequantize("float32")[1])
    save_native(tmp_path, {"up": {"kernel": stack}})
    assert np.array_equal(load_native(tmp_path).params["up"]["kernel"].dequantize("float32"), stack.dequantize("float32"))


def test_a_split_of_the_inputs_takes_whole_spans(rng):
    from qfunc.layers.parallel import _row
    q = qfunc.quantize({"up": {"kernel": rng.standard_normal((2048, 8)).astype(np.float32)}}, "mxfp4_dual")["up"]["kernel"]
    specs = _row(q, "tp", 2, "up/kernel")
    assert specs.scale2 == specs.scale == jax.sharding.PartitionSpec(None, "tp")
    with pytest.raises(ValueError, match="units of 512"):
        _row(q, "tp", 8, "up/kernel")

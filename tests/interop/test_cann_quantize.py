"""Activations on the torch side against `qfunc._activation`, and the rules of the primitives against the primitives."""

import jax
import jax.numpy as jnp
import npu_cpu
import npu_weights
import numpy as np
import pytest

import qfunc
from qfunc._activation import quantize_rows
from qfunc._codes import code as element_code
from qfunc.kernels import use

torch = pytest.importorskip("torch")

SPECS = {spec: name for name in sorted(qfunc.schemes)
         if (spec := qfunc.scheme(name).activation) is not None and spec.outlier_threshold is None}


@pytest.fixture(autouse=True)
def calls():
    made = npu_cpu.install()
    made.clear()
    return made


def _same(mine, theirs, what=""):
    theirs = np.asarray(theirs)
    mine = mine.to(torch.float32).numpy() if theirs.dtype.itemsize < 4 and theirs.dtype.kind not in "iu" else mine.numpy()
    theirs = theirs.astype(np.float32) if theirs.dtype.kind not in "iu" else theirs
    np.testing.assert_array_equal(mine, theirs, what)


@pytest.mark.parametrize("spec", SPECS, ids=SPECS.get)
def test_composed_codes_and_scales_equal_the_specification(rng, spec):
    from qfunc.interop.cann import _compose
    x = rng.standard_normal((3, 4, 128)).astype(np.float32) * np.exp2(rng.integers(-6, 6, (3, 4, 1))).astype(np.float32)
    x[1, 2] = 0
    x[0, 0, :3] = (0.25, -0.25, 1e-30)
    scale, zero = (np.float32([[0.02]]), np.int32([[5]])) if spec.mode == "static" else (None, None)
    zero = zero if spec.zero else None
    own = _compose.quantize(torch.from_numpy(x), spec, *(None if v is None else torch.from_numpy(v) for v in (scale, zero)), scope=1)
    ref = quantize_rows(jnp.asarray(x), spec, scale, zero, 1)
    for name, a, b in zip(("codes", "scale", "zero"), own, ref, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert tuple(a.shape) == b.shape
            _same(a, b, name)
    values = ref.codes.astype(jnp.float32) if element_code(spec.code).integer else element_code(spec.code).decode(ref.codes)
    np.testing.assert_array_equal(_compose.decode(own[0], spec.code).numpy(), np.asarray(values))


RULES = ["mx_floor", "mx_even", "mx_even1", "mx_ceil", "mx_rceil", "mx_ceil_x"]


@pytest.mark.parametrize("rounding", ["rne", "rha"])
@pytest.mark.parametrize("code", ["fp8_e4m3", "fp4_e2m1"])
@pytest.mark.parametrize("rule", RULES)
def test_microscaled_rows_equal_the_specification_natively_or_composed(rng, calls, rule, code, rounding):
    from qfunc._spec import ActivationSpec, group
    from qfunc.interop.cann._quantize import MX_OPERATOR, MX_ROUNDING, Rows
    spec = ActivationSpec(code, group(32), scale_dtype="e8m0", scale_rule=rule, rounding=rounding)
    x = npu_weights.activation(rng, 4, 192)
    # Largest elements on and beside the numbers at which the rules part: 1.5, 1.75 and the powers of two.
    x[2, ::32] = np.float32([4.0, 6.0, 7.0, 6.03125, 6.96875, 7.03125]) * np.float32(8)
    x[3, ::32] = np.float32([448, 256, 480, 392, 450, 1])
    native = (code, rule) in MX_OPERATOR and (code, rounding) in MX_ROUNDING
    codes, scale = Rows(torch.from_numpy(x).to(torch.bfloat16), spec).mx()
    assert [name for name, *_ in calls] == (["npu_dynamic_mx_quant"] if native else [])
    ref = quantize_rows(jnp.asarray(x), spec)
    exponents = (np.asarray(ref.scale).view(np.int32) >> 23).astype(np.uint8)
    zero = np.abs(x.reshape(4, 6, 32)).max(-1) == 0                     # the operator's byte of a block of zeros is its own affair
    np.testing.assert_array_equal(np.where(zero, 0, scale.flatten(1).numpy()), np.where(zero, 0, exponents))
    theirs = np.asarray(ref.codes)
    theirs = theirs[:, 0::2] | theirs[:, 1::2] << 4 if code == "fp4_e2m1" else theirs.view(np.uint8)
    values = codes.view(torch.uint8).numpy()
    np.testing.assert_array_equal(values & ~np.uint8(_minus_zero(values, code)), theirs & ~np.uint8(_minus_zero(theirs, code)))


def _minus_zero(codes, code):
    """The sign bits of zeros: -0 and 0 are one number."""
    if code == "fp8_e4m3":
        return np.where(codes & 127 == 0, 128, 0).astype(np.uint8)
    return (np.where(codes & 7 == 0, 8, 0) | np.where(codes & 0x70 == 0, 128, 0)).astype(np.uint8)


def _run(function, weights, *arrays, soc="A2", device="cpu"):
    """Interpret a function whose equations are the three primitives alone."""
    from qfunc.interop import cann
    from qfunc.interop.cann._leaves import to_torch
    from qfunc.interop.cann._rules import RULES
    placed = cann.place(weights, device, soc)
    jaxpr = jax.make_jaxpr(function)(weights, *arrays).jaxpr
    flat = [part for w in jax.tree.leaves(placed) for part in w.parts] + [to_torch(a) for a in arrays]
    values = dict(zip(jaxpr.invars, flat, strict=True))
    for equation in jaxpr.eqns:
        out = RULES[equation.primitive.name](equation.params, [values[v] for v in equation.invars], soc=soc)
        values.update(zip(equation.outvars, out, strict=True))
    return [values[v] for v in jaxpr.outvars]


@pytest.mark.parametrize("scheme, soc", [("w8a8_dynamic", "A2"), ("w4a4_dynamic", "A2"), ("mxfp8", "A5"), ("w4a8_dynamic", "A3")])
def test_several_weights_share_one_quantization(rng, calls, scheme, soc):
    weights = {name: npu_weights.weight(rng, scheme, 256, 16, powers=True) for name in ("k", "q", "v")}
    x = jnp.asarray(npu_weights.activation(rng, 3, 256, top=7)).astype(jnp.bfloat16)

    def function(w, x):
        codes = qfunc.quantize_activation(x, w["q"].scheme)
        return [qfunc.matmul(codes, w[name], out_dtype=x.dtype) for name in ("q", "k", "v")]

    out = _run(function, weights, x, soc=soc)
    with use("reference"):
        ref = function(weights, x)
    for mine, theirs in zip(out, ref, strict=True):
        theirs = np.asarray(theirs.astype(jnp.float32))
        # One step of the last cast; float32 sums of floats in two orders.
        np.testing.assert_allclose(mine.to(torch.float32).numpy(), theirs, rtol=2.0**-7, atol=1e-5 * np.abs(theirs).max())
    assert [name for name, *_ in calls].count("npu_quant_matmul") == 3
    assert sum(name in ("npu_dynamic_quant", "npu_dynamic_mx_quant") for name, *_ in calls) == 1


@pytest.mark.parametrize("scheme, soc", [("w8a8_dynamic", "A2"), ("w4a16_g32_asym", "A2"), ("mxfp4", "A5")])
def test_batch_axes_of_a_weight_run_one_by_one(rng, scheme, soc):
    w = {"layers": npu_weights.weight(rng, scheme, 64, 16, experts=3)}
    x = jnp.asarray(npu_weights.activation(rng, 3, 2, 64)).astype(jnp.bfloat16)
    bias = jnp.asarray(rng.standard_normal((3, 16)).astype(np.float32))

    def function(w, x, bias):
        return qfunc.matmul(x, w["layers"], bias=bias)

    jitted = _run(function, w, x, bias, soc=soc)
    with use("reference"):
        ref = np.asarray(function(w, x, bias).astype(jnp.float32))
    np.testing.assert_allclose(jitted[0].to(torch.float32).numpy(), ref, rtol=2.0**-6, atol=0.02 * np.abs(ref).max())


def test_parts_give_what_jax_has(rng):
    for scheme, soc in (("w8a8_dynamic", "A2"), ("w4a4_dynamic", "A2"), ("mxfp8", "A5"), ("mxfp4", "A5")):
        x = jnp.asarray(npu_weights.activation(rng, 2, 3, 64)).astype(jnp.bfloat16)
        out = _run(lambda w, x, scheme=scheme: tuple(qfunc.quantize_activation(x, scheme)[:2]), {}, x, soc=soc)
        with use("reference"):
            ref = qfunc.quantize_activation(x, scheme)
        for mine, theirs in zip(out, ref[:2], strict=True):
            assert mine.shape == theirs.shape
            _same(mine.tensor(), theirs)


def test_weights_that_a_function_closes_over_are_placed_when_met(rng):
    from qfunc.interop.cann._leaves import leaves_of, to_torch
    from qfunc.interop.cann._rules import RULES
    q = npu_weights.weight(rng, "w8a8_dynamic", 64, 16)
    x = jnp.asarray(npu_weights.activation(rng, 3, 64)).astype(jnp.bfloat16)
    equation = next(e for e in jax.make_jaxpr(qfunc.matmul)(x, q).eqns if e.primitive.name == "quantized_matmul")
    tensors = list(leaves_of(q)[1].values())
    first, second = (RULES["quantized_matmul"](equation.params, [to_torch(x), *tensors], soc="A2")[0] for _ in range(2))
    with use("reference"):
        ref = np.asarray(qfunc.matmul(x, q).astype(jnp.float32))
    assert torch.equal(first, second)
    np.testing.assert_allclose(first.to(torch.float32).numpy(), ref, rtol=2.0**-7)
    with pytest.raises(ValueError, match="runs on A2 and A3 alone"):
        RULES["quantized_matmul"](equation.params, [to_torch(x), *tensors], soc="A5")


@pytest.mark.parametrize("numbers", ["one", "head", "channel"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_an_int8_cache_is_that_of_the_layers(rng, calls, numbers, asymmetric):
    from qfunc.interop import cann
    from qfunc.layers.cache import update
    heads, size = 3, 16
    count = {"one": 1, "head": heads, "channel": heads * size}[numbers]
    scale = rng.uniform(0.01, 0.03, count).astype(np.float32)
    zero = rng.integers(-9, 9, count).astype(np.float32) if asymmetric else None
    x = npu_weights.activation(rng, 2, 5, heads, size)
    scales = {"k_scale": jnp.asarray(scale), **({"k_zero": jnp.asarray(zero)} if asymmetric else {})}
    entry, seen = update(None, jnp.asarray(x).astype(jnp.bfloat16), 0, "k", "int8", scales)
    own = [None if v is None else torch.from_numpy(v) for v in (scale, zero)]
    codes = cann.write_cache(torch.from_numpy(x).to(torch.bfloat16), *own)
    np.testing.assert_array_equal(codes.numpy(), np.asarray(entry["codes"]))
    _same(cann.read_cache(codes, *own), seen)
    assert [name for name, *_ in calls] == ["npu_quantize"]
    with pytest.raises(ValueError, match="expected 1, 3 or 48 numbers, found 2"):
        cann.write_cache(torch.from_numpy(x), torch.ones(2))

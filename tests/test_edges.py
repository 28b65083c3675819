"""What a tree, a calibration or a mode of JAX may bring that is not usual: right results, or an error that names it."""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from near import near

import qfunc
from qfunc import ActivationSpec, Granularity, Rule, Scheme, WeightSpec


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def static(scale):
    return np.asarray(scale)[..., 0, 0]


# ---- calibration --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("layers", "experts"), [(2, 3), (3, 2), (1, 4)])
def test_experts_of_a_layer_share_what_the_layer_saw(rng, layers, experts):
    w, x = normal(rng, layers, experts, 32, 32) / 6, normal(rng, 9, 32)

    def apply(params, x):
        return jax.lax.scan(lambda x, w: (3 * jnp.einsum("td,edf->etf", x, w).mean(0), None), x, params["w"])[0]

    found = qfunc.calibrate(apply, {"w": w}, [x])
    assert found["w"].count.shape == (layers,)
    q = qfunc.quantize({"w": w}, {"w": Rule("w8a8_static", batch=2)}, calibration=found)["w"]
    want = np.asarray(found["w"].amax).max(-1) / 127
    near(static(q.input_scale), np.repeat(want[:, None], experts, 1), 1e-6)
    assert layers == 1 or want[0] != want[1]


def test_leading_axes_that_could_be_several_are_refused(rng):
    statistics = qfunc.statistics_of(normal(rng, 2, 9, 32), leading=1)
    with pytest.raises(ValueError, match=r"calibration of w: .*leading axes \(2, 2\).*found \(2,\), which could be several"):
        qfunc.quantize({"w": normal(rng, 2, 2, 32, 8)}, {"w": Rule("w8a8_static", batch=2)}, calibration={"w": statistics})
    with pytest.raises(ValueError, match=r"calibration of w: .*leading axes \(3, 4\).*found \(2,\)$"):
        qfunc.quantize({"w": normal(rng, 3, 4, 32, 8)}, {"w": Rule("w8a8_static", batch=2)}, calibration={"w": statistics})
    shared = jax.tree.map(lambda part: part[None], statistics)         # (1, 2): of every expert its own
    q = qfunc.quantize({"w": normal(rng, 2, 2, 32, 8)}, {"w": Rule("w8a8_static", batch=2)}, calibration={"w": shared})["w"]
    near(static(q.input_scale), np.tile(np.asarray(statistics.amax).max(-1) / 127, (2, 1)), 1e-6)


@pytest.mark.parametrize(("scheme", "needs"), [("w8a8_static", True), ("w8a8_static_asym", True), ("fp8", False)])
def test_a_weight_that_saw_no_row(rng, scheme, needs):
    params, x = {"up": normal(rng, 32, 32), "down": normal(rng, 32, 32)}, normal(rng, 7, 32)

    def apply(p, x):
        return jax.lax.cond(x.sum() > 1e9, lambda y: y @ p["down"], lambda y: y * 1.0, x @ p["up"])

    found = qfunc.calibrate(apply, params, [x])
    if needs:
        with pytest.raises(ValueError, match="^down: .*needs calibration, which saw no row"):
            qfunc.quantize(params, scheme, calibration=found)
    else:
        q = qfunc.quantize(params, scheme, calibration=found)
        assert q["up"].input_scale is not None and q["down"].input_scale is None
    with pytest.raises(ValueError, match="down: .*no rows"):
        qfunc.quantize({"down": params["down"]}, "w8a8_static", calibration={"down": jnp.ones((0, 32))})


# ---- specs and rules ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("spec", "message"), [
    ({"code": "uint8"}, "code"), ({"code": "uint8", "zero": "int"}, "code"), ({"code": "int9"}, "code"), ({"code": "nf4"}, "code"),
    ({"code": "int8", "zero": "float"}, "zero"), ({"code": "fp8_e4m3", "zero": "int"}, "zero"),
    ({"code": "int8", "granularity": Granularity("channel")}, "granularity"), ({"code": "int8", "outer": "row"}, "outer"),
    ({"code": "int8", "scale_rule": "nope"}, "scale_rule"), ({"code": "int8", "scale_rule": "minmax"}, "scale_rule"),
    ({"code": "int8", "scale_rule": "mx_floor"}, "powers of two"), ({"code": "int8", "bound": -1.0}, "bound"),
])
def test_activation_specs_that_mean_nothing_are_refused(rng, spec, message):
    with pytest.raises(ValueError, match=f"w: activations: expected .*{message}|w: activations: expected {message}"):
        qfunc.quantize({"w": normal(rng, 32, 8)}, {"w": Scheme("own", WeightSpec("int8"), ActivationSpec(**spec))})


def test_another_scheme_for_what_is_packed_is_no_silence(rng):
    once = qfunc.quantize({"a": normal(rng, 64, 32)}, "w8a16")
    assert qfunc.quantize(once, "w8a16")["a"].scheme.name == "w8a16"
    with pytest.raises(ValueError, match="quantizes nothing: a .already quantized as w8a16"):
        qfunc.quantize(once, "w4a16_g32")
    both = qfunc.quantize({**once, "up": normal(rng, 64, 32)}, "w4a16_g32")
    assert [both[name].scheme.name for name in ("a", "up")] == ["w8a16", "w4a16_g32"]


def test_two_leaves_of_one_path_are_refused_everywhere(rng):
    w = normal(rng, 32, 32)
    params = {"params": {"a": w}, "a": w}
    with pytest.raises(ValueError, match="two leaves have the path 'a'"):
        qfunc.report(params, params)
    with pytest.raises(ValueError, match="two leaves have the path 'a'"):
        qfunc.calibrate(lambda p, x: x @ p["a"], params, [w])


@pytest.mark.parametrize("size", [1e7, 1e-7, 1e-9])
def test_float16_scales_stay_in_their_range(rng, size):
    scheme = Scheme("half", WeightSpec("int4", Granularity("group", 32), scale_dtype="float16"))
    w = size * normal(rng, 64, 8)
    q = qfunc.quantize({"w": w}, {"w": scheme})["w"]
    scale = np.asarray(q.scale, np.float32)
    assert np.isfinite(scale).all() and (scale > 0).all() and np.isfinite(q.dequantize()).all()
    assert np.abs(np.asarray(q.dequantize()) - w).max() <= 1.01 * np.abs(w).max()
    broken = qfunc.quantize({"w": w.at[3, 2].set(jnp.nan)}, {"w": scheme}, check=False)["w"]
    assert np.isnan(broken.dequantize()).any()


# ---- 64 bits, and trees that were cast as a whole ----------------------------------------------------------------------------------

def test_calibration_with_64_bits_enabled(rng):
    w, x = normal(rng, 3, 16, 16), normal(rng, 5, 16)

    def looped(p, x):
        return jax.lax.fori_loop(0, 3, lambda i, x: x @ p["k"][i], x)

    def branched(p, x):
        return jax.lax.cond(x.sum() > 0, lambda: jax.lax.scan(lambda x, w: (x @ w, None), x, p["k"])[0], lambda: x)

    for apply in (lambda p, x: x @ p["k"][1], looped, branched):
        want = qfunc.calibrate(apply, {"k": w}, [x])["k"]
        with jax.enable_x64(True):
            got = qfunc.calibrate(apply, {"k": w}, [x])["k"]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)
        assert [part.dtype for part in jax.tree.leaves(got)] == [part.dtype for part in jax.tree.leaves(want)]


@pytest.mark.parametrize("implementation", ["reference", "chosen"])
@pytest.mark.parametrize("scheme", ["w8a8_static_asym", "w8a8_dynamic", "w4a16_g32_asym", "nf4_dq"])
def test_matmuls_with_64_bits_enabled(rng, scheme, implementation):
    w, x = normal(rng, 2, 64, 8), normal(rng, 5, 64)
    q = qfunc.quantize({"w": w}, {"w": Rule(scheme, batch=1)}, calibration={"w": x})["w"]
    sizes = np.array([2, 3])
    want = qfunc.grouped_matmul(x, q, jnp.asarray(sizes, jnp.int32))
    with jax.enable_x64(True), qfunc.use(implementation) if implementation == "reference" else contextlib.nullcontext():
        near(qfunc.grouped_matmul(x, q, jnp.asarray(sizes)), want)
        near(qfunc.matmul(x[:2], q[0]), want[:2])


def test_float64_beyond_float32_is_refused(rng):
    with jax.enable_x64(True), pytest.raises(ValueError, match="NaN or infinity in a"):
        qfunc.quantize({"a": jnp.asarray(rng.standard_normal((32, 8)) * 1e200)}, "w8a16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scheme", ["fp8_dynamic", "mxfp8", "fp8_w8a16", "nf4", "nvfp4", "int4wo_g32", "w4a16_g32"])
def test_a_tree_that_was_cast_as_a_whole(rng, tmp_path, scheme, dtype):
    q = qfunc.quantize({"w": normal(rng, 128, 8)}, scheme)
    x = normal(rng, 3, 128)
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, q)["w"]
    with qfunc.use("reference"):
        want = qfunc.matmul(x, cast)
    near(want, qfunc.matmul(x, q["w"]), 0.02)
    told = qfunc.explain(qfunc.matmul, x, cast, platform="cpu")[0]
    eight = q["w"].codes.dtype.itemsize == 1 and jnp.issubdtype(q["w"].codes.dtype, jnp.floating)
    assert eight == (told.implementation == "reference") or not _native()
    if not eight:
        near(qfunc.matmul(x, cast), want)
        qfunc.interop.save_native(tmp_path, {"w": cast})
        back = qfunc.interop.load_native(tmp_path).params["w"]
        assert back.scale.dtype == cast.scale.dtype
        np.testing.assert_array_equal(back.dequantize(), cast.dequantize())
    else:
        with pytest.raises(qfunc.CheckpointError, match="codes"):
            qfunc.interop.save_native(tmp_path, {"w": cast})
        assert not list(tmp_path.iterdir())


def _native() -> bool:
    from qfunc.kernels.cpu import _library
    return _library.isa() is not None


# ---- files --------------------------------------------------------------------------------------------------------------------

def test_numbers_of_64_bits_survive_a_file(tmp_path):
    params = {"a": np.array([2**40, -3]), "b": np.array([1 + 2.0**-40])}
    qfunc.interop.save_native(tmp_path, params)
    back = qfunc.interop.load_native(tmp_path).params
    assert all(back[name].dtype == value.dtype and (back[name] == value).all() for name, value in params.items())


def test_a_bare_tensor_is_no_model(rng, tmp_path):
    with pytest.raises(TypeError, match="params: expected nested dicts"):
        qfunc.interop.save_native(tmp_path / "new", qfunc.quantize(normal(rng, 32, 8), "w8a16"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("leaf", "value"), [("input_scale", np.ones((7, 1), np.float32)), ("smooth", np.ones(9, np.float32))])
def test_leaves_of_the_activation_fit_their_weight(rng, tmp_path, leaf, value):
    q = qfunc.quantize({"w": normal(rng, 32, 8)}, "w8a8_dynamic")["w"]
    with pytest.raises(qfunc.CheckpointError, match=f"tensor 'w'.*{leaf} of shape"):
        qfunc.interop.save_native(tmp_path, {"w": dataclasses.replace(q, **{leaf: jnp.asarray(value)})})


@pytest.mark.parametrize("sizes", [(0,), ("a",), (-4,)])
def test_a_view_that_is_none_is_refused(rng, tmp_path, sizes):
    q = qfunc.quantize({"w": normal(rng, 32, 8)}, "w8a16")["w"]
    qfunc.interop.save_native(tmp_path, {"w": q})
    index = tmp_path / "qfunc.json"
    text = json.loads(index.read_text())
    text["tensors"]["w"]["view"]["outs"] = list(sizes)
    index.write_text(json.dumps(text))
    with pytest.raises(qfunc.CheckpointError, match="tensor 'w'"):
        qfunc.interop.load_native(tmp_path)

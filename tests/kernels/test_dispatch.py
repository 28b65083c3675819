"""The table of lowerings: one equation per matmul, a forced choice that jit notices, an explanation that tells the truth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qfunc
from qfunc.kernels import IMPLEMENTATIONS, Implementation, _dispatch


@pytest.fixture
def operands(rng):
    w = jnp.asarray(rng.standard_normal((128, 64)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((3, 128)), jnp.float32)
    return x, qfunc.quantize({"kernel": w}, "w8a8_dynamic")["kernel"]


@pytest.fixture
def marked():
    """An implementation that answers with sevens, for as long as the test runs."""
    def run(call, *operands):
        return jnp.full((*call.x[0].shape[:-1], call.w.matrix_shape[-1]), 7, call.out_dtype)
    row = Implementation("marked", ("cpu",), lambda call, platform: "x is bfloat16" if call.x[0].dtype == jnp.bfloat16 else None, run)
    _dispatch.register("quantized_matmul", row)
    yield row
    IMPLEMENTATIONS["quantized_matmul"].remove(row)


def equations(fn, *args):
    return [e.primitive.name for e in jax.make_jaxpr(fn)(*args).eqns]


def test_one_equation_per_matmul(operands):
    x, q = operands
    assert equations(lambda x: qfunc.matmul(x, q, bias=jnp.zeros(64)), x).count("quantized_matmul") == 1
    shared = equations(lambda x: [qfunc.matmul(qfunc.quantize_activation(x, q), q)], x)
    assert shared.count("quantized_matmul") == 1 and shared.count("quantize_activation") == 1


def test_use_is_part_of_the_cache_key(operands, marked):
    x, q = operands
    with qfunc.use("reference"):
        want = np.asarray(qfunc.matmul(x, q))
    jitted = jax.jit(qfunc.matmul)
    assert np.all(np.asarray(jitted(x, q)) == 7)
    with qfunc.use("reference"):
        np.testing.assert_array_equal(jitted(x, q), want)
        np.testing.assert_array_equal(qfunc.matmul(x, q), want)
    assert np.all(np.asarray(jitted(x, q)) == 7)


def test_use_reaches_an_inner_jit(operands, marked):
    x, q = operands
    inner = jax.jit(qfunc.matmul)
    outer = jax.jit(lambda x, q: inner(x, q))
    assert np.all(np.asarray(outer(x, q)) == 7)
    with qfunc.use("reference"):
        assert not np.all(np.asarray(outer(x, q)) == 7)


def test_a_refused_call_falls_back_with_one_warning_and_a_forced_one_raises(operands, marked):
    x, q = operands
    half = x.astype(jnp.bfloat16)
    _dispatch._warn.cache_clear()
    with pytest.warns(qfunc.kernels.FallbackWarning, match="x is bfloat16"):
        y = qfunc.matmul(half, q)
    assert y.dtype == jnp.bfloat16 and not np.all(np.asarray(y, np.float32) == 7)
    with pytest.raises(NotImplementedError, match="x is bfloat16"), qfunc.use("marked"):
        jax.jit(lambda x: qfunc.matmul(x, q))(half)


def test_what_was_traced_is_traced_anew_once_choices_have_changed(operands, marked):
    x, q = operands
    traced = []
    IMPLEMENTATIONS["quantized_matmul"].insert(0, row := Implementation(
        "counted", ("cpu",), lambda call, platform: None, lambda call, *o: traced.append(call) or marked.run(call, *o)))
    try:
        for count in (1, 1, 2):
            if count == 2:
                _dispatch.forget()
            qfunc.matmul(x, q)
            assert len(traced) == count
    finally:
        IMPLEMENTATIONS["quantized_matmul"].remove(row)
        _dispatch.forget()


def test_unknown_implementation():
    with pytest.raises(ValueError, match="reference"), qfunc.use("tritron"):
        pass


def test_explain_lists_choices_and_reasons(operands, marked):
    x, q = operands

    def layer(x):
        y = qfunc.matmul(x, q)
        _, ys = jax.lax.scan(lambda c, _: (c, qfunc.matmul(x.astype(jnp.bfloat16), q)), 0, None, length=2)
        return y, ys, jax.jit(qfunc.matmul)(x, q)

    told = qfunc.explain(layer, x, platform="cpu")
    assert {(c.implementation, c.count) for c in told} == {("marked", 2), (told[1].implementation, 1)}
    assert told[0].weight == (128, 64) and told[0].scheme == "w8a8_dynamic"
    assert ("marked", "x is bfloat16") in told[1].refused
    assert "x is bfloat16" in repr(told) and "<pre>" in told._repr_html_()
    (cuda,) = {c.implementation for c in qfunc.explain(layer, x, platform="cuda")}
    assert cuda != "marked"
    with qfunc.use("reference"):
        assert {c.implementation for c in qfunc.explain(layer, x)} == {"reference"}
    assert "no quantized operation" in repr(qfunc.explain(jnp.sin, x))


def test_names_of_platforms_are_checked(operands):
    x, q = operands
    assert qfunc.explain(qfunc.matmul, x, q, platform="gpu") == qfunc.explain(qfunc.matmul, x, q, platform="cuda")
    (tpu,) = qfunc.explain(qfunc.matmul, x, q, platform="tpu")
    assert tpu.implementation == "reference"
    for wrong in ("cuad", "CPU", "canonical", ""):
        with pytest.raises(ValueError, match=f"platform: expected one of cpu, cuda, rocm, gpu, tpu, found '{wrong}'"):
            qfunc.explain(qfunc.matmul, x, q, platform=wrong)
    with pytest.raises(ValueError, match="rocm, gpu, tpu, canonical, found 'cuad'"):
        qfunc.kernels.prepare({"kernel": q}, "cuad")
    for known in (None, "cpu", "gpu", "canonical"):
        assert qfunc.kernels.prepare({"kernel": q}, known)["kernel"].canonical.codes.shape == q.codes.shape


def test_gpu_is_the_kind_that_is_here(monkeypatch):
    from types import SimpleNamespace

    from qfunc.kernels import _explain
    for key, version, name in (("gpu", "rocm 70000", "rocm"), ("gpu", "cuda 13000", "cuda"), ("rocm", "", "rocm"), ("cuda", "", "cuda")):
        found = {key: SimpleNamespace(platform_version=version)}
        monkeypatch.setattr(_explain.backend, "backends", lambda found=found: found)
        assert _explain.platform_of("gpu") == name


def test_lowers_for_another_platform(operands):
    x, q = operands
    with qfunc.use("reference"):
        text = jax.jit(qfunc.matmul).trace(x, q).lower(lowering_platforms=("cuda",)).as_text()
    assert "dot_general" in text and "custom_call" not in text


def test_reference_is_the_last_of_every_primitive():
    assert {"quantized_matmul", "quantized_grouped_matmul", "quantize_activation"} <= set(IMPLEMENTATIONS)
    for rows in IMPLEMENTATIONS.values():
        assert rows[-1].name == "reference" and rows[-1].platforms is None

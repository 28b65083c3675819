"""`functional`: an unchanged function on packed weights equals the function on the dequantized ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from near import near

import qfunc
from qfunc.layers import functional, quantize_model, weight_axes

K, N = 6, 8
FIRST, SECOND = ((0,), (1,)), ((1,), (0,))


@pytest.fixture
def normal(rng):
    return lambda *shape: jnp.asarray(rng.standard_normal(shape, dtype=np.float32))


def close(got, want):
    assert jax.tree.map(lambda leaf: leaf.dtype, got) == jax.tree.map(lambda leaf: leaf.dtype, want)
    near(got, want)


def matmuls(function, *args):
    text = str(jax.make_jaxpr(function)(*args))
    return text.count("quantized_matmul[") + text.count("quantized_grouped_matmul[")


def rule(axes=None, batch=None, scheme="w8a16"):
    return {"w": qfunc.Rule(scheme, axes=axes, batch=batch)}


def packed(weight, rules):
    q = qfunc.quantize({"w": weight}, rules)
    assert isinstance(q["w"], qfunc.QTensor)
    return q


# name: function of (w, x), shape of w, its rule, shape of x
DOTS = {
    "plain": (lambda w, x: x @ w, (K, N), rule(), (2, 3, K)),
    "vector": (lambda w, x: x @ w, (K, N), rule(), (K,)),
    "transposed": (lambda w, x: x @ w.T, (N, K), rule(SECOND), (2, 3, K)),
    "weight first": (lambda w, x: w @ x, (N, K), rule(SECOND), (K, 5)),
    "heads out": (lambda w, x: jnp.einsum("btd,dhk->bhtk", x, w), (K, 2, 4), rule(((0,), (1, 2))), (2, 3, K)),
    "heads in": (lambda w, x: jnp.einsum("btkh,hkd->dbt", x, w), (2, 3, 5), rule(((0, 1), (2,))), (2, 4, 3, 2)),
    "unfolded": (lambda w, x: x @ w.reshape(K, 8), (K, 2, 4), rule(((0,), (1, 2))), (3, K)),
    "experts": (lambda w, x: jnp.einsum("ebd,edf->ebf", x, w), (2, K, 5), rule(batch=1), (2, 3, K)),
    "experts inside": (lambda w, x: jnp.einsum("bed,edf->bfe", x, w), (3, K, 5), rule(batch=1), (2, 3, K)),
    "shared by experts": (lambda w, x: jnp.einsum("btd,edf->betf", x, w), (3, K, 5), rule(batch=1), (2, 3, K)),
    "summed over experts": (lambda w, x: jnp.einsum("etd,edf->tf", x, w), (2, K, 5), rule(batch=1), (2, 3, K)),
    "broadcast": (lambda w, x: x @ jnp.broadcast_to(w, (2, K, N)), (K, N), rule(), (2, 3, K)),
    "dynamic layer": (lambda w, x: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ w[i]), x), (3, K, K), rule(batch=1), (4, K)),
    "scan": (lambda w, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), c), x, w), (3, K, K), rule(batch=1), (4, K)),
    "scan transposed": (lambda w, x: lax.scan(lambda c, w: (jnp.tanh(c @ w.T), c), x, w.mT), (3, K, K), rule(batch=1), (4, K)),
    "carried": (lambda w, x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ c[2], c[2]), (0, x, w))[1],
                (K, K), rule(), (4, K)),
    "ragged": (lambda w, x: lax.ragged_dot(x, w, jnp.array([1, 0, 3])), (3, K, N), rule(batch=1), (4, K)),
    "vmap of weights": (lambda w, x: jax.vmap(jnp.matmul)(x, w), (3, K, N), rule(batch=1), (3, 4, K)),
    "vmap of x": (lambda w, x: jax.vmap(lambda x: x @ w)(x), (K, N), rule(), (3, 4, K)),
    "checkpoint": (lambda w, x: jax.checkpoint(lambda w, x: jnp.sin(x @ w))(w, x), (K, N), rule(), (4, K)),
    "custom_vjp": (lambda w, x: _custom(w, x), (K, N), rule(), (4, K)),
    "jit": (lambda w, x: jax.jit(jnp.matmul)(x, w), (K, N), rule(), (4, K)),
    "one row in": (lambda w, x: x @ w, (1, N), rule(), (4, 1)),
    "one layer": (lambda w, x: lax.scan(lambda c, w: (c @ w, None), x, w)[0], (1, K, K), rule(batch=1), (4, K)),
    "the only layer": (lambda w, x: x @ w[0], (1, K, K), rule(batch=1), (4, K)),
}


@jax.custom_vjp
def _custom(w, x):
    return x @ w


_custom.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, g: (saved[1].T @ g, g @ saved[0].T))


@pytest.mark.parametrize("name", DOTS)
def test_equals_the_float_function(normal, name):
    function, w, rules, x = DOTS[name]
    q, x = packed(normal(*w), rules), normal(*x)

    def apply(p, x):
        return function(p["w"], x)

    run, want = functional(apply), apply(qfunc.dequantize(q), x)
    close(run(q, x), want)
    close(jax.jit(run)(q, x), want)
    close(jax.jit(lambda x: run(q, x))(x), want)
    assert matmuls(run, q, x) == 1


@pytest.mark.parametrize("scheme, low, high", [("w8a8_dynamic", 1e-3, 0.02), ("w4a8_dynamic", 1e-3, 0.02), ("fp8_dynamic", 1e-3, 0.05)])
def test_activations_are_quantized(normal, scheme, low, high):
    q, x = packed(normal(64, 32), rule(scheme=scheme)), normal(9, 64)
    y, want = functional(lambda p, x: x @ p["w"])(q, x), x @ q["w"].dequantize()
    assert low < jnp.linalg.norm(y - want) / jnp.linalg.norm(want) < high
    np.testing.assert_array_equal(y, qfunc.matmul(x, q["w"]))


@pytest.mark.parametrize("rows", [
    lambda t, i: t[i], lambda t, i: jnp.take(t, i, axis=0), lambda t, i: jnp.take(t, i, axis=0, mode="clip"),
    lambda t, i: t.at[i].get(mode="fill", fill_value=3.0), lambda t, i: jax.vmap(jax.vmap(lambda i: t[i]))(i), lambda t, i: t[i[0, 0]],
    lambda t, i: t[2], lambda t, i: jnp.tanh(t[i]) @ t.T,
])
def test_rows_of_tables(normal, rows):
    q = packed(normal(10, K), rule(SECOND))
    ids = jnp.array([[1, 2, 9], [0, 3, 4]])
    apply = functional(lambda p, i: rows(p["w"], i))
    close(apply(q, ids), rows(q["w"].dequantize(), ids))
    close(jax.jit(apply)(q, ids), rows(q["w"].dequantize(), ids))


def test_ids_out_of_range(normal):
    q = packed(normal(10, K), rule(SECOND))
    ids = jnp.array([3, 10, -1, -11])
    for mode in ("fill", "clip", "wrap"):
        got = functional(lambda p, i, mode=mode: jnp.take(p["w"], i, axis=0, mode=mode))(q, ids)
        np.testing.assert_allclose(got, jnp.take(q["w"].dequantize(), ids, axis=0, mode=mode), rtol=1e-6)


def test_derivatives_and_batching(normal):
    q, x = packed(normal(3, K, K) * 0.5, rule(batch=1)), normal(5, K)

    def apply(p, x):
        body = jax.checkpoint(lambda c, w: (jax.nn.relu(c @ w), None))
        return lax.scan(body, x, p["w"])[0].sum()

    f = qfunc.dequantize(q)
    close(jax.grad(functional(apply), argnums=1)(q, x), jax.grad(apply, argnums=1)(f, x))
    close(jax.jit(jax.grad(functional(apply), argnums=1))(q, x), jax.grad(apply, argnums=1)(f, x))
    close(jax.vmap(functional(apply), (None, 0))(q, x[:, None]), jax.vmap(apply, (None, 0))(f, x[:, None]))
    close(jax.vmap(functional(lambda p, x: x @ p["w"]), (0, None))(q, x), jax.vmap(lambda p, x: x @ p["w"], (0, None))(f, x))


def test_casts_decide_the_type(normal):
    q, x = packed(normal(K, N), rule()), normal(4, K)
    y = functional(lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16))(q, x)
    assert y.dtype == jnp.bfloat16
    want = x.astype(jnp.bfloat16).astype(jnp.float32) @ q["w"].dequantize()
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=0.02, atol=0.02)


def test_python_arguments_and_untouched_results(normal):
    def apply(p, x, *, deep, act):
        return {"y": act(x @ p["w"]) if deep else x, "p": p, "name": "a string"}

    q, x = packed(normal(K, N), rule()), normal(4, K)
    out = functional(apply)(q, x, deep=True, act=jax.nn.relu)
    assert isinstance(out["p"]["w"], qfunc.QTensor) and out["name"] == "a string"
    close(out["y"], jax.nn.relu(x @ q["w"].dequantize()))
    close(functional(apply)(qfunc.dequantize(q), x, deep=True, act=jax.nn.relu)["y"], out["y"])


@pytest.mark.parametrize("function, word", [
    (lambda w, x: x @ (w * 2), "mul"), (lambda w, x: x @ w.T, "dot_general"), (lambda w, x: (w.sum(), x), "reduce_sum"),
    (lambda w, x: x @ w[:, :4], "slice"), (lambda w, x: (w.T, x), "the result"), (lambda w, x: jnp.concatenate([w, w]), "concatenate"),
    (lambda w, x: lax.scan(lambda c, row: (c + row, None), x[0], w)[0], "scan"),
    (lambda w, x: x @ jnp.sin(w.reshape(3, 12)).reshape(6, 6), "sin"),
])
def test_no_silent_dequantize(normal, function, word):
    q, x = packed(normal(K, K), rule()), normal(4, K)

    def apply(p, x):
        return function(p["w"], x)

    with pytest.raises(ValueError, match=f"w: a packed weight.*{word}"):
        functional(apply)(q, x)
    close(functional(apply, on_unknown="dequantize")(q, x), apply(qfunc.dequantize(q), x))


def test_what_is_computed_and_dropped_is_no_use(normal):
    q, x = packed(normal(K, K), rule()), normal(4, K)
    close(functional(lambda p, x: ((p["w"] * 2).sum(), x @ p["w"])[1])(q, x), x @ q["w"].dequantize())


def test_bad_arguments(normal):
    with pytest.raises(ValueError, match="on_unknown.*maybe"):
        functional(lambda p: p, on_unknown="maybe")
    with pytest.raises(TypeError, match="functional"):
        quantize_model(lambda p, x: x, "w8a16")


def test_axes_are_found_by_tracing():
    def struct(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    params = {"q": struct(6, 2, 4), "o": struct(2, 4, 6), "stack": struct(5, 6, 6), "experts": struct(3, 6, 8),
              "table": struct(10, 6), "position": struct(9, 6), "turned": struct(8, 6), "front": struct(2, 6, 3),
              "both": struct(6, 6), "idle": struct(4, 4), "b": struct(8)}

    def apply(p, ids, *, extra):
        h = p["table"][ids] + p["position"][:ids.shape[1]]
        h = jnp.einsum("bthk,hkd->btd", jnp.einsum("btd,dhk->bthk", h, p["q"]), p["o"])
        h = lax.scan(lambda c, w: (c @ w, None), h, p["stack"])[0]
        y = jnp.einsum("btd,edf->betf", h, p["experts"])
        z = h @ p["turned"].T + p["b"], jnp.einsum("btd,hdk->bthk", h, p["front"])
        return y, z, h @ p["both"] @ p["both"].T + extra, h @ p["table"].T

    found = weight_axes(apply, params, jax.ShapeDtypeStruct((2, 7), jnp.int32), extra=jnp.float32(1))
    texts = {path: (a if isinstance(a, str) else (a.batch, a.ins, a.outs, a.transposed)) for path, a in found.items()}
    assert texts == {
        "q": (0, 1, 2, False), "o": (0, 2, 1, False), "stack": (1, 1, 1, False), "experts": (1, 1, 1, False), "table": (0, 1, 1, True),
        "turned": (0, 1, 1, True), "front": (1, 1, 1, False), "position": "it meets slice", "idle": "it meets no matmul",
        "both": "its matmuls contract different axes, (0,) and (1,)"}

"""Calibration against the activations themselves, written out by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import qfunc
from qfunc import Statistics, calibrate, merge, merge_across, observe, statistics_of
from qfunc._calibrate import as_statistics

rng = np.random.default_rng()
K, N, LAYERS = 6, 8, 5


def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape, dtype=np.float32))


def equals(found: Statistics, x, axis):
    """`found` are the statistics of x over `axis`."""
    x = np.asarray(x, np.float64)
    rows = int(np.prod([x.shape[a] for a in np.atleast_1d(axis)]))
    assert np.all(np.asarray(found.count) == rows)
    for name, want in {"min": x.min(axis), "max": x.max(axis), "abs_sum": np.abs(x).sum(axis), "sq_sum": (x**2).sum(axis)}.items():
        part = np.asarray(getattr(found, name))
        assert part.shape == want.shape, (name, part.shape, want.shape)
        np.testing.assert_allclose(part, want, rtol=1e-5, atol=1e-5, err_msg=name)


def one(apply, params, *batches):
    (found,) = calibrate(apply, params, batches).values()
    return found


def test_batches_merge():
    x, y = normal(7, K), normal(2, 3, K)
    found = calibrate(lambda p, x: jax.nn.relu(x @ p["mlp"]["up"]), {"mlp": {"up": normal(K, N)}}, [x, (y,)])
    assert list(found) == ["mlp/up"]
    equals(found["mlp/up"], np.concatenate([x, y.reshape(-1, K)]), 0)


@pytest.mark.parametrize("equation, weight, x, order", [
    ("btd,dhk->bthk", (K, 2, 4), (2, 3, K), None),
    ("bthk,hkd->btd", (2, 4, K), (2, 3, 2, 4), lambda x: x.reshape(6, 8)),
    ("btkh,hkd->dbt", (2, 4, K), (2, 3, 4, 2), lambda x: x.transpose(0, 1, 3, 2).reshape(6, 8)),
    ("td,nd->tn", (N, K), (7, K), None),
])
def test_folded_axes_come_in_the_order_of_the_leaf(equation, weight, x, order):
    x = normal(*x)
    found = one(lambda p, x: jnp.einsum(equation, x, p["w"]), {"w": normal(*weight)}, x)
    equals(found, x.reshape(-1, K) if order is None else order(x), 0)


@pytest.mark.parametrize("loop", ["scan", "fori", "python", "transposed scan", "remat", "jit"])
def test_layers_keep_their_statistics_apart(loop):
    w, x = normal(LAYERS, K, K), normal(4, K)

    def step(c, layer):
        return jnp.tanh(c @ layer), c

    def apply(p, x):
        w = p["w"]
        if loop == "fori":
            return lax.fori_loop(0, LAYERS, lambda i, c: step(c, w[i])[0], x)
        if loop == "python":
            for i in range(LAYERS):
                x, _ = step(x, w[i])
            return x
        if loop == "transposed scan":
            return lax.scan(lambda c, layer: step(c, layer.T), x, w.swapaxes(1, 2))[0]
        body = {"remat": jax.checkpoint(step), "jit": jax.jit(step)}.get(loop, step)
        return lax.scan(body, x, w)[0]

    inputs = lax.scan(step, x, w)[1]
    equals(one(apply, {"w": w}, x), inputs, 1)


def test_a_weight_shared_by_all_steps_merges():
    w, x = normal(K, K), normal(4, K)
    steps = [x]
    for _ in range(3):
        steps.append(jnp.tanh(steps[-1] @ w))
    found = one(lambda p, x: lax.while_loop(lambda c: c[0] < 4, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"])), (0, x)), {"w": w}, x)
    equals(found, jnp.concatenate(steps), 0)
    equals(one(lambda p, x: (x @ p["w"], (2 * x) @ p["w"]), {"w": w}, x), jnp.concatenate([x, 2 * x]), 0)


def test_branches_count_only_when_taken():
    params = {"a": normal(K, N), "b": normal(K, N)}

    def apply(p, x):
        return lax.cond(x.sum() > 0, lambda: x @ p["a"], lambda: (2 * x) @ p["b"])

    x = jnp.abs(normal(4, K))
    found = calibrate(apply, params, [x])
    equals(found["a"], x, 0)
    assert int(found["b"].count) == 0
    found = calibrate(apply, params, [x, -x])
    equals(found["b"], -2 * x, 0)


def test_experts_see_their_own_rows():
    w, x, sizes = normal(4, K, N), normal(9, K), jnp.array([2, 0, 3, 1])
    found = one(lambda p, x: lax.ragged_dot(x, p["w"], sizes), {"w": w}, x)
    assert found.count.tolist() == [2, 0, 3, 1]
    for expert, rows in ((0, x[:2]), (2, x[2:5]), (3, x[5:6])):
        equals(jax.tree.map(lambda a: a[expert], found), rows, 0)       # noqa: B023
    filled = as_statistics(found)
    np.testing.assert_allclose(filled.max[1], x[:6].max(0))
    dense = normal(4, 3, K)
    equals(one(lambda p, x: jnp.einsum("erd,edf->erf", x, p["w"]), {"w": w}, dense), dense, 1)


def test_packed_weights_are_seen_through():
    x = normal(4, K)
    for params, apply in (
        ({"kernel": normal(K, N)}, lambda p, x: x @ p["kernel"]),
        ({"kernel": normal(K, N)}, lambda p, x: qfunc.layers.functional(lambda p, x: x @ p["kernel"])(p, x)),
    ):
        equals(one(apply, qfunc.quantize(params, "w8a8_dynamic"), x), x, 0)
    stack = qfunc.quantize({"kernel": normal(LAYERS, K, K)}, "w8a16")
    found = one(lambda p, x: lax.scan(lambda c, w: (c, c @ w), x, p["kernel"]), stack, x)
    equals(found, jnp.broadcast_to(x, (LAYERS, *x.shape)), 1)


def test_static_schemes_take_the_result():
    params, x = {"kernel": normal(K, N)}, normal(32, K)
    found = calibrate(lambda p, x: x @ p["kernel"], params, [x])
    q, raw = (qfunc.quantize(params, "w8a8_static", calibration=c)["kernel"] for c in (found, {"kernel": x}))
    np.testing.assert_allclose(q.input_scale, jnp.abs(x).max() / 127, rtol=1e-6)
    np.testing.assert_array_equal(q.input_scale, raw.input_scale)
    y, want = qfunc.matmul(x, q), x @ qfunc.dequantize({"w": q})["w"]
    assert 1e-3 < jnp.linalg.norm(y - want) / jnp.linalg.norm(want) < 0.02


def test_merge_and_raw_activations():
    x, y = normal(4, K), normal(3, 2, K)
    equals(statistics_of(x) + statistics_of(y), np.concatenate([x, y.reshape(-1, K)]), 0)
    equals(statistics_of(y, leading=1), y, 1)
    both = merge({"a": statistics_of(x)}, {"a": statistics_of(x), "b": statistics_of(y)})
    assert set(both) == {"a", "b"} and int(both["a"].count) == 8
    np.testing.assert_allclose(both["a"].mean_abs, jnp.abs(x).mean(0), rtol=1e-5)
    np.testing.assert_allclose(both["a"].amax, jnp.abs(x).max(0))
    np.testing.assert_allclose(both["a"].mean_square, (x * x).mean(0), rtol=1e-5)
    with pytest.raises(ValueError, match="a: statistics of .*do not merge"):
        merge({"a": statistics_of(x)}, {"a": statistics_of(normal(4, K + 1))})


def test_it_is_a_pytree_and_pure():
    w, x = normal(K, N), normal(4, 3, K)
    run = observe(lambda p, x: x @ p["w"])
    found = jax.vmap(run, (None, 0))({"w": w}, x)["w"]
    equals(found, x, 1)
    equals(found.reduce(0), x.reshape(-1, K), 0)
    assert "rows" in repr(found) and len(jax.tree.leaves(found)) == 5


def test_compiled_once_per_shape():
    traces = []

    def apply(p, x):
        traces.append(x.shape)
        return x @ p["w"]

    calibrate(apply, {"w": normal(K, N)}, [normal(4, K), normal(4, K), normal(2, K), normal(4, K)])
    assert traces == [(4, K), (2, K)]


def test_static_arguments_stay_python():
    def apply(p, x, deep, name):
        assert name == "relu"
        return getattr(jax.nn, name)(x @ p["w"]) if deep else x

    x = normal(4, K)
    equals(one(apply, {"w": normal(K, N), "kind": "a string"}, (x, True, "relu")), x, 0)


def test_devices_merge():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    x, params = normal(8, K), {"w": normal(K, N)}
    run = observe(lambda p, x: x @ p["w"])
    across = jax.shard_map(lambda p, x: merge_across(run(p, x), "data"), mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    found = jax.jit(across)(params, x)
    equals(found["w"], x, 0)


def test_refusals():
    x, params = normal(4, K), {"block": {"kernel": normal(K, K)}}
    with pytest.raises(ValueError, match="no parameter reaches a matmul"):
        calibrate(lambda p, x: 2 * x, params, [x])
    with pytest.raises(ValueError, match="no batches"):
        calibrate(lambda p, x: x @ p["block"]["kernel"], params, [])
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        with pytest.raises(ValueError, match=r"block/kernel: .*NaN or infinity.*\[3\]"):
            calibrate(lambda p, x: x @ p["block"]["kernel"], params, [x, x.at[1, 3].set(bad)])
        with pytest.raises(ValueError, match="kernel: .*NaN or infinity"):
            as_statistics(x.at[1, 3].set(bad), "kernel")
    with pytest.raises(ValueError, match="block/kernel: one matmul contracts"):
        calibrate(lambda p, x: (x @ p["block"]["kernel"]) @ p["block"]["kernel"].T, params, [x])
    with pytest.raises(TypeError, match="block/kernel.*list"):
        as_statistics([1.0], "block/kernel")


def test_merge_across_takes_one_entry_too():
    x = normal(3, 4, K)
    found = jax.vmap(lambda x: merge_across(statistics_of(x), "i"), axis_name="i")(x)
    equals(jax.tree.map(lambda a: a[0], found), x.reshape(-1, K), 0)

"""Equinox models are pytrees: `qfunc.quantize` is all they need, and their own `self.weight @ x` runs packed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from near import near

import qfunc

eqx = pytest.importorskip("equinox")


class Model(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    norm: eqx.nn.LayerNorm
    words: eqx.nn.Embedding
    conv: eqx.nn.Conv1d
    cell: eqx.nn.GRUCell

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=keys[0])
        self.mlp = eqx.nn.MLP(8, 8, 16, 1, key=keys[1])
        self.norm = eqx.nn.LayerNorm(8)
        self.words = eqx.nn.Embedding(20, 8, key=keys[2])
        self.conv = eqx.nn.Conv1d(8, 8, 3, padding=1, key=keys[3])
        self.cell = eqx.nn.GRUCell(8, 8, key=keys[4])

    def __call__(self, ids):
        x = jax.vmap(self.words)(ids)
        x = x + self.attention(x, x, x)
        x = x + jax.vmap(self.mlp)(jax.vmap(self.norm)(x)) + self.conv(x.T).T
        return jax.lax.scan(lambda h, x: (self.cell(x, h), h), x[0], x)[1]


@pytest.fixture
def key(rng):
    return jax.random.key(int(rng.integers(2**31)))


def test_linear_runs_packed(key):
    linear, x = eqx.nn.Linear(64, 32, key=key), jax.random.normal(key, (5, 64))
    for scheme in ("w8a16", "w4a16_g32"):
        q = qfunc.quantize(linear, scheme)
        assert q.weight.shape == (32, 64) and q.weight.matrix_shape == (64, 32)
        want = x @ q.weight.dequantize().T + linear.bias
        near(q(x[0]), want[0])
        near(jax.vmap(q)(x), want)
        near(eqx.filter_jit(lambda q, x: jax.vmap(q)(x))(q, x), want)
        near(jax.grad(lambda x: jnp.sin(q(x)).sum())(x[0]), jax.grad(lambda x: jnp.sin(qfunc.dequantize(q)(x)).sum())(x[0]))     # noqa: B023
    y = jax.vmap(qfunc.quantize(linear, "w8a8_dynamic"))(x)
    assert 1e-3 < jnp.linalg.norm(y - jax.vmap(linear)(x)) / jnp.linalg.norm(y) < 0.03


def test_a_whole_model(key):
    model, ids = Model(key), jnp.array([1, 2, 19, 0])
    q = qfunc.layers.quantize_model(model, "w8a16")
    leaves = jax.tree.leaves(q, is_leaf=lambda leaf: isinstance(leaf, qfunc.QTensor))
    assert sum(isinstance(leaf, qfunc.QTensor) for leaf in leaves) == 9
    assert not isinstance(q.conv.weight, qfunc.QTensor) and not isinstance(q.norm.weight, qfunc.QTensor)
    want = qfunc.dequantize(q)(ids)
    near(q(ids), want)
    near(eqx.filter_jit(lambda q, ids: q(ids))(q, ids), want)
    near(qfunc.layers.functional(lambda q, ids: q(ids))(q, ids), want)


def test_stacked_layers(key):
    layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(8, 8, key=key))(jax.random.split(key, 3))
    x = jax.random.normal(key, (8,))

    def forward(layers, x):
        arrays, rest = eqx.partition(layers, eqx.is_array)
        return jax.lax.scan(lambda c, layer: (eqx.combine(layer, rest)(c), c), x, arrays)[0]

    q = qfunc.quantize(layers, "w8a16")
    assert q.weight.shape == (3, 8, 8)
    near(forward(q, x), forward(qfunc.dequantize(q), x))


def test_calibrated(key):
    model, ids = Model(key), jnp.array([1, 2, 19, 0])
    statistics = qfunc.calibrate(lambda model, ids: model(ids), model, [ids])
    assert "mlp/layers/1/weight" in statistics and statistics["mlp/layers/1/weight"].max.shape == (16,)
    rules = {"words/*": None, "*": "w8a8_static"}
    q = qfunc.quantize(model, rules, calibration=statistics)
    y, want = q(ids), qfunc.dequantize(q)(ids)
    assert 0 < jnp.linalg.norm(y - want) / jnp.linalg.norm(want) < 0.1


def test_a_subclass_of_a_layer_has_its_axes(rng):
    class Convolution(eqx.nn.Conv1d):
        pass

    class Dense(eqx.nn.Linear):
        pass

    key = jax.random.key(int(rng.integers(2**31)))
    model = {"proj": Convolution(8, 8, 3, key=key), "out": Dense(8, 24, key=key)}
    q = qfunc.quantize(model, "w8a16")
    assert not isinstance(q["proj"].weight, qfunc.QTensor) and q["out"].weight.shape == (24, 8)
    assert q["out"].weight.matrix_shape == (8, 24)

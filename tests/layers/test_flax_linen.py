"""Existing linen models, quantized by one call: packed `apply` equals the float model on the dequantized parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from near import near

import qfunc

nn = pytest.importorskip("flax.linen")
D = 16


def packed(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, qfunc.QTensor))
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves if isinstance(leaf, qfunc.QTensor)}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(h, h)
        x = x + nn.Dense(D)(nn.gelu(nn.Dense(2 * D)(x)))
        x = x + nn.DenseGeneral(D, axis=(-2, -1))(nn.DenseGeneral((4, 5))(x))
        own = self.param("own", nn.initializers.lecun_normal(), (D, D))
        return x + nn.Einsum((D, D), "btd,de->bte", use_bias=False)(x) @ own.T, None


class Model(nn.Module):
    scan: bool

    @nn.compact
    def __call__(self, ids, train: bool = False):
        embed = nn.Embed(50, D)
        x = embed(ids)
        if self.scan:
            stack = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            x, _ = stack(name="blocks")(x, None)
        else:
            for _ in range(2):
                x, _ = Block()(x)
        x = nn.Conv(D, (3,))(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return embed.attend(nn.Dropout(0.5, deterministic=not train)(x))

    def doubled(self, ids):
        return 2 * self(ids)


@pytest.fixture(params=[False, True], ids=["unrolled", "scan"])
def model(request, rng):
    model = Model(request.param)
    ids = jnp.asarray(rng.integers(0, 50, (2, 7)))
    return model, jax.jit(model.init)(jax.random.key(int(rng.integers(2**31))), ids), ids


def test_weight_only_is_exact(model):
    module, variables, ids = model
    for rules in ("w8a16", {"Embed*": "w8a16", "*": "w4a16"}):
        qmodel, qvariables = qfunc.layers.quantize_linen(module, variables, rules, inputs=(ids,))
        found = packed(qvariables["params"])
        assert len(found) == (10 if module.scan else 20) + (rules != "w8a16")
        assert not any("Conv" in path or "bias" in path for path in found)
        floats = qfunc.dequantize(qvariables)
        want = jax.jit(module.apply)(floats, ids)
        near(jax.jit(qmodel.apply)(qvariables, ids), want)
        near(jax.jit(lambda ids: qmodel.apply(qvariables, ids))(ids), want)        # noqa: B023
        assert str(jax.make_jaxpr(qmodel.apply)(qvariables, ids)).count("quantized_matmul[") == len(found)
    for method in ("doubled", Model.doubled):
        near(jax.jit(lambda v, ids: qmodel.apply(v, ids, method=method))(qvariables, ids), 2 * want)       # noqa: B023


def test_mutable_state_and_rngs(model):
    module, variables, ids = model
    qmodel, qvariables = qfunc.layers.quantize_model(module, variables, "w8a16", inputs={"args": (ids,), "train": False})
    options = {"train": True, "rngs": {"dropout": jax.random.key(3)}, "mutable": ["batch_stats"]}
    got = jax.jit(lambda v: qmodel.apply(v, ids, **options))(qvariables)
    near(got, jax.jit(lambda v: module.apply(v, ids, **options))(qfunc.dequantize(qvariables)))


def test_params_alone_by_names(model):
    module, variables, ids = model
    if module.scan:
        pytest.skip("names alone cannot tell folded axes in a stack of layers")
    rules = {"*/own": None, "*": "w8a16"}       # used as its transpose, which its name does not tell
    qmodel, qparams = qfunc.layers.quantize_linen(module, variables["params"], rules)
    assert len(packed(qparams)) == 18
    rest = {name: value for name, value in variables.items() if name != "params"}
    got = jax.jit(qmodel.apply)({"params": qparams, **rest}, ids)
    near(got, jax.jit(module.apply)({"params": qfunc.dequantize(qparams), **rest}, ids))


def test_calibrated(model):
    module, variables, ids = model
    statistics = qfunc.calibrate(module.apply, variables, [ids])
    stacked = 3 if module.scan else None
    path = "blocks/Dense_1/kernel" if module.scan else "Block_0/Dense_1/kernel"
    assert statistics[path].max.shape == ((stacked, D) if stacked else (D,))
    qmodel, qvariables = qfunc.layers.quantize_linen(module, variables, "w8a8_static", inputs=(ids,), calibration=statistics)
    y, want = jax.jit(qmodel.apply)(qvariables, ids), jax.jit(module.apply)(qfunc.dequantize(qvariables), ids)
    assert 1e-3 < jnp.linalg.norm(y - want) / jnp.linalg.norm(want) < 0.1


def test_derivative_in_the_input():
    module, x = nn.Dense(8), jnp.ones((3, D)) / 3
    variables = module.init(jax.random.key(0), x)
    qmodel, qvariables = qfunc.layers.quantize_linen(module, variables, "w8a16")
    def loss(apply, variables, x):
        return jnp.sin(apply(variables, x)).sum()
    near(jax.grad(loss, 2)(qmodel.apply, qvariables, x), jax.grad(loss, 2)(module.apply, qfunc.dequantize(qvariables), x))


def test_an_operation_without_packed_form_is_named():
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ (2 * self.param("kernel", nn.initializers.ones, (D, D)))

    module, x = Scaled(), jnp.ones((3, D))
    variables = module.init(jax.random.key(0), x)
    qmodel, qvariables = qfunc.layers.quantize_linen(module, variables, "w8a16")
    with pytest.raises(ValueError, match="kernel: a packed weight.*mul"):
        qmodel.apply(qvariables, x)
    with pytest.raises(ValueError, match="kernel.*it meets mul"):
        qfunc.layers.quantize_linen(module, variables, "w8a16", inputs=(x,))

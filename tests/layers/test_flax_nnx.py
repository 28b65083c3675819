"""Existing nnx models, quantized by one call: the packed model equals the float model with the dequantized parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from near import near

import qfunc

nnx = pytest.importorskip("flax.nnx")
D = 16


def is_packed(leaf):
    return isinstance(leaf, qfunc.QTensor)


def packed(model):
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.state(model), is_leaf=is_packed)
    return {jax.tree_util.keystr(keys, simple=True, separator="/").removesuffix("/value"): leaf for keys, leaf in leaves if is_packed(leaf)}


def dequantized(model):
    graph, state = nnx.split(model)
    return nnx.merge(graph, qfunc.dequantize(state), copy=True)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=D, rngs=rngs, decode=False)
        self.up, self.down = nnx.Linear(D, 2 * D, rngs=rngs), nnx.Linear(2 * D, D, rngs=rngs)
        self.mix = nnx.Einsum("btd,dhk->bthk", (D, 2, D // 2), (2, D // 2), rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        x = x + self.down(nnx.gelu(self.up(x)))
        return self.drop(x) + self.mix(x).reshape(x.shape)


class Model(nnx.Module):
    def __init__(self, rngs, scan):
        self.embed = nnx.Embed(50, D, rngs=rngs)
        self.scan = scan
        if scan:
            self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(Block, in_axes=0, out_axes=0))(rngs)
        else:
            self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.batch_norm = nnx.BatchNorm(D, rngs=rngs)
        self.head = nnx.Param(jax.random.normal(rngs.params(), (D, 7)))
        self.position = nnx.Param(jax.random.normal(rngs.params(), (9, D)))
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, ids):
        x = self.embed(ids) + self.position[:ids.shape[1]]
        if self.scan:
            x = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        else:
            for block in self.blocks:
                x = block(x)
        self.calls[...] += 1
        x = self.batch_norm(x)
        return self.embed.attend(x), x @ self.head


@pytest.fixture(params=[False, True], ids=["unrolled", "scan"])
def model(request, rng):
    model = Model(nnx.Rngs(int(rng.integers(2**31))), request.param)
    model.eval()
    return model, jnp.asarray(rng.integers(0, 50, (2, 7)))


@pytest.mark.parametrize("rules, traced, more", [
    ("w8a16", False, set()),
    ("w8a16", True, {"head"}),
    ({"embed/*": "w8a16", "head": "w4a16", "*": "w8a16"}, False, {"head", "embed/embedding"}),
])
def test_weight_only_is_exact(model, rules, traced, more):
    float_model, ids = model
    qmodel = qfunc.layers.quantize_model(float_model, rules, inputs=(ids,) if traced else None)
    found = packed(qmodel)
    assert len(found) == (7 if float_model.scan else 14) + len(more) and more <= set(found)
    assert not packed(float_model)
    run = nnx.jit(lambda model, ids: model(ids))
    want = run(dequantized(qmodel), ids)
    near(run(qmodel, ids), want)
    assert int(qmodel.calls[...]) == 1 and int(float_model.calls[...]) == 0
    graph, state = nnx.split(qmodel)
    near(jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))(state, ids), want)
    assert isinstance(qmodel, Model) and isinstance(qmodel.embed, nnx.Embed) and type(qmodel).__name__ == "Model"
    assert "Model" in repr(qmodel)


def test_training_state(model):
    float_model, ids = model
    qmodel = qfunc.layers.quantize_nnx(float_model, {"head": "w8a16", "*": "w8a16"})
    qmodel.train()
    twin = dequantized(qmodel)
    run = nnx.jit(lambda model, ids: model(ids))
    for _ in range(2):                  # the same dropout masks each time, batch statistics updated alike
        near(run(qmodel, ids), run(twin, ids))
        near(qmodel.batch_norm.mean[...], twin.batch_norm.mean[...])


def test_calibrated(model):
    float_model, ids = model
    statistics = qfunc.calibrate(*qfunc.layers.nnx_function(float_model), [ids])
    path = "blocks/down/kernel" if float_model.scan else "blocks/0/down/kernel"
    assert statistics[path].max.shape == ((3, 2 * D) if float_model.scan else (2 * D,))
    qmodel = qfunc.layers.quantize_nnx(float_model, "w8a8_static", calibration=statistics)
    run = nnx.jit(lambda model, ids: model(ids)[0])
    y, want = run(qmodel, ids), run(dequantized(qmodel), ids)
    assert 1e-3 < jnp.linalg.norm(y - want) / jnp.linalg.norm(want) < 0.1


def test_parts_and_transforms(rng):
    block = Block(nnx.Rngs(int(rng.integers(2**31))))
    block.eval()
    qblock, x = qfunc.layers.quantize_nnx(block, "w8a16"), jnp.asarray(rng.standard_normal((2, 5, D), dtype=np.float32))
    twin = dequantized(qblock)
    near(qblock.up(x), twin.up(x))
    want = jax.jit(lambda x: twin(x))(x)
    near(jax.jit(lambda x: qblock(x))(x), want)
    near(jax.jit(jax.vmap(lambda x: qblock(x)))(x[:, None]), want[:, None])
    near(jax.jit(jax.grad(lambda x: jnp.sin(qblock(x)).sum()))(x), jax.jit(jax.grad(lambda x: jnp.sin(twin(x)).sum()))(x))
    assert str(jax.make_jaxpr(lambda x: qblock(x))(x)).count("quantized_matmul[") == 7


def test_a_state_is_a_pytree(rng):
    model = nnx.Linear(D, 8, rngs=nnx.Rngs(0))
    state = nnx.state(model)
    q = qfunc.quantize(state, "w8a16")
    assert is_packed(q["kernel"][...])
    near(qfunc.dequantize(q)["kernel"][...], state["kernel"][...], 0.02)


def test_refusals(rng):
    class Scaled(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.ones((D, D)))

        def __call__(self, x):
            return x @ (2 * self.kernel)

    with pytest.raises(ValueError, match="kernel.*a parameter of Scaled"):
        qfunc.layers.quantize_nnx(Scaled(), "w8a16")
    qmodel = qfunc.layers.quantize_nnx(Scaled(), {"kernel": "w8a16"})
    with pytest.raises(ValueError, match="kernel: a packed weight.*mul"):
        qmodel(jnp.ones((3, D)))

"""nnx modules over the functions: the same numbers as those, packed or not, beside modules of flax and of one's own."""

import jax
import jax.numpy as jnp
import pytest
from near import near

import qfunc
from qfunc.layers import decoder
from qfunc.layers.config import Names, Routing
from qfunc.layers.mlp import gated
from qfunc.layers.moe import mixture

nnx = pytest.importorskip("flax.nnx")
H = 32


@pytest.fixture
def net(rng):
    layers = pytest.importorskip("qfunc.layers.flax")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = layers.Embedding(50, H, rngs=rngs)
            self.norm, self.last = layers.RMSNorm(H), layers.LayerNorm(H)
            self.attention = layers.Attention(H, 4, 2, qk_norm=True, use_bias=True, window=4, rngs=rngs)
            self.mlp = layers.MLP(H, 48, activation="gelu", rngs=rngs)
            self.moe = layers.MoE(H, 32, Routing(4, 2, normalize=True), shared=16, rngs=rngs)
            self.own = nnx.Linear(H, H, rngs=rngs)
            self.free = nnx.Param(jax.random.normal(rngs.params(), (H, H)))
            self.head = layers.Linear(H, 10, use_bias=True, rngs=rngs)

        def __call__(self, ids):
            x = self.embed(ids)
            x = x + self.attention(self.norm(x))
            x = x + self.moe(x + self.mlp(x))
            x = self.last(jnp.tanh(self.own(x)) @ self.free)
            return self.head(x), self.embed.attend(x)

    return Net(nnx.Rngs(int(rng.integers(2**31)))), jnp.asarray(rng.integers(0, 50, (2, 7)))


run = nnx.jit(lambda module, *args: module(*args))


@nnx.jit
def lead(net, ids):
    """By how much the router prefers each token's second expert, its last, to the third."""
    x = net.embed(ids)
    x = x + net.attention(net.norm(x))
    best = jax.lax.top_k((x + net.mlp(x)) @ net.moe.gate.kernel[...], 3)[0]
    return best[..., 1] - best[..., 2]


def test_modules_are_their_functions(net, rng):
    net, _ = net
    x = jnp.asarray(rng.standard_normal((2, 5, H)), jnp.float32)

    @jax.jit
    def functions(attention, moe, mlp, x):
        gate, up, down = (mlp[name]["kernel"] for name in ("gate_proj", "up_proj", "down_proj"))
        places = decoder.Places.of(5, jnp.int32(0))
        return (decoder.self_attention(attention, x, places, None, net.attention.config, 0)[0],
                mixture(moe, x, net.moe.routing, Names(shared="shared_experts"), gated("silu")),
                (jax.nn.gelu(x @ gate, approximate=False) * (x @ up)) @ down)
    both = nnx.jit(lambda net, x: (net.attention(x), net.moe(x), net.mlp(x)))
    near(both(net, x), functions(net.attention.params, net.moe.params, net.mlp.params, x))


def test_packed_modules_run_beside_those_of_flax(net):
    net, ids = net
    qnet = qfunc.layers.quantize_nnx(net, {"embed/*": "w8a16", "free": "w8a16", "*": "w8a16"})
    kinds = {name: type(value.get_raw_value()).__name__ for name, value in (
        ("experts", qnet.moe.experts.up_proj.kernel), ("router", qnet.moe.gate.kernel), ("table", qnet.embed.weight),
        ("own", qnet.own.kernel), ("q", qnet.attention.q_proj.kernel), ("bias", qnet.attention.q_proj.bias))}
    assert kinds == {"experts": "QTensor", "router": "ArrayImpl", "table": "QTensor", "own": "QTensor", "q": "QTensor", "bias": "ArrayImpl"}
    graph, state = nnx.split(qnet)
    twin = nnx.merge(graph, qfunc.dequantize(state), copy=True)
    clear = lead(twin, ids) > 1e-4      # the last bit of a sum may send any other token to another expert
    assert clear.mean() > 0.5
    near(*(jax.tree.map(lambda y: y[clear], run(either, ids)) for either in (qnet, twin)))
    x = net.embed(ids)                  # the parts without a router, which one step of int8 may turn to another expert
    for part in ("attention", "mlp"):
        got, want = run(getattr(qnet, part), x), run(getattr(net, part), x)
        assert 1e-4 < jnp.linalg.norm(got - want) / jnp.linalg.norm(want) < 0.05
    dynamic = qfunc.layers.quantize_nnx(net, "w8a8_dynamic")
    assert str(jax.make_jaxpr(lambda x: dynamic.attention(x))(jnp.ones((1, 3, H)))).count("quantize_activation[") == 1
    assert "quantized_matmul" in str(jax.make_jaxpr(jax.grad(lambda x: dynamic.attention(x).sum()))(jnp.ones((1, 3, H))))


def test_a_cache_gives_the_numbers_of_the_whole(net, rng):
    attention, x = net[0].attention, jnp.asarray(rng.standard_normal((2, 7, H)), jnp.float32)
    first, cache = run(attention, x[:, :4], attention.init_cache(2, 8))
    last, cache = run(attention, x[:, 4:], cache)
    near(jnp.concatenate([first, last], 1), run(attention, x))
    assert int(cache["length"]) == 7


def test_calibration_and_parameters_of_a_checkpoint(net):
    net, ids = net
    statistics = qfunc.calibrate(*qfunc.layers.nnx_function(net), [ids])
    static = qfunc.layers.quantize_nnx(net, {"mlp/*": "w8a8_static", "*": None}, calibration=statistics)
    assert static.mlp.up_proj.kernel.get_raw_value().input_scale is not None

    @nnx.jit
    def inner(module, ids):             # behind the MLP a router would send a token elsewhere for one step of int8
        x = module.embed(ids)
        return module.mlp(x + module.attention(module.norm(x)))

    want = inner(net, ids)
    assert 0 < jnp.linalg.norm(inner(static, ids) - want) / jnp.linalg.norm(want) < 0.05

    other = type(net)(nnx.Rngs(99))
    other.attention.assign(qfunc.quantize(net.attention.params, "w8a16"))
    x = jnp.ones((1, 3, H))
    near(run(other.attention, x), run(qfunc.layers.quantize_nnx(net, {"attention/*": "w8a16", "*": None}).attention, x))
    with pytest.raises(ValueError, match="expected down_proj, gate_proj, up_proj, found gate_proj"):
        other.mlp.assign({"gate_proj": {}})
    wrong = {**net.mlp.params, "up_proj": {"kernel": jnp.ones((H, 3))}}
    with pytest.raises(ValueError, match=r"up_proj/kernel: expected the shape \(32, 48\), found \(32, 3\)"):
        other.mlp.assign(wrong)
    for make in (lambda layers: layers.MLP(4, 4, activation="swish", rngs=nnx.Rngs(0)),
                 lambda layers: layers.Attention(4, 2, cache="int3", rngs=nnx.Rngs(0))):
        with pytest.raises(ValueError, match="expected one of"):
            make(pytest.importorskip("qfunc.layers.flax"))

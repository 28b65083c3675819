"""Whole models on the CPU host of torch_npu's operators: the logits of JAX, and exactly the operator calls that the layers need.

Three comparisons, so that each can be strict; differences are in parts of the largest logit.

- Operators against their specification, both in torch on bfloat16 activations: equal bit by bit where sums are of integers or microscaled
  numbers and scales are float32; 2e-2 where the operator takes scales of 16 bits (weight-only formats, int8 experts); 5e-3 for int4
  activations, which the operator divides by a scale of other rounding.
- The interpreter against JAX, the specification in both, float32: 1e-5.
- All of it against JAX on recorded checkpoints in float32: 1e-5 for dense models of 8-bit integers, 1e-2 for weight-only formats, experts
  and GGUF, whose operators round scales, activations or results to 16 bits, 3e-2 with 4-bit activations or weights of int8 experts, where a
  code that falls to the other side of a border moves more.
"""

from collections import Counter

import checkpoints
import jax
import numpy as np
import pytest

import qfunc
from qfunc.layers.cache import init_cache
from qfunc.layers.config import ModelConfig, Routing
from qfunc.layers.decoder import apply
from qfunc.layers.rope import Rope
from qfunc.layers.stack import stack_layers

torch = pytest.importorskip("torch")
import npu_cpu  # noqa: E402

from qfunc.interop import cann  # noqa: E402

QUANTIZERS = ("npu_quantize", "npu_dynamic_quant", "npu_dynamic_mx_quant")
MATMULS = ("npu_quant_matmul", "npu_weight_quant_batchmatmul", "npu_grouped_matmul")
DENSE = ModelConfig("qwen3", 64, 256, 2, 4, 2, 64, (None, None), Rope(), 0.125)
MOE = DENSE.replace(family="qwen3_moe", routing=Routing(4, 2, normalize=True))


@pytest.fixture(autouse=True)
def calls():
    made = npu_cpu.install()
    made.clear()
    return made


def random_params(config: ModelConfig, seed: int = 0, dtype: str = "float32") -> dict:
    rng = np.random.default_rng(seed)

    def kernel(*shape):
        return {"kernel": jax.numpy.asarray(rng.standard_normal(shape) * shape[-2] ** -0.5, dtype)}

    def norm():
        return {"weight": jax.numpy.asarray(1 + 0.1 * rng.standard_normal(256), dtype)}

    def layer():
        stack = () if config.routing is None else (config.routing.experts,)
        wide = {"gate_proj": kernel(*stack, 256, 512), "up_proj": kernel(*stack, 256, 512), "down_proj": kernel(*stack, 512, 256)}
        attention = {"q_proj": kernel(256, 256), "k_proj": kernel(256, 128), "v_proj": kernel(256, 128), "o_proj": kernel(256, 256)}
        return {"input_layernorm": norm(), "post_attention_layernorm": norm(), "self_attn": attention,
                "mlp": wide if config.routing is None else {"gate": kernel(256, config.routing.experts), "experts": wide}}
    return {"model": {"embed_tokens": {"weight": jax.numpy.asarray(rng.standard_normal((64, 256)), dtype)}, "norm": norm(),
                      "layers": {str(i): layer() for i in range(2)}}, "lm_head": kernel(256, 64)}


def texts(config, length=8):
    return np.random.default_rng(1).integers(0, config.vocab_size, (2, length)).astype(np.int32)


def worst(got, want) -> float:
    """The largest difference, in parts of the largest number."""
    got, want = (np.asarray(cann.to_array(x) if isinstance(x, torch.Tensor) else x, np.float32) for x in (got, want))
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


def step_by_step(run, params, ids, config):
    """Logits of all tokens, from a prompt of five and the others one at a time through the cache."""
    cache = cann.place(init_cache(config, ids.shape[0], ids.shape[1]), "cpu")
    out, cache = run(params, torch.from_numpy(ids[:, :5]), cache, config)
    steps = [out]
    for i in range(5, ids.shape[1]):
        out, cache = run(params, torch.from_numpy(ids[:, i:i + 1]), cache, config)
        steps.append(out)
    return torch.cat(steps, 1)


# (scheme, model, generation, largest difference between operators and specification)
ROWS = [("w8a8_dynamic", DENSE, "A2", 0), ("w4a8_dynamic", MOE, "A2", 0), ("mxfp8", DENSE, "A5", 0)]
MORE = [("w4a16_g128_asym", DENSE, "A3", 2e-2), ("w8a8_dynamic", MOE, "A2", 3e-2), ("w4a4_dynamic", DENSE, "A2", 5e-3),
        ("w4a16_g128", MOE, "A2", 2e-2), ("w8a16", DENSE, "A2", 2e-2), ("mxfp4", DENSE, "A5", 0), ("mxfp8", MOE, "A5", 0),
        ("mxfp4", MOE, "A5", 0), ("w4a4_dynamic", MOE, "A2", 5e-3), ("nf4", DENSE, "A2", 2e-2), ("w8a8_dynamic_tensor", DENSE, "A3", 0)]


@pytest.mark.parametrize("scheme, config, soc, tolerance", [*ROWS, *(pytest.param(*row, marks=pytest.mark.slow) for row in MORE)])
def test_operators_compute_what_specifies_them(scheme, config, soc, tolerance):
    config = config.replace(dtype="bfloat16")
    params, ids = qfunc.quantize(random_params(config, dtype="bfloat16"), scheme), texts(config)
    want, _ = cann.to_torch(apply, rules="reference")(params, ids, None, config)
    placed, run = cann.place(params, "cpu", soc), cann.to_torch(apply)
    got, _ = run(placed, ids, None, config)
    assert worst(got, want) <= tolerance
    if scheme != "w8a8_dynamic_tensor":         # whose scale depends on how many tokens are looked at
        # A product of another number of rows may be summed in another order.
        assert worst(step_by_step(run, placed, ids, config), got) < (0.2 if "w4a4" in scheme else 5e-2)


@pytest.mark.parametrize("scheme, config", [("w8a8_dynamic", DENSE), pytest.param("w4a16_g128_asym", MOE, marks=pytest.mark.slow),
                                            pytest.param("mxfp4", MOE, marks=pytest.mark.slow),
                                            pytest.param("w4a4_dynamic", DENSE, marks=pytest.mark.slow)])
def test_specifications_run_as_in_jax(scheme, config):
    params, ids = qfunc.quantize(random_params(config), scheme), texts(config)
    with qfunc.use("reference"):
        want, _ = jax.jit(apply, static_argnums=3)(params, ids, None, config)
    run = cann.to_torch(apply, rules="reference")
    assert worst(run(params, ids, None, config)[0], want) < 1e-5
    assert worst(step_by_step(run, params, ids, config), want) < 1e-5


# (checkpoint, largest difference from JAX)
FIXTURES = [("modelslim-w8a8-dynamic", 1e-5)]
MORE_FIXTURES = [("gptqmodel-moe-4bit-g128", 1e-2), ("gguf-q4_k_m", 1e-2),
                 ("modelslim-w8a8", 1e-5), ("modelslim-mixed-dense", 1e-5), ("modelslim-w8a8c8", 1e-5), ("modelslim-w8a16", 1e-2),
                 ("modelslim-mixed-moe", 1e-2), ("modelslim-w4a8-dynamic-moe", 1e-2), ("modelslim-w4a4-dynamic", 3e-2),
                 ("autoawq-gemm-4bit-g128", 1e-2), ("autoawq-moe-gemm-4bit-g128", 1e-2), ("autoround-w4a16-asym-g32", 1e-2),
                 ("autoround-moe-w4a16", 1e-2), ("gptqmodel-4bit-g128-sym", 1e-2), ("gptqmodel-4bit-g128-descact", 1e-2),
                 ("gptqmodel-4bit-g32-asym", 1e-2), ("gptqmodel-8bit-g128", 1e-2), ("ct-w8a8-int8-dynamic", 1e-2),
                 ("ct-moe-w8a8-int8-dynamic", 1e-2), ("ct-moe-w4a16", 1e-2), ("ct-moe-w4a8-int", 3e-2),
                 ("ct-w4a16-asym-gptq-actorder-group", 1e-2), ("gguf-q8_0", 1e-2), ("gguf-moe-q4_k_m", 1e-2)]


def fixture(name: str, dtype: str) -> "qfunc.layers.model.Model":
    root = checkpoints.archive()
    if root is None or not (root / name).is_dir():
        pytest.skip("the archive of recorded checkpoints is not here")
    return qfunc.load_model(next((root / name).glob("*.gguf"), root / name), dtype=dtype)


@pytest.mark.fixtures
@pytest.mark.parametrize("name, tolerance", [*FIXTURES, *(pytest.param(*row, marks=pytest.mark.slow) for row in MORE_FIXTURES)])
def test_recorded_checkpoints(name, tolerance):
    model = fixture(name, "float32")
    ids, config = texts(model.config), model.config
    want = model(ids)
    placed, run = cann.place(model.params, "cpu", "A2"), cann.to_torch(apply)
    got = step_by_step(run, placed, ids, config)
    assert worst(got, want) < tolerance
    assert (got.numpy().argmax(-1) == np.asarray(want).argmax(-1)).mean() > 0.9


def packed_layers(params) -> int:
    """How many packed matrices (a stack of experts is one) a forward pass multiplies by."""
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, qfunc.QTensor))[0]
    return sum(isinstance(leaf, qfunc.QTensor) and "embed" not in jax.tree_util.keystr(keys) for keys, leaf in leaves)


COUNTS = [("w8a8_dynamic", DENSE, "A2", 4), ("w8a8_dynamic", MOE, "A2", 4), ("w4a16_g128", DENSE, "A2", 0), ("mxfp8", DENSE, "A5", 4),
          ("w4a4_dynamic", DENSE, "A3", 4), ("w4a8_dynamic", MOE, "A2", 4)]


@pytest.mark.parametrize("scheme, config, soc, quantized",
                         [*COUNTS[:2], *(pytest.param(*row, marks=pytest.mark.slow) for row in COUNTS[2:])])
def test_one_matmul_per_linear_and_one_quantization_per_input(scheme, config, soc, quantized, calls):
    """Query, key and value share a quantization, gate and up as well: four inputs a layer."""
    config = config.replace(dtype="bfloat16")
    params = qfunc.quantize(random_params(config, dtype="bfloat16"), scheme)
    placed, run = cann.place(params, "cpu", soc), cann.to_torch(apply)
    calls.clear()
    run(placed, torch.from_numpy(texts(config)), None, config)
    counts = Counter(call[0] for call in calls)
    assert sum(counts[name] for name in MATMULS) == packed_layers(params) == 14
    assert sum(counts[name] for name in QUANTIZERS) == quantized * config.num_hidden_layers
    assert set(counts) <= {*QUANTIZERS, *MATMULS}


@pytest.mark.parametrize("config, scheme", [(DENSE, "w8a8_dynamic"), (MOE, "w4a16_g128")])
def test_nothing_is_read_between_arguments_and_results(config, scheme):
    """Meta tensors have no numbers: a program that runs on them brings nothing to the host, not one value."""
    config = config.replace(dtype="bfloat16")
    params = qfunc.quantize(random_params(config, dtype="bfloat16"), scheme)
    cache = init_cache(config, 2, 8)
    placed = cann.place(params, "meta", "A2")
    ids = torch.empty((2, 1), dtype=torch.int32, device="meta")
    logits, cache = cann.to_torch(apply)(placed, ids, cann.place(cache, "meta"), config)
    assert logits.is_meta and logits.shape == (2, 1, 64) and cache["layers"][1]["v"]["codes"].shape == (2, 8, 2, 64)


def test_the_graph_holds_the_operators():
    from torch.fx.experimental.proxy_tensor import make_fx
    config = DENSE.replace(dtype="bfloat16")
    placed = cann.place(qfunc.quantize(random_params(config, dtype="bfloat16"), "w8a8_dynamic"), "cpu", "A2")
    run = cann.to_torch(apply)
    ids = torch.from_numpy(texts(config))
    graph = make_fx(lambda ids: run(placed, ids, None, config)[0])(ids)
    counts = Counter(str(node.target).split(".")[1] for node in graph.graph.nodes if str(node.target).startswith("npu."))
    assert counts == {"npu_quant_matmul": 14, "npu_dynamic_quant": 8}
    assert torch.equal(graph(ids), run(placed, ids, None, config)[0])


def test_stacked_layers_are_scanned():
    params = qfunc.quantize(random_params(DENSE), "w8a8_dynamic")
    params, config = stack_layers(params, DENSE)
    ids = texts(config)
    want, _ = jax.jit(apply, static_argnums=3)(params, ids, None, config)
    got, _ = cann.to_torch(apply)(cann.place(params, "cpu", "A2"), torch.from_numpy(ids), None, config)
    assert worst(got, want) < 1e-5


def test_packed_embeddings_and_routers():
    """A table is read by rows, a packed router decoded: from the same codes, on the device."""
    params = qfunc.quantize(random_params(MOE), {"*embed*": "w8a16", "*/gate/kernel": "w8a16", "*": "w8a8_dynamic"})
    ids = texts(MOE)
    want, _ = jax.jit(apply, static_argnums=3)(params, ids, None, MOE)
    got, _ = cann.to_torch(apply)(cann.place(params, "cpu", "A2"), torch.from_numpy(ids), None, MOE)
    assert worst(got, want) < 3e-2


def test_weights_that_are_not_placed_are_refused_by_path():
    params = qfunc.quantize(random_params(DENSE), "w8a8_dynamic")
    with pytest.raises(TypeError, match=r"model/layers/0/mlp/down_proj/kernel.*not placed"):
        cann.to_torch(apply)(params, texts(DENSE), None, DENSE)


def test_the_specification_runs_on_placed_weights_too():
    params, ids = qfunc.quantize(random_params(DENSE), "w8a8_dynamic"), texts(DENSE)
    run = cann.to_torch(apply, rules="reference")
    assert torch.equal(run(params, ids, None, DENSE)[0], run(cann.place(params, "cpu", "A2"), ids, None, DENSE)[0])


def test_a_placed_weight_that_is_handed_on_stays_placed():
    params = cann.place(qfunc.quantize(random_params(DENSE), "w8a8_dynamic"), "cpu", "A2")
    kernel = params["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"]
    out, text, twice = cann.to_torch(lambda w, x: (w, "name", x * 2))(kernel, torch.ones(3))
    assert out is kernel and text == "name" and torch.equal(twice, torch.full((3,), 2.0))


def test_the_slow_path_inside_jit():
    config = DENSE
    params = qfunc.quantize(random_params(config), "w8a8_dynamic")["model"]["layers"]["0"]["mlp"]
    from qfunc.layers.decoder import feed_forward
    placed = cann.place(params, "cpu", "A2")
    x = jax.numpy.asarray(np.random.default_rng(0).standard_normal((2, 3, 256)), "float32")
    slow = cann.callback(lambda params, x: feed_forward(params, x, config), placed)
    got, want = jax.jit(lambda x: slow(x) * 2)(x), jax.jit(lambda p, x: feed_forward(p, x, config) * 2)(params, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(slow)(x), want / 2, rtol=1e-5, atol=1e-5)

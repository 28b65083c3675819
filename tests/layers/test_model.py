"""Models from disk: the public face of loading, calling, generating and quantizing them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import DATA, archive, checkpoint

import qfunc
from qfunc.layers.cache import FORMATS
from qfunc.layers.families import model_config
from qfunc.layers.generate import largest, sample
from qfunc.layers.model import Model

# Which kernel runs is not the matter here.
pytestmark = pytest.mark.filterwarnings("ignore:.* runs on 'reference'")

CONFIG = {"model_type": "qwen3", "vocab_size": 64, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64, "eos_token_id": 0,
          "torch_dtype": "float32", "tie_word_embeddings": False}
MOE = {**CONFIG, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
       "norm_topk_prob": True}


def tensors(config: dict, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    h, d = config["hidden_size"], config["head_dim"]

    def matrix(*shape):
        return (rng.standard_normal(shape) * 0.08).astype(np.float32)
    out = {"model.embed_tokens.weight": matrix(config["vocab_size"], h) * 10, "model.norm.weight": np.ones(h, np.float32),
           "lm_head.weight": matrix(config["vocab_size"], h)}
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        out |= {p + f"{name}.weight": 1 + matrix(size) for name, size in (("input_layernorm", h), ("post_attention_layernorm", h),
                                                                          ("self_attn.q_norm", d), ("self_attn.k_norm", d))}
        heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"], "v": config["num_key_value_heads"]}
        out |= {p + f"self_attn.{name}_proj.weight": matrix(n * d, h) for name, n in heads.items()}
        out[p + "self_attn.o_proj.weight"] = matrix(h, heads["q"] * d)
        blocks = ["mlp."]
        inner = config["intermediate_size"]
        if "num_experts" in config:
            blocks, inner = [f"mlp.experts.{e}." for e in range(config["num_experts"])], config["moe_intermediate_size"]
            out[p + "mlp.gate.weight"] = matrix(config["num_experts"], h) * 5
        for block in blocks:
            out |= {p + block + "gate_proj.weight": matrix(inner, h), p + block + "up_proj.weight": matrix(inner, h),
                    p + block + "down_proj.weight": matrix(h, inner)}
    return out


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("dense") / "m", tensors(CONFIG), config=CONFIG)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("moe") / "m", tensors(MOE), config=MOE)


IDS = np.random.default_rng(1).integers(1, 64, (2, 9))


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


def test_a_float_model_computes_and_generates(dense):
    model = qfunc.load_model(dense)
    assert isinstance(model, Model) and model.config.dtype == "float32" and "qwen3" in repr(model)
    logits = model(IDS)
    assert logits.shape == (2, 9, 64) and logits.dtype == jnp.float32
    np.testing.assert_allclose(model(IDS[0])[0], logits[0], atol=1e-5)
    half, cache = model(IDS[:, :4], model.init_cache(2, 9))
    rest, cache = model(IDS[:, 4:], cache)
    np.testing.assert_allclose(np.concatenate([half, rest], 1), logits, atol=1e-5)
    with pytest.raises(ValueError, match="9 of 9 positions"):
        model(IDS[:, :1], cache)
    for ids in ([[64]], [[-1]], [[0.5]], [[]]):
        with pytest.raises(ValueError, match="input_ids"):
            model(ids)
    with pytest.raises(ValueError, match="the 1 texts of the cache, found 2"):
        model(IDS, model.init_cache(1, 9))

    new = model.generate(IDS, max_new_tokens=6)
    best = np.asarray(model(np.concatenate([IDS, new], 1))).argmax(-1)[:, 8:-1]
    for row, want in zip(new, best, strict=True):
        end = list(row).index(0) + 1 if 0 in row else 6
        assert list(row[:end]) == list(want[:end])
    pieces = list(model.generate(IDS, max_new_tokens=6, stream=True))
    np.testing.assert_array_equal(np.concatenate(pieces, 1), new)
    drawn = [model.generate(IDS[0], max_new_tokens=6, temperature=1.0, top_p=0.9, seed=seed) for seed in (0, 0, 1, 2, 3)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert len({tuple(d) for d in drawn}) > 1
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate("hello")
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(IDS, max_new_tokens=0)


def test_generation_ends_where_the_text_ends(dense):
    model = qfunc.load_model(dense)
    first = model.generate(IDS[0], max_new_tokens=12)
    ending = Model(model.params, model.config.replace(eos=(int(first[2]),)))
    out = ending.generate(IDS[0], max_new_tokens=12)
    stop = list(first).index(first[2]) + 1
    np.testing.assert_array_equal(out, first[:stop])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 1000), (2, 151_936)])
def test_the_first_of_the_largest(rng, shape, dtype):
    logits = jnp.asarray(rng.choice([-np.inf, -3, -0.0, 0, 1.5], shape) * rng.choice([0.5, 1, 1e30], (shape[0], 1)), dtype)
    np.testing.assert_array_equal(jax.jit(largest)(logits), np.asarray(logits, np.float32).argmax(-1))


def test_sampling_keeps_to_the_nucleus():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 400)
    drawn = np.asarray(sample(jnp.broadcast_to(logits, (400, 4)), keys, jnp.float32(1), jnp.float32(0.75)))
    assert set(drawn) == {0, 1} and abs((drawn == 0).mean() - 0.625) < 0.08


@pytest.mark.parametrize(("scheme", "limit"), [("w8a16", 0.02), ("w8a8_dynamic", 0.04), ("w4a16_g128", 0.25), ("fp8", 0.1), ("mxfp8", 0.1)])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_quantized_while_loading_is_quantized_after(kind, scheme, limit, request):
    folder = request.getfixturevalue(kind)
    plain = qfunc.load_model(folder)
    after, online = plain.quantize(scheme), qfunc.load_model(folder, quantize=scheme)
    assert jax.tree.structure(after.params) == jax.tree.structure(online.params)
    jax.tree.map(np.testing.assert_array_equal, after.params, online.params)
    assert online.nbytes < 0.75 * plain.nbytes
    assert relative(online(IDS), plain(IDS)) < limit
    assert online.generate(IDS, max_new_tokens=3).shape[0] == 2


def test_rules_of_online_methods(moe, dense):
    experts = qfunc.load_model(moe, quantize="quark_int4fp8_moe").params["model"]["layers"]["0"]
    assert isinstance(experts["mlp"]["experts"]["up_proj"]["kernel"], qfunc.QTensor)
    assert not isinstance(experts["self_attn"]["q_proj"]["kernel"], qfunc.QTensor)
    with pytest.raises(ValueError, match="no scheme"):
        qfunc.load_model(dense, quantize="w9a9")
    with pytest.raises(ValueError, match="experts alone"):
        qfunc.load_model(dense, quantize="nvfp4_online")
    qfunc.interop.save_native(dense.parent / "packed", qfunc.load_model(dense, quantize="w8a16").params, CONFIG)
    again = qfunc.load_model(dense.parent / "packed")
    np.testing.assert_array_equal(again(IDS), qfunc.load_model(dense, quantize="w8a16")(IDS))


def test_static_schemes_take_ids_as_calibration(dense):
    plain = qfunc.load_model(dense)
    static = plain.quantize("w8a8_static", calibration=[IDS, IDS[:, ::-1]])
    assert relative(static(IDS), plain(IDS)) < 0.05
    with pytest.raises(ValueError, match="calibration"):
        plain.quantize("w8a8_static")
    with pytest.raises(ValueError, match="no tokenizer"):
        plain.quantize("w8a8_static", calibration=["a text"])
    with pytest.raises(ValueError, match="already quantized as w8a8_static.*start from float weights"):
        static.quantize("w4a16_g128")
    with pytest.raises(ValueError, match=r"packed already \(w8a8_static\)"):
        static.quantize("w8a8_static", calibration=[IDS])


@pytest.mark.parametrize("form", [name for name in FORMATS if name != "float"])
def test_quantized_caches(dense, form):
    plain = qfunc.load_model(dense)
    params = plain.params
    if form == "int8":
        with pytest.raises(ValueError, match="k_scale"):
            Model(params, plain.config.replace(cache=form))(IDS)
        params = jax.tree.map(lambda leaf: leaf, params)
        for layer in params["model"]["layers"].values():
            layer["self_attn"] |= {"k_scale": jnp.float32(0.03), "v_scale": jnp.full(2 * 32, 0.03), "v_zero": jnp.full(2 * 32, 3.0)}
    model = Model(params, plain.config.replace(cache=form))
    whole = model(IDS)
    assert 0 < relative(whole, plain(IDS)) < (0.02 if "int8" in form else 0.06 if "e4m3" in form else 0.12)
    logits, cache = model(IDS[:, :5], model.init_cache(2, 12))
    steps = [logits]
    for i in range(5, 9):
        logits, cache = model(IDS[:, i:i + 1], cache)
        steps.append(logits)
    np.testing.assert_allclose(np.concatenate(steps, 1), whole, atol=2e-3)
    assert cache["layers"][0]["k"]["codes"].dtype.itemsize == 1


def test_bfloat16_and_refusals(dense, tmp_path):
    model = qfunc.load_model(dense, dtype="bfloat16", quantize="w8a8_dynamic")
    assert model(IDS).dtype == jnp.bfloat16
    assert relative(model(IDS).astype(jnp.float32), qfunc.load_model(dense)(IDS)) < 0.06
    for dtype in ("int8", "nonsense"):
        with pytest.raises(ValueError, match="dtype: expected float32, bfloat16 or float16"):
            qfunc.load_model(dense, dtype=dtype)
    with pytest.raises(ValueError, match="fp8_e4m3_token"):
        qfunc.load_model(dense, cache="int3")
    other = checkpoint(tmp_path / "m", tensors(CONFIG), config={**CONFIG, "model_type": "falcon"})
    with pytest.raises(qfunc.CheckpointError, match="falcon"):
        qfunc.load_model(other)
    assert model_config(CONFIG).windows == (None, None)


@pytest.mark.parametrize(("changes", "found"), [
    ({"hidden_size": 64}, r"layers/0/self_attn/q_proj: expected \(64, 128\) .* found \(128, 128\)"),
    ({"head_dim": 16}, r"layers/0/self_attn/q_proj: expected \(128, 64\)"),
    ({"num_key_value_heads": 4}, r"layers/0/self_attn/k_proj: expected \(128, 128\) .* found \(128, 64\)"),
    ({"vocab_size": 65}, "embed_tokens: expected vocab_size 65 by hidden_size 128, found 64 by 128"),
    ({"num_hidden_layers": 3}, "model/layers/2: expected 3 layers, found 2"),
    (None, "config.json .* found none"),
])
@pytest.mark.parametrize("quantize", [None, "w8a16"])
def test_weights_and_configuration_that_do_not_fit(tmp_path, changes, found, quantize):
    folder = checkpoint(tmp_path / "m", tensors(CONFIG), config={**CONFIG, **(changes or {})})
    if changes is None:
        (folder / "config.json").unlink()
    with pytest.raises(qfunc.CheckpointError, match=found):
        qfunc.load_model(folder, quantize=quantize)


def test_a_damaged_tokenizer_is_named(tmp_path):
    pytest.importorskip("tokenizers")
    folder = checkpoint(tmp_path / "m", tensors(CONFIG), config=CONFIG)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(qfunc.CheckpointError, match="tokenizer.json"):
        qfunc.load_model(folder)


def test_experts_of_different_schemes_give_the_numbers_of_a_stack(moe):
    plain = qfunc.load_model(moe)
    stacked = plain.quantize("w8a16")
    apart = jax.tree.map(lambda leaf: leaf, stacked.params)
    for layer in apart["model"]["layers"].values():
        experts = layer["mlp"]["experts"]
        layer["mlp"]["experts"] = {"down_proj": experts["down_proj"], **{
            str(e): {name: {"kernel": experts[name]["kernel"][e]} for name in ("gate_proj", "up_proj")} for e in range(4)}}
    np.testing.assert_allclose(Model(apart, plain.config)(IDS), stacked(IDS), atol=1e-5)


ONLINE = ("w8a8_int8", "w8a8_fp8", "fp8", "mxfp8", "mxfp4", "awq", "gptq", "awq_marlin",
          "gptq_marlin", "bitsandbytes", "modelopt", "modelopt_fp8",
          "modelopt_fp4", "petit_nvfp4", "nvfp4_online", "blockwise_int8", "qoq", "quark_int4fp8_moe", "quark_mxfp4", "auto-round-int8",
          "int8wo", "int8dq", "int4wo-32", "int4wo-64", "int4wo-128", "int4wo-256", "fp8wo", "fp8dq-per_tensor", "fp8dq-per_row")


@pytest.mark.parametrize("name", ONLINE)
def test_every_online_name_is_a_rule(name):
    from qfunc.interop._online import ONLINE as RULES
    shapes = {"mlp": {"experts": {"up_proj": {"kernel": jax.ShapeDtypeStruct((2, 256, 256), jnp.float32)}},
                      "gate": {"kernel": jax.ShapeDtypeStruct((256, 2), jnp.float32)}}}
    packed = jax.eval_shape(lambda params: qfunc.quantize(params, RULES.get(name, name), check=False, progress=False), shapes)
    assert isinstance(packed["mlp"]["experts"]["up_proj"]["kernel"], qfunc.QTensor)
    assert not isinstance(packed["mlp"]["gate"]["kernel"], qfunc.QTensor)


@pytest.mark.parametrize(("name", "own"), [("compressed-tensors", "ct-w8a8-int8-dynamic"), ("w8a8_int8", "ct-w8a8-int8-dynamic"),
                                           ("quark", "quark-fp8"), ("auto-round", "autoround-w4a16-sym-g128"), ("gguf", "gguf-q4_0"),
                                           ("torchao", "torchao-int8wo"), ("modelslim", "modelslim-w8a8"),
                                           ("modelopt_fp4", "modelopt-nvfp4")])
def test_a_formats_name_loads_its_checkpoints(name, own, dense):
    from qfunc.interop._online import load_online
    folder = DATA / own
    assert load_online(folder, name, False).schemes == qfunc.load(folder).schemes
    if name in ("w8a8_int8", "modelopt_fp4"):
        return                                                            # names of schemes as well
    with pytest.raises(ValueError, match="format of checkpoints"):
        qfunc.load_model(dense, quantize=name)


def fp8_blocks(found: dict) -> dict:
    """Tensors in DeepSeek's fp8 blocks of 128 by 128."""
    out = {}
    for name, array in found.items():
        if array.ndim < 2 or "embed" in name or "lm_head" in name or "mlp.gate." in name:
            out[name] = array
            continue
        q = qfunc.quantize(jnp.asarray(array.T), "fp8_block")
        out |= {name: np.asarray(q.codes), name + "_scale_inv": np.asarray(q.scale)}
    return out


def test_fp8_blocks_are_quantized_again(moe, tmp_path):
    quant = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    small = {**MOE, "num_hidden_layers": 1, "num_experts": 2}
    config = {**small, "torch_dtype": "bfloat16", "quantization_config": quant}
    folder = checkpoint(tmp_path / "fp8", fp8_blocks(tensors(small)), config=config)
    source, online = qfunc.load_model(folder), qfunc.load_model(folder, quantize="nvfp4_online")
    own, new = (m.params["model"]["layers"]["0"] for m in (source, online))
    assert own["mlp"]["experts"]["up_proj"]["kernel"].scheme.name == new["self_attn"]["q_proj"]["kernel"].scheme.name == "fp8_block"
    gate, up, down = (new["mlp"]["experts"][name]["kernel"] for name in ("gate_proj", "up_proj", "down_proj"))
    # The outer scale is that of both halves' bfloat16 values; the codes are those of a quantization by it.
    wide = [np.asarray(own["mlp"]["experts"][name]["kernel"].dequantize("bfloat16"), np.float32) for name in ("gate_proj", "up_proj")]
    largest = np.maximum(*(np.abs(w).max((1, 2)) for w in wide))
    np.testing.assert_allclose(gate.scale2[:, 0, 0], largest / (6 * 448), rtol=1e-6)
    np.testing.assert_array_equal(gate.scale2, up.scale2)
    assert (gate.scale2 != down.scale2).all() and gate.scheme.name == "nvfp4_token"
    for w, q in zip(wide, (gate, up), strict=True):
        assert relative(q.dequantize("float32"), w) < 0.12 and q.shape == w.shape
    assert relative(online(IDS).astype(jnp.float32), source(IDS).astype(jnp.float32)) < 0.3
    for asked, scheme in (("fp8", "fp8_block"), ({"*/experts/*": "blockwise_int8", "*": None}, "w8a8_block")):
        loaded = qfunc.load_model(folder, quantize=asked).params["model"]["layers"]["0"]["mlp"]["experts"]
        assert loaded["up_proj"]["kernel"].scheme.name == scheme
    with pytest.raises(ValueError, match="w8a8_dynamic"):
        qfunc.load_model(DATA / "ct-w8a8-int8-dynamic", quantize="w4a16")


SLICE = ("ct-w8a8-int8-dynamic", "ct-moe-w4a8-int", "modelslim-quarot-online-w4a4", "modelslim-w8a8c8", "gguf-q4_k_m",
         "gptqmodel-4bit-g32-asym")


@pytest.mark.fixtures
@pytest.mark.parametrize("name", SLICE)
def test_logits_of_recorded_checkpoints(name):
    root = archive()
    if root is None:
        pytest.skip("no recorded checkpoints")
    folder = root / name
    recorded = np.load(folder / "reference.npz")
    model = qfunc.load_model(next(iter(folder.glob("*.gguf")), folder), dtype="float32")
    got, want = (a - a.mean(-1, keepdims=True) for a in (np.asarray(model(recorded["input_ids"])), recorded["logits"].astype(np.float32)))
    assert relative(got, want) < float(recorded["tolerance"])


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_prompts_of_different_lengths_do_not_see_their_padding(kind, request):
    rng = np.random.default_rng(3)
    rows = [rng.integers(1, 64, n) for n in (3, 9)]
    model = qfunc.load_model(request.getfixturevalue(kind), cache="int8_token")
    model.config = model.config.replace(eos=())
    alone = [model.generate(row, max_new_tokens=5) for row in rows]
    np.testing.assert_array_equal(model.generate(rows, max_new_tokens=5), alone)
    # Logits with a cache in floating point: the last bit of a key, which the batch may decide, moves codes of a rounded one.
    plain = Model(model.params, model.config.replace(cache="float"))
    whole = [plain(np.pad(row, (0, 9 - len(row))))[0, :len(row)] for row in rows]
    for front in (True, False):
        ids, mask = np.zeros((2, 9), int), np.zeros((2, 9), int)
        for i, row in enumerate(rows):
            where = slice(9 - len(row), 9) if front else slice(0, len(row))
            ids[i, where], mask[i, where] = row, 1
        np.testing.assert_array_equal(model.generate(ids, max_new_tokens=5, mask=mask), alone)
        logits = plain(ids, mask=mask)
        for i, want in enumerate(whole):
            np.testing.assert_allclose(logits[i][mask[i] == 1], want, atol=1e-4)
    mask[0] = [1, 0, 1, 0, 0, 0, 0, 0, 0]
    for bad in (mask, mask[:, :3], np.zeros_like(mask)):
        with pytest.raises(ValueError, match="mask"):
            model(ids, mask=bad)
    with pytest.raises(ValueError, match="empty"):
        model.generate([[1, 2], []])


@pytest.mark.slow
def test_what_a_row_draws_is_its_own(dense):
    model = qfunc.load_model(dense)
    model.config = model.config.replace(eos=())
    options = {"max_new_tokens": 6, "temperature": 1.5}
    alone = model.generate(IDS[0], seed=7, **options)
    pair = model.generate([IDS[1], IDS[0]], seed=[3, 7], **options)
    np.testing.assert_array_equal(pair[1], alone)
    np.testing.assert_array_equal(model.generate([IDS[0], IDS[1]], seed=7, **options)[0], alone)
    same = model.generate(np.stack([IDS[0]] * 2), seed=7, **options)
    assert (same[0] != same[1]).any()
    pieces = list(model.generate([IDS[1], IDS[0]], seed=[3, 7], stream=True, **options))
    np.testing.assert_array_equal(np.concatenate(pieces, 1), pair)
    with pytest.raises(ValueError, match="or 2 of them, found .1, 2, 3"):
        model.generate(IDS, seed=[1, 2, 3])


@pytest.mark.parametrize(("kind", "scheme"), [("dense", "w4a16_g128"), ("moe", "w8a8_dynamic")])
def test_stacked_layers_give_the_numbers_of_unrolled_ones(kind, scheme, request):
    model = qfunc.load_model(request.getfixturevalue(kind), quantize=scheme)
    stacked = model.stacked()
    assert stacked.params["model"]["layers"]["stack"]["self_attn"]["q_proj"]["kernel"].shape == (2, 128, 128)
    np.testing.assert_allclose(stacked(IDS), model(IDS), atol=1e-5)
    rows = [IDS[0], IDS[1, :5]]
    np.testing.assert_array_equal(stacked.generate(rows, max_new_tokens=4), model.generate(rows, max_new_tokens=4))


def test_layers_that_differ_are_no_stack(dense):
    model = qfunc.load_model(dense)
    mixed = model.quantize({"*/layers/0/self_attn/q_proj/kernel": "w8a16", "*": None})
    with pytest.raises(ValueError, match="layer 1 differs"):
        mixed.stacked()
    with pytest.raises(ValueError, match="windows"):
        Model(model.params, model.config.replace(windows=(3, None))).stacked()

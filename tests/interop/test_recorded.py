"""Checkpoints that the real tools wrote load to the weights that the tools' own code computes."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoints import DATA, archive, sampled

import qfunc

CUTS = sorted(p.name for p in DATA.iterdir() if p.is_dir())
ARCHIVE = archive()
WHOLE = sorted(p.parent.name for p in ARCHIVE.glob("*/reference.npz")) if ARCHIVE else ["none"]

# Most tools dequantize in float32; these round to 16 bits on the way (the longest matching prefix counts).
LIMITS = {"": 1e-7, "torchao": 2e-3, "torchao-mx": 1e-7, "autoawq-gemv": 5e-4, "gptqmodel-awq": 5e-4, "modelslim-w4a16": 2e-3}

FORMATS = {"autoawq": "awq", "autoround-awq": "awq", "autoround-gptq": "gptq", "autoround-int8": "compressed-tensors",
           "autoround": "auto-round",
           "bnb": "bitsandbytes", "ct": "compressed-tensors", "gguf": "gguf", "gptqmodel": "gptq", "gptqmodel-awq": "awq",
           "modelopt": "modelopt",
           "modelslim": "modelslim", "quark": "quark", "torchao": "torchao"}


def longest(table, name):
    return table[max((key for key in table if name.startswith(key)), key=len)]


def worst(folder: Path, checkpoint) -> float:
    reference = np.load(folder / "reference.npz")
    errors = []
    for key in reference.files:
        if not key.startswith("weight/"):
            continue
        name = key.removeprefix("weight/")
        module, expert = re.fullmatch(r"(.*?)(?:\.weight)?(?:\[(\d+)\])?", name).groups()
        leaf = checkpoint.weight(module)
        if expert is not None:
            leaf = jax.tree.map(lambda a, e=int(expert): a[e], leaf)
        got = np.asarray(qfunc.dequantize(leaf, "float32"), np.float32).T[reference[f"rows/{name}"]]
        want = reference[key].astype(np.float32)
        assert got.shape == want.shape
        errors.append(np.linalg.norm(got - want) / np.linalg.norm(want))
    assert errors
    return float(max(errors))


# What the usual run takes: every family, packing and kind of scale once.
USUAL = ("autoawq-gemm*", "autoawq-moe*", "autoround-mixed-4-8-16", "autoround-nvfp4", "bnb-int8", "bnb-nf4-dq", "ct-fp8-block",
         "ct-moe-w4a16", "ct-nvfp4", "ct-w4a16-asym-gptq-actorder-group", "ct-w4a8-int", "ct-w8a8-int8-static-asym", "gguf-iq3_s",
         "gguf-moe-q4_k_m", "gptqmodel-3bit-g128", "gptqmodel-moe-4bit-g128", "modelopt-moe-nvfp4", "modelopt-w4a8-awq",
         "modelslim-mixed-moe", "modelslim-w4a8-dynamic-moe", "modelslim-w8a8", "modelslim-w8a8-mxfp8", "quark-moe-int4-fp8",
         "quark-mxfp4", "torchao-8da4w", "torchao-fp8dq-pertensor")


@pytest.mark.parametrize("name", sampled(CUTS, *USUAL))
def test_weights_are_the_tools_own(name):
    path = next((DATA / name).glob("*.gguf"), DATA / name)
    checkpoint = qfunc.load(path)
    assert checkpoint.format == longest(FORMATS, name)
    assert worst(DATA / name, checkpoint) <= longest(LIMITS, name)
    assert checkpoint.schemes


@pytest.mark.fixtures
@pytest.mark.slow
@pytest.mark.skipif(ARCHIVE is None, reason="no recorded checkpoints: set QFUNC_FIXTURES to their folder")
@pytest.mark.parametrize("name", WHOLE)
def test_whole_checkpoints(name):
    path = next((ARCHIVE / name).glob("*.gguf"), ARCHIVE / name)
    assert worst(ARCHIVE / name, qfunc.load(path)) <= longest(LIMITS, name)


@pytest.mark.parametrize("name", sampled(CUTS, "autoawq-moe*", "autoround-nvfp4", "bnb-int8", "ct-moe-w4a16", "ct-w8a8-int8-static-asym",
                                         "gguf-moe-q4_k_m", "gptqmodel-4bit-g128-descact", "modelopt-moe-nvfp4", "modelslim-mixed-moe",
                                         "quark-moe-int4-fp8", "torchao-8da4w"))
def test_inspection_agrees_with_loading(name):
    path = next((DATA / name).glob("*.gguf"), DATA / name)
    checkpoint, seen = qfunc.load(path), qfunc.interop.inspect(path)
    assert seen.schemes == checkpoint.schemes and seen.format == checkpoint.format
    for path_, scheme in checkpoint.schemes.items():
        leaf = checkpoint.params
        for key in path_.split("/"):
            leaf = leaf[key]
        assert leaf.scheme == scheme
        row = next(r for r in seen.rows if r.scheme == scheme)
        assert row.bits_per_weight < 17
    assert "bits per weight" in str(seen)


# What the scheme of a recorded checkpoint must be; the other recorded ones are held to the table of schemes below.
SCHEMES = {
    "autoawq-gemm-4bit-g128": "w4a16_g128_asym", "autoround-w2a16-g32": "w2a16_g32", "autoround-mxfp4": "mxfp4", "autoround-nvfp4": "nvfp4",
    "bnb-int8": "llm_int8", "bnb-nf4": "nf4", "bnb-nf4-dq": "nf4_dq", "ct-fp8-block": "fp8_block", "ct-fp8-dynamic": "fp8_dynamic",
    "ct-fp8-static": "fp8_static", "ct-mxfp4a16": "mxfp4_a16", "ct-mxfp8": "mxfp8", "ct-nvfp4a16": "nvfp4_a16",
    "ct-w4a16-asym-gptq-actorder-group": "w4a16_g128_asym_actorder", "ct-w4a16-channel": "w4a16", "ct-w4a8-int": "w4a8_dynamic_g128",
    "ct-w4afp8": "w4afp8_g128", "ct-w8a16": "w8a16_g128", "ct-w8a8-int8-static-asym": "w8a8_static_asym",
    "ct-w8a8-int8-tensor-weights": "w8a8_static_tensor", "gguf-q4_0": "gguf:q4_0", "gptqmodel-3bit-g128": "w3a16_g128",
    "gptqmodel-8bit-g128": "w8a16_g128", "modelopt-int4-awq": "w4a16_g128", "modelopt-int8-smoothquant": "w8a8_static", "modelopt-w4a8-awq":
    "w4afp8_static_g128", "modelslim-w4a16": "w4a16_g64", "modelslim-w4a8-dynamic-moe": "w4a8_dynamic",
    "modelslim-w8a8": "w8a8_static_asym",
    "quark-moe-int4-fp8": "w4afp8", "quark-ptpc-fp8": "fp8_dynamic", "torchao-8da4w": "w4a8_dynamic_g32",
    "torchao-fp8dq-pertensor": "fp8", "torchao-int8wo": "w8a16",
}


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes_have_the_names_of_the_table(name):
    path = next((DATA / name).glob("*.gguf"), DATA / name)
    found = {scheme.name for scheme in qfunc.interop.inspect(path).schemes.values()}
    assert found == {SCHEMES[name]}
    assert qfunc.scheme(SCHEMES[name]).name == SCHEMES[name]


def test_smoothing_and_calibrated_scales_are_kept():
    q = qfunc.load(DATA / "modelopt-int8-smoothquant").weight("model.layers.0.self_attn.k_proj")
    assert q.smooth.shape == (256,) and q.input_scale.shape == (1, 1) and q.input_scale.dtype == np.float32
    q = qfunc.load(DATA / "ct-nvfp4").weight("model.layers.0.self_attn.k_proj")
    assert q.scale2.shape == q.input_scale.shape == (1, 1)
    q = qfunc.load(DATA / "modelslim-w8a8").weight(cut_module("modelslim-w8a8"))
    assert q.input_zero.dtype == np.int32 and q.scheme.activation.mode == "static"


def cut_module(name):
    reference = np.load(DATA / name / "reference.npz")
    return next(k.removeprefix("weight/") for k in reference.files if k.startswith("weight/"))


@pytest.mark.parametrize(("name", "code"), [("ct-fp8-dynamic-kv-fp8", "fp8_e4m3"), ("ct-w8a8-int8-kv-int8", "int8"),
                                            ("modelopt-fp8-kv-fp8", "fp8_e4m3"),
                                            ("quark-llama-fp8-kv-fp8", "fp8_e4m3"), ("modelslim-w8a8c8", "int8")])
def test_scales_of_the_cache_are_leaves_of_the_attention(name, code):
    checkpoint = qfunc.load(DATA / name)
    assert checkpoint.kv_cache == code
    layer = next(iter(checkpoint.params["model"]["layers"].values()))["self_attn"]
    assert layer["k_scale"].dtype == layer["v_scale"].dtype == np.float32
    assert layer["k_scale"].shape == ((128,) if name == "modelslim-w8a8c8" else ())


def test_online_rotations_stay_beside_the_kernel():
    layers = qfunc.load(DATA / "modelslim-quarot-online-w4a4").params["model"]["layers"]
    assert layers["0"]["self_attn"]["o_proj"]["heads_rotation"].shape == (4, 4)
    assert layers["0"]["mlp"]["down_proj"]["kronecker_rotation_m"].shape == (16, 16)


def test_experts_are_one_stack():
    checkpoint = qfunc.load(DATA / "autoawq-moe-gemm-4bit-g128")
    [(path, scheme)] = checkpoint.schemes.items()
    assert re.fullmatch(r"model/layers/\d/mlp/experts/down_proj/kernel", path)
    stack = checkpoint.weight(path)
    assert stack.shape == (2, 256, 256)
    one = checkpoint.weight(path.replace("/", ".").replace("experts.", "experts.1.").removesuffix(".kernel"))
    assert one.shape == (256, 256)
    assert np.array_equal(one.codes, stack.codes[1])


@pytest.mark.parametrize("name", ["ct-w4a16-sym-g128", "gguf-q4_0", "modelslim-w8a8-dynamic"])
def test_dequantize_gives_float_kernels(name):
    path = next((DATA / name).glob("*.gguf"), DATA / name)
    packed, plain = qfunc.load(path), qfunc.load(path, dequantize="bf16")
    module = re.sub(r"\.weight$", "", cut_module(name))
    got = plain.weight(module)
    assert isinstance(got, jax.Array) and got.dtype == "bfloat16" and not plain.schemes
    assert np.array_equal(got, qfunc.dequantize(packed.weight(module), "bfloat16"))


def test_unknown_weights_are_named():
    with pytest.raises(KeyError, match="k_proj"):
        qfunc.load(DATA / "ct-fp8-dynamic").weight("model.layers.0.self_attn.kproj")

"""Formats that no recorded checkpoint covers, written and read by the tools' own code: compressed-tensors, bitsandbytes, transformers."""

import json

import ml_dtypes
import numpy as np
import pytest
from checkpoints import checkpoint

import qfunc

torch = pytest.importorskip("torch")
M = "model.layers.0.mlp.up_proj"
N, K = 24, 256


def matrix(seed=0, outs=N, ins=K):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((outs, ins)).astype(np.float32))


def array(tensor):
    kinds = {torch.bfloat16: (torch.int16, ml_dtypes.bfloat16), torch.float8_e4m3fn: (torch.int8, ml_dtypes.float8_e4m3fn),
             torch.float8_e8m0fnu: (torch.uint8, np.uint8)}
    tensor = tensor.detach().contiguous()
    if tensor.dtype in kinds:
        store, kind = kinds[tensor.dtype]
        return tensor.view(store).numpy().view(kind)
    return tensor.numpy()


def loaded(folder, tensors, quantization, module=M):
    """The weight [out, in] of a checkpoint of one module, and its scheme."""
    named = {f"{module}.{name}": array(value) for name, value in tensors.items()}
    leaf = qfunc.load(checkpoint(folder, named, quantization)).weight(module)
    return np.asarray(leaf.dequantize("float32")).swapaxes(-1, -2), leaf.scheme


def compressed(form, **fields):
    """(tensors, dequantized weight, configuration) of compressed-tensors' own compressor."""
    package = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    args = QuantizationArgs(**fields)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    w = matrix()
    cells = w.reshape(N, -1, args.group_size) if args.group_size and args.group_size > 0 else w[:, None]
    state, scale_of = {"weight": w}, {}
    if form == "nvfp4-pack-quantized":
        state["weight_global_scale"] = scale_of["global_scale"] = generate_gparam(w.min(), w.max())
    scale, zero = calculate_qparams(cells.amin(-1), cells.amax(-1), args, **scale_of)
    state |= {"weight_scale": scale, "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(form)
    packed = compressor.compress(state, scheme)
    want = compressor.decompress(packed, scheme)["weight"].float().numpy()
    config = {"quant_method": "compressed-tensors", "format": form, "version": package.__version__,
              "config_groups": {"group_0": json.loads(scheme.model_dump_json())}}
    return packed, want, config


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("symmetric", "group"), [(True, 64), (False, None),
                                                  *(pytest.param(*row, marks=pytest.mark.slow) for row in ((True, None), (False, 64)))])
def test_packed_integers_of_compressed_tensors(tmp_path, bits, symmetric, group):
    fields = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    packed, want, config = compressed("pack-quantized", num_bits=bits, type="int", symmetric=symmetric, **fields)
    got, scheme = loaded(tmp_path, packed, config)
    assert np.allclose(got, want, rtol=1e-6, atol=1e-7) and scheme.name.startswith(f"w{bits}a16")


@pytest.mark.parametrize(("form", "fields", "name"), [
    ("mxfp4-pack-quantized", dict(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8), "mxfp4_a16"),
    ("mxfp6-pack-quantized", dict(num_bits=6, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8), "mxfp6_a16"),
    ("mxfp8-quantized", dict(num_bits=8, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8), "mxfp8_a16"),
    ("nvfp4-pack-quantized", dict(num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn),
     "nvfp4_a16"),
    ("int-quantized", dict(num_bits=8, type="int", strategy="group", group_size=64), "w8a16_g64"),
    ("naive-quantized", dict(num_bits=4, type="int", strategy="channel"), "w4a16"),
    ("float-quantized", dict(num_bits=8, type="float", strategy="channel"), "fp8_w8a16"),
])
def test_formats_of_compressed_tensors(tmp_path, form, fields, name):
    packed, want, config = compressed(form, symmetric=True, **fields)
    got, scheme = loaded(tmp_path, packed, config)
    # The tool multiplies MX and NVFP4 weights in bfloat16; the scales of MX are powers of two, so nothing is lost there.
    assert np.allclose(got, want, rtol=1e-2 if form.startswith("nvfp4") else 1e-6, atol=1e-7) and scheme.name == name


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("size", "nested"), [(64, True), (128, False), *(pytest.param(*row, marks=pytest.mark.slow) for row in (
    (64, False), (128, True), (256, False), (256, True)))])
def test_blocks_of_bitsandbytes(tmp_path, kind, size, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(matrix(outs=32), blocksize=size, compress_statistics=nested, quant_type=kind)
    tensors = {"weight": packed, **{f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}}
    got, scheme = loaded(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind})
    assert np.array_equal(got, functional.dequantize_4bit(packed, state).numpy())
    assert scheme.weight.granularity.size == size


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_bitsandbytes_in_other_storage(tmp_path, storage):
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(matrix(), blocksize=64, quant_type="nf4", quant_storage=storage)
    tensors = {"weight": packed, **{f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}}
    got, _ = loaded(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert np.array_equal(got, functional.dequantize_4bit(packed, state).numpy())


def test_int8_of_bitsandbytes(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, scb, _ = functional.int8_vectorwise_quant(matrix().half())
    got, scheme = loaded(tmp_path, {"weight": codes, "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)},
                         {"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert np.allclose(got, functional.int8_vectorwise_dequant(codes, scb).float().numpy(), rtol=1e-6) and scheme.name == "llm_int8"


def test_experts_of_gpt_oss_as_transformers_unpacks_them(tmp_path):
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    rng = np.random.default_rng(0)
    blocks = torch.from_numpy(rng.integers(0, 256, (3, 64, 4, 16)).astype(np.uint8))
    scales = torch.from_numpy(rng.integers(110, 130, (3, 64, 4)).astype(np.uint8))
    want = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)           # [experts, in, out]
    module = "model.layers.0.mlp.experts.down_proj"
    folder = checkpoint(tmp_path, {f"{module}_blocks": blocks.numpy(), f"{module}_scales": scales.numpy()}, {"quant_method": "mxfp4"})
    assert np.array_equal(qfunc.load(folder).weight(module).dequantize("float32"), want.numpy())


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_blocks_of_fp8_as_transformers_dequantizes_them(tmp_path, kind):
    fine = pytest.importorskip("transformers.integrations.finegrained_fp8")
    rng = np.random.default_rng(0)
    if kind == "fp8":
        weight = matrix(outs=256).to(torch.float8_e4m3fn)
        scales = torch.from_numpy(rng.uniform(.01, .02, (2, 2)).astype(np.float32))
    else:               # DeepSeek-V4's experts: two e2m1 in a byte called int8, a power of two for 32 of them
        weight = torch.from_numpy(rng.integers(-128, 128, (64, 128)).astype(np.int8))
        scales = torch.from_numpy(rng.integers(115, 130, (64, 8)).astype(np.uint8)).view(torch.float8_e8m0fnu)
    want = fine.Fp8Dequantize(None)._dequantize_one(weight, scales, torch.float32).numpy()
    got, scheme = loaded(tmp_path, {"weight": weight, "scale" if kind == "fp4" else "weight_scale_inv": scales},
                         {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"})
    assert np.array_equal(got, want) and scheme.name == ("fp8_block" if kind == "fp8" else "mxfp4_a8")


@pytest.mark.parametrize(("blocks", "scheme"), [(None, "static"), (None, "dynamic"), ([128, 128], "dynamic"), ([128, 128], "static")])
def test_fp8_layers_of_transformers(tmp_path, blocks, scheme):
    fine = pytest.importorskip("transformers.integrations.finegrained_fp8")
    layer = fine.FP8Linear(K, 144, block_size=blocks, activation_scheme=scheme, has_bias=True)
    rng = np.random.default_rng(0)
    layer.weight.data = matrix(outs=144).to(torch.float8_e4m3fn)
    scale = layer.weight_scale_inv
    scale.data = torch.from_numpy(rng.uniform(.01, .02, tuple(scale.shape)).astype(np.float32))
    layer.bias.data = torch.arange(144.)
    want = fine._dequantize_fp8_weight(layer.weight.data, scale.data, blocks, torch.float32).numpy()
    state = {name: value for name, value in layer.state_dict().items() if value is not None}
    got, found = loaded(tmp_path, state, {"quant_method": "fp8", "activation_scheme": scheme, "weight_block_size": blocks})
    assert np.array_equal(got, want) and found.activation.mode == scheme


TARGETS = [M, "re:.*up_proj$", "re:.*mlp.*", "Linear", "re:.*attn.*", "model.layers.1.mlp.up_proj", "Embedding"]


def test_of_several_groups_the_one_that_compressed_tensors_takes(tmp_path):
    """Groups of different widths and all orders of two and three targets: the tool's own matcher says which is meant."""
    import itertools
    from types import SimpleNamespace

    match = pytest.importorskip("compressed_tensors.utils.match").match_targets
    from qfunc.interop._detect import family
    from qfunc.interop._family import Config
    reader, linear = family("compressed_tensors"), torch.nn.Linear(1, 1)
    for count in (1, 2, 3):
        for targets in itertools.permutations(TARGETS, count):
            groups = {f"group_{i}": {"targets": [target], "weights": {"num_bits": 2 + i}} for i, target in enumerate(targets)}
            config = Config({"format": "pack-quantized", "config_groups": groups}, tmp_path)
            settings = reader.settings(SimpleNamespace(quant=config))
            for name in (M, "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"):
                theirs, ours = match(name, linear, list(targets)), settings.of(name)
                assert (ours is None) == (not theirs)
                assert ours is None or ours.targets == (theirs[0],)


def test_transforms_of_compressed_tensors_that_are_in_the_weights(tmp_path):
    """The tool multiplies offline rotations into weight and bias and keeps nothing else; those at run time are refused by name."""
    transform = pytest.importorskip("compressed_tensors.transform")
    layer = torch.nn.Sequential()
    layer.linear = torch.nn.Linear(64, 32, bias=True)
    places = [{"targets": ["Linear"], "location": "weight_input", "inverse": True}, {"targets": ["Linear"], "location": "weight_output"}]
    config = transform.TransformConfig(config_groups={"R1": {"type": "hadamard", "apply": places}})
    before = layer.linear.weight.detach().clone()
    transform.apply_transform_config(layer, config)
    assert set(layer.state_dict()) == {"linear.weight", "linear.bias"} and not torch.allclose(layer.linear.weight, before)
    _, _, plain = compressed("int-quantized", num_bits=8, type="int", strategy="channel")
    scale = layer.linear.weight.detach().abs().amax(1, keepdim=True) / 127
    codes = torch.round(layer.linear.weight.detach() / scale).to(torch.int8)
    tensors = {"weight": codes, "weight_scale": scale, "bias": layer.linear.bias}
    told = json.loads(config.model_dump_json())
    got, _ = loaded(tmp_path / "a", tensors, {**plain, "transform_config": told})
    assert np.array_equal(got, (codes.float() * scale).numpy())
    assert not qfunc.load(tmp_path / "a").notes
    for wrong in ({"location": "input"}, {"location": "q_attn"}, {}):
        told["config_groups"]["R1"]["apply"][1] = {"targets": ["Linear"], **wrong}
        with pytest.raises(qfunc.CheckpointError, match=r"config_groups\.R1\.apply.*at run time"):
            loaded(tmp_path / "b", tensors, {**plain, "transform_config": told})


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("mapping", ["SYMMETRIC", "ASYMMETRIC"])
def test_integers_of_torchao_with_and_without_zero_points(tmp_path, bits, mapping):
    torchao = pytest.importorskip("torchao.quantization")
    safetensors = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    from safetensors.torch import save_file
    from torchao.quantization.quant_primitives import MappingType
    model = torch.nn.Sequential()
    model.linear = torch.nn.Linear(96, 40, bias=False)
    model.linear.weight.data = matrix(outs=40, ins=96) + .3
    config = torchao.IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=torchao.PerGroup(32),
                                          mapping_type=MappingType[mapping])
    torchao.quantize_(model, config)
    tensors, metadata = safetensors.flatten_tensor_state_dict({"linear.weight": model.linear.weight.data})
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "torchao", "quant_type": {}}}))
    leaf = qfunc.load(tmp_path).weight("linear")
    assert np.array_equal(leaf.dequantize("float32").T, model.linear.weight.dequantize().detach().numpy())
    assert leaf.scheme.name == f"w{bits}a16_g32" + "_asym" * (mapping == "ASYMMETRIC")

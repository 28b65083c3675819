"""Formats and corners that no recorded checkpoint covers, against a second, plain implementation; and layers that must be refused."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from checkpoints import checkpoint

import qfunc
from qfunc import CheckpointError
from qfunc.interop import marlin

M = "model.layers.0.mlp.up_proj"
K, N = 256, 256
E2M1 = np.array([0, .5, 1, 1.5, 2, 3, 4, 6, -0.0, -.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def generator(seed=0):
    return np.random.default_rng(seed)


def under(tensors, module=M):
    return {f"{module}.{name}": array for name, array in tensors.items()}


def dense(folder, module=M):
    return np.asarray(qfunc.dequantize(qfunc.load(folder).weight(module), "float32"))


def words(codes, bits=4):
    """Codes [K, N] to GPTQ words [K b / 32, N]."""
    spread = ((codes.T[..., None] >> np.arange(bits)) & 1).reshape(codes.shape[1], -1).astype(np.uint8)
    return np.ascontiguousarray(np.packbits(spread, axis=-1, bitorder="little").view(np.int32).T)


def gptq(bits=4, group=128, zero=None, order=None, seed=0):
    rng = generator(seed)
    q = rng.integers(0, 2**bits, (K, N)).astype(np.uint8)
    s = rng.uniform(.01, .02, (K // group, N)).astype(np.float16)
    z = rng.integers(1, 2**bits, (K // group, N)) if zero is None else np.full((K // group, N), zero)
    index = np.arange(K) // group if order is None else (np.arange(K) // group)[order]
    want = s[index].astype(np.float32) * (q.astype(np.float32) - z[index])
    return q, s, z, index, want


def gptq_tensors(q, s, stored, index=None, bits=4):
    tensors = {"qweight": words(q, bits), "scales": s, "qzeros": np.ascontiguousarray(words(stored.T.astype(np.uint8), bits).T)}
    return tensors if index is None else {**tensors, "g_idx": index.astype(np.int32)}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("v2", [False, True])
def test_gptq_zero_points_of_both_versions(tmp_path, bits, v2):
    q, s, z, _, want = gptq(bits)
    config = {"quant_method": "gptq", "bits": bits, "group_size": 128, "sym": False, "checkpoint_format": "gptq_v2" if v2 else "gptq"}
    folder = checkpoint(tmp_path, under(gptq_tensors(q, s, z if v2 else z - 1, bits=bits)), config)
    assert np.array_equal(dense(folder), want)
    other = {**config, "checkpoint_format": "gptq" if v2 else "gptq_v2"}
    if bits == 8 and v2:
        return          # read as v1 its largest zero points would be 256, which is refused
    assert not np.allclose(dense(checkpoint(tmp_path, under(gptq_tensors(q, s, z if v2 else z - 1, bits=bits)), other)), want, atol=1e-3)


@pytest.mark.parametrize("stored", [7, 8, 3])
def test_symmetric_gptq_does_not_believe_its_zero_points(tmp_path, stored):
    q, s, _, _, want = gptq(zero=8)
    folder = checkpoint(tmp_path, under(gptq_tensors(q, s, np.full((2, N), stored))), {"quant_method": "gptq", "bits": 4,
                                                                                       "group_size": 128})
    assert np.array_equal(dense(folder), want)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_act_order_permutes_inputs(tmp_path, bits):
    order = generator(5).permutation(K)
    q, s, z, index, want = gptq(bits, order=order)
    config = {"quant_method": "gptq", "bits": bits, "group_size": 128, "sym": False, "desc_act": True, "checkpoint_format": "gptq_v2"}
    loaded = qfunc.load(checkpoint(tmp_path, under(gptq_tensors(q, s, z, index, bits)), config)).weight(M)
    assert loaded.scheme.weight.actorder and loaded.scheme.name.endswith("_asym_actorder")
    assert np.array_equal(qfunc.dequantize(loaded, "float32"), want)


def test_gptq_rules_by_module(tmp_path):
    q, s, _, _, want = gptq(8, group=64, zero=128)
    skipped = {"model.layers.1.mlp.up_proj.weight": np.ones((4, 4), np.float32)}
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128,
              "dynamic": {r"+:.*\.0\.mlp.*": {"bits": 8, "group_size": 64}, r"-:.*\.1\..*": {}}}
    folder = checkpoint(tmp_path, {**under(gptq_tensors(q, s, np.full((4, N), 127), bits=8)), **skipped}, config)
    loaded = qfunc.load(folder)
    assert np.array_equal(dense(folder), want) and list(loaded.schemes.values())[0].name == "w8a16_g64"
    assert loaded.params["model"]["layers"]["1"]["mlp"]["up_proj"]["kernel"].shape == (4, 4)


@pytest.mark.parametrize("group", [-1, 128])
def test_marlin_layout(tmp_path, group):
    groups = 1 if group == -1 else K // group
    rng = generator()
    q, s = rng.integers(0, 16, (K, N)).astype(np.uint8), rng.uniform(.01, .02, (groups, N)).astype(np.float16)
    tiles = q.reshape(K // 16, 16, N // 16, 16).transpose(0, 2, 1, 3).reshape(-1, 1024)[:, marlin.tile_order()]
    packed = np.zeros((K // 16, N * 2), np.uint32)
    flat = tiles.reshape(K // 16, -1)
    for i in range(8):
        packed |= flat[:, i::8].astype(np.uint32) << np.uint32(4 * i)
    order = marlin.scale_order(groups > 1)
    stored = np.ascontiguousarray(s.reshape(-1, len(order))[:, order].reshape(groups, N))
    folder = checkpoint(tmp_path, under({"B": packed.view(np.int32), "s": stored}),
                        {"quant_method": "gptq", "bits": 4, "group_size": group, "is_marlin_format": True})
    want = np.repeat(s.astype(np.float32), K // groups, 0) * (q.astype(np.float32) - 8)
    assert np.array_equal(dense(folder), want) and qfunc.load(folder).format == "marlin"


def test_experts_of_gpt_oss(tmp_path):
    experts, rng = 3, generator()
    blocks = rng.integers(0, 256, (experts, N, K // 32, 16)).astype(np.uint8)
    scales = rng.integers(110, 130, (experts, N, K // 32)).astype(np.uint8)
    bias = rng.standard_normal((experts, N)).astype(ml_dtypes.bfloat16)
    module = "model.layers.0.mlp.experts.gate_up_proj"
    folder = checkpoint(tmp_path, {f"{module}_blocks": blocks, f"{module}_scales": scales, f"{module}_bias": bias},
                        {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(experts, N, K)
    want = (E2M1[codes] * np.repeat(np.exp2(scales.astype(np.float32) - 127), 32, -1)).swapaxes(1, 2)
    assert np.array_equal(dense(folder, module), want)
    assert qfunc.load(folder).weight("model.layers.0.mlp.experts.2.gate_up_proj").shape == (K, N)
    assert np.array_equal(qfunc.load(folder).params["model"]["layers"]["0"]["mlp"]["experts"]["gate_up_proj"]["bias"], bias)


@pytest.mark.parametrize(("outs", "ins"), [(256, 256), (200, 300)])
@pytest.mark.parametrize("method", ["fp8", "blockwise_int8"])
def test_blocks_may_stick_out_over_the_edge(tmp_path, outs, ins, method):
    rng = generator()
    w = rng.integers(-100, 100, (outs, ins)).astype(np.int8)
    w = w if "int8" in method else (w / 10).astype(ml_dtypes.float8_e4m3fn)
    s = rng.uniform(.01, .02, (-(-outs // 128), -(-ins // 128))).astype(np.float32)
    folder = checkpoint(tmp_path, under({"weight": w, "weight_scale_inv": s}), {"quant_method": method, "weight_block_size": [128, 128]})
    want = w.astype(np.float32) * np.repeat(np.repeat(s, 128, 0), 128, 1)[:outs, :ins]
    assert np.array_equal(dense(folder), want.T)


def test_mxfp8_with_its_own_method(tmp_path):
    rng = generator()
    w = rng.standard_normal((N, K)).astype(ml_dtypes.float8_e4m3fn)
    e = rng.integers(100, 140, (N, K // 32)).astype(np.uint8)
    folder = checkpoint(tmp_path, under({"weight": w, "weight_scale_inv": e}), {"quant_method": "mxfp8", "weight_block_size": [1, 32]})
    assert np.array_equal(dense(folder).T, w.astype(np.float32) * np.repeat(np.exp2(e.astype(np.float32) - 127), 32, 1))


def slim(folder, tensors, kind, **more):
    folder = checkpoint(folder, under(tensors))
    (folder / "quant_model_description.json").write_text(json.dumps({**{name: kind for name in under(tensors)}, "version": "1.0.0",
                                                                     **more}))
    return folder


def test_modelslim_second_scales_and_their_check(tmp_path):
    rng, groups = generator(), 2
    q = rng.integers(-8, 8, (N, K)).astype(np.int8)
    pairs = ((q[0::2] & 15) | (q[1::2] << 4)).astype(np.int8)
    s, second = rng.uniform(.01, .02, (N, 1)).astype(np.float32), rng.uniform(.5, 2, (N, groups)).astype(np.float32)
    want = q * np.repeat(s * second, K // groups, 1)
    tensors = {"weight": pairs, "weight_scale": s, "weight_offset": np.zeros_like(s), "weight_scale_second": second,
               "weight_offset_second": np.zeros_like(second), "scale_bias": (8 * want.sum(1, keepdims=True)).astype(np.float32)}
    assert np.allclose(dense(slim(tmp_path / "a", tensors, "W4A8_DYNAMIC")).T, want, rtol=1e-6)
    tensors["scale_bias"] = tensors["scale_bias"][::-1].copy()
    with pytest.raises(CheckpointError, match="scale_bias"):
        qfunc.load(slim(tmp_path / "b", tensors, "W4A8_DYNAMIC"))


def test_modelslim_flat_quantization_keeps_its_transforms(tmp_path):
    rng = generator()
    q, s = rng.integers(-8, 8, (N, K)).astype(np.int8), rng.uniform(.01, .02, (N, 1)).astype(np.float32)
    tensors = {"weight": q, "weight_scale": s, "weight_offset": np.zeros_like(s), "left_trans": np.eye(16, dtype=np.float32),
               "right_trans": np.eye(16, dtype=np.float32), "clip_ratio": np.array([.9], np.float32)}
    loaded = qfunc.load(slim(tmp_path, tensors, "W4A4_FLATQUANT_DYNAMIC"))
    assert np.isclose(loaded.weight(M).scheme.activation.clip, .9)
    assert loaded.params["model"]["layers"]["0"]["mlp"]["up_proj"]["left_trans"].shape == (16, 16)


@pytest.mark.parametrize("wide", [False, True])
def test_modelslim_static_scales_and_bias(tmp_path, wide):
    rng = generator()
    q, s = rng.integers(-127, 128, (N, K)).astype(np.int8), rng.uniform(.01, .02, N).astype(np.float32)
    scale, offset, bias = np.float32(.05), -7, rng.standard_normal(N).astype(np.float32)
    deq = (s * scale).astype(np.float32)
    quant_bias = np.round(bias / deq - offset * q.sum(1, dtype=np.int64)).astype(np.int32)
    tensors = {"weight": q, "input_scale": np.array([scale]), "input_offset": np.array([offset], np.float32), "quant_bias": quant_bias,
               "deq_scale": deq.view(np.int32).astype(np.int64) if wide else deq}
    loaded = qfunc.load(slim(tmp_path, tensors, "W8A8"))
    leaf, node = loaded.weight(M), loaded.params["model"]["layers"]["0"]["mlp"]["up_proj"]
    assert np.allclose(leaf.scale[:, 0], s, rtol=1e-6) and int(leaf.input_zero[0, 0]) == offset
    assert np.abs(node["bias"] - bias).max() <= deq.max()


def test_experts_that_differ_stay_apart_and_are_reported(tmp_path):
    tensors = {}
    for expert, bits in enumerate((4, 8)):
        for proj, width in (("up_proj", bits), ("down_proj", 4)):
            q, s, z, _, _ = gptq(width, zero=2 ** (width - 1))
            tensors |= under(gptq_tensors(q, s, z - 1, bits=width), f"model.layers.0.mlp.experts.{expert}.{proj}")
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {r".*experts\.1\.up_proj": {"bits": 8}}}
    loaded = qfunc.load(checkpoint(tmp_path, tensors, config))
    assert set(loaded.schemes) == {"model/layers/0/mlp/experts/down_proj/kernel", "model/layers/0/mlp/experts/0/up_proj/kernel",
                                   "model/layers/0/mlp/experts/1/up_proj/kernel"}
    assert any("up_proj" in note for note in loaded.notes)
    assert loaded.weight("model.layers.0.mlp.experts.1.up_proj").scheme.name == "w8a16_g128"
    assert loaded.weight("model.layers.0.mlp.experts.1.down_proj").shape == (K, N)


def test_experts_with_and_without_an_order_are_one_stack(tmp_path):
    tensors, wants = {}, []
    for expert, order in enumerate((None, generator(1).permutation(K))):
        q, s, z, index, want = gptq(order=order, zero=8, seed=expert)
        tensors |= under(gptq_tensors(q, s, z - 1, index), f"model.layers.0.mlp.experts.{expert}.up_proj")
        wants.append(want)
    loaded = qfunc.load(checkpoint(tmp_path, tensors, {"quant_method": "gptq", "bits": 4, "group_size": 128}))
    stack = loaded.weight("model.layers.0.mlp.experts.up_proj")
    assert np.array_equal(qfunc.dequantize(stack, "float32"), np.stack(wants))


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
CT = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": {
    "targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}, "input_activations": None}}}
GOOD = gptq_tensors(*gptq()[:2], gptq()[2])
INT8 = {"weight": np.ones((8, 16), np.int8), "weight_scale": np.ones((8, 1), np.float32)}
BAD = {
    "no such method": ({"quant_method": "magic"}, GOOD, "quant_method: expected one of"), "no method": ({"bits": 4}, GOOD, "quant_method"),
    "bits": ({**GPTQ, "bits": 5}, GOOD, "bits: expected 2, 3, 4 or 8"), "bits type": ({**GPTQ, "bits": "4"}, GOOD,
                                                                                      "bits: expected an integer"),
    "bits true": ({**GPTQ, "bits": True}, GOOD, "bits: expected an integer"), "zero group": ({**GPTQ, "group_size": 0}, GOOD, "group_size"),
    "huge group": ({**GPTQ, "group_size": 2**40}, GOOD, "group_size"), "other group": ({**GPTQ, "group_size": 64}, GOOD,
                                                                                       "scales: expected shape"),
    "other bits": ({**GPTQ, "bits": 8}, GOOD, "scales: expected shape"), "no scales": (GPTQ, {"qweight": GOOD["qweight"]},
                                                                                       "scales: expected the tensor"),
    "missing zeros": ({**GPTQ, "sym": False}, {k: v for k, v in GOOD.items() if k != "qzeros"}, "qzeros: expected zero points"),
    "dtype": (GPTQ, {**GOOD, "qweight": GOOD["qweight"].astype(np.int64)}, "qweight: expected I32, found I64"),
    "NaN scale": (GPTQ, {**GOOD, "scales": np.full((2, N), np.nan, np.float16)}, "scales: expected finite numbers"),
    "infinite scale": (GPTQ, {**GOOD, "scales": np.full((2, N), np.inf, np.float16)}, "scales: expected finite numbers"),
    "extra tensor": (GPTQ, {**GOOD, "surprise": np.ones(3, np.float32)}, "surprise: expected no such tensor"),
    "g_idx range": (GPTQ, {**GOOD, "g_idx": np.full(K, 2, np.int32)}, "g_idx: expected groups from 0 to 1"),
    "g_idx negative": (GPTQ, {**GOOD, "g_idx": np.full(K, -1, np.int32)}, "g_idx: expected groups from 0 to 1"),
    "g_idx uneven": (GPTQ, {**GOOD, "g_idx": (np.arange(K) >= 100).astype(np.int32)}, "g_idx: expected groups of 128"),
    "g_idx length": (GPTQ, {**GOOD, "g_idx": np.zeros(7, np.int32)}, "g_idx: expected shape"),
    "awq bits": ({**AWQ, "bits": 8}, GOOD, "bits: expected 4"), "awq version": ({**AWQ, "version": "gemm_fast"}, GOOD,
                                                                                "version: expected one of"),
    "ct format": ({**CT, "format": "marlin-24"}, INT8, "format among"), "ct no groups": ({**CT, "config_groups": {}}, INT8,
                                                                                         "config_groups"),
    "ct ignored": ({**CT, "ignore": [M]}, INT8, "expected a float layer"), "ct sparse": ({**CT,
                                                                                          "sparsity_config": {"format": "sparse-24"}},
                                                                                          INT8, "dense"),
    "ct transforms": ({**CT, "transform_config": {"config_groups": {"a": {"apply": [{"location": "output"}]}}}}, INT8, "at run time"),
    "ct no transforms": ({**CT, "transform_config": {"config_groups": {"a": 1}}}, INT8, "object of objects"),
    "ct status": ({**CT, "quantization_status": "calibration"}, INT8, "quantization_status"),
    "ct regex": ({**CT, "ignore": ["re:("]}, INT8, "patterns that can be matched"),
    "float layer in int8": (CT, {"weight": INT8["weight"]}, "expected a float tensor, or scales"),
    "exponent 255": ({"quant_method": "mxfp8"}, {"weight": np.ones((8, 32), ml_dtypes.float8_e4m3fn),
                                                 "weight_scale_inv": np.full((8, 1), 255, np.uint8)},
                     "exponents below 255"),
    "codes": ({**CT, "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "channel"}}}},
              {**INT8, "weight": np.full((8, 16), 9, np.int8)}, "codes from -8 to 7"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_layers_are_refused_by_name(tmp_path, name):
    config, tensors, message = BAD[name]
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        qfunc.load(checkpoint(tmp_path, under(tensors), config))
    assert "json" in str(error.value) or "safetensors" in str(error.value)


def test_packed_float_weights_without_a_configuration_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="names no quantization"):
        qfunc.load(checkpoint(tmp_path, under(INT8)))


def test_a_float_checkpoint_loads(tmp_path):
    loaded = qfunc.load(checkpoint(tmp_path, {f"{M}.weight": np.ones((8, 4), np.float32), "model.embed_tokens.weight": np.ones((6,
                                                                                                                                4),
                                                                                                                                np.float16),
                                              "model.norm.weight": np.ones(4, ml_dtypes.bfloat16), "ids": np.arange(3)}))
    assert loaded.format == "float" and not loaded.schemes
    assert loaded.weight(M).shape == (4, 8) and loaded.params["model"]["embed_tokens"]["weight"].shape == (6, 4)
    assert loaded.params["ids"].dtype == np.int32


@pytest.mark.parametrize(("names", "message"), [
    (["a.weight", "a.weight.b.weight"], "parents that are no leaves"), (["a.kernel", "a.weight"], "one leaf of this path"),
])
def test_names_that_collide_in_the_tree_are_refused(tmp_path, names, message):
    tensors = {name: np.ones((2, 2) if name == "a.weight" and message.startswith("one") else 2, np.float32) for name in names}
    with pytest.raises(CheckpointError, match=message):
        qfunc.load(checkpoint(tmp_path, tensors))


def test_nvfp4_divisors_are_inverted(tmp_path):
    rng = generator()
    codes = rng.integers(0, 16, (N, K)).astype(np.uint8)
    tensors = {"weight_packed": codes[:, ::2] | codes[:, 1::2] << 4, "weight_global_scale": np.array([50.], np.float32),
               "weight_scale": rng.uniform(1, 8, (N, K // 16)).astype(ml_dtypes.float8_e4m3fn),
               "input_global_scale": np.array([4.], np.float32)}
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
             "input_activations": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"}}
    folder = checkpoint(tmp_path, under(tensors), {**CT, "format": "nvfp4-pack-quantized", "config_groups": {"group_0": group}})
    leaf = qfunc.load(folder).weight(M)
    want = E2M1[codes] * np.repeat(tensors["weight_scale"].astype(np.float32), 16, 1) / 50
    assert np.allclose(np.asarray(leaf.dequantize("float32")).T, want, rtol=1e-6)
    assert float(leaf.input_scale[0, 0]) == .25 and float(leaf.scale2[0, 0]) == np.float32(1) / 50


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("old", [False, True])
def test_both_packings_of_odd_widths(tmp_path, bits, old):
    q = generator().integers(0, 2**bits, (8, 96)).astype(np.uint8)
    each = 32 // bits
    if old:
        padded = np.pad(q, ((0, 0), (0, -96 % each))).reshape(8, -1, each).astype(np.uint32)
        packed = (padded << (np.arange(each) * bits).astype(np.uint32)).sum(-1).astype(np.uint32).view(np.int32)
    else:
        packed = np.ascontiguousarray(words(q.T, bits).T)
    group = {"targets": ["Linear"], "weights": {"num_bits": bits, "type": "int", "strategy": "channel"}}
    tensors = {"weight_packed": packed, "weight_scale": np.full((8, 1), .5, np.float32), "weight_shape": np.array([8, 96])}
    folder = checkpoint(tmp_path, under(tensors), {**CT, "format": "pack-quantized", "config_groups": {"group_0": group}})
    assert np.array_equal(dense(folder).T, (q.astype(np.float32) - 2 ** (bits - 1)) / 2)


def test_a_group_for_the_experts_class_comes_before_linear(tmp_path):
    def group(bits, target):
        return {"targets": [target], "weights": {"num_bits": bits, "type": "int", "strategy": "channel"}}
    config = {**CT, "config_groups": {"a": group(8, "Linear"), "b": group(4, "MoEGMM")}}
    folder = checkpoint(tmp_path, {**under(INT8), **under(INT8, "model.layers.0.mlp.experts.0.up_proj")}, config)
    assert sorted(s.name for s in qfunc.load(folder).schemes.values()) == ["w4a16", "w8a16"]


def fast_words(q):
    """Codes [N, K] as AutoAWQ's `gemv_fast` interleaves them, one element at a time."""
    outs, ins = q.shape
    words = np.zeros((outs // 4, ins), np.uint16)
    order = [0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27, 4, 5, 12, 13, 20, 21, 28, 29, 6, 7, 14, 15, 22, 23, 30, 31]
    order = [order[8 * (i // 8) + (0, 2, 4, 6, 1, 3, 5, 7)[i % 8]] for i in range(32)]
    for n in range(outs):
        for k in range(ins):
            place = 64 * (n % 4) + k % 64                  # of the 256 nibbles of 4 outputs x 64 inputs
            source = 32 * (k // 32) + order[k % 32]
            words[n // 4, 64 * (k // 64) + place // 4] |= np.uint16(int(q[n, source]) << 4 * (place % 4))
    return words.view(np.int16)


@pytest.mark.parametrize("group", [64, 128])
def test_awqs_fast_gemv(tmp_path, group):
    rng, groups = generator(), K // group
    q, z = rng.integers(0, 16, (64, K)).astype(np.uint8), rng.integers(0, 16, (64, groups))
    s = rng.uniform(.01, .02, (64, groups)).astype(np.float16)
    tall = np.zeros((8, 64), np.float16)
    scales, products = tall.copy(), tall.copy()
    scales[:groups], products[:groups] = s.T, -(s.astype(np.float32) * z).astype(np.float16).T
    tensors = {"qweight": fast_words(q), "scales": scales, "scaled_zeros": products}
    config = {**AWQ, "group_size": group, "version": "gemv_fast"}
    folder = checkpoint(tmp_path, under(tensors), config)
    want = (q - np.repeat(z, group, 1)) * np.repeat(s.astype(np.float32), group, 1)
    assert np.array_equal(dense(folder).T, want)
    tensors["scaled_zeros"] = products + np.float16(.004)
    with pytest.raises(CheckpointError, match="products of the scales"):
        qfunc.load(checkpoint(tmp_path, under(tensors), config))


@pytest.mark.parametrize("own", [False, True])
def test_fbgemm_clips_activations_to_its_bound(tmp_path, own):
    rng = generator()
    w, s = rng.standard_normal((32, 64)).astype(ml_dtypes.float8_e4m3fn), rng.uniform(.01, .02, (32, 1)).astype(np.float32)
    tensors = {"weight": w, "weight_scale": s, **({"input_scale_ub": np.array([3.], np.float32)} if own else {})}
    loaded = qfunc.load(checkpoint(tmp_path, under(tensors), {"quant_method": "fbgemm_fp8", "activation_scale_ub": 7.0 if own else 3.0}))
    leaf = loaded.weight(M)
    assert leaf.scheme.name == "fp8_dynamic" and leaf.scheme.activation.bound == 3
    assert np.array_equal(dense(tmp_path).T, w.astype(np.float32) * s)
    x = (10 * rng.standard_normal((5, 64))).astype(np.float32)
    # fbgemm's own form of it: the row's largest magnitude, at most the bound, lands on 448; what is beyond is clipped.
    scale = np.minimum(np.abs(x).max(1, keepdims=True), 3) / np.float32(448)
    codes = np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    got = qfunc.quantize_activation(x, leaf)
    assert np.array_equal(got.codes, codes) and np.array_equal(got.scale, scale)
    want = (codes.astype(np.float64) * scale) @ (w.astype(np.float64) * s).T
    assert np.allclose(qfunc.matmul(x, leaf), want, rtol=1e-5, atol=1e-5)
    assert np.allclose(qfunc.matmul(x, leaf), qfunc.matmul(np.clip(x, -3, 3), leaf))


@pytest.mark.parametrize(("outs", "ins"), [(8, 96), (12, 40), (6, 32), (128, 160)])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_blocks_that_cross_rows(tmp_path, outs, ins, nested):
    torch, functional = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes.functional")
    w = torch.from_numpy(generator().standard_normal((outs, ins)).astype(np.float32))
    packed, state = functional.quantize_4bit(w, blocksize=64, compress_statistics=nested, quant_type="nf4")
    tensors = {"weight": packed.numpy(), **{f"weight.{name}": value.numpy() for name, value in state.as_dict(packed=True).items()}}
    folder = checkpoint(tmp_path, under(tensors), {"quant_method": "bitsandbytes", "load_in_4bit": True})
    # On a CPU bitsandbytes 0.50 restarts its blocks at every row of such a matrix (far from what it quantized); as one row it is right.
    state.shape = torch.Size((1, outs * ins))
    assert np.array_equal(dense(folder).T, functional.dequantize_4bit(packed, state).numpy().reshape(outs, ins))
    assert np.abs(dense(folder).T - w.numpy()).mean() < .15


@pytest.mark.parametrize("version", ["gemv_fast", "gemv", "gemm"])
def test_awq_without_its_zero_points_or_words_is_refused(tmp_path, version):
    with pytest.raises(CheckpointError):
        qfunc.load(checkpoint(tmp_path, under({"qweight": np.zeros((4, 128), np.int16)}), {**AWQ, "version": version}))


@pytest.mark.parametrize("bits", [pytest.param(b, marks=[] if b in (3, 6) else pytest.mark.slow) for b in range(2, 9)])
@pytest.mark.parametrize("packing", ["auto_round", "auto_round:gptqmodel", "auto_round:auto_gptq"])
def test_auto_rounds_zero_points_and_widths(tmp_path, bits, packing):
    """auto-round's backends list which packing they read: those of `GPTQ_FORMAT_NO_ZP` take zero points as they are stored."""
    q, s, z, _, want = gptq(bits, group=64)
    config = {"quant_method": "auto-round", "bits": bits, "group_size": 64, "sym": False, "data_type": "int", "packing_format": packing}
    tensors = gptq_tensors(q, s, z - 1 if "auto_gptq" in packing else z, bits=bits)
    assert np.array_equal(dense(checkpoint(tmp_path, under(tensors), config)), want)


@pytest.mark.parametrize(("method", "more"), [("auto-round", {"packing_format": "auto_round:auto_awq"}),
                                              ("awq", {"provider": "auto-round"})])
@pytest.mark.parametrize("bits", [4, 5, 6, 7])
def test_awqs_order_in_other_widths(tmp_path, method, more, bits):
    rng, groups = generator(bits), K // 64
    q, z = rng.integers(0, 2**bits, (K, N)).astype(np.uint8), rng.integers(0, 2**bits, (groups, N)).astype(np.uint8)
    s = rng.uniform(.01, .02, (groups, N)).astype(np.float16)

    def packed(codes):              # slot i of eight outputs holds the one at (0, 2, 4, 6, 1, 3, 5, 7)[i]
        slots = codes.reshape(len(codes), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(codes.shape)
        return np.ascontiguousarray(words(slots.T, bits).T)
    config = {"quant_method": method, "bits": bits, "group_size": 64, "sym": False, **more}
    folder = checkpoint(tmp_path, under({"qweight": packed(q), "qzeros": packed(z), "scales": s}), config)
    assert np.array_equal(dense(folder), np.repeat(s.astype(np.float32), 64, 0) * (q.astype(np.float32) - np.repeat(z, 64, 0)))


def test_gptq_of_six_bits_only_from_auto_round(tmp_path):
    q, s, _, _, want = gptq(6, zero=32)
    tensors, config = under(gptq_tensors(q, s, np.full((2, N), 31), bits=6)), {"quant_method": "gptq", "bits": 6, "group_size": 128}
    assert np.array_equal(dense(checkpoint(tmp_path, tensors, {**config, "provider": "auto-round"})), want)
    for wrong in (config, {**GPTQ, "dynamic": {r".*up_proj": {"bits": 6}}}):
        with pytest.raises(CheckpointError, match="bits: expected 2, 3, 4 or 8"):
            qfunc.load(checkpoint(tmp_path, tensors, wrong))


def quark_words(codes, ordered):
    """Codes 0 to 15 [rows, n] as Quark's int32, one element at a time."""
    out = np.zeros((len(codes), codes.shape[1] // 8), np.uint32)
    for i in range(8):
        out |= codes[:, (i if ordered else (0, 2, 4, 6, 1, 3, 5, 7)[i])::8].astype(np.uint32) << np.uint32(4 * i)
    return out.view(np.int32)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("dtype", "scheme"), [("int4", "per_group"), ("uint4", "per_group"), ("int8", "per_group"),
                                               ("int4", "per_channel"), ("uint4", "per_channel")])
def test_quarks_integers(tmp_path, dtype, scheme, ordered):
    rng, grouped, bits = generator(), scheme == "per_group", int(dtype[-1])
    outs, ins, groups = 40, 96, 3 if grouped else 1
    low = -(2 ** (bits - 1)) if dtype[0] == "i" else 0
    q, s = rng.integers(low, low + 2**bits, (outs, ins)), rng.uniform(.01, .02, (outs, groups)).astype(np.float32)
    z = np.zeros((outs, groups), int) if low else rng.integers(0, 16, (outs, groups))

    def packed(codes):
        codes = codes.T if grouped else codes
        return np.ascontiguousarray(codes).astype(np.int8) if bits == 8 else quark_words(codes & 15, ordered)
    tensors = {"weight": packed(q), "weight_scale": np.ascontiguousarray(s.T) if grouped else s[:, 0],
               "weight_zero_point": packed(z) if grouped else quark_words(z.T & 15, ordered)[0]}
    weight = {"dtype": dtype, "qscheme": scheme, "group_size": 32 if grouped else None, "symmetric": low < 0, "ch_axis": -1}
    config = {"quant_method": "quark", "global_quant_config": {"weight": weight, "input_tensors": None},
              "export": {"pack_method": "order" if ordered else "reorder"}}
    want = (q - np.repeat(z, ins // groups, 1)) * np.repeat(s, ins // groups, 1)
    assert np.array_equal(dense(checkpoint(tmp_path, under(tensors), config)).T, want.astype(np.float32))
    if low:
        tensors["weight_zero_point"] = np.full_like(tensors["weight_zero_point"], 3)
        with pytest.raises(CheckpointError, match="zero points 0"):
            qfunc.load(checkpoint(tmp_path, under(tensors), config))


@pytest.mark.parametrize("shape", [(2, 2), (2, 1, 2, 1)])
def test_modelopts_blocks_have_empty_axes_between(tmp_path, shape):
    rng = generator()
    w, s = rng.standard_normal((N, K)).astype(ml_dtypes.float8_e4m3fn), rng.uniform(.01, .02, (2, 2)).astype(np.float32)
    folder = checkpoint(tmp_path, under({"weight": w, "weight_scale": s.reshape(shape)}), {"quant_method": "modelopt",
                                                                                           "quant_algo": "fp8_pb_wo"})
    assert np.array_equal(dense(folder).T, w.astype(np.float32) * np.repeat(np.repeat(s, 128, 0), 128, 1))


def test_modelopts_weight_only_int8(tmp_path):
    w, s = generator().integers(-128, 128, (N, K)).astype(np.int8), np.linspace(.01, .02, N, dtype=np.float32)
    loaded = qfunc.load(checkpoint(tmp_path, under({"weight": w, "weight_scale": s}), {"quant_method": "modelopt", "quant_algo": "W8A16"}))
    assert loaded.weight(M).scheme.name == "w8a16" and np.array_equal(dense(tmp_path).T, w * s[:, None])


def test_missing_experts_are_told(tmp_path):
    config = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": CT["config_groups"]}
    tensors = {name: array for e in (0, 2) for name, array in under(INT8, f"model.layers.0.mlp.experts.{e}.up_proj").items()}
    loaded = qfunc.load(checkpoint(tmp_path, tensors, config))
    assert any("no expert 1" in note for note in loaded.notes) and len(loaded.schemes) == 2


def test_an_embedding_is_a_target_of_its_own(tmp_path):
    def group(bits, target):
        return {"targets": [target], "weights": {"num_bits": bits, "type": "int", "strategy": "channel"}}
    tensors = {**under(INT8), **under(INT8, "model.embed_tokens")}
    config = {**CT, "config_groups": {"a": group(8, "Linear"), "b": group(4, "Embedding")}}
    loaded = qfunc.load(checkpoint(tmp_path, tensors, config))
    assert loaded.weight("model.embed_tokens").scheme.name == "w4a16" and loaded.weight(M).scheme.name == "w8a16"
    for wrong in ({**config, "config_groups": {"a": group(8, "Linear")}}, {**config, "ignore": ["Embedding"]}):
        with pytest.raises(CheckpointError, match="embed_tokens.*ignored, or no group"):
            qfunc.load(checkpoint(tmp_path, tensors, wrong))


@pytest.mark.parametrize("name", ["self_attn.kv_scale", "self_attn.attn.kv_scale"])
def test_one_scale_of_the_cache_is_that_of_keys_and_values(tmp_path, name):
    tensors = {**under({"weight": np.ones((8, 16), ml_dtypes.float8_e4m3fn), "weight_scale": np.ones((), np.float32)}),
               f"model.layers.0.{name}": np.array(.25, np.float32)}
    loaded = qfunc.load(checkpoint(tmp_path, tensors, {"quant_method": "fp8", "activation_scheme": "dynamic"}))
    node = loaded.params["model"]["layers"]["0"]["self_attn"]
    assert loaded.kv_cache == "fp8_e4m3" and set(node) == {"k_scale", "v_scale"} and float(node["k_scale"]) == float(node["v_scale"]) == .25
    tensors[f"model.layers.0.{name.replace('kv_', 'v_')}"] = np.array(.5, np.float32)
    with pytest.raises(CheckpointError, match="v_scale: expected one leaf"):
        qfunc.load(checkpoint(tmp_path, tensors, {"quant_method": "fp8", "activation_scheme": "dynamic"}))


@pytest.mark.parametrize("container", [np.uint8, ml_dtypes.float8_e4m3fn])
def test_dual_scales_over_nibbles_and_over_bytes(tmp_path, container):
    rng, ins = generator(), 1024
    q = rng.integers(0, 16, (8, ins)).astype(np.uint8)
    weight = q[:, 0::2] | q[:, 1::2] << 4 if container is np.uint8 else E2M1[q].astype(container)
    e, outer = rng.integers(120, 130, (8, ins // 32)).astype(np.uint8), rng.uniform(.5, 2, (8, 2, 1)).astype(np.float32)
    tensors = {"weight": weight, "weight_scale": e, "weight_dual_scale": outer}
    want = E2M1[q] * np.repeat(np.exp2(e.astype(np.float32) - 127), 32, 1) * np.repeat(outer[..., 0], 512, 1)
    assert np.allclose(dense(slim(tmp_path / "a", tensors, "W4A4_MXFP4_DUALSCALE")).T, want, rtol=1e-6)
    if container is not np.uint8:
        tensors["weight"][3, 7] = 5
        with pytest.raises(CheckpointError, match="weight: expected e4m3 numbers that e2m1 has"):
            qfunc.load(slim(tmp_path / "b", tensors, "W4A4_MXFP4_DUALSCALE"))


@pytest.mark.parametrize("columns", [1, 16])
def test_compressed_tensors_for_ascend_hold_two_outputs_a_byte(tmp_path, columns):
    rng = generator()
    q, s = rng.integers(-8, 8, (N, K)).astype(np.int8), rng.uniform(.01, .02, (N, 1)).astype(np.float32)
    want = q * s
    tensors = {"weight": ((q[0::2] & 15) | (q[1::2] << 4)).astype(np.int8), "weight_scale": s, "weight_offset": np.zeros_like(s),
               "scale_bias": (8 * want.reshape(N, columns, -1).sum(-1)).astype(np.float32)}
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "channel"},
             "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}}
    config = {**CT, "config_groups": {"group_0": group}}
    module = "model.layers.0.mlp.experts.0.up_proj"
    folder = checkpoint(tmp_path, under(tensors, module), config)
    leaf = qfunc.load(folder).weight(module)
    assert np.array_equal(dense(folder, module).T, want) and leaf.scheme.name == "w4a8_dynamic"
    tensors["scale_bias"] = -tensors["scale_bias"]
    with pytest.raises(CheckpointError, match="scale_bias"):
        qfunc.load(checkpoint(tmp_path, under(tensors, module), config))


@pytest.mark.parametrize("form", ["sparse-24-bitmask", "sparse-bitmask"])
@pytest.mark.parametrize("kind", [np.int8, ml_dtypes.float8_e4m3fn])
def test_sparse_weights_of_compressed_tensors(tmp_path, form, kind):
    rng, outs, ins = generator(), 12, 44
    mask = np.zeros((outs, ins), bool)
    for row in mask.reshape(outs, -1, 4) if form == "sparse-24-bitmask" else ():
        for four in row:
            four[rng.permutation(4)[:2]] = True
    mask = mask if mask.any() else rng.random((outs, ins)) < .3
    dense_weight = np.where(mask, rng.integers(1, 100, (outs, ins)), 0).astype(kind)
    bits = np.zeros((outs, 6), np.uint8)
    for row, column in zip(*np.nonzero(mask), strict=True):
        bits[row, column // 8] |= 1 << column % 8
    values, counts = dense_weight[mask], mask.sum(1)
    tensors = {"shape": np.array([[outs], [ins]]), "bitmask": bits, "weight_scale": rng.uniform(.01, .02, (outs, 1)).astype(np.float32)}
    if form == "sparse-24-bitmask":
        tensors["compressed"] = values.reshape(outs, ins // 2)
    else:
        tensors |= {"compressed": values, "row_offsets": np.cumsum(counts) - counts, "shape": np.array([outs, ins])}
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int" if kind is np.int8 else "float", "strategy": "channel"}}
    config = {**CT, "format": "int-quantized" if kind is np.int8 else "float-quantized", "config_groups": {"g": group},
              "sparsity_config": {"format": form, "global_sparsity": .5, "sparsity_structure": "2:4", "targets": [], "ignore": []}}
    folder = checkpoint(tmp_path, under(tensors), config)
    assert np.array_equal(dense(folder).T, dense_weight.astype(np.float32) * tensors["weight_scale"])
    assert not qfunc.load(folder).notes and qfunc.interop.inspect(folder).nbytes == sum(t.nbytes for t in tensors.values())
    one = bits.copy()
    one[3, 0] ^= 1
    for name, wrong in (("bitmask", one), ("bitmask", bits[:, :5]), ("compressed", tensors["compressed"][:-1]),
                        ("shape", np.array([outs, -ins])), ("shape", np.array([outs, 2**40]))):
        with pytest.raises(CheckpointError):
            qfunc.load(checkpoint(tmp_path, under({**tensors, name: wrong}), config))
    with pytest.raises(CheckpointError, match="leaves in float|float layer"):
        qfunc.load(checkpoint(tmp_path, under(tensors), {**config, "ignore": ["re:.*"]}))

"""Formats and corners that no recorded checkpoint covers, against a second, plain implementation; and layers that must be refused."""

import re

import ml_dtypes
import numpy as np
import pytest
from checkpoints import checkpoint
from foreign import AWQ, CT, E2M1, GPTQ, INT8, K, M, N, dense, generator, gptq, gptq_tensors, slim, under

import qfunc
from qfunc import CheckpointError
from qfunc.interop import marlin


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


GOOD = gptq_tensors(*gptq()[:2], gptq()[2])
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

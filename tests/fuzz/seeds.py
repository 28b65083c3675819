"""Small checkpoints of the formats that no recorded one covers, to be damaged like the recorded ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from checkpoints import checkpoint, header_and_data, write_file  # noqa: E402

N, K = 32, 128
MODULE = "model.layers.0.mlp.up_proj"
E4M3 = ml_dtypes.float8_e4m3fn


def _tensors(rng) -> dict[str, tuple[dict, dict]]:
    """Family to (quantization_config, tensors of one layer)."""
    def numbers(kind, *shape, low=0, high=100):
        return rng.integers(low, high, shape).astype(kind)

    def floats(*shape, kind=np.float16):
        return np.asarray(rng.uniform(.01, .02, shape), kind)
    return {
        "gptq-2bit": ({"quant_method": "gptq", "bits": 2, "group_size": 64, "sym": False, "checkpoint_format": "gptq_v2"},
                      {"qweight": numbers(np.int32, K // 16, N), "qzeros": numbers(np.int32, 2, N // 16), "scales": floats(2, N),
                       "g_idx": (np.arange(K) // 64).astype(np.int32)}),
        "marlin": ({"quant_method": "gptq", "bits": 4, "group_size": -1, "is_marlin_format": True},
                   {"B": numbers(np.int32, K // 16, 512), "s": floats(1, 256)}),
        "awq-fast": ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemv_fast"},
                     {"qweight": numbers(np.int16, N // 4, K), "scales": floats(8, N), "scaled_zeros": np.zeros((8, N), np.float16)}),
        "fp8-block": ({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
                      {"weight": numbers(np.int8, N, K).view(E4M3), "weight_scale_inv": floats(1, 1, kind=np.float32)}),
        "fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
                   {"weight": numbers(np.int8, N, K).view(E4M3), "weight_scale": floats(N, 1, kind=np.float32),
                    "input_scale_ub": np.ones(1, np.float32)}),
        "blockwise-int8": ({"quant_method": "blockwise_int8", "weight_block_size": [16, 64]},
                           {"weight": numbers(np.int8, N, K), "weight_scale_inv": floats(2, 2, kind=np.float32)}),
        "mxfp8": ({"quant_method": "mxfp8"},
                  {"weight": numbers(np.int8, N, K).view(E4M3), "weight_scale_inv": numbers(np.uint8, N, K // 32)}),
        "ct-3bit": ({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": {
            "targets": ["Linear"], "weights": {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 64}}}},
            {"weight_packed": numbers(np.int32, N, 12), "weight_scale": floats(N, 2), "weight_shape": np.array([N, K])}),
        "autoround-6bit": ({"quant_method": "auto-round", "bits": 6, "group_size": 64, "sym": False, "packing_format": "auto_round",
                            "extra_config": {r".*\.lm_head": {"bits": 16}}},
                           {"qweight": numbers(np.int32, K * 6 // 32, N), "qzeros": numbers(np.int32, 2, N * 6 // 32),
                            "scales": floats(2, N)}),
        "quark-uint4": ({"quant_method": "quark", "export": {"pack_method": "order"}, "global_quant_config": {
            "weight": {"dtype": "uint4", "qscheme": "per_group", "group_size": 64, "symmetric": False}, "input_tensors": None}},
            {"weight": numbers(np.int32, K, N // 8), "weight_scale": floats(2, N), "weight_zero_point": numbers(np.int32, 2, N // 8)}),
        "fp8-static": ({"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
                       {"weight": numbers(np.int8, N, K).view(E4M3), "weight_scale_inv": floats(kind=np.float32),
                        "activation_scale": floats(kind=np.float32)}),
        "modelopt-blocks": ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"},
                            {"weight": numbers(np.int8, N, K).view(E4M3), "weight_scale": floats(1, 1, 1, 1, kind=np.float32)}),
        "ct-sparse": ({"quant_method": "compressed-tensors", "format": "int-quantized", "sparsity_config": {"format": "sparse-24-bitmask"},
                       "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}}},
                      {"shape": np.array([[N], [K]]), "bitmask": np.full((N, K // 8), 0x55, np.uint8),
                       "compressed": numbers(np.int8, N, K // 2), "weight_scale": floats(N, 1, kind=np.float32)}),
        "ct-mxfp6": ({"quant_method": "compressed-tensors", "format": "mxfp6-pack-quantized", "config_groups": {"g": {
            "targets": ["Linear"], "weights": {"num_bits": 6, "type": "float", "strategy": "group", "group_size": 32}}}},
            {"weight_packed": numbers(np.uint8, N, K * 3 // 4), "weight_scale": numbers(np.uint8, N, K // 32)}),
    }


def _experts(folder: Path, rng) -> None:
    module = "model.layers.0.mlp.experts.gate_up_proj"
    checkpoint(folder, {f"{module}_blocks": rng.integers(0, 256, (2, 8, 2, 16)).astype(np.uint8),
                        f"{module}_scales": rng.integers(100, 130, (2, 8, 2)).astype(np.uint8),
                        f"{module}_bias": np.ones((2, 8), ml_dtypes.bfloat16)}, {"quant_method": "mxfp4", "modules_to_not_convert": []})


def _wan(folder: Path, rng, kind: str, tensors: dict) -> None:
    folder.mkdir(parents=True)
    named = {f"blocks.0.self_attn.q.linear.{name}": array for name, array in tensors.items()}
    floats = {"blocks.0.self_attn.q.div.mul_scale": np.ones(K, np.float32), "head.modulation": np.ones((1, 2, K), np.float32),
              "blocks.0.self_attn.q_rot": np.eye(8, dtype=np.float32)}
    write_file(folder / "quant_model_weight.safetensors", *header_and_data({**named, **floats}))
    (folder / "quant_model_description.json").write_text(json.dumps({
        **dict.fromkeys(named, kind), **dict.fromkeys(floats, "FLOAT"), "blocks.0.self_attn.quant_type": "FP8_DYNAMIC",
        "model_quant_type": kind}))
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", "dim": K, "num_heads": 2}))


def _gguf(folder: Path, rng) -> None:
    """NVFP4 with outer scales, rows to put in order, numbers of heads by layer."""
    import gguf
    folder.mkdir(parents=True)
    writer = gguf.GGUFWriter(folder / "model.gguf", "deci")
    writer.add_array("deci.attention.head_count", [4, 2])
    for layer in range(2):
        writer.add_tensor(f"blk.{layer}.attn_q.weight", rng.integers(0, 126, (N, 36 * K // 64)).astype(np.uint8),
                          raw_dtype=gguf.GGMLQuantizationType.NVFP4)
        writer.add_tensor(f"blk.{layer}.attn_q.scale", np.ones(1, np.float32))
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", np.ones(K, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(folder: Path) -> list[Path]:
    """All of them, each in a folder of its own."""
    import qfunc
    from qfunc.interop import save_native
    rng = np.random.default_rng(0)
    for name, (quantization, tensors) in _tensors(rng).items():
        checkpoint(folder / name, {f"{MODULE}.{part}": array for part, array in tensors.items()}, quantization)
    _experts(folder / "gpt-oss", rng)
    _gguf(folder / "gguf-nvfp4", rng)
    exponents = rng.integers(100, 130, (N, K // 32)).astype(np.uint8)
    nibbles = rng.integers(0, 256, (N, K // 2)).astype(np.uint8)
    _wan(folder / "wan" / "high_noise_model", rng, "W4A4_MXFP4_DUALSCALE", {
        "weight": nibbles, "weight_scale": exponents, "weight_dual_scale": np.ones((N, 1, 1), np.float32)})
    _wan(folder / "wan" / "low_noise_model", rng, "W8A8_MXFP8", {"weight": nibbles.repeat(2, 1).view(E4M3), "weight_scale": exponents})
    part = ["diffusers", "WanTransformer3DModel"]
    (folder / "pipeline").mkdir()
    (folder / "pipeline" / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "transformer": part}))
    _wan(folder / "pipeline" / "transformer", rng, "W8A8_DYNAMIC", {
        "weight": rng.integers(-9, 9, (N, K)).astype(np.int8), "weight_scale": np.ones((N, 1), np.float32)})
    weights = {"up": {"kernel": rng.standard_normal((K, N)).astype(np.float32)}}
    save_native(folder / "native", qfunc.quantize(weights, "w4a16_g64"), {"model_type": "qwen3"})
    return sorted(path for path in folder.iterdir() if path.is_dir())

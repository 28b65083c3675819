"""How fast checkpoints load, as a ratio to plain reading of the same bytes.

    python kernels/bench/load.py [--gigabytes 2] [--families gptq awq ...] [--rounds 3] [--json FILE]

For every family a synthetic checkpoint of layers of 4096 x 4096 is written once, then read plainly (`np.fromfile`, whole files) and loaded
(`qfunc.load`, until every array is on the device), alternating; the best of the rounds counts. A ratio of 0.5 means that loading takes
twice as long as reading. Families marked `=` are stored in qfunc's own packing, the others are repacked.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import qfunc

SIZE = 4096
KINDS = {"I8": 1, "U8": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8}
CT = {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}


def ct(form: str, weights: dict, act: dict | None = None) -> dict:
    return {**CT, "format": form, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": act}}}


TOKEN8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
N, K = SIZE, SIZE
# family: (repacked, quantization_config, tensors of a layer as (dtype, shape, fill)); a fill of None is random bytes.
FAMILIES = {
    "ct-w8a8": (False, ct("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, TOKEN8),
                {"weight": ("I8", (N, K), None), "weight_scale": ("F32", (N, 1), 0.01)}),
    "fp8-block": (False, {"quant_method": "fp8", "weight_block_size": [128, 128]},
                  {"weight": ("F8_E4M3", (N, K), None), "weight_scale_inv": ("F32", (N // 128, K // 128), 0.01)}),
    "modelslim-w8a8": (False, "W8A8_DYNAMIC", {"weight": ("I8", (N, K), None), "weight_scale": ("F32", (N, 1), 0.01),
                                               "weight_offset": ("F32", (N, 1), 0.0)}),
    "mxfp8": (False, {"quant_method": "mxfp8"}, {"weight": ("F8_E4M3", (N, K), None), "weight_scale_inv": ("U8", (N, K // 32), 120)}),
    "bnb-int8": (False, {"quant_method": "bitsandbytes", "load_in_8bit": True}, {"weight": ("I8", (N, K), None), "SCB": ("F32",
                                                                                                                         (N,), 1.0)}),
    "gguf-q4_k": (False, "gguf", {}),
    "gptq-4bit": (True, {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True},
                  {"qweight": ("I32", (K // 8, N), None), "qzeros": ("I32", (K // 128, N // 8), None), "scales": ("F16", (K // 128,
                                                                                                                          N), 0.01)}),
    "gptq-3bit": (True, {"quant_method": "gptq", "bits": 3, "group_size": 128, "sym": True},
                  {"qweight": ("I32", (K * 3 // 32, N), None), "qzeros": ("I32", (K // 128, N * 3 // 32), None),
                   "scales": ("F16", (K // 128, N), 0.01)}),
    "gptq-8bit": (True, {"quant_method": "gptq", "bits": 8, "group_size": 128, "sym": True},
                  {"qweight": ("I32", (K // 4, N), None), "qzeros": ("I32", (K // 128, N // 4), None), "scales": ("F16", (K // 128,
                                                                                                                          N), 0.01)}),
    "awq": (True, {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
            {"qweight": ("I32", (K, N // 8), None), "qzeros": ("I32", (K // 128, N // 8), None), "scales": ("F16", (K // 128, N), 0.01)}),
    "ct-w4a16": (True, ct("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}),
                 {"weight_packed": ("I32", (N, K // 8), None), "weight_scale": ("BF16", (N, K // 128), 0.01),
                  "weight_shape": ("I64", (2,), SIZE)}),
    "ct-w4a8-in-bytes": (True, ct("int-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}, TOKEN8),
                         {"weight": ("I8", (N, K), 3), "weight_scale": ("BF16", (N, K // 128), 0.01)}),
    "modelopt-nvfp4": (True, {"quant_method": "modelopt", "quant_algo": "NVFP4"},
                       {"weight": ("U8", (N, K // 2), None), "weight_scale": ("F8_E4M3", (N, K // 16), 56),
                        "weight_scale_2": ("F32", (), 0.01),
                        "input_scale": ("F32", (), 0.01)}),
    "quark-mxfp4": (True, {"quant_method": "quark", "global_quant_config": {
        "weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}, "input_tensors": None}},
        {"weight": ("U8", (N, K // 2), None), "weight_scale": ("U8", (N, K // 32), 120)}),
    "modelslim-w4a8": (True, "W4A8_DYNAMIC", {"weight": ("I8", (N // 2, K), None), "weight_scale": ("F32", (N, 1), 0.01),
                                              "weight_offset": ("F32", (N, 1), 0.0)}),
    "bnb-nf4": (True, {"quant_method": "bitsandbytes", "load_in_4bit": True},
                {"weight": ("U8", (N * K // 2, 1), None), "weight.absmax": ("F32", (N * K // 64,), 0.01),
                 "weight.quant_state.bitsandbytes__nf4": ("U8", None, json.dumps(
                     {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [N, K]}))}),
}


def filled(kind: str, shape, fill, noise: bytes) -> bytes:
    """The bytes of one tensor."""
    if isinstance(fill, str):
        return fill.encode()
    count = int(np.prod(shape, dtype=np.int64))
    if fill is None:
        return (noise * (count * KINDS[kind] // len(noise) + 1))[: count * KINDS[kind]]
    if kind == "BF16":
        return (np.full(count, fill, np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    dtype = {"I8": np.int8, "U8": np.uint8, "F8_E4M3": np.uint8, "F16": np.float16, "F32": np.float32, "I64": np.int64}[kind]
    return np.full(count, fill, dtype).tobytes()


def write(folder: Path, family: str, size: int, noise: bytes) -> Path:
    """A synthetic checkpoint of about `size` bytes."""
    _, quant, parts = FAMILIES[family]
    if quant == "gguf":
        return write_gguf(folder / "model.gguf", size, noise)
    blobs = {name: filled(*part, noise) for name, part in parts.items()}
    layers = max(1, size // sum(map(len, blobs.values())))
    header, place, types = {}, 0, {}
    for i in range(layers):
        for name, (kind, shape, _) in parts.items():
            full, length = f"model.layers.{i}.mlp.up_proj.{name}", len(blobs[name])
            header[full] = {"dtype": kind, "shape": [length] if shape is None else list(shape), "data_offsets": [place, place + length]}
            place += length
            types[full] = quant
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(layers):
            for blob in blobs.values():
                file.write(blob)
    config = {"model_type": "qwen3", "torch_dtype": "bfloat16"}
    if isinstance(quant, str):
        (folder / "quant_model_description.json").write_text(json.dumps({**types, "version": "1.0.0"}))
    else:
        config["quantization_config"] = quant
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_gguf(path: Path, size: int, noise: bytes) -> Path:
    """A GGUF file of Q4_K matrices."""
    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()
    each = SIZE * SIZE // 256 * 144
    layers = max(1, size // each)
    blocks = np.frombuffer((noise * (each // len(noise) + 1))[:each], np.uint8).reshape(-1, 144).copy()
    blocks[:, [1, 3]] &= 0x3F                       # the scales, float16, are finite
    blob = blocks.tobytes()
    head = b"GGUF" + struct.pack("<IQQ", 3, layers, 1) + string("general.architecture") + struct.pack("<I", 8) + string("qwen3")
    for i in range(layers):
        head += string(f"blk.{i}.ffn_up.weight") + struct.pack("<IQQIQ", 2, SIZE, SIZE, 12, i * each)
    with open(path, "wb") as file:
        file.write(head + bytes(-len(head) % 32))
        for _ in range(layers):
            file.write(blob)
    return path


def best(rounds: int, *functions) -> list[float]:
    """The least time of each function, taken in turns."""
    times = [[] for _ in functions]
    for _ in range(rounds):
        for function, found in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            found.append(time.perf_counter() - start)
    return [min(found) for found in times]


def measure(family: str, gigabytes: float, rounds: int, noise: bytes) -> dict:
    """Write, read and load the checkpoint of one family."""
    folder = Path(tempfile.mkdtemp())
    try:
        path = write(folder, family, int(gigabytes * 1e9), noise)
        weights = folder / ("model.gguf" if path.suffix == ".gguf" else "model.safetensors")
        read, loaded = best(rounds, lambda: np.fromfile(weights, np.uint8),
                            lambda: jax.block_until_ready(qfunc.load(path, progress=False).params))
        size = weights.stat().st_size
        return {"family": family, "repacked": FAMILIES[family][0], "gigabytes": size / 1e9, "read_gbs": size / read / 1e9,
                "load_gbs": size / loaded / 1e9, "ratio": read / loaded}
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    noise = np.random.default_rng(0).integers(0, 256, 2**24, np.uint8).tobytes()
    rows = []
    for family in args.families:
        rows.append(row := measure(family, args.gigabytes, args.rounds, noise))
        print(f"{family:18s} {' ' if row['repacked'] else '='} {row['gigabytes']:5.2f} GB  read {row['read_gbs']:5.2f} GB/s  "
              f"load {row['load_gbs']:5.2f} GB/s  ratio {row['ratio']:.2f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

"""Small layers as the tools of each family store them, written in plain numpy, and how tests look at what was loaded."""

import json

import numpy as np
from checkpoints import checkpoint

import qfunc

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


def slim(folder, tensors, kind, **more):
    folder = checkpoint(folder, under(tensors))
    (folder / "quant_model_description.json").write_text(json.dumps({**{name: kind for name in under(tensors)}, "version": "1.0.0",
                                                                     **more}))
    return folder


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
CT = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": {
    "targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}, "input_activations": None}}}
INT8 = {"weight": np.ones((8, 16), np.int8), "weight_scale": np.ones((8, 1), np.float32)}

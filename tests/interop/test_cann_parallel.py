"""Tensor parallel over processes: two ranks of torch.distributed (gloo) against the same model split over two JAX devices."""

import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

import qfunc
from qfunc.layers.config import ModelConfig, Routing
from qfunc.layers.parallel import parallel_apply, place
from qfunc.layers.rope import Rope

torch = pytest.importorskip("torch")
from qfunc.interop.cann import rank_config, rank_params  # noqa: E402

CONFIG = ModelConfig("qwen3_moe", 64, 128, 2, 4, 2, 32, (None, None), Rope(), 32**-0.5, routing=Routing(4, 2, normalize=True),
                     dtype="bfloat16")


def random_params(seed: int, scheme=None) -> dict:
    """A model of two layers, the first dense, the second of experts."""
    rng = np.random.default_rng(seed)

    def kernel(*shape, bias=False):
        out = {"kernel": jax.numpy.asarray(rng.standard_normal(shape) * shape[-2] ** -0.5, "bfloat16")}
        return {**out, "bias": jax.numpy.asarray(rng.standard_normal(shape[-1]), "bfloat16")} if bias else out

    def norm(size):
        return {"weight": jax.numpy.ones(size, "bfloat16")}

    attention = {"q_proj": (128, 128, True), "k_proj": (128, 64, True), "v_proj": (128, 64, True), "o_proj": (128, 128, True)}
    wide = {"gate_proj": (128, 256), "up_proj": (128, 256), "down_proj": (256, 128)}
    layers = {str(i): {"input_layernorm": norm(128), "post_attention_layernorm": norm(128),
                       "self_attn": {name: kernel(a, b, bias=bias) for name, (a, b, bias) in attention.items()}} for i in range(2)}
    layers["0"]["mlp"] = {name: kernel(*shape) for name, shape in wide.items()}
    layers["1"]["mlp"] = {"gate": kernel(128, 4), "experts": {name: kernel(4, *shape) for name, shape in wide.items()}}
    params = {"model": {"embed_tokens": {"weight": jax.numpy.asarray(rng.standard_normal((64, 128)), "bfloat16")}, "layers": layers,
                        "norm": norm(128)}, "lm_head": kernel(128, 64)}
    return params if scheme is None else qfunc.quantize(params, scheme)


CHILD = """
    import pickle, sys
    import numpy as np, torch
    import torch.distributed as dist
    support, folder, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
    sys.path.insert(0, support)
    import npu_cpu
    from qfunc.interop import cann
    from qfunc.layers.decoder import apply
    torch.set_num_threads(1)
    npu_cpu.install()
    with open(f"{folder}/rank{rank}", "rb") as file:
        params, config, ids = pickle.load(file)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    hook = cann.Collective(rank, 2)
    logits, _ = cann.to_torch(apply, collective=hook)(cann.place(params, "cpu", "A2"), torch.from_numpy(ids), None, config)
    whole = hook.gather(logits)
    if rank == 0:
        np.save(f"{folder}/out.npy", whole.float().numpy())
    dist.barrier()
    dist.destroy_process_group()
"""


# 128 packed inputs are one block, which a mesh does not cut.
MIXED = {"*/o_proj/kernel": "w8a16", "*": "w4a16_g64"}


@pytest.mark.parametrize("rules", ["w8a8_dynamic", pytest.param(MIXED, marks=pytest.mark.slow, id="w4a16_g64")])
def test_two_ranks_give_what_two_jax_devices_give(rules, tmp_path):
    import npu_host
    npu_host.host()
    params, ids = random_params(0, rules), np.random.default_rng(1).integers(0, 64, (2, 5)).astype(np.int32)
    for rank in range(2):
        local = jax.tree.map(np.asarray, rank_params(params, CONFIG, rank, 2))
        (tmp_path / f"rank{rank}").write_bytes(pickle.dumps((local, rank_config(CONFIG, 2), ids)))
    support = str(Path(__file__).parents[1] / "support")
    ranks = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(CHILD), support, str(tmp_path), str(rank)],
                              env={**os.environ, "JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        errors = [rank.communicate(timeout=600)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(text[-2000:] for text in errors)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("tp",))
    placed = place(params, CONFIG, mesh)
    want = np.asarray(jax.jit(parallel_apply(mesh, placed, CONFIG), static_argnums=3)(placed, ids, None, CONFIG)[0], np.float32)
    got = np.load(tmp_path / "out.npy")
    # XLA keeps float32 between operations that it fuses, torch rounds to bfloat16 after each.
    assert got.shape == want.shape and np.linalg.norm(got - want) / np.linalg.norm(want) < 0.02


@pytest.mark.parametrize("scheme", ["w3a16_g32", "fp8_block", *(pytest.param(name, marks=pytest.mark.slow) for name in (
    "w8a8_dynamic", "w4a16_g32", "mxfp4_a16", "w4a16_g32_asym"))])
def test_slices_are_those_of_the_decoded_matrix(scheme, rng):
    config = CONFIG.replace(routing=None, num_hidden_layers=1, windows=(None,))
    wide, high = (qfunc.quantize({"kernel": jax.numpy.asarray(rng.standard_normal(shape), "float32")}, {"*": scheme})["kernel"]
                  for shape in ((128, 512), (512, 128)))
    params = {"model": {"layers": {"0": {"mlp": {"gate_proj": {"kernel": wide}, "down_proj": {"kernel": high}}}}}}
    for rank in range(2):
        mlp = rank_params(params, config, rank, 2)["model"]["layers"]["0"]["mlp"]
        got, want = mlp["gate_proj"]["kernel"].dequantize(), wide.dequantize()[:, rank * 256:(rank + 1) * 256]
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(mlp["down_proj"]["kernel"].dequantize(), high.dequantize()[rank * 256:(rank + 1) * 256])


def test_a_cut_inside_a_packed_block_packs_again(rng):
    q = qfunc.quantize({"kernel": jax.numpy.asarray(rng.standard_normal((192, 32)), "float32")}, {"*": "w4a16_g32"})["kernel"]
    params = {"model": {"layers": {"0": {"mlp": {"down_proj": {"kernel": q}}}}}}
    config = CONFIG.replace(num_attention_heads=6, num_key_value_heads=6)
    parts = [rank_params(params, config, rank, 6)["model"]["layers"]["0"]["mlp"]["down_proj"]["kernel"] for rank in range(6)]
    np.testing.assert_array_equal(np.concatenate([p.dequantize() for p in parts]), q.dequantize())
    assert parts[0].codes.shape == (32, 64) and parts[0].pad == 96


def test_second_scales_over_spans_are_cut_with_them(rng):
    import npu_cpu

    from qfunc.interop.cann import place as placed
    from qfunc.interop.cann import to_tensor, to_torch
    npu_cpu.install()
    q = qfunc.quantize({"kernel": jax.numpy.asarray(rng.standard_normal((2048, 64)), "float32")}, {"*": "mxfp4_dual"})["kernel"]
    params = {"model": {"layers": {"0": {"mlp": {"down_proj": {"kernel": q}}}}}}
    whole = q.dequantize()
    x = jax.numpy.asarray(rng.standard_normal((4, 2048)), "bfloat16")
    for rank in range(2):
        part = rank_params(params, CONFIG, rank, 2)["model"]["layers"]["0"]["mlp"]["down_proj"]["kernel"]
        own = slice(rank * 1024, (rank + 1) * 1024)
        np.testing.assert_array_equal(part.dequantize(), whole[own])
        got = to_torch(qfunc.matmul)(to_tensor(x[:, own]), placed(part, "cpu", "A5")).float().numpy()
        want = np.asarray(qfunc.matmul(x[:, own], part), np.float32)
        assert np.linalg.norm(got - want) < 0.01 * np.linalg.norm(want)
    with pytest.raises(ValueError, match="spans of 512 inputs would be cut"):
        rank_params(params, CONFIG.replace(num_attention_heads=8, num_key_value_heads=8), 0, 8)


def test_what_cannot_be_cut_is_named(rng):
    coarse = qfunc.quantize({"kernel": jax.numpy.asarray(rng.standard_normal((128, 32)), "float32")}, {"*": "w4a16_g128"})["kernel"]
    order = coarse.replace(perm=jax.numpy.arange(128)[::-1])
    params = {"model": {"layers": {"0": {"self_attn": {"o_proj": {"kernel": order}}, "mlp": {"down_proj": {"kernel": coarse}}}}}}
    with pytest.raises(ValueError, match="(?s)(o_proj.*act-order.*down_proj.*groups of 128|down_proj.*groups of 128.*o_proj.*act-order)"):
        rank_params(params, CONFIG, 0, 2)
    with pytest.raises(ValueError, match="heads"):
        rank_params(params, CONFIG, 0, 3)
    with pytest.raises(ValueError, match="rank"):
        rank_params(params, CONFIG, 2, 2)
    assert rank_config(CONFIG, 2).num_attention_heads == 2


def test_a_collective_without_a_hook_is_refused():
    from qfunc.interop.cann import to_torch
    with pytest.raises((NotImplementedError, NameError), match="tp"):
        to_torch(lambda x: jax.lax.psum(x, "tp"), rules="reference")(np.ones(3, np.float32))

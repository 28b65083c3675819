"""A decoder split over simulated devices gives the logits of one device, and its packed weights stay where they are."""

import os
import secrets
import socket
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from checkpoints import sampled
from jax.sharding import Mesh

import qfunc
from qfunc.layers.decoder import apply  # noqa: F401 (the two processes take it from here)
from qfunc.layers.families import model_config
from qfunc.layers.model import Model
from qfunc.layers.parallel import parallel_apply, place, shardings

# Which kernel runs is not the matter here.
pytestmark = pytest.mark.filterwarnings("ignore:.* runs on 'reference'")

DENSE = {"model_type": "qwen2", "vocab_size": 256, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 1,
         "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 64}
MOE = {**DENSE, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 1024,
       "norm_topk_prob": True}
IDS = np.random.default_rng(0).integers(0, 256, (2, 6)).astype(np.int32)


def random_params(found: dict, seed: int = 0) -> dict:
    rng, config = np.random.default_rng(seed), model_config(found)
    h, d = config.hidden_size, config.head_dim

    def matrix(*shape):
        return rng.standard_normal(shape, np.float32) * np.float32(shape[-2] ** -0.5)

    def linear(ins, outs, bias=False):
        return {"kernel": matrix(ins, outs), **({"bias": rng.standard_normal(outs).astype(np.float32) * 0.1} if bias else {})}
    inner, biased = config.routing and found["moe_intermediate_size"], config.routing is None
    shared = config.num_key_value_heads
    attention = {"q_proj": linear(h, 16 * d, biased), "k_proj": linear(h, shared * d, biased), "v_proj": linear(h, shared * d, biased),
                 "o_proj": linear(16 * d, h, biased)}
    if inner:
        experts = {name: {"kernel": matrix(8, *shape)} for name, shape in (("gate_proj", (h, inner)), ("up_proj", (h, inner)),
                                                                           ("down_proj", (inner, h)))}
        mlp = {"gate": linear(h, 8), "experts": experts}
    else:
        mlp = {"gate_proj": linear(h, 2048), "up_proj": linear(h, 2048), "down_proj": linear(2048, h)}
    norm = {"weight": np.ones(h, np.float32)}
    return {"model": {"embed_tokens": {"weight": matrix(256, h) * 16}, "norm": norm,
                      "layers": {"0": {"self_attn": attention, "mlp": mlp, "input_layernorm": norm, "post_attention_layernorm": norm}}},
            "lm_head": linear(h, 256)}


def mesh_of(count: int, axis: str = "tp") -> Mesh:
    if jax.device_count() < count:
        pytest.skip(f"{jax.device_count()} devices, {count} are needed")
    return Mesh(np.asarray(jax.devices()[:count]), (axis,))


def both(params, config, mesh):
    """Logits [B, T, vocab] of one device and of the mesh, prompt and one step through a cache included."""
    one, many = Model(params, config), Model(place(params, config, mesh), config, mesh=mesh)
    whole = np.asarray(one(IDS)), np.asarray(many(IDS))
    first, cache = many(IDS[:, :5], many.init_cache(2, 8))
    last, _ = many(IDS[:, 5:], cache)
    return (*whole, np.concatenate([first, last], 1))


def relative(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# Where activations are quantized, each device quantizes its own part of a row, which moves the result by part of the scheme's error.
# In groups the parts are those of one device, and only the order of sums moves an activation now and then to the next code.
SCHEMES = {"w8a8_dynamic": 0.02, "w8a8_static": 0.002, "w4a16_g128": 1e-4, "w4a16_g128_asym": 1e-4, "w4a8_dynamic": 0.02, "fp8_block": 5e-3,
           "mxfp4": 0.02}
CASES = [(found, axis) for found in ("dense", "moe") for axis in ("tp", "ep") if (found, axis) != ("dense", "ep")]


def case(found: str):
    json = DENSE if found == "dense" else MOE
    return random_params(json), model_config(json)


@pytest.mark.parametrize(("found", "axis"), CASES)
def test_float_logits(found, axis):
    params, config = case(found)
    one, many, steps = both(params, config, mesh_of(2, axis))
    np.testing.assert_allclose(many, one, atol=1e-4)
    np.testing.assert_allclose(steps, one, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("found", "axis"), CASES)
def test_quantized_logits(found, axis, scheme):
    params, config = case(found)
    model = Model(params, config).quantize(scheme, calibration=[IDS] if "static" in scheme else None)
    one, many, steps = both(model.params, config, mesh_of(2, axis))
    assert relative(many, one) < SCHEMES[scheme]
    assert relative(steps, one) < 2 * SCHEMES[scheme]


@pytest.mark.slow
def test_generation_and_texts_split_over_devices():
    params, config = case("dense")
    packed = qfunc.quantize(params, "w4a16_g128")
    want, rows = Model(packed, config).generate(IDS, max_new_tokens=4), [IDS[0, 2:], IDS[1]]
    apart = Model(packed, config).generate(rows, max_new_tokens=4)
    for mesh in (mesh_of(2), Mesh(np.asarray(jax.devices()[:2]).reshape(2, 1), ("data", "tp"))):
        model = Model(place(packed, config, mesh), config, mesh=mesh)
        np.testing.assert_array_equal(model.generate(IDS, max_new_tokens=4), want)
        np.testing.assert_array_equal(model.generate(rows, max_new_tokens=4), apart)
        with pytest.raises(ValueError, match="split over a mesh"):
            model.quantize("w8a16")


@pytest.mark.parametrize("name", sampled([f"{found}-{axis}-{scheme}" for found, axis in CASES for scheme in SCHEMES],
                                         "moe-tp-w8a8_dynamic", "moe-tp-w4a16_g128"))
def test_packed_weights_are_never_gathered(name):
    found, axis, scheme = name.split("-")
    params, config = case(found)
    mesh = mesh_of(2, axis)
    model = Model(params, config).quantize(scheme, calibration=[IDS] if "static" in scheme else None)
    packed = place(model.params, config, mesh)
    run = parallel_apply(mesh, packed, config)
    text = jax.jit(lambda params, ids: run(params, ids, None, config)[0]).lower(packed, IDS).compile().as_text()
    moved = [line for line in text.splitlines() if any(f"{op}(" in line or f"{op}-start(" in line for op in (
        "all-gather", "all-to-all", "collective-permute", "all-reduce"))]
    assert moved and all("all-reduce" in line for line in moved)
    assert not any(kind in line.split("all-reduce")[0] for line in moved for kind in ("u8[", "s8[", "f8e"))
    mlp = packed["model"]["layers"]["0"]["mlp"]
    shares = [leaf.addressable_shards[0].data.nbytes / leaf.nbytes for leaf in jax.tree.leaves(mlp.get("experts", mlp))
              if leaf.dtype.itemsize == 1]
    assert shares and all(share == 0.5 for share in shares)


def test_splits_that_cut_a_group_or_a_batch_are_refused():
    params, config = case("dense")
    small = {**DENSE, "num_attention_heads": 4, "num_key_value_heads": 2}

    class Wide:                                                            # shapes alone are looked at
        def __init__(self, **sizes):
            self.shape, self.axis_names = sizes, tuple(sizes)
    with pytest.raises(ValueError, match=r"2 key/value heads cannot be split over 8 devices; 1, 2 devices would work"):
        shardings(params, model_config(small), Wide(tp=8))
    wide = qfunc.quantize(params, "w4a16_g1024")
    with pytest.raises(ValueError, match=r"down_proj/kernel: 2048 inputs in units of 1024 do not divide; 1, 2 devices would work"):
        shardings(wide, config, Wide(tp=4))
    ordered = qfunc.quantize(params, {"*o_proj/kernel": "w4a16_g128", "*": None})
    attention = ordered["model"]["layers"]["0"]["self_attn"]
    attention["o_proj"]["kernel"] = attention["o_proj"]["kernel"].replace(perm=np.arange(1024, dtype=np.int32))
    with pytest.raises(ValueError, match="act-order"):
        shardings(ordered, config, Wide(tp=2))
    with pytest.raises(ValueError, match="axis tp or ep"):
        shardings(params, config, Wide(model=2))
    with pytest.raises(ValueError, match="models with experts"):
        shardings(params, config, Wide(ep=2))
    assert shardings(params, config, Wide(tp=8))
    odd = qfunc.quantize(params, {"*down_proj/kernel": "w4a16_g2048"})
    with pytest.raises(ValueError, match=r"down_proj/kernel: 2048 inputs in units of 2048 do not divide; one device alone would work"):
        shardings(odd, config, Wide(tp=2))
    model = Model(params, config, mesh=Mesh(mesh_of(2).devices.reshape(2, 1), ("data", "tp")))
    for run in (model, model.generate):
        with pytest.raises(ValueError, match="multiple of 2 texts, as the mesh splits them over its axis data, found 1"):
            run(IDS[:1])


def test_blocks_wider_than_a_device_keep_their_scale():
    found = {**DENSE, "num_key_value_heads": 2}
    params, config = qfunc.quantize(random_params(found), "fp8_block"), model_config(found)
    placed = place(params, config, mesh_of(2))
    assert placed["model"]["layers"]["0"]["self_attn"]["k_proj"]["kernel"].scale.shape == (2, 8)
    one, many, steps = both(params, config, mesh_of(2))
    # A sum in another order may move an activation by one step of e4m3, 2^-3; a scale of the wrong block would be far beyond.
    assert relative(many, one) < 5e-3 and relative(steps, one) < 5e-3


def sweep() -> None:
    """Every split that 8 devices allow, for a process of its own."""
    for found, axis in CASES:
        params, config = case(found)
        for scheme in (None, *SCHEMES):
            model = Model(params, config)
            model = model if scheme is None else model.quantize(scheme, calibration=[IDS] if "static" in scheme else None)
            for count in (2, 4, 8):
                one, many, steps = both(model.params, config, mesh_of(count, axis))
                limit = 1e-4 if scheme is None else SCHEMES[scheme]
                assert relative(many, one) < limit and relative(steps, one) < 2 * limit, (found, axis, scheme, count, relative(many, one))
                print(found, axis, scheme, count, f"{relative(many, one):.1e}", flush=True)


def in_process(script: str, path, *args: str) -> subprocess.Popen:
    path.write_text(textwrap.dedent(script))
    here = __file__.rpartition("/")[0]
    paths = os.pathsep.join([f"{here}/../support", *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen([sys.executable, str(path), here, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONPATH": paths})


EIGHT = """
    import sys
    import jax
    jax.config.update("jax_num_cpu_devices", 8)
    sys.path.insert(0, sys.argv[1])
    import test_parallel
    test_parallel.sweep()
    print("equal")
"""


@pytest.mark.slow
def test_eight_devices(tmp_path):
    run = in_process(EIGHT, tmp_path / "eight.py")
    out, err = run.communicate(timeout=1800)
    assert run.returncode == 0 and "equal" in out, out + err


TWO = """
    import sys
    import jax
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize("localhost:" + sys.argv[3], num_processes=2, process_id=int(sys.argv[2]))
    import numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import Mesh
    sys.path.insert(0, sys.argv[1])
    import qfunc
    import test_parallel as t
    params, config = t.case("dense")
    params = jax.tree.map(np.asarray, qfunc.quantize(params, "w4a16_g128"))
    mesh = Mesh(np.asarray(jax.devices()), ("tp",))
    placed = t.place(params, config, mesh)
    run = t.parallel_apply(mesh, placed, config)
    logits = jax.jit(lambda p, ids: run(p, ids, None, config)[0])(placed, t.IDS)
    got = np.asarray(multihost_utils.process_allgather(logits, tiled=True))
    one = np.asarray(t.apply(params, t.IDS, None, config)[0])
    assert t.relative(got, one) < 1e-4, t.relative(got, one)
    print("equal")
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    while True:                     # below the ports that the system gives to connections, one of which could be given before it is used
        port = str(20_000 + secrets.randbelow(10_000))
        with socket.socket() as free:
            if free.connect_ex(("localhost", int(port))):
                break
    runs = [in_process(TWO, tmp_path / f"two{i}.py", str(i), port) for i in range(2)]
    outs = [run.communicate(timeout=600) for run in runs]
    assert all(run.returncode == 0 and "equal" in out for run, (out, _) in zip(runs, outs, strict=True)), outs

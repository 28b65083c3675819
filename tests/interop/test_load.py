"""Loading as such: places, memory, progress, hub ids, the note of fields, and what fuzzing has found."""

import importlib.util
import json
import re
import shutil
import struct
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoints import DATA, checkpoint, header_and_data, write_file

import qfunc
from qfunc import CheckpointError

ROOT = Path(__file__).parent.parent.parent
MODULE = "model.layers.0.self_attn.k_proj"


def test_shardings_are_applied_leaf_by_leaf():
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
    for shardings in ({"*/kernel": split, "*": whole}, lambda path, leaf: split if path.endswith("kernel") else whole):
        loaded = qfunc.load(DATA / "ct-w4a16-sym-g128", shardings=shardings)
        leaf = loaded.weight(MODULE)
        assert leaf.codes.sharding == split and leaf.scale.sharding == split
        assert loaded.params["model"]["layers"]["0"]["input_layernorm"]["weight"].sharding == whole
    single = qfunc.load(DATA / "ct-w4a16-sym-g128", shardings=whole)
    assert all(leaf.sharding == whole for leaf in jax.tree.leaves(single.params))


def test_arrays_do_not_depend_on_the_file(tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(DATA / "modelslim-w8a8-dynamic", folder)
    loaded = qfunc.load(folder)
    before = [np.array(leaf) for leaf in jax.tree.leaves(loaded.params)]
    weights = next(folder.glob("*.safetensors"))
    with open(weights, "r+b") as file:
        file.write(bytes(weights.stat().st_size))
    assert all(np.array_equal(a, b) for a, b in zip(before, jax.tree.leaves(loaded.params), strict=True))


def test_a_loaded_matrix_multiplies_and_survives_donation():
    leaf = qfunc.load(DATA / "ct-w8a8-int8-dynamic").weight(MODULE)
    x = jax.numpy.ones((2, 256), jax.numpy.float32)
    want = qfunc.matmul(x, leaf)
    again = jax.jit(lambda q: jax.tree.map(lambda a: a + 0, q), donate_argnums=0)(leaf)
    assert np.array_equal(qfunc.matmul(x, again), want)


def test_one_file_loads_too(tmp_path):
    loaded = qfunc.load(DATA / "ct-fp8-dynamic" / "model.safetensors")
    assert loaded.format == "compressed-tensors" and len(loaded.schemes) == 1


@pytest.mark.parametrize("name", ["nothing/here", "no such thing", "/no/such/folder"])
def test_what_is_not_there_is_said(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="no such file|found nothing"):
        qfunc.load(name)


def test_hub_ids_are_downloaded(monkeypatch, tmp_path):
    from types import SimpleNamespace
    asked = []
    hub = SimpleNamespace(snapshot_download=lambda name, **kw: asked.append(name) or str(DATA / "ct-fp8-dynamic"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert qfunc.load("some-org/some-model").schemes and asked == ["some-org/some-model"]


def test_dequantize_wants_a_float_type():
    with pytest.raises(ValueError, match="bf16"):
        qfunc.load(DATA / "ct-fp8-dynamic", dequantize="int8")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="a .safetensors file"):
        qfunc.load(tmp_path)


def test_unknown_fields_are_notes(tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(DATA / "autoawq-gemm-4bit-g128", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["novelty"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    assert any("'novelty'" in note for note in qfunc.load(folder).notes)


@pytest.mark.slow
def test_inspecting_a_hundred_gigabytes_takes_two_seconds(tmp_path):
    header, place = {}, 0
    for layer in range(60):
        for name, shape, kind, size in [(f"experts.{e}.{p}_proj.{part}", shape, kind, size) for e in range(64) for p in ("gate",
                                                                                                                         "up", "down")
                                        for part, shape, kind, size in (("weight", [2048, 4096], "I8", 2048 * 4096),
                                                                        ("weight_scale", [2048, 1], "F32", 8192))]:
            header[f"model.layers.{layer}.mlp.{name}"] = {"dtype": kind, "shape": shape, "data_offsets": [place, place + size]}
            place += size
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + place)                                        # a sparse file: no byte of it exists
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
    quant = {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head", "re:.*mlp.gate$"],
             "config_groups": {"g": group}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quant}))
    qfunc.interop.inspect(DATA / "ct-fp8-dynamic")                                  # imports are not part of it
    start = time.process_time()
    seen = qfunc.interop.inspect(tmp_path)
    assert time.process_time() - start < 2      # of processor time: a busy machine is not the reader's fault
    assert seen.nbytes > 96e9 and seen.tensors == 60 * 64 * 6 and len(seen.rows) == 3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_stays_under_the_packed_size_plus_the_largest_leaf(tmp_path):
    size, layers = 2048, 24
    rng = np.random.default_rng(0)
    tensors = {}
    for i in range(layers):
        module = f"model.layers.{i}.mlp.up_proj"
        tensors |= {f"{module}.weight": rng.integers(-127, 128, (size, size)).astype(np.int8),
                    f"{module}.weight_scale": np.ones((size, 1), np.float32)}
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
    quant = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"g": group}}
    folder = checkpoint(tmp_path, tensors, quant)
    del tensors
    qfunc.load(DATA / "ct-fp8-dynamic")

    def peak():
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
    Path("/proc/self/clear_refs").write_text("5")                                   # start the high-water mark anew
    before = peak()
    loaded = qfunc.load(folder)
    packed = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))
    assert peak() - before < packed + 8 * size * size


def _mutations():
    folder = ROOT / "tests" / "fuzz"
    spec = importlib.util.spec_from_file_location("mutate", folder / "mutate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.mutate


@pytest.mark.fuzz
def test_damaged_checkpoints_load_or_are_refused(tmp_path):
    import random
    mutate, start = _mutations(), int(time.time())
    sources = sorted(p for p in DATA.iterdir() if p.is_dir())
    for seed in range(start, start + 150):
        rng = random.Random(seed)
        source = rng.choice(sources)
        what = mutate(rng, source, tmp_path / f"{seed}")
        try:
            qfunc.interop.inspect(tmp_path / f"{seed}")
            qfunc.load(tmp_path / f"{seed}")
        except CheckpointError:
            pass
        except Exception as error:
            raise AssertionError(f"seed {seed}, {source.name}: {what}") from error
        shutil.rmtree(tmp_path / f"{seed}")


# What the fuzzer has found: the folder, a path into its JSON, the value put there.
FOUND = [
    ("ct-w4a8-int", "config.json", ("quantization_config", "config_groups", "group_0", "weights", "num_bits"), None),
    ("autoround-w2a16-g32", "config.json", ("quantization_config", "bits"), None),
    ("modelslim-quarot-online-w4a4", "quant_model_description.json", ("optional", "quarot"), 7),
]


@pytest.mark.parametrize(("name", "file", "path", "value"), FOUND)
def test_what_the_fuzzer_found(tmp_path, name, file, path, value):
    folder = tmp_path / "a"
    shutil.copytree(DATA / name, folder)
    data = json.loads((folder / file).read_text())
    node = data
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    (folder / file).write_text(json.dumps(data))
    with pytest.raises(CheckpointError):
        qfunc.load(folder)


@pytest.mark.parametrize("scale", [np.zeros(1, np.float32), np.full(1, 1e30, np.float32)])
def test_impossible_activation_scales_are_refused(tmp_path, scale):
    folder = tmp_path / "a"
    shutil.copytree(DATA / "ct-nvfp4", folder)
    from qfunc.interop.safetensors import File
    tensors = {name: tensor.read() for name, tensor in File(folder / "model.safetensors").tensors.items()}
    tensors[f"{MODULE}.input_global_scale"] = scale
    write_file(folder / "model.safetensors", *header_and_data(tensors))
    if scale[0] == 0:
        with pytest.raises(CheckpointError, match="not 0"):
            qfunc.load(folder)
    else:
        qfunc.load(folder)


@pytest.mark.parametrize("kind", ["gguf", "native", "config"])
def test_no_file_of_a_folder_may_be_a_link_out_of_it(tmp_path, kind):
    folder, outside = tmp_path / "model", tmp_path / "outside"
    outside.mkdir()
    if kind == "native":
        qfunc.interop.save_native(folder, {"a": {"kernel": np.ones((2, 2), np.float32)}})
        name = "qfunc.json"
    else:
        shutil.copytree(DATA / ("gguf-q4_0" if kind == "gguf" else "ct-fp8-dynamic"), folder)
        (folder / "reference.npz").unlink(missing_ok=True)
        name = next(folder.glob("*.gguf")).name if kind == "gguf" else "config.json"
    qfunc.interop.inspect(folder)
    shutil.move(folder / name, outside / name)
    (folder / name).symlink_to(outside / name)
    for run in (qfunc.load, qfunc.interop.inspect):
        with pytest.raises(CheckpointError, match="a link to"):
            run(folder)


def test_a_scale_of_torchaos_nvfp4_that_is_nan_is_refused(tmp_path):
    from qfunc.interop.safetensors import File
    folder = tmp_path / "a"
    shutil.copytree(DATA / "torchao-nvfp4wo", folder)
    file = File(folder / "model.safetensors")
    tensors = {name: np.array(tensor.read()) for name, tensor in file.tensors.items()}
    name = next(n for n in tensors if n.endswith("_weight_scale"))
    tensors[name].view(np.uint8).reshape(-1)[0] = 0x7F
    header, data = header_and_data(tensors)
    write_file(folder / "model.safetensors", {**header, "__metadata__": file.metadata}, data)
    with pytest.raises(CheckpointError, match="_weight_scale.*finite"):
        qfunc.load(folder)


@pytest.mark.parametrize("name", ["gptqmodel-4bit-g128-sym", "autoawq-gemm-4bit-g128", "ct-w4a16-sym-g128", "bnb-nf4", "modelslim-w8a8",
                                  "torchao-int8wo", "quark-mxfp4", "ct-fp8-dynamic"])
def test_packed_weights_without_their_configuration_are_refused(tmp_path, name):
    folder = tmp_path / "a"
    shutil.copytree(DATA / name, folder)
    for path in folder.glob("*.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match="names (the|no) quantization"):
        qfunc.load(folder)


@pytest.mark.parametrize("dtype", ["float999", "object", "int8", "float8_e4m3fn"])
def test_a_quant_state_of_bitsandbytes_names_a_float_type(tmp_path, dtype):
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "shape": [8, 8], "dtype": dtype}).encode()
    tensors = {"a.weight": np.zeros((32, 1), np.uint8), "a.weight.absmax": np.ones(1, np.float32),
               "a.weight.quant_state.bitsandbytes__nf4": np.frombuffer(state, np.uint8)}
    with pytest.raises(CheckpointError, match="dtype float32, float16 or bfloat16"):
        qfunc.load(checkpoint(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True}))

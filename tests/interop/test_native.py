"""qfunc's own folders: everything comes back to the bit, saves are atomic, damage is refused."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qfunc
from qfunc.interop import native
from qfunc.interop.floats import load_floats
from qfunc.interop.native import load_native, save_native
from qfunc.interop.safetensors import open_folder

SCHEMES = ("w2a16", "w3a16_g32", "w4a16_g128_asym", "w5a16", "w8a8_dynamic", "w8a8_block", "fp8_dynamic", "fp8_e5m2_w8a16", "mxfp4",
           "mxfp6", "nvfp4", "nf4", "nf4_dq", "int4wo_g64", "llm_int8")


def weights(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_round_trip(tmp_path, scheme):
    params = {"a": {"kernel": weights(256, 128, dtype=jnp.bfloat16), "bias": weights(128)}, "norm": weights(7, dtype=jnp.float16)}
    q = qfunc.quantize(params, scheme)
    save_native(tmp_path / "new" / "folder", q, {"model_type": "test"})
    back, config = load_native(tmp_path / "new" / "folder")
    same(q, back)
    assert config == {"model_type": "test"} and back["a"]["kernel"].scheme == q["a"]["kernel"].scheme


def test_stacks_static_scales_and_float8_leaves(tmp_path):
    params = {"experts": {"kernel": weights(3, 64, 32)}, "head": {"kernel": weights(64, 32)},
              "f8": jnp.ones(5, jnp.float8_e4m3fn), "one": jnp.ones(())}
    rules = {"experts/*": qfunc.Rule("w4a16_g32", batch=1), "head/*": "w8a8_static_asym", "*": None}
    q = qfunc.quantize(params, rules, calibration={"head/kernel": weights(9, 64)})
    save_native(tmp_path, q)
    back = load_native(tmp_path).params
    same(q, back)
    assert back["head"]["kernel"].input_zero is not None and back["experts"]["kernel"].shape == (3, 64, 32)


def test_saving_again_replaces_and_an_interrupted_save_does_not(tmp_path, monkeypatch):
    old = {"kernel": weights(32, 32)}
    save_native(tmp_path, old)
    (tmp_path / "notes.txt").write_text("mine")
    real, calls = native.replace_file, []

    def fails_at_the_index(path, write):
        calls.append(path.name)
        if path.name == "qfunc.json":
            raise KeyboardInterrupt
        real(path, write)

    monkeypatch.setattr(native, "replace_file", fails_at_the_index)
    with pytest.raises(KeyboardInterrupt):
        save_native(tmp_path, {"kernel": weights(32, 32, seed=1)})
    assert len(calls) == 2
    same(old, load_native(tmp_path).params)
    monkeypatch.undo()
    new = {"kernel": weights(32, 32, seed=2)}
    save_native(tmp_path, new)
    same(new, load_native(tmp_path).params)
    assert sorted(p.name.split("-")[0] for p in tmp_path.iterdir()) == ["notes.txt", "qfunc", "qfunc.json"]


def test_a_failed_write_leaves_no_partial_file(tmp_path):
    class Broken:
        dtype, shape, size = np.dtype(np.float32), (4,), 4

        def __array__(self, *args, **kwargs):
            raise OSError("disk")

    from qfunc.interop._write import replace_file, write_safetensors
    with pytest.raises(OSError, match="disk"):
        replace_file(tmp_path / "x.safetensors", lambda file: write_safetensors(file, {"a": Broken()}))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_saved(tmp_path):
    for params, message in (({"a": [weights(2, 2)]}, "a: expected nested dicts.*list"), ({"a/b": weights(2, 2)}, "without '/'"),
                            ({"a": jnp.ones(3, jnp.int4)}, "a: safetensors has no name for int4")):
        with pytest.raises((TypeError, ValueError), match=message):
            save_native(tmp_path / "out", params)
    assert not (tmp_path / "out" / "qfunc.json").exists()


@pytest.fixture
def saved(tmp_path):
    params = {"a": {"kernel": weights(128, 64)}, "b": weights(3)}
    save_native(tmp_path, qfunc.quantize(params, "w4a16_g32"))
    return tmp_path


def change(folder: Path, edit):
    index = json.loads((folder / "qfunc.json").read_text())
    edit(index)
    (folder / "qfunc.json").write_text(json.dumps(index))


@pytest.mark.parametrize("edit, message", [
    (lambda i: i.update(version=2), "version 2"),
    (lambda i: i.update(format="other"), "other"),
    (lambda i: i.update(weights="../x.safetensors"), "leaves it"),
    (lambda i: i.update(weights=3), "file name 3"),
    (lambda i: i.update(tensors=[]), "objects"),
    (lambda i: i.update(config=[]), "objects"),
    (lambda i: i["tensors"].pop("b"), "'b'.*an entry"),
    (lambda i: i["tensors"].update(c=None), "'c'.*one array"),
    (lambda i: i["tensors"].update({"b/c": None}), "b/c"),
    (lambda i: i["tensors"].update({"a/kernel": None}), "one array"),
    (lambda i: i["tensors"]["a/kernel"].pop("view"), "view"),
    (lambda i: i["tensors"]["a/kernel"].update(layout="cpu"), "cpu"),
    (lambda i: i["tensors"]["a/kernel"].update(pad=64), "a/kernel"),
    (lambda i: i["tensors"]["a/kernel"]["scheme"]["weight"]["granularity"].update(size=64), "scale"),
    (lambda i: i["tensors"]["a/kernel"]["scheme"]["weight"].update(code="int3"), "a/kernel"),
    (lambda i: i["tensors"]["a/kernel"]["scheme"]["weight"].update(code="int99"), "a/kernel"),
    (lambda i: i["tensors"]["a/kernel"]["scheme"]["weight"].update(zero="int"), "a/kernel"),
    (lambda i: i["tensors"]["a/kernel"]["scheme"].update(weight=None), "a/kernel"),
])
def test_an_index_that_lies_is_refused(saved, edit, message):
    change(saved, edit)
    with pytest.raises(qfunc.CheckpointError, match=message):
        load_native(saved)


def test_missing_and_cut_files_are_refused(saved, tmp_path):
    with pytest.raises(qfunc.CheckpointError, match=r"qfunc\.json"):
        load_native(tmp_path / "nothing")
    (weights_file,) = saved.glob("*.safetensors")
    data = weights_file.read_bytes()
    weights_file.write_bytes(data[:-1])
    with pytest.raises(qfunc.CheckpointError):
        load_native(saved)
    weights_file.unlink()
    with pytest.raises(qfunc.CheckpointError):
        load_native(saved)


def test_floats_are_turned_into_our_orientation(tmp_path):
    from safetensors.numpy import save_file
    rng = np.random.default_rng(0)
    tensors = {"model.embed_tokens.weight": rng.standard_normal((10, 4)), "model.layers.0.q_proj.weight": rng.standard_normal((6, 4)),
               "model.norm.weight": np.ones(4), "wte.weight": np.ones((3, 4)), "x.position_ids": np.arange(3)}
    save_file({k: v.astype(ml_dtypes.bfloat16) if v.dtype == float else v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    params = load_floats(tmp_path)
    kernel = params["model"]["layers"]["0"]["q_proj"]["kernel"]
    assert kernel.shape == (4, 6) and kernel.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(kernel, tensors["model.layers.0.q_proj.weight"].T.astype(ml_dtypes.bfloat16))
    assert params["model"]["embed_tokens"]["weight"].shape == (10, 4) and params["wte"]["weight"].shape == (3, 4) and "x" not in params
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert load_floats(tmp_path)["model"]["layers"]["0"]["q_proj"]["kernel"].shape == (6, 4)
    assert set(load_floats(tmp_path, skip=("norm",), prefix="model.")) == {"embed_tokens", "layers", "wte"}
    save_file({"a.weight": np.ones((2, 2), np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(qfunc.CheckpointError, match="a.weight.*float checkpoint.*I8"):
        load_floats(tmp_path)


def test_what_we_write_the_safetensors_package_reads(saved):
    from safetensors import safe_open
    files = open_folder(saved)
    with safe_open(str(files.files[0].path), "np") as theirs:
        for name in theirs.keys():
            np.testing.assert_array_equal(theirs.get_tensor(name), files[name].read())


# What the fuzzer has found: a path into the entry of a tensor, and the value put there.
@pytest.mark.parametrize(("path", "value"), [
    (("scheme", "weight", "granularity", "kind"), 7), (("scheme", "weight", "scale_rule"), []), (("scheme", "weight", "scale_rule"), 3),
    (("scheme", "name"), {}), (("scheme",), None), (("scheme", "weight", "code"), "int99"), (("pad",), "x"), (("pad",), 2**63),
    (("view",), 3), (("view", "outs"), [[]]), (("dtype",), "unicorn"), (("dtype",), []), (("layout",), "other"),
])
def test_entries_that_are_no_such_thing_are_refused_by_load_and_inspect(tmp_path, path, value):
    save_native(tmp_path, qfunc.quantize({"up": {"kernel": np.ones((128, 8), np.float32)}}, "w4a16_g64"))
    index = json.loads((tmp_path / "qfunc.json").read_text())
    node = index["tensors"]["up/kernel"]
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    (tmp_path / "qfunc.json").write_text(json.dumps(index))
    with pytest.raises(qfunc.CheckpointError, match="up/kernel"):
        qfunc.load(tmp_path)
    try:
        qfunc.interop.inspect(tmp_path)
    except qfunc.CheckpointError:
        pass


@pytest.mark.parametrize("broken", [{"tensors": 3}, {"weights": 7}, {"weights": "../x.safetensors"}, {"version": 2}, {"config": []}])
def test_a_broken_index_is_refused_by_inspect(tmp_path, broken):
    save_native(tmp_path, qfunc.quantize({"up": {"kernel": np.ones((128, 8), np.float32)}}, "w4a16_g64"))
    index = json.loads((tmp_path / "qfunc.json").read_text())
    (tmp_path / "qfunc.json").write_text(json.dumps({**index, **broken}))
    with pytest.raises(qfunc.CheckpointError):
        qfunc.interop.inspect(tmp_path)

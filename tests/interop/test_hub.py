"""What a path may be: folders, files, ids of the hub, and what is neither."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from checkpoints import DATA, checkpoint

import qfunc
from qfunc import CheckpointError

FOLDER = DATA / "ct-fp8-dynamic"


@pytest.fixture
def hub(monkeypatch):
    """Make a hub that has a list of files and fetches a folder; what it was asked for is its `asked`."""
    def make(files, fetched=FOLDER):
        asked = []

        def download(name, **options):
            asked.append(options)
            if isinstance(fetched, Exception):
                raise fetched
            return str(fetched)
        def info(name, timeout):
            if isinstance(files, Exception):
                raise files
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])
        fake = SimpleNamespace(snapshot_download=download, model_info=info, asked=asked)
        monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
        return fake
    return make


def test_weights_that_are_there_twice_are_fetched_once(hub):
    found = hub(["config.json", "model.safetensors", "consolidated.safetensors", "model-Q4_0.gguf"])
    assert qfunc.load("org/name").schemes
    asked, = found.asked
    assert "*.gguf" not in asked["allow_patterns"] and "*.safetensors" in asked["allow_patterns"]
    assert asked["ignore_patterns"] == ["consolidated*.safetensors"]
    found = hub(["params.json", "consolidated.safetensors"])
    qfunc.load("org/name")
    assert not found.asked[0]["ignore_patterns"]


@pytest.mark.parametrize(("files", "message"), [
    (["a-Q4_0.gguf", "a-Q8_0.gguf", "README.md"], "org/name: expected one .gguf file.*found a-Q4_0.gguf, a-Q8_0.gguf"),
    (["Q4/a-00001-of-00002.gguf", "Q4/a-00002-of-00002.gguf"], "expected one .gguf file, at the top.*found Q4/a-00001-of-00002.gguf"),
    (["README.md", "pytorch_model.bin"], r"expected a repository with .safetensors files or a .gguf file, found 2 files"),
])
def test_what_cannot_be_chosen_is_refused_before_it_is_fetched(hub, files, message):
    found = hub(files)
    with pytest.raises(CheckpointError, match=message):
        qfunc.load("org/name")
    assert not found.asked


def test_the_parts_of_one_gguf_file_are_fetched(hub, tmp_path):
    parts = [f"a-0000{i}-of-00002.gguf" for i in (1, 2)]
    found = hub([*parts, "README.md"], fetched=next(iter((DATA / "gguf-q4_0").glob("*.gguf"))).parent)
    qfunc.load("org/name")
    assert set(parts) <= set(found.asked[0]["allow_patterns"]) and "*.gguf" not in found.asked[0]["allow_patterns"]


def test_without_a_network_what_was_fetched_before_loads(hub):
    found = hub(ConnectionError("no route"))
    assert qfunc.load("org/name").schemes and len(found.asked) == 1


def test_a_mistyped_path_is_neither_here_nor_on_the_hub(hub):
    hub(ConnectionError("no route"), fetched=OSError("cannot find it\nmore lines"))
    with pytest.raises(CheckpointError, match="models/typo: expected a local path or a repository of the hub, found neither.*"
                                              "OSError: cannot find it$"):
        qfunc.load("models/typo")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"install huggingface_hub \(pip install 'qfunc\[hub\]'\)"):
        qfunc.load("org/name")


@pytest.mark.parametrize("load", [qfunc.load, qfunc.load_model, qfunc.interop.inspect])
def test_no_path_is_not_the_current_folder(load, monkeypatch):
    monkeypatch.chdir(FOLDER)
    with pytest.raises(CheckpointError, match="found an empty path"):
        load("")


@pytest.mark.parametrize("load", [qfunc.load, qfunc.load_model, qfunc.interop.inspect])
@pytest.mark.parametrize("name", ["config.json", "README.md", "pytorch_model.bin", "weights"])
def test_other_files_of_a_checkpoint_are_not_one(tmp_path, load, name):
    folder = checkpoint(tmp_path / "m", {"l.weight": np.ones((4, 4), np.float32)}, config={"model_type": "llama"})
    (folder / name).write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match=f"{name}: expected a .gguf or .safetensors file, or the folder .*, found a file"):
        load(folder / name)


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
def test_a_pointer_to_weights_is_named(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match=f"{name}: expected the weights themselves, found a pointer of Git LFS"):
            qfunc.load(path)


@pytest.mark.parametrize("load", [qfunc.load, qfunc.load_model, qfunc.interop.inspect])
def test_a_part_of_a_checkpoint_is_not_one(tmp_path, load):
    for name in ("model-00001-of-00002", "model-00002-of-00002", "model-00001-of-00001"):
        made = checkpoint(tmp_path / "m", {"l.weight": np.ones((4, 4), np.float32)})
        (made / "model.safetensors").rename(made / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=f"expected a whole checkpoint; its folder, {made}, has all parts, found part 1 of 2"):
        load(made / "model-00001-of-00002.safetensors")
    assert qfunc.load(made / "model-00001-of-00001.safetensors")

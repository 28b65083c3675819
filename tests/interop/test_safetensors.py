"""The safetensors reader: every dtype, and every way in which a file can lie."""

import json
import os
import struct
import time

import ml_dtypes
import numpy as np
import pytest
from checkpoints import header_and_data, write_file

from qfunc import CheckpointError
from qfunc.interop.safetensors import DTYPES, File, open_folder

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def one(**changes):
    return {"a": {**ONE, **changes}}


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_reads(tmp_path, name):
    bits, kind = DTYPES[name]
    data = np.random.default_rng(0).integers(0, 2, 6 * 8 * bits // 8, np.uint8)
    path = write_file(tmp_path / "a.safetensors", one(dtype=name, shape=[6, 8], data_offsets=[0, data.size]), data.tobytes())
    array = File(path).tensors["a"].read()
    assert array.dtype == kind and array.shape == (6, 8 if bits >= 8 else bits) and array.tobytes() == data.tobytes()
    assert not array.flags.writeable


def test_fp8_and_exponents_keep_their_types(tmp_path):
    tensors = {"w": np.arange(8).astype(ml_dtypes.float8_e4m3fn), "s": np.array([127, 255], np.uint8).view(ml_dtypes.float8_e8m0fnu),
               "b": np.ones(3, ml_dtypes.bfloat16), "empty": np.zeros((0, 4), np.float32), "scalar": np.array(3, np.int64)}
    file = File(write_file(tmp_path / "a.safetensors", *header_and_data(tensors)))
    for name, array in tensors.items():
        assert file.tensors[name].read().dtype == array.dtype and file.tensors[name].read().tobytes() == array.tobytes()


LIES = {
    "empty file": (b"", b"", "8 bytes"), "no object": (b"[1, 2]", b"", "JSON object"), "no JSON": (b"{nonsense", b"", "valid document"),
    "deep": (b'{"a":' + b"[" * 200_000, b"", "RecursionError"), "digits": (b'{"a": ' + b"9" * 10_000 + b"}", b"", "ValueError"),
    "duplicate": (b'{"a": %s, "a": %s}' % ((json.dumps(ONE).encode(),) * 2), b"\0" * 8, "duplicate"),
    "not UTF-8": (b'{"\xff": 1}', b"", "valid document"), "metadata": ({"__metadata__": {"a": 1}}, b"", "object of strings"),
    "entry": ({"a": 3}, b"", "dtype, shape and data_offsets"), "more fields": (one(x=1), b"\0" * 8, "dtype, shape and data_offsets"),
    "dtype": (one(dtype="F33"), b"\0" * 8, "F64"), "dtype type": (one(dtype=3), b"\0" * 8, "F64"), "shape": (one(shape="2"),
                                                                                                             b"\0" * 8, "a shape"),
    "negative": (one(shape=[-2]), b"\0" * 8, "non-negative"), "fraction": (one(shape=[2.0]), b"\0" * 8, "non-negative"),
    "boolean": (one(shape=[True, 2]), b"\0" * 8, "non-negative"), "huge": (one(shape=[2**61, 2**61]), b"\0" * 8, "bytes for F32"),
    "offsets": (one(data_offsets=[0]), b"\0" * 8, "two data_offsets"), "backwards": (one(data_offsets=[8, 0]), b"\0" * 8, "within"),
    "out of range": (one(shape=[3], data_offsets=[0, 12]), b"\0" * 8, "within the 8 bytes"), "too few": (one(shape=[1]), b"\0" * 8,
                                                                                                         "4 bytes for F32"),
    "overlap": ({"a": ONE, "b": {**ONE, "data_offsets": [4, 12]}}, b"\0" * 12, "overlap"),
    "same place": ({"a": ONE, "b": ONE}, b"\0" * 8, "overlap"), "gap": ({"a": ONE, "b": {**ONE, "data_offsets": [12, 20]}},
                                                                        b"\0" * 20, "gap"),
    "tail": (one(), b"\0" * 9, "fill the file"), "head": (one(data_offsets=[4, 12]), b"\0" * 12, "fill the file"),
    "half a byte": (one(dtype="F4", shape=[3], data_offsets=[0, 1]), b"\0", "whole bytes"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_by_name(tmp_path, lie):
    header, data, message = LIES[lie]
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"") if lie == "empty file" else write_file(path, header, data)
    with pytest.raises(CheckpointError, match=message) as error:
        File(path)
    assert "a.safetensors" in str(error.value) and len(str(error.value)) < 2000


@pytest.mark.parametrize("length", [0, 1, 100, 2**31, 2**40, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused_at_once(tmp_path, length):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    start = time.process_time()
    with pytest.raises(CheckpointError, match="header length"):
        File(path)
    assert time.process_time() - start < 1


def shard(folder, name, tensors):
    return write_file(folder / name, *header_and_data(tensors))


def index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_one_mapping(tmp_path):
    shard(tmp_path, "a.safetensors", {"x": np.ones(2, np.float32)})
    shard(tmp_path, "b.safetensors", {"y": np.zeros(3, np.float32)})
    index(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"})
    files = open_folder(tmp_path)
    assert set(files) == {"x", "y"} and files.nbytes == 20 and files["y"].read().shape == (3,)


@pytest.mark.parametrize(("weight_map", "message"), [
    ({"x": "../secret.safetensors"}, "inside the checkpoint"), ({"x": "/etc/passwd"}, "inside the checkpoint"),
    ({"x": "a/../../b.safetensors"}, "inside the checkpoint"), ({"x": "..\\b.safetensors"}, "inside the checkpoint"),
    ({"x": "missing.safetensors"}, "readable file"), ({"x": ["a.safetensors"]}, "file name"), ({}, "object from tensor to file"),
    ({"x": "a.safetensors", "z": "a.safetensors"}, "tensor in a.safetensors"), ({"x": "."}, "regular file"), ({"x": ""}, "inside"),
])
def test_an_index_names_only_what_is_there(tmp_path, weight_map, message):
    shard(tmp_path, "a.safetensors", {"x": np.ones(2, np.float32)})
    index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=message):
        open_folder(tmp_path)


def test_tensors_that_the_index_forgets_are_a_note(tmp_path):
    import qfunc
    shard(tmp_path, "a.safetensors", {"x": np.ones(2, np.float32), "y": np.ones(2, np.float32)})
    index(tmp_path, {"x": "a.safetensors"})
    loaded = qfunc.load(tmp_path)
    assert set(loaded.params) == {"x", "y"} and loaded.notes == qfunc.interop.inspect(tmp_path).notes
    assert "1 tensors of the shards are not in model.safetensors.index.json, such as 'y'" in loaded.notes[0]


def test_one_name_in_two_files_is_refused(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        shard(tmp_path, name, {"x": np.ones(2, np.float32)})
    with pytest.raises(CheckpointError, match="same name in a.safetensors"):
        open_folder(tmp_path)


def test_links_may_not_leave_the_folder_but_for_the_blobs_of_a_hub_cache(tmp_path):
    outside = shard(tmp_path, "outside.safetensors", {"x": np.ones(2, np.float32)})
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="a link to"):
        open_folder(folder)
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    os.rename(outside, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert set(open_folder(snapshot)) == {"x"}
    loop = tmp_path / "loop"
    loop.mkdir()
    (loop / "a.safetensors").symlink_to("a.safetensors")
    with pytest.raises(CheckpointError):
        open_folder(loop)


def test_pipes_do_not_block(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="regular file"):
        open_folder(tmp_path)


def test_reading_maps_and_releases(tmp_path):
    tensors = {"a": np.arange(2**20, dtype=np.float32), "b": np.ones(5, np.int8)}
    file = File(shard(tmp_path, "a.safetensors", tensors))
    first = file.tensors["a"].read()
    file.release(file.tensors.values())
    assert np.array_equal(first, tensors["a"])


def test_brackets_without_content_are_refused_before_they_are_parsed(tmp_path):
    path = write_file(tmp_path / "a.safetensors", b'{"a":[' + b"[]," * 2**20 + b"[]]}", b"")
    start = time.process_time()
    with pytest.raises(CheckpointError, match="bracket"):
        File(path)
    assert time.process_time() - start < 1


FULL = 2**21 - 1
"""Keys of the largest JSON that is parsed."""


@pytest.mark.slow
@pytest.mark.parametrize(("data", "message"), [
    (b"{" + b",".join(b'"%d":0' % i for i in range(FULL)) + b"}", "dtype, shape and data_offsets"),
    (b'{"a":[' + b"0," * (2 * FULL) + b"0]}", "dtype, shape and data_offsets"),
    (b"{" + b",".join(b'"%d":0' % i for i in range(FULL + 2)) + b"}", "keys"),
    (b'{"a":[' + b"0," * 20_000_000 + b"0]}", "keys"),
], ids=["keys", "list", "too many keys", "too long a list"])
def test_no_header_costs_more_than_five_seconds(tmp_path, data, message):
    path = write_file(tmp_path / "a.safetensors", data, b"")
    start = time.process_time()
    with pytest.raises(CheckpointError, match=message):
        File(path)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(("names", "found"), [
    (("m-00001-of-00003", "m-00003-of-00003"), "m-00002-of-00003.safetensors: expected 3 shards, found 2"),
    (("m-00001-of-00002",), "m-00002-of-00002.safetensors: expected 2 shards, found 1"),
    (("m-00003-of-00002", "m-00001-of-00002"), "shards up to 00002"),
    (("m-00001-of-00002", "m-00002-of-00002"), None), (("m-1-of-2", "m-2-of-2", "other"), None),
])
def test_shards_without_an_index_are_counted_by_their_names(tmp_path, names, found):
    for i, name in enumerate(names):
        shard(tmp_path, f"{name}.safetensors", {f"x{i}": np.ones(2, np.float32)})
    if found is None:
        assert len(open_folder(tmp_path)) == len(names)
    else:
        with pytest.raises(CheckpointError, match=found):
            open_folder(tmp_path)


@pytest.mark.parametrize("depth", ["", "transformer", "a/b"])
def test_folders_inside_of_a_snapshot_link_to_the_blobs_too(tmp_path, depth, monkeypatch):
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc" / depth, tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    os.rename(shard(tmp_path, "x.safetensors", {"x": np.ones(2, np.float32)}), blobs / "0123")
    (snapshot / "model.safetensors").symlink_to(os.path.relpath(blobs / "0123", snapshot))
    assert set(open_folder(snapshot)) == {"x"}
    monkeypatch.chdir(snapshot.parent)
    assert set(open_folder(snapshot.name)) == {"x"}
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(shard(tmp_path, "y.safetensors", {"x": np.ones(2, np.float32)}))
    with pytest.raises(CheckpointError, match="a link to"):
        open_folder(snapshot)

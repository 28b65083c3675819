"""GGUF: types, names, row orders, outer scales, split files, and headers that lie."""

import struct
import time

import gguf as package
import jax
import numpy as np
import pytest
from checkpoints import DATA, sampled

import qfunc
from qfunc import CheckpointError
from qfunc._ggml import TYPES as TYPES_BY_NAME
from qfunc.interop import gguf
from qfunc.interop._gguf_file import GgufFile
from qfunc.interop._gguf_names import to_gguf, to_hugging_face

TYPES = np.load(DATA.parent / "ggml_types.npz")
KIND = package.GGMLQuantizationType


@pytest.mark.parametrize("name", sampled(sorted({key.partition("/")[0] for key in TYPES.files}), "q4_0", "q6_k", "iq2_xs", "iq1_m", "tq1_0",
                                         "nvfp4"))
def test_ggmls_own_floats(name):
    raw, want = TYPES[f"{name}/raw"], TYPES[f"{name}/float"]
    for run in (gguf.decode, jax.jit(gguf.decode, static_argnums=(1, 2))):
        assert np.array_equal(np.asarray(run(raw, name, want.shape[1])).view(np.uint32), want.view(np.uint32))


def write(path, tensors, architecture="qwen3", **fields):
    """A GGUF file by the package's own writer: name to float array, or (type, bytes)."""
    writer = package.GGUFWriter(path, architecture)
    for key, value in fields.items():
        writer.add_uint32(key.replace("__", "."), value)
    for name, array in tensors.items():
        kind, data = array if isinstance(array, tuple) else (None, array)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def q8(shape, seed=0):
    return KIND.Q8_0, package.quants.quantize(np.random.default_rng(seed).standard_normal(shape).astype(np.float32), KIND.Q8_0)


def test_llama_rows_come_back_in_hugging_face_order(tmp_path):
    heads, kv, dim = 4, 2, 16
    q, k, bias = q8((heads * dim, 64)), np.random.default_rng(1).standard_normal((kv * dim, 64)).astype(np.float32), np.arange(64,
                                                                                                                               dtype=np.float32)
    path = write(tmp_path / "a.gguf", {"blk.0.attn_q.weight": q, "blk.0.attn_k.weight": k, "blk.0.attn_q.bias": bias}, "llama",
                 llama__attention__head_count=heads, llama__attention__head_count_kv=kv)
    loaded = qfunc.load(path)
    in_file = np.asarray(package.quants.dequantize(q[1], KIND.Q8_0))
    for name, weight, count in (("q", in_file, heads), ("k", k, kv)):
        ours = weight.reshape(count, dim // 2, 2, 64).swapaxes(1, 2).reshape(-1, 64)
        assert np.array_equal(qfunc.dequantize(loaded.weight(f"model.layers.0.self_attn.{name}_proj"), "float32").T, ours)
        assert np.array_equal(qfunc.dequantize(loaded.weight(f"blk.0.attn_{name}"), "float32").T, weight)
    assert loaded.params["model"]["layers"]["0"]["self_attn"]["q_proj"]["bias"][1] == 2
    assert loaded.config["model_type"] == "llama" and loaded.config["num_attention_heads"] == heads


def test_the_permutation_is_the_converters():
    weight = np.random.default_rng(0).standard_normal((64, 8))
    converted = weight.reshape(4, 2, 8, 8).swapaxes(1, 2).reshape(64, 8)     # LlamaModel.permute of convert_hf_to_gguf.py
    assert np.array_equal(to_gguf(weight, 4), converted) and np.array_equal(to_hugging_face(converted, 4), weight)


def test_nvfp4_with_its_outer_scale(tmp_path):
    raw = np.random.default_rng(0).integers(0, 126, (32, 2 * 36)).astype(np.uint8)
    path = write(tmp_path / "a.gguf", {"blk.0.ffn_up.weight": (KIND.NVFP4, raw), "blk.0.ffn_up.scale": np.array([.25], np.float32)})
    leaf = qfunc.load(path).weight("model.layers.0.mlp.up_proj")
    assert leaf.scheme.name == "nvfp4_a16"
    assert np.allclose(leaf.dequantize("float32").T, .25 * np.asarray(gguf.decode(raw, "nvfp4", 128)), rtol=1e-6)
    plain = qfunc.load(write(tmp_path / "b.gguf", {"blk.0.ffn_up.weight": (KIND.NVFP4, raw)})).weight("blk.0.ffn_up")
    assert plain.scheme.name == "gguf:nvfp4" and np.array_equal(plain.dequantize("float32").T, gguf.decode(raw, "nvfp4", 128))


def test_metadata_becomes_the_configuration():
    loaded = qfunc.load(next((DATA / "gguf-moe-q4_k_m").glob("*.gguf")))
    assert {k: loaded.config[k] for k in ("model_type", "hidden_size", "num_experts", "num_experts_per_tok", "head_dim")} == {
        "model_type": "qwen3_moe", "hidden_size": 256, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 64}
    assert loaded.config["gguf"]["tokenizer.ggml.tokens"] == ["a", "b"] and loaded.config["tie_word_embeddings"]


def test_gemma_norms_lose_the_one_that_the_file_adds(tmp_path):
    path = write(tmp_path / "a.gguf", {"blk.0.attn_norm.weight": np.full(8, 1.5, np.float32)}, "gemma2")
    assert (qfunc.load(path).params["model"]["layers"]["0"]["input_layernorm"]["weight"] == .5).all()


def test_unknown_names_and_architectures_are_notes(tmp_path):
    loaded = qfunc.load(write(tmp_path / "a.gguf", {"blk.0.strange.weight": q8((8, 32))}, "novel"))
    assert len(loaded.notes) == 2 and loaded.weight("blk.0.strange").shape == (32, 8)


def test_split_files_are_one(tmp_path):
    for i, name in enumerate(("blk.0.ffn_up.weight", "blk.0.ffn_down.weight")):
        writer = package.GGUFWriter(tmp_path / f"m-{i + 1:05}-of-00002.gguf", "qwen3")
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", 2)
        writer.add_tensor(name, np.ones((4, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert len(qfunc.load(tmp_path).params["model"]["layers"]["0"]["mlp"]) == 2
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match="m-00002-of-00002.gguf"):
        qfunc.load(tmp_path / "m-00001-of-00002.gguf")


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def header(version=3, tensors=1, pairs=0, body=b"", data=bytes(64), pad=True):
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + body
    return head + bytes(-len(head) % 32 if pad else 0) + data


def record(name="a", sizes=(4,), kind=0, offset=0):
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def pair(key, kind, value):
    return string(key) + struct.pack("<I", kind) + value


LIES = {
    "magic": (b"GGUX" + bytes(60), "magic"), "short": (b"GGUF", "24 bytes"), "version": (header(9, 0), "version"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"), "tensors": (header(tensors=2**60), "number of tensors"),
    "pairs": (header(pairs=2**63), "number of metadata pairs"), "key": (header(0 + 3, 0, 1, struct.pack("<Q", 2**50)), "metadata key"),
    "value type": (header(3, 0, 1, pair("k", 13, b"")), "value type"), "array": (header(3, 0, 1, pair("k", 9, struct.pack("<IQ", 4,
                                                                                                                          2**61))), "'k'"),
    "strings": (header(3, 0, 1, pair("k", 9, struct.pack("<IQ", 8, 2**40))), "'k'"),
    "nesting": (header(3, 0, 1, pair("k", 9, struct.pack("<IQ", 9, 1) * 20)), "deep"),
    "twice": (header(3, 0, 2, pair("k", 0, b"\1") * 2), "duplicate"), "alignment": (header(3, 0, 1, pair("general.alignment", 4,
                                                                                                         struct.pack("<I", 48))),
                                                                                                         "power of two"),
    "zero alignment": (header(3, 0, 1, pair("general.alignment", 4, bytes(4))), "power of two"),
    "axes": (header(body=string("a") + struct.pack("<I", 9) + bytes(90)), "axes"), "type": (header(body=record(kind=999)),
                                                                                            "known ggml type"),
    "size": (header(body=record(sizes=(2**50,))), "sizes from 1"), "zero": (header(body=record(sizes=(0,))), "sizes from 1"),
    "blocks": (header(body=record(sizes=(33,), kind=2)), "whole blocks of 32"), "offset": (header(body=record(offset=8)), "32 divides"),
    "beyond": (header(body=record(offset=2**40)), "within the file"), "large": (header(body=record(sizes=(2**30, 2**17))),
                                                                                "within the file"),
    "name twice": (header(tensors=2, body=record() + record(offset=32)), "duplicate"),
    "overlap": (header(tensors=2, body=record(sizes=(16,)) + record("b", offset=32)), "overlap"),
    "not UTF-8": (header(body=struct.pack("<Q", 1) + b"\xff" + bytes(60)), "UTF-8"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_at_once(tmp_path, lie):
    data, message = LIES[lie]
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=message):
        GgufFile(path)
    assert time.process_time() - start < 2


def test_a_truth_is_read(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(header(pairs=1, body=pair("general.architecture", 8, string("qwen3")) + record("output_norm.weight", (4,))))
    assert (qfunc.load(path).params["model"]["norm"]["weight"] == 0).all()


@pytest.mark.slow
def test_a_full_header_is_read_in_time_and_a_fuller_one_refused(tmp_path):
    from qfunc.interop._gguf_file import MOST_STRINGS
    path = tmp_path / "a.gguf"
    for count, message in ((MOST_STRINGS, None), (MOST_STRINGS + 1, "at most")):
        path.write_bytes(header(3, 0, 1, pair("k", 9, struct.pack("<IQ", 8, count)), bytes(8 * count)))
        start = time.process_time()
        if message is None:
            assert len(GgufFile(path).metadata["k"]) == count
        else:
            with pytest.raises(CheckpointError, match=message):
                GgufFile(path)
        assert time.process_time() - start < 5


def test_the_strings_of_a_file_share_one_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("qfunc.interop._gguf_file.MOST_STRINGS", 5)
    path = tmp_path / "a.gguf"
    body = b"".join(pair(key, 9, struct.pack("<IQ", 8, 3) + string("a") * 3) for key in "kl")
    path.write_bytes(header(3, 0, 2, body))
    with pytest.raises(CheckpointError, match="'l': expected at most 2, found 3"):
        GgufFile(path)
    monkeypatch.setattr("qfunc.interop._gguf_file.MOST_STRINGS", 6)
    assert GgufFile(path).metadata == {"k": ["a"] * 3, "l": ["a"] * 3}


def test_a_string_that_ends_behind_the_file_is_refused(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(header(3, 0, 1, pair("k", 9, struct.pack("<IQ", 8, 2) + string("a") + struct.pack("<Q", 2**60))))
    with pytest.raises(CheckpointError, match="more bytes"):
        GgufFile(path)


def test_nvfp4_rows_of_llama_are_put_in_order(tmp_path):
    raw = np.random.default_rng(3).integers(0, 126, (16, 36)).astype(np.uint8)
    tensors, heads = {"blk.0.attn_q.weight": (KIND.NVFP4, raw)}, {"llama__attention__head_count": 2}
    plain = qfunc.load(write(tmp_path / "a.gguf", tensors, "llama", **heads))
    assert np.array_equal(plain.weight("blk.0.attn_q").codes, raw)
    assert np.array_equal(plain.weight("model.layers.0.self_attn.q_proj").codes, to_hugging_face(raw, 2))
    outer = qfunc.load(write(tmp_path / "b.gguf", {**tensors, "blk.0.attn_q.scale": np.array([.5], np.float32)}, "llama", **heads))
    in_file = package.quants.dequantize(raw, KIND.NVFP4) / 2
    assert np.array_equal(outer.weight("blk.0.attn_q").dequantize("float32").T, in_file)
    assert np.array_equal(outer.weight("model.layers.0.self_attn.q_proj").dequantize("float32").T, to_hugging_face(in_file, 2))


def test_every_layer_may_have_heads_of_its_own(tmp_path):
    weights = [np.random.default_rng(i).standard_normal((16, 4)).astype(np.float32) for i in range(2)]
    writer = package.GGUFWriter(tmp_path / "a.gguf", "deci")
    writer.add_array("deci.attention.head_count", [4, 2])
    writer.add_array("deci.attention.head_count_kv", [2, 1])
    for i, weight in enumerate(weights):
        writer.add_tensor(f"blk.{i}.attn_q.weight", weight)
        writer.add_tensor(f"blk.{i}.attn_k.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = qfunc.load(tmp_path / "a.gguf")
    for i, weight in enumerate(weights):
        for name, heads in (("q", (4, 2)[i]), ("k", (2, 1)[i])):
            want = weight.reshape(heads, 8 // heads, 2, 4).swapaxes(1, 2).reshape(16, 4)
            assert np.array_equal(loaded.weight(f"model.layers.{i}.self_attn.{name}_proj").T, want)


def test_rows_are_not_left_permuted_where_the_number_of_heads_is_missing(tmp_path):
    path = write(tmp_path / "a.gguf", {"blk.0.attn_q.weight": np.ones((8, 4), np.float32)}, "llama")
    with pytest.raises(CheckpointError, match=r"attn_q.*llama\.attention\.head_count"):
        qfunc.load(path)


@pytest.mark.parametrize(("architecture", "order"), [("mistral3", True), ("deepseek", True), ("qwen3", False), ("gemma3", False)])
def test_which_architectures_are_permuted(tmp_path, architecture, order):
    weight = np.arange(8, dtype=np.float32)[:, None].repeat(4, 1)
    fields = {f"{architecture}__attention__head_count": 2}
    loaded = qfunc.load(write(tmp_path / "a.gguf", {"blk.0.attn_q.weight": weight}, architecture, **fields))
    want = [0, 2, 1, 3, 4, 6, 5, 7] if order else range(8)
    assert list(np.asarray(loaded.weight("model.layers.0.self_attn.q_proj"))[0]) == list(want)


def test_names_are_among_those_that_the_package_knows():
    """The package lists, for every tensor of an architecture, what all the models that it converts call it; norms in no fixed order."""
    from qfunc.interop import _gguf_names as names
    kinds = {name: kind for kind, name in package.MODEL_ARCH_NAMES.items()}
    checked = 0
    for architecture in (names.PERMUTED | names.PLAIN) & kinds.keys():
        known = {}
        for theirs, (_, ours) in package.get_tensor_name_map(kinds[architecture], 1).mapping.items():
            known.setdefault(ours, set()).add(theirs)
        for name, theirs in known.items():
            found = names.hugging_face(f"{name}.weight", architecture, False)
            assert found is None or name.endswith("_norm") or found.removesuffix(".weight") in theirs, (architecture, name)
            checked += found is not None
    assert checked > 300


@pytest.mark.parametrize(("architecture", "name", "shift"), [
    ("gemma3", "blk.0.attn_q_norm", 1), ("qwen3next", "blk.0.attn_norm", 1), ("qwen3next", "blk.0.ssm_norm", 0),
    ("qwen3", "output_norm", 0)])
def test_norms_that_are_stored_with_a_one(tmp_path, architecture, name, shift):
    path = write(tmp_path / "a.gguf", {f"{name}.weight": np.full(8, 1.5, np.float32)}, architecture)
    [leaf] = jax.tree.leaves(qfunc.load(path).params)
    assert (leaf == 1.5 - shift).all()


@pytest.mark.parametrize("name", sorted(set(gguf.NOT_FINITE) - {"q8_1", "q8_k", "q1_0", "q2_0", "mxfp4"}))
def test_a_scale_that_is_not_finite_would_spoil_its_block(name):
    kind, places = TYPES_BY_NAME[name], gguf.NOT_FINITE[name]
    rows = np.random.default_rng(0).integers(0, 64, (len(places), 2 * kind.bytes)).astype(np.uint8)        # top bits clear: all are finite
    bad = rows.copy()
    for row, place in zip(bad, places, strict=True):
        for byte, mask in place:
            row[byte] |= mask
    with np.errstate(invalid="ignore"):
        floats = package.quants.dequantize(np.concatenate([rows, bad]), KIND[name.upper()])
    assert np.isfinite(floats[: len(rows)]).all() and np.isfinite(floats[:, kind.elements:]).all()
    assert not np.isfinite(floats[len(rows):, : kind.elements]).any()


@pytest.mark.parametrize("name", sorted(gguf.NOT_FINITE))
def test_scales_that_are_not_finite_are_refused(tmp_path, name):
    kind = TYPES_BY_NAME[name]
    rows = np.random.default_rng(0).integers(0, 64, (4, 2, kind.bytes)).astype(np.uint8)

    def tensor(blocks):
        path = tmp_path / "a.gguf"
        path.write_bytes(header(body=record("blk.0.ffn_up.weight", (2 * kind.elements, 4), kind.id), data=blocks.tobytes()))
        return GgufFile(path).tensors["blk.0.ffn_up.weight"]
    gguf.check_scales(good := tensor(rows), good.raw())
    for places in gguf.NOT_FINITE[name]:
        bad = rows.copy()
        for byte, mask in places:
            bad[2, 1, byte] |= mask
        with pytest.raises(CheckpointError, match=r"a.gguf.*ffn_up.*finite scales.*block 5 of 8"):
            gguf.check_scales(wrong := tensor(bad), wrong.raw())


def test_loading_looks_at_the_scales(tmp_path):
    raw = np.zeros((4, 34), np.uint8)
    raw[3, 1] = 0x7C
    with pytest.raises(CheckpointError, match=r"ffn_up.*NaN or infinity in block 3 of 4"):
        qfunc.load(write(tmp_path / "a.gguf", {"blk.0.ffn_up.weight": (KIND.Q8_0, raw)}))


def test_every_type_with_a_scale_is_checked():
    without = {"f32", "f16", "bf16", "f64", "i8", "i16", "nvfp4"}       # every byte of NVFP4's unsigned scales is a number
    assert set(gguf.NOT_FINITE) == set(TYPES_BY_NAME) - without

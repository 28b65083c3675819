"""Wan's diffusion transformers as msModelSlim writes them: original names, two experts, every type, against the formulas in float64."""

import json

import ml_dtypes
import numpy as np
import pytest
from checkpoints import checkpoint, header_and_data, write_file

import qfunc
from qfunc import CheckpointError
from qfunc.interop import _wan

D, F, LAYERS = 512, 1024, 2
E2M1 = np.array([0, .5, 1, 1.5, 2, 3, 4, 6, -0.0, -.5, -1, -1.5, -2, -3, -4, -6])
# A Linear of a block in the original code: its name, diffusers' name, and its shape (out, in).
LINEARS = {**{f"{old}.{part}": (f"{new}.{name}", (D, D)) for old, new in (("self_attn", "attn1"), ("cross_attn", "attn2"))
              for part, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))},
           "ffn.0": ("ffn.net.0.proj", (F, D)), "ffn.2": ("ffn.net.2", (D, F))}
FLOATS = {"patch_embedding.weight": (D, 16, 1, 2, 2), "patch_embedding.bias": (D,), "text_embedding.0.weight": (D, 64),
          "time_embedding.2.weight": (D, D), "time_projection.1.weight": (6 * D, D), "time_projection.1.bias": (6 * D,),
          "head.modulation": (1, 2, D), "head.head.weight": (64, D), "head.head.bias": (64,)}
BLOCK_FLOATS = {"modulation": (1, 6, D), "norm3.weight": (D,), "norm3.bias": (D,), "self_attn.norm_q.weight": (D,),
                "cross_attn.norm_k.weight": (D,)}
CONFIG = {"_class_name": "WanModel", "dim": D, "num_heads": 8, "in_dim": 16, "out_dim": 16, "ffn_dim": F, "num_layers": LAYERS}


def exponents(rng, *shape):
    return rng.integers(115, 130, shape).astype(np.uint8)


def nibbles(codes):
    return (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)


def spread(scale, size):
    return np.repeat(np.exp2(scale.astype(np.float64) - 127), size, 1)


def w8a8(rng, n, k):
    q, scale, offset = rng.integers(-127, 128, (n, k)).astype(np.int8), np.float32(.03), 5
    deq = rng.uniform(1e-4, 2e-4, n).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    packed = np.round(bias / deq - offset * q.sum(1, dtype=np.int64)).astype(np.int32)
    return {"weight": q, "quant_bias": packed, "input_scale": np.array([scale]), "input_offset": np.array([offset], np.float32),
            "deq_scale": deq}, q * (deq / scale).astype(np.float64)[:, None], bias


def per_channel(low, high):
    def make(rng, n, k):
        q, s = rng.integers(low, high + 1, (n, k)).astype(np.int8), rng.uniform(.01, .02, (n, 1)).astype(np.float32)
        return {"weight": q, "weight_scale": s, "weight_offset": np.zeros_like(s)}, q * s.astype(np.float64), None
    return make


def mxfp8(rng, n, k):
    q, e = rng.standard_normal((n, k)).astype(ml_dtypes.float8_e4m3fn), exponents(rng, n, k // 32)
    return {"weight": q, "weight_scale": e}, q.astype(np.float64) * spread(e, 32), None


def mxfp4(rng, n, k):
    q, e = rng.integers(0, 16, (n, k)), exponents(rng, n, k // 32)
    return {"weight": nibbles(q), "weight_scale": e}, E2M1[q] * spread(e, 32), None


def dual(rng, n, k):
    tensors, want, _ = mxfp4(rng, n, k)
    outer = rng.uniform(.5, 2, (n, k // 512, 1)).astype(np.float32)
    return {**tensors, "weight_dual_scale": outer}, want * np.repeat(outer[..., 0].astype(np.float64), 512, 1), None


TYPES = {"W8A8": (w8a8, "w8a8_static_asym"), "W8A8_DYNAMIC": (per_channel(-127, 127), "w8a8_dynamic"),
         "W4A4_DYNAMIC": (per_channel(-8, 7), "w4a4_dynamic"), "W8A8_MXFP8": (mxfp8, "mxfp8"), "W4A4_MXFP4": (mxfp4, "mxfp4"),
         "W4A4_MXFP4_DUALSCALE": (dual, "mxfp4_dual")}


def write(folder, kind, seed=0, kept=("ffn.2",), smoothed=(), description=None, **changes):
    """A transformer as the exporter writes it; returns what each quantized Linear must decode to, by diffusers' name."""
    rng, wants, types, tensors = np.random.default_rng(seed), {}, {}, {}
    for name, shape in FLOATS.items():
        tensors[name], types[name] = rng.standard_normal(shape).astype(ml_dtypes.bfloat16), "FLOAT"
    for layer in range(LAYERS):
        block = f"blocks.{layer}."
        for name, shape in BLOCK_FLOATS.items():
            tensors[block + name], types[block + name] = rng.standard_normal(shape).astype(np.float32), "FLOAT"
        for name, (new, (n, k)) in LINEARS.items():
            bias = rng.standard_normal(n).astype(np.float32)
            if name in kept:
                tensors |= {f"{block}{name}.weight": rng.standard_normal((n, k)).astype(ml_dtypes.bfloat16), f"{block}{name}.bias": bias}
                types |= {f"{block}{name}.weight": "FLOAT", f"{block}{name}.bias": "FLOAT"}
                continue
            found, want, own = TYPES[kind][0](rng, n, k)
            inner = f"{block}{name}.linear" if name in smoothed else f"{block}{name}"
            tensors |= {f"{inner}.{part}": array for part, array in found.items()} | {f"{inner}.bias": bias if own is None else own}
            types |= {f"{inner}.{part}": kind for part in found} | {f"{inner}.bias": "FLOAT"}
            if name in smoothed:
                tensors[f"{block}{name}.div.mul_scale"] = rng.uniform(.5, 2, k).astype(np.float32)
                types[f"{block}{name}.div.mul_scale"] = "FLOAT"
            wants[f"blocks.{layer}.{new}"] = want
    tensors |= changes
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / f"quant_model_weight_{kind.lower()}.safetensors", *header_and_data(tensors))
    text = {**types, "model_quant_type": kind, **(description or {})}
    (folder / f"quant_model_description_{kind.lower()}.json").write_text(json.dumps(text))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return wants


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_decodes_to_its_formula_under_diffusers_names(tmp_path, kind):
    wants = write(tmp_path, kind)
    loaded = qfunc.load(tmp_path)
    assert loaded.format == "modelslim" and len(loaded.schemes) == len(wants) == 9 * LAYERS
    for name, want in wants.items():
        leaf = loaded.weight(name)
        assert leaf.scheme.name == TYPES[kind][1] and qfunc.scheme(kind if kind != "W8A8" else TYPES[kind][1]).name == leaf.scheme.name
        assert np.allclose(np.asarray(leaf.dequantize("float32"), np.float64).T, want, rtol=3e-7, atol=0)
    block = loaded.params["blocks"]["1"]
    assert set(block) == {"attn1", "attn2", "ffn", "norm2", "scale_shift_table"} and block["ffn"]["net"]["2"]["kernel"].shape == (F, D)
    assert block["attn1"]["to_out"]["0"]["bias"].shape == (D,)
    assert set(loaded.params) == {"blocks", "patch_embedding", "condition_embedder", "scale_shift_table", "proj_out"}
    assert set(loaded.params["condition_embedder"]) == {"text_embedder", "time_embedder", "time_proj"}
    assert loaded.config["num_attention_heads"] == 8 and loaded.config["attention_head_dim"] == 64
    assert qfunc.interop.inspect(tmp_path).schemes == loaded.schemes


def test_the_originals_own_names_find_a_weight(tmp_path):
    write(tmp_path, "W8A8_DYNAMIC")
    loaded = qfunc.load(tmp_path)
    assert loaded.weight("blocks.1.self_attn.q") is loaded.weight("blocks.1.attn1.to_q")
    assert loaded.weight("blocks.0.ffn.0").shape == (D, F)


def test_two_experts_keep_their_own_schemes(tmp_path):
    wants = {"transformer": write(tmp_path / "high_noise_model", "W4A4_MXFP4_DUALSCALE", 1),
             "transformer_2": write(tmp_path / "low_noise_model", "W8A8_MXFP8", 2)}
    loaded = qfunc.load(tmp_path)
    assert set(loaded.params) == set(loaded.config) == set(wants)
    for part, kind in (("transformer", "mxfp4_dual"), ("transformer_2", "mxfp8")):
        assert {s.name for path, s in loaded.schemes.items() if path.startswith(f"{part}/")} == {kind}
        for name, want in wants[part].items():
            assert np.allclose(np.asarray(loaded.weight(f"{part}.{name}").dequantize("float32")).T, want, rtol=3e-7, atol=0)
    assert {row.pattern.split("/")[0] for row in qfunc.interop.inspect(tmp_path).rows} == set(wants)
    shapes = []
    qfunc.load(tmp_path, shardings=lambda path, leaf: shapes.append(path))
    assert {path.split("/")[0] for path in shapes} == set(wants)


def test_a_missing_expert_is_refused(tmp_path):
    write(tmp_path / "high_noise_model", "W8A8_MXFP8")
    with pytest.raises(CheckpointError, match="low_noise_model: expected the folder of this transformer"):
        qfunc.load(tmp_path)


def test_a_pipelines_folder_loads_its_transformers(tmp_path):
    wants = write(tmp_path / "transformer", "W8A8_DYNAMIC")
    part = ["diffusers", "WanTransformer3DModel"]
    index = {"_class_name": "WanPipeline", "boundary_ratio": None, "transformer": part, "transformer_2": [None, None], "vae": part}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    paths = qfunc.load(tmp_path).schemes
    assert {path.removeprefix("transformer/").removesuffix("/kernel").replace("/", ".") for path in paths} == set(wants)
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "transformer_2": part}))
    with pytest.raises(CheckpointError, match="transformer_2"):
        qfunc.load(tmp_path)


def test_a_repacked_folder_is_the_original_one_under_other_names(tmp_path):
    from qfunc.interop.safetensors import File
    write(tmp_path / "a", "W8A8_MXFP8", smoothed=("ffn.0",))
    file = File(next((tmp_path / "a").glob("*.safetensors")))
    description = json.loads(next((tmp_path / "a").glob("*description*")).read_text())
    (tmp_path / "b").mkdir()
    write_file(tmp_path / "b" / "diffusion_pytorch_model.safetensors",
               *header_and_data({_wan.renamed(name): tensor.read() for name, tensor in file.tensors.items()}))
    (tmp_path / "b" / "quant_model_description.json").write_text(json.dumps({_wan.renamed(k): v for k, v in description.items()}))
    first, second = qfunc.load(tmp_path / "a"), qfunc.load(tmp_path / "b")
    assert first.schemes == second.schemes
    for name in first.schemes:
        one, two = first.weight(name), second.weight(name)
        assert one.leaves.keys() == two.leaves.keys() and all(np.array_equal(one.leaves[k], two.leaves[k]) for k in one.leaves)


def test_smoothing_is_a_leaf_and_its_loss_is_refused(tmp_path):
    write(tmp_path, "W8A8_MXFP8", smoothed=("self_attn.q",))
    loaded = qfunc.load(tmp_path)
    assert loaded.weight("blocks.0.self_attn.q") is loaded.weight("blocks.0.self_attn.q.linear") is loaded.weight("blocks.0.attn1.to_q")
    assert loaded.weight("blocks.0.attn1.to_q").smooth.shape == (D,) and loaded.weight("blocks.0.attn1.to_k").smooth is None
    description = next(tmp_path.glob("*description*"))
    text = json.loads(description.read_text())
    description.write_text(json.dumps({**text, "blocks.0.self_attn.k.div.mul_scale": "FLOAT"}))
    with pytest.raises(CheckpointError, match=r"attn1\.to_k\.mul_scale: expected the tensor"):
        qfunc.load(tmp_path)


def test_rotations_and_attention_types_are_kept_and_told(tmp_path):
    rotation = np.eye(64).astype(ml_dtypes.bfloat16)
    write(tmp_path, "W8A8_MXFP8", **{"blocks.1.self_attn.q_rot": rotation, "blocks.1.self_attn.k_rot": rotation},
          description={"blocks.1.self_attn.quant_type": "FP8_DYNAMIC", "fa_quant_type": "FP8_DYNAMIC"})
    loaded = qfunc.load(tmp_path)
    assert loaded.params["blocks"]["1"]["attn1"]["to_q_rot"].shape == (64, 64)
    assert any("1 attention layers are quantized at run time (FP8_DYNAMIC)" in note for note in loaded.notes)


def test_float_checkpoints_of_the_original_are_renamed_too(tmp_path):
    tensors = {"blocks.0.cross_attn.o.weight": np.ones((8, 4), np.float32), "head.modulation": np.ones((1, 2, 4), np.float32)}
    loaded = qfunc.load(checkpoint(tmp_path, tensors))
    assert loaded.weight("blocks.0.attn2.to_out.0").shape == (4, 8) and loaded.params["scale_shift_table"].shape == (1, 2, 4)


@pytest.mark.parametrize(("old", "new"), [
    ("time_embedding.0.weight", "condition_embedder.time_embedder.linear_1.weight"), ("head.head.bias", "proj_out.bias"),
    ("head.modulation", "scale_shift_table"), ("blocks.3.modulation", "blocks.3.scale_shift_table"),
    ("blocks.12.norm3.weight", "blocks.12.norm2.weight"), ("blocks.0.norm2.weight", "blocks.0.norm3.weight"),
    ("blocks.0.self_attn.o.bias", "blocks.0.attn1.to_out.0.bias"), ("blocks.0.cross_attn.norm_q.weight", "blocks.0.attn2.norm_q.weight"),
    ("blocks.0.cross_attn.k_img.weight", "blocks.0.attn2.add_k_proj.weight"),
    ("blocks.0.cross_attn.norm_k_img.weight", "blocks.0.attn2.norm_added_k.weight"),
    ("img_emb.proj.1.weight", "condition_embedder.image_embedder.ff.net.0.proj.weight"),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    ("blocks.0.ffn.2.linear.weight", "blocks.0.ffn.net.2.weight"), ("blocks.0.ffn.0.div.mul_scale", "blocks.0.ffn.net.0.proj.mul_scale"),
    ("blocks.0.self_attn.q_rot", "blocks.0.attn1.to_q_rot"), ("patch_embedding.weight", "patch_embedding.weight"),
])
def test_names(old, new):
    assert _wan.renamed(old) == new


def test_properties_of_attention_are_not_mangled():
    assert _wan.described("blocks.0.self_attn.quant_type") == "blocks.0.attn1.quant_type"


def test_names_that_would_become_one_are_refused(tmp_path):
    tensors = {"blocks.0.self_attn.q.weight": np.ones((2, 2), np.float32), "blocks.0.attn1.to_q.weight": np.ones((2, 2), np.float32)}
    with pytest.raises(CheckpointError, match="a name of its own in diffusers' spelling"):
        qfunc.load(checkpoint(tmp_path, tensors))

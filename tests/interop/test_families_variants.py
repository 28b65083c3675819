"""What single tools write otherwise than the rest of their family: packings, widths, scales and names of their own, by plain numpy."""

import ml_dtypes
import numpy as np
import pytest
from checkpoints import checkpoint
from foreign import AWQ, CT, E2M1, GPTQ, INT8, K, M, N, dense, generator, gptq, gptq_tensors, slim, under, words
from near import near

import qfunc
from qfunc import CheckpointError


def test_nvfp4_divisors_are_inverted(tmp_path):
    rng = generator()
    codes = rng.integers(0, 16, (N, K)).astype(np.uint8)
    tensors = {"weight_packed": codes[:, ::2] | codes[:, 1::2] << 4, "weight_global_scale": np.array([50.], np.float32),
               "weight_scale": rng.uniform(1, 8, (N, K // 16)).astype(ml_dtypes.float8_e4m3fn),
               "input_global_scale": np.array([4.], np.float32)}
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
             "input_activations": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"}}
    folder = checkpoint(tmp_path, under(tensors), {**CT, "format": "nvfp4-pack-quantized", "config_groups": {"group_0": group}})
    leaf = qfunc.load(folder).weight(M)
    want = E2M1[codes] * np.repeat(tensors["weight_scale"].astype(np.float32), 16, 1) / 50
    assert np.allclose(np.asarray(leaf.dequantize("float32")).T, want, rtol=1e-6)
    assert float(leaf.input_scale[0, 0]) == .25 and float(leaf.scale2[0, 0]) == np.float32(1) / 50


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("old", [False, True])
def test_both_packings_of_odd_widths(tmp_path, bits, old):
    q = generator().integers(0, 2**bits, (8, 96)).astype(np.uint8)
    each = 32 // bits
    if old:
        padded = np.pad(q, ((0, 0), (0, -96 % each))).reshape(8, -1, each).astype(np.uint32)
        packed = (padded << (np.arange(each) * bits).astype(np.uint32)).sum(-1).astype(np.uint32).view(np.int32)
    else:
        packed = np.ascontiguousarray(words(q.T, bits).T)
    group = {"targets": ["Linear"], "weights": {"num_bits": bits, "type": "int", "strategy": "channel"}}
    tensors = {"weight_packed": packed, "weight_scale": np.full((8, 1), .5, np.float32), "weight_shape": np.array([8, 96])}
    folder = checkpoint(tmp_path, under(tensors), {**CT, "format": "pack-quantized", "config_groups": {"group_0": group}})
    assert np.array_equal(dense(folder).T, (q.astype(np.float32) - 2 ** (bits - 1)) / 2)


def test_a_group_for_the_experts_class_comes_before_linear(tmp_path):
    def group(bits, target):
        return {"targets": [target], "weights": {"num_bits": bits, "type": "int", "strategy": "channel"}}
    config = {**CT, "config_groups": {"a": group(8, "Linear"), "b": group(4, "MoEGMM")}}
    folder = checkpoint(tmp_path, {**under(INT8), **under(INT8, "model.layers.0.mlp.experts.0.up_proj")}, config)
    assert sorted(s.name for s in qfunc.load(folder).schemes.values()) == ["w4a16", "w8a16"]


def fast_words(q):
    """Codes [N, K] as AutoAWQ's `gemv_fast` interleaves them, one element at a time."""
    outs, ins = q.shape
    words = np.zeros((outs // 4, ins), np.uint16)
    order = [0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27, 4, 5, 12, 13, 20, 21, 28, 29, 6, 7, 14, 15, 22, 23, 30, 31]
    order = [order[8 * (i // 8) + (0, 2, 4, 6, 1, 3, 5, 7)[i % 8]] for i in range(32)]
    for n in range(outs):
        for k in range(ins):
            place = 64 * (n % 4) + k % 64                  # of the 256 nibbles of 4 outputs x 64 inputs
            source = 32 * (k // 32) + order[k % 32]
            words[n // 4, 64 * (k // 64) + place // 4] |= np.uint16(int(q[n, source]) << 4 * (place % 4))
    return words.view(np.int16)


@pytest.mark.parametrize("group", [64, 128])
def test_awqs_fast_gemv(tmp_path, group):
    rng, groups = generator(), K // group
    q, z = rng.integers(0, 16, (64, K)).astype(np.uint8), rng.integers(0, 16, (64, groups))
    s = rng.uniform(.01, .02, (64, groups)).astype(np.float16)
    tall = np.zeros((8, 64), np.float16)
    scales, products = tall.copy(), tall.copy()
    scales[:groups], products[:groups] = s.T, -(s.astype(np.float32) * z).astype(np.float16).T
    tensors = {"qweight": fast_words(q), "scales": scales, "scaled_zeros": products}
    config = {**AWQ, "group_size": group, "version": "gemv_fast"}
    folder = checkpoint(tmp_path, under(tensors), config)
    want = (q - np.repeat(z, group, 1)) * np.repeat(s.astype(np.float32), group, 1)
    assert np.array_equal(dense(folder).T, want)
    tensors["scaled_zeros"] = products + np.float16(.004)
    with pytest.raises(CheckpointError, match="products of the scales"):
        qfunc.load(checkpoint(tmp_path, under(tensors), config))


@pytest.mark.parametrize("own", [False, True])
def test_fbgemm_clips_activations_to_its_bound(tmp_path, own):
    rng = generator()
    w, s = rng.standard_normal((32, 64)).astype(ml_dtypes.float8_e4m3fn), rng.uniform(.01, .02, (32, 1)).astype(np.float32)
    tensors = {"weight": w, "weight_scale": s, **({"input_scale_ub": np.array([3.], np.float32)} if own else {})}
    loaded = qfunc.load(checkpoint(tmp_path, under(tensors), {"quant_method": "fbgemm_fp8", "activation_scale_ub": 7.0 if own else 3.0}))
    leaf = loaded.weight(M)
    assert leaf.scheme.name == "fp8_dynamic" and leaf.scheme.activation.bound == 3
    assert np.array_equal(dense(tmp_path).T, w.astype(np.float32) * s)
    x = (10 * rng.standard_normal((5, 64))).astype(np.float32)
    # fbgemm's own form of it: the row's largest magnitude, at most the bound, lands on 448; what is beyond is clipped.
    scale = np.minimum(np.abs(x).max(1, keepdims=True), 3) / np.float32(448)
    codes = np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    got = qfunc.quantize_activation(x, leaf)
    assert np.array_equal(got.codes, codes) and np.array_equal(got.scale, scale)
    want = (codes.astype(np.float64) * scale) @ (w.astype(np.float64) * s).T
    near(qfunc.matmul(x, leaf), want)
    near(qfunc.matmul(x, leaf), qfunc.matmul(np.clip(x, -3, 3), leaf))


@pytest.mark.parametrize(("outs", "ins"), [(8, 96), (12, 40), (6, 32), (128, 160)])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_blocks_that_cross_rows(tmp_path, outs, ins, nested):
    torch, functional = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes.functional")
    w = torch.from_numpy(generator().standard_normal((outs, ins)).astype(np.float32))
    packed, state = functional.quantize_4bit(w, blocksize=64, compress_statistics=nested, quant_type="nf4")
    tensors = {"weight": packed.numpy(), **{f"weight.{name}": value.numpy() for name, value in state.as_dict(packed=True).items()}}
    folder = checkpoint(tmp_path, under(tensors), {"quant_method": "bitsandbytes", "load_in_4bit": True})
    # On a CPU bitsandbytes 0.50 restarts its blocks at every row of such a matrix (far from what it quantized); as one row it is right.
    state.shape = torch.Size((1, outs * ins))
    assert np.array_equal(dense(folder).T, functional.dequantize_4bit(packed, state).numpy().reshape(outs, ins))
    assert np.abs(dense(folder).T - w.numpy()).mean() < .15


@pytest.mark.parametrize("version", ["gemv_fast", "gemv", "gemm"])
def test_awq_without_its_zero_points_or_words_is_refused(tmp_path, version):
    with pytest.raises(CheckpointError):
        qfunc.load(checkpoint(tmp_path, under({"qweight": np.zeros((4, 128), np.int16)}), {**AWQ, "version": version}))


@pytest.mark.parametrize("bits", [pytest.param(b, marks=[] if b in (3, 6) else pytest.mark.slow) for b in range(2, 9)])
@pytest.mark.parametrize("packing", ["auto_round", "auto_round:gptqmodel", "auto_round:auto_gptq"])
def test_auto_rounds_zero_points_and_widths(tmp_path, bits, packing):
    """auto-round's backends list which packing they read: those of `GPTQ_FORMAT_NO_ZP` take zero points as they are stored."""
    q, s, z, _, want = gptq(bits, group=64)
    config = {"quant_method": "auto-round", "bits": bits, "group_size": 64, "sym": False, "data_type": "int", "packing_format": packing}
    tensors = gptq_tensors(q, s, z - 1 if "auto_gptq" in packing else z, bits=bits)
    assert np.array_equal(dense(checkpoint(tmp_path, under(tensors), config)), want)


@pytest.mark.parametrize(("method", "more"), [("auto-round", {"packing_format": "auto_round:auto_awq"}),
                                              ("awq", {"provider": "auto-round"})])
@pytest.mark.parametrize("bits", [4, 5, 6, 7])
def test_awqs_order_in_other_widths(tmp_path, method, more, bits):
    rng, groups = generator(bits), K // 64
    q, z = rng.integers(0, 2**bits, (K, N)).astype(np.uint8), rng.integers(0, 2**bits, (groups, N)).astype(np.uint8)
    s = rng.uniform(.01, .02, (groups, N)).astype(np.float16)

    def packed(codes):              # slot i of eight outputs holds the one at (0, 2, 4, 6, 1, 3, 5, 7)[i]
        slots = codes.reshape(len(codes), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(codes.shape)
        return np.ascontiguousarray(words(slots.T, bits).T)
    config = {"quant_method": method, "bits": bits, "group_size": 64, "sym": False, **more}
    folder = checkpoint(tmp_path, under({"qweight": packed(q), "qzeros": packed(z), "scales": s}), config)
    assert np.array_equal(dense(folder), np.repeat(s.astype(np.float32), 64, 0) * (q.astype(np.float32) - np.repeat(z, 64, 0)))


def test_gptq_of_six_bits_only_from_auto_round(tmp_path):
    q, s, _, _, want = gptq(6, zero=32)
    tensors, config = under(gptq_tensors(q, s, np.full((2, N), 31), bits=6)), {"quant_method": "gptq", "bits": 6, "group_size": 128}
    assert np.array_equal(dense(checkpoint(tmp_path, tensors, {**config, "provider": "auto-round"})), want)
    for wrong in (config, {**GPTQ, "dynamic": {r".*up_proj": {"bits": 6}}}):
        with pytest.raises(CheckpointError, match="bits: expected 2, 3, 4 or 8"):
            qfunc.load(checkpoint(tmp_path, tensors, wrong))


def quark_words(codes, ordered):
    """Codes 0 to 15 [rows, n] as Quark's int32, one element at a time."""
    out = np.zeros((len(codes), codes.shape[1] // 8), np.uint32)
    for i in range(8):
        out |= codes[:, (i if ordered else (0, 2, 4, 6, 1, 3, 5, 7)[i])::8].astype(np.uint32) << np.uint32(4 * i)
    return out.view(np.int32)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("dtype", "scheme"), [("int4", "per_group"), ("uint4", "per_group"), ("int8", "per_group"),
                                               ("int4", "per_channel"), ("uint4", "per_channel")])
def test_quarks_integers(tmp_path, dtype, scheme, ordered):
    rng, grouped, bits = generator(), scheme == "per_group", int(dtype[-1])
    outs, ins, groups = 40, 96, 3 if grouped else 1
    low = -(2 ** (bits - 1)) if dtype[0] == "i" else 0
    q, s = rng.integers(low, low + 2**bits, (outs, ins)), rng.uniform(.01, .02, (outs, groups)).astype(np.float32)
    z = np.zeros((outs, groups), int) if low else rng.integers(0, 16, (outs, groups))

    def packed(codes):
        codes = codes.T if grouped else codes
        return np.ascontiguousarray(codes).astype(np.int8) if bits == 8 else quark_words(codes & 15, ordered)
    tensors = {"weight": packed(q), "weight_scale": np.ascontiguousarray(s.T) if grouped else s[:, 0],
               "weight_zero_point": packed(z) if grouped else quark_words(z.T & 15, ordered)[0]}
    weight = {"dtype": dtype, "qscheme": scheme, "group_size": 32 if grouped else None, "symmetric": low < 0, "ch_axis": -1}
    config = {"quant_method": "quark", "global_quant_config": {"weight": weight, "input_tensors": None},
              "export": {"pack_method": "order" if ordered else "reorder"}}
    want = (q - np.repeat(z, ins // groups, 1)) * np.repeat(s, ins // groups, 1)
    assert np.array_equal(dense(checkpoint(tmp_path, under(tensors), config)).T, want.astype(np.float32))
    if low:
        tensors["weight_zero_point"] = np.full_like(tensors["weight_zero_point"], 3)
        with pytest.raises(CheckpointError, match="zero points 0"):
            qfunc.load(checkpoint(tmp_path, under(tensors), config))


@pytest.mark.parametrize("shape", [(2, 2), (2, 1, 2, 1)])
def test_modelopts_blocks_have_empty_axes_between(tmp_path, shape):
    rng = generator()
    w, s = rng.standard_normal((N, K)).astype(ml_dtypes.float8_e4m3fn), rng.uniform(.01, .02, (2, 2)).astype(np.float32)
    folder = checkpoint(tmp_path, under({"weight": w, "weight_scale": s.reshape(shape)}), {"quant_method": "modelopt",
                                                                                           "quant_algo": "fp8_pb_wo"})
    assert np.array_equal(dense(folder).T, w.astype(np.float32) * np.repeat(np.repeat(s, 128, 0), 128, 1))


def test_modelopts_weight_only_int8(tmp_path):
    w, s = generator().integers(-128, 128, (N, K)).astype(np.int8), np.linspace(.01, .02, N, dtype=np.float32)
    loaded = qfunc.load(checkpoint(tmp_path, under({"weight": w, "weight_scale": s}), {"quant_method": "modelopt", "quant_algo": "W8A16"}))
    assert loaded.weight(M).scheme.name == "w8a16" and np.array_equal(dense(tmp_path).T, w * s[:, None])


def test_missing_experts_are_told(tmp_path):
    config = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": CT["config_groups"]}
    tensors = {name: array for e in (0, 2) for name, array in under(INT8, f"model.layers.0.mlp.experts.{e}.up_proj").items()}
    loaded = qfunc.load(checkpoint(tmp_path, tensors, config))
    assert any("no expert 1" in note for note in loaded.notes) and len(loaded.schemes) == 2


def test_an_embedding_is_a_target_of_its_own(tmp_path):
    def group(bits, target):
        return {"targets": [target], "weights": {"num_bits": bits, "type": "int", "strategy": "channel"}}
    tensors = {**under(INT8), **under(INT8, "model.embed_tokens")}
    config = {**CT, "config_groups": {"a": group(8, "Linear"), "b": group(4, "Embedding")}}
    loaded = qfunc.load(checkpoint(tmp_path, tensors, config))
    assert loaded.weight("model.embed_tokens").scheme.name == "w4a16" and loaded.weight(M).scheme.name == "w8a16"
    for wrong in ({**config, "config_groups": {"a": group(8, "Linear")}}, {**config, "ignore": ["Embedding"]}):
        with pytest.raises(CheckpointError, match="embed_tokens.*ignored, or no group"):
            qfunc.load(checkpoint(tmp_path, tensors, wrong))


@pytest.mark.parametrize("name", ["self_attn.kv_scale", "self_attn.attn.kv_scale"])
def test_one_scale_of_the_cache_is_that_of_keys_and_values(tmp_path, name):
    tensors = {**under({"weight": np.ones((8, 16), ml_dtypes.float8_e4m3fn), "weight_scale": np.ones((), np.float32)}),
               f"model.layers.0.{name}": np.array(.25, np.float32)}
    loaded = qfunc.load(checkpoint(tmp_path, tensors, {"quant_method": "fp8", "activation_scheme": "dynamic"}))
    node = loaded.params["model"]["layers"]["0"]["self_attn"]
    assert loaded.kv_cache == "fp8_e4m3" and set(node) == {"k_scale", "v_scale"} and float(node["k_scale"]) == float(node["v_scale"]) == .25
    tensors[f"model.layers.0.{name.replace('kv_', 'v_')}"] = np.array(.5, np.float32)
    with pytest.raises(CheckpointError, match="v_scale: expected one leaf"):
        qfunc.load(checkpoint(tmp_path, tensors, {"quant_method": "fp8", "activation_scheme": "dynamic"}))


@pytest.mark.parametrize("container", [np.uint8, ml_dtypes.float8_e4m3fn])
def test_dual_scales_over_nibbles_and_over_bytes(tmp_path, container):
    rng, ins = generator(), 1024
    q = rng.integers(0, 16, (8, ins)).astype(np.uint8)
    weight = q[:, 0::2] | q[:, 1::2] << 4 if container is np.uint8 else E2M1[q].astype(container)
    e, outer = rng.integers(120, 130, (8, ins // 32)).astype(np.uint8), rng.uniform(.5, 2, (8, 2, 1)).astype(np.float32)
    tensors = {"weight": weight, "weight_scale": e, "weight_dual_scale": outer}
    want = E2M1[q] * np.repeat(np.exp2(e.astype(np.float32) - 127), 32, 1) * np.repeat(outer[..., 0], 512, 1)
    assert np.allclose(dense(slim(tmp_path / "a", tensors, "W4A4_MXFP4_DUALSCALE")).T, want, rtol=1e-6)
    if container is not np.uint8:
        tensors["weight"][3, 7] = 5
        with pytest.raises(CheckpointError, match="weight: expected e4m3 numbers that e2m1 has"):
            qfunc.load(slim(tmp_path / "b", tensors, "W4A4_MXFP4_DUALSCALE"))


@pytest.mark.parametrize("columns", [1, 16])
def test_compressed_tensors_for_ascend_hold_two_outputs_a_byte(tmp_path, columns):
    rng = generator()
    q, s = rng.integers(-8, 8, (N, K)).astype(np.int8), rng.uniform(.01, .02, (N, 1)).astype(np.float32)
    want = q * s
    tensors = {"weight": ((q[0::2] & 15) | (q[1::2] << 4)).astype(np.int8), "weight_scale": s, "weight_offset": np.zeros_like(s),
               "scale_bias": (8 * want.reshape(N, columns, -1).sum(-1)).astype(np.float32)}
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "channel"},
             "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}}
    config = {**CT, "config_groups": {"group_0": group}}
    module = "model.layers.0.mlp.experts.0.up_proj"
    folder = checkpoint(tmp_path, under(tensors, module), config)
    leaf = qfunc.load(folder).weight(module)
    assert np.array_equal(dense(folder, module).T, want) and leaf.scheme.name == "w4a8_dynamic"
    tensors["scale_bias"] = -tensors["scale_bias"]
    with pytest.raises(CheckpointError, match="scale_bias"):
        qfunc.load(checkpoint(tmp_path, under(tensors, module), config))


@pytest.mark.parametrize("form", ["sparse-24-bitmask", "sparse-bitmask"])
@pytest.mark.parametrize("kind", [np.int8, ml_dtypes.float8_e4m3fn])
def test_sparse_weights_of_compressed_tensors(tmp_path, form, kind):
    rng, outs, ins = generator(), 12, 44
    mask = np.zeros((outs, ins), bool)
    for row in mask.reshape(outs, -1, 4) if form == "sparse-24-bitmask" else ():
        for four in row:
            four[rng.permutation(4)[:2]] = True
    mask = mask if mask.any() else rng.random((outs, ins)) < .3
    dense_weight = np.where(mask, rng.integers(1, 100, (outs, ins)), 0).astype(kind)
    bits = np.zeros((outs, 6), np.uint8)
    for row, column in zip(*np.nonzero(mask), strict=True):
        bits[row, column // 8] |= 1 << column % 8
    values, counts = dense_weight[mask], mask.sum(1)
    tensors = {"shape": np.array([[outs], [ins]]), "bitmask": bits, "weight_scale": rng.uniform(.01, .02, (outs, 1)).astype(np.float32)}
    if form == "sparse-24-bitmask":
        tensors["compressed"] = values.reshape(outs, ins // 2)
    else:
        tensors |= {"compressed": values, "row_offsets": np.cumsum(counts) - counts, "shape": np.array([outs, ins])}
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int" if kind is np.int8 else "float", "strategy": "channel"}}
    config = {**CT, "format": "int-quantized" if kind is np.int8 else "float-quantized", "config_groups": {"g": group},
              "sparsity_config": {"format": form, "global_sparsity": .5, "sparsity_structure": "2:4", "targets": [], "ignore": []}}
    folder = checkpoint(tmp_path, under(tensors), config)
    assert np.array_equal(dense(folder).T, dense_weight.astype(np.float32) * tensors["weight_scale"])
    assert not qfunc.load(folder).notes and qfunc.interop.inspect(folder).nbytes == sum(t.nbytes for t in tensors.values())
    one = bits.copy()
    one[3, 0] ^= 1
    for name, wrong in (("bitmask", one), ("bitmask", bits[:, :5]), ("compressed", tensors["compressed"][:-1]),
                        ("shape", np.array([outs, -ins])), ("shape", np.array([outs, 2**40]))):
        with pytest.raises(CheckpointError):
            qfunc.load(checkpoint(tmp_path, under({**tensors, name: wrong}), config))
    with pytest.raises(CheckpointError, match="leaves in float|float layer"):
        qfunc.load(checkpoint(tmp_path, under(tensors), {**config, "ignore": ["re:.*"]}))


def test_an_order_or_zero_points_that_the_configuration_names_are_needed(tmp_path, rng):
    """Without them the weight would load in another order, or around another zero."""
    random = rng.integers(-2**31, 2**31, (K // 8, N)).astype(np.int32)
    scales = rng.uniform(.01, .02, (2, N)).astype(np.float16)
    packed = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
    gptq_layer = {"qweight": random, "scales": scales}
    ct_layer = {"weight_packed": random.T.copy(), "weight_scale": scales.T.copy(), "weight_shape": np.array([N, K])}
    awq_layer = {"qweight": random.reshape(K, N // 8), "scales": scales}

    def ct(actorder, size=128):
        group = {"targets": ["Linear"], "weights": {**packed, "group_size": size, "actorder": actorder}}
        return {**CT, "format": "pack-quantized", "config_groups": {"group_0": group}}
    wide = {**gptq_layer, "scales": scales[:1]}
    for layer, config, message in (
            (gptq_layer, {**GPTQ, "desc_act": True}, "g_idx: expected the group of each input, as desc_act is true, found none"),
            ({**gptq_layer, "g_idx": np.zeros(0, np.int32)}, {**GPTQ, "desc_act": True}, "g_idx: expected the group"),
            (gptq_layer, {**GPTQ, "dynamic": {"+:.*": {"desc_act": True}}}, "g_idx: expected the group"),
            (ct_layer, ct("group"), "weight_g_idx: expected the group of each input, as actorder says, found none"),
            (ct_layer, ct(True), "weight_g_idx: expected"), (awq_layer, AWQ, "qzeros: expected zero points, as zero_point is true"),
            (gptq_layer, {**GPTQ, "desc_act": False}, None), (wide, {**GPTQ, "group_size": -1, "desc_act": True}, None),
            (ct_layer, ct("weight"), None), (ct_layer, ct(None), None), (awq_layer, {**AWQ, "zero_point": False}, None)):
        folder = checkpoint(tmp_path, under(layer), config)
        if message is None:
            qfunc.load(folder)
        else:
            with pytest.raises(CheckpointError, match=message):
                qfunc.load(folder)

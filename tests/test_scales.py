"""Scale rules against the producers themselves: compressed-tensors, torchao, gguf and bitsandbytes."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import qfunc


def weight(rng, out=24, columns=192):
    w = rng.standard_normal((out, columns)) * np.exp(rng.uniform(-3, 3, (out, columns // 32))).repeat(32, -1)
    return w.astype(np.float32)


def ours(w, name, **changes):
    """The QTensor of w [out, in] by a scheme with other fields."""
    return qfunc.quantize({"kernel": jnp.asarray(w.T)}, qfunc.scheme(name).replace(**changes))["kernel"]


def codes_of(q):
    code, columns = q.scheme.weight.code, q.shape[-2]
    bits = oracle.bits_of(code)
    if bits == 8:
        return np.asarray(q.codes)
    codes = oracle.unpack(q.codes, bits, columns)
    return codes - 2 ** (bits - 1) if code.startswith("int") else codes


def compressed(w, size=None, block=None, **fields):
    """(codes as floats, scale, zero point) of compressed-tensors' own functions."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    strategy = fields.pop("strategy", "group" if size else "block" if block else "channel")
    args = QuantizationArgs(strategy=strategy, group_size=size, block_structure=list(block) if block else None, **fields)
    t = torch.from_numpy(w)
    if block:
        padded = torch.nn.functional.pad(t, (0, -w.shape[1] % block[1], 0, -w.shape[0] % block[0]))
        cells = padded.unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1]))
        lo, hi = cells.amin((1, 3)), cells.amax((1, 3))
    else:
        cells = t.unflatten(1, (-1, size or w.shape[1]))
        lo, hi = cells.amin(-1), cells.amax(-1)
    outer = generate_gparam(t.min(), t.max()) if strategy == "tensor_group" else None
    scale, zero = calculate_qparams(lo, hi, args, global_scale=outer)
    codes = quantize(t, scale, zero, args, global_scale=outer)
    return codes.float().numpy(), scale.float().numpy(), zero.float().numpy(), None if outer is None else float(outer)


@pytest.mark.parametrize(("name", "bits", "size"), [("w8a16", 8, None), ("w4a16_g32", 4, 32), ("w3a16_g32", 3, 32), ("w8a16_g32", 8, 32)])
def test_compressed_tensors_symmetric_integers(rng, name, bits, size):
    w = weight(rng)
    codes, scale, _, _ = compressed(w, size, num_bits=bits, type="int", symmetric=True)
    q = ours(w, name, weight_scale_rule="amax_half")
    np.testing.assert_array_equal(q.scale, scale)
    np.testing.assert_array_equal(codes_of(q), codes)


@pytest.mark.parametrize(("bits", "size"), [(4, 32), (8, None)])
def test_compressed_tensors_asymmetric_integers(rng, bits, size):
    w = weight(rng)
    codes, scale, zero, _ = compressed(w, size, num_bits=bits, type="int", symmetric=False)
    q = ours(w, f"w{bits}a16" + (f"_g{size}" if size else "") + "_asym")
    np.testing.assert_allclose(q.scale, scale, rtol=2e-7)
    moved = np.asarray(q.zero, np.float64) - (zero + 2 ** (bits - 1))
    # Either rounds a quotient below 2^b after a few roundings to float32: beside a half they may fall to different sides.
    lowest = np.minimum(w.reshape(*scale.shape, -1).min(-1), 0).astype(np.float64)
    clear = np.abs(lowest / scale % 1 - 0.5) > 2.0 ** (bits - 21)
    assert np.abs(moved).max() <= 1 and not moved[clear].any() and clear.mean() > 0.9
    same = np.repeat(moved == 0, w.shape[1] // moved.shape[1], -1)
    difference = (codes_of(q) - (codes + 2 ** (bits - 1)))[same]
    assert np.abs(difference).max() <= 1 and np.mean(difference == 0) > 0.999


@pytest.mark.parametrize("shape", [(256, 256), (200, 300)])
def test_compressed_tensors_fp8_blocks(rng, shape):
    w = rng.standard_normal(shape).astype(np.float32)
    _, scale, _, _ = compressed(w[:128], block=(128, 128), num_bits=8, type="float", symmetric=True) if shape[0] % 128 else (
        None, compressed(w, block=(128, 128), num_bits=8, type="float", symmetric=True)[1], None, None)
    np.testing.assert_array_equal(np.asarray(ours(w, "fp8_block").scale)[:len(scale)], scale)


def test_compressed_tensors_nvfp4(rng):
    import torch
    w = weight(rng)
    codes, scale, _, divisor = compressed(w, 16, num_bits=4, type="float", symmetric=True, strategy="tensor_group",
                                          scale_dtype=torch.float8_e4m3fn)
    q = ours(w, "nvfp4")
    np.testing.assert_allclose(1 / np.asarray(q.scale2).reshape(()), divisor, rtol=3e-7)
    mine = np.asarray(q.scale).astype(np.float32)
    same = mine == scale                        # they multiply by a reciprocal, so that a tie of e4m3 may fall either way
    assert same.mean() > 0.995
    got = oracle.values(codes_of(q), "fp4_e2m1")
    assert np.mean((got == codes)[np.repeat(same, 16, -1)]) > 0.9995


@pytest.mark.parametrize(("mode", "rule"), [("FLOOR", "mx_floor"), ("RCEIL", "mx_rceil"), ("CEIL", "mx_ceil"), ("EVEN", "mx_even")])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_torchao_microscaling(rng, name, mode, rule):
    import torch
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx
    w = weight(rng, 64)
    w[:, 0] = np.float32([6, 7, 4, 3.5, 448, 480, 464, 1.75] * 8) * 2.0 ** rng.integers(-9, 9, 64)
    element = torch.float4_e2m1fn_x2 if name == "mxfp4" else torch.float8_e4m3fn
    scale, data = to_mx(torch.from_numpy(w), element, 32, ScaleCalculationMode[mode])[:2]
    q = ours(w, name, weight_scale_rule=rule)
    np.testing.assert_array_equal(np.asarray(q.scale), scale.view(torch.uint8).numpy().reshape(q.scale.shape))
    data = data.view(torch.uint8).numpy()
    theirs = np.stack([data & 15, data >> 4], -1).reshape(w.shape) if name == "mxfp4" else data.reshape(w.shape)
    mine = codes_of(q) if name == "mxfp4" else codes_of(q).view(np.uint8)
    np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_microscaling_rounds_to_one_mantissa_bit(rng, bits):
    import torch
    from compressed_tensors.quantization.utils import generate_mx_scales
    w = weight(rng, 64)
    amax = np.abs(w).reshape(64, -1, 32).max(-1)
    exponents = generate_mx_scales(torch.from_numpy(amax), num_bits=bits).numpy()
    q = ours(w, "mxfp4" if bits == 4 else "mxfp8", weight_scale_rule="mx_even1")
    theirs = exponents.astype(np.int64) if exponents.max() > 1 and np.all(exponents == np.round(exponents)) else np.log2(exponents) + 127
    np.testing.assert_array_equal(np.asarray(q.scale), theirs)


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4), ("Q5_0", 5)])
def test_ggml_uses_the_full_range(rng, kind, bits):
    import gguf
    w = weight(rng)
    cells = w.reshape(len(w), -1, 32)           # of two equal extremes ggml takes the first, we the positive one: let there be none
    equal = cells.max(-1) == -cells.min(-1)
    cells[equal] = np.abs(cells[equal])
    blocks = gguf.quants.quantize(w, gguf.GGMLQuantizationType[kind]).reshape(w.shape[0], -1, 18 if bits == 4 else 22)
    scale = blocks[..., :2].copy().view(np.float16)[..., 0]
    q = ours(w, f"w{bits}a16_g32", weight_scale_rule="full_range", weight_scale_dtype="float16")
    np.testing.assert_array_equal(np.asarray(q.scale), scale)
    back = gguf.quants.dequantize(blocks.reshape(w.shape[0], -1), gguf.GGMLQuantizationType[kind])
    mine = np.asarray(q.dequantize()).T
    assert np.abs(mine - back).max() <= 1.01 * np.abs(scale.astype(np.float32)).max() and np.mean(np.isclose(mine, back)) > 0.98


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_blocks_and_nested_scales(rng, kind):
    import torch
    from bitsandbytes import functional
    w = weight(rng, 96, 256)                    # rows of whole blocks: their flat blocks are our groups, under two outer ones
    name = "nf4" if kind == "nf4" else "fp4_bnb"
    packed, state = functional.quantize_4bit(torch.from_numpy(w), blocksize=64, quant_type=kind)
    q = ours(w, name)
    np.testing.assert_array_equal(np.asarray(q.scale).reshape(-1), state.absmax.numpy())
    back = functional.dequantize_4bit(packed, state).numpy()
    assert np.mean(np.asarray(q.dequantize()).T == back) > 0.999
    packed, state = functional.quantize_4bit(torch.from_numpy(w), blocksize=64, quant_type=kind, compress_statistics=True)
    q = ours(w, name + "_dq")
    np.testing.assert_allclose(np.asarray(q.scale_offset).reshape(()), float(state.offset), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(q.scale2).reshape(-1), state.state2.absmax.numpy(), rtol=1e-6)
    mapped = state.state2.code.numpy()
    from qfunc import _codec
    np.testing.assert_array_equal(_codec.dynamic_map(), mapped)
    assert np.mean(np.asarray(q.scale).reshape(-1) == state.absmax.numpy()) > 0.97, "neighbouring codes may win a tie"
    theirs = functional.dequantize_4bit(packed, state).numpy()
    mine = np.asarray(q.dequantize()).T
    assert np.linalg.norm(mine - theirs) <= 0.01 * np.linalg.norm(theirs)
    np.testing.assert_array_equal(codes_of(q), codes_of(ours(w, name)), err_msg="codes know nothing of the compression of their scales")

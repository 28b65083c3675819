"""What lies on the device against the checkpoint's own tensors, re-laid as the engines' loaders do it, written down here a second time."""

import json

import npu_cpu
import numpy as np
import pytest
from checkpoints import DATA

import qfunc

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def calls():
    return npu_cpu.install()


def _raw(name):
    """The checkpoint's tensors by name."""
    from safetensors.torch import load_file
    return {key: tensor for path in sorted((DATA / name).glob("*.safetensors")) for key, tensor in load_file(path).items()}


def _placed(name, soc="A2", **named):
    from qfunc.interop import cann
    return cann.place(qfunc.load(DATA / name).params, "cpu", soc, **named)


def _at(tree, module: str):
    for part in module.split("."):
        tree = tree[part]
    return tree["kernel"]


def _modules(raw, leaf: str) -> list[str]:
    return [key.removesuffix("." + leaf) for key in raw if key.endswith("." + leaf) and "lm_head" not in key]


def _types(name) -> dict:
    found = json.loads((DATA / name / "quant_model_description.json").read_text())
    return {key.removesuffix(".weight"): kind for key, kind in found.items() if key.endswith(".weight")}


def _words(nibbles: np.ndarray) -> np.ndarray:
    """Nibbles [.., 8 n] as int32 words, the first lowest."""
    digits = nibbles.astype(np.uint32).reshape(*nibbles.shape[:-1], -1, 8)
    return np.bitwise_or.reduce(digits << np.arange(0, 32, 4, dtype=np.uint32), -1).view(np.int32)


def _nibbles(words: np.ndarray, order=range(8)) -> np.ndarray:
    return np.stack([(words.view(np.uint32) >> np.uint32(4 * i)) & 15 for i in order], -1).reshape(*words.shape[:-1], -1)


def test_awq_words_are_reordered_and_their_top_bits_flipped():
    raw, placed = _raw("autoawq-gemm-4bit-g128"), _placed("autoawq-gemm-4bit-g128")
    for module in _modules(raw, "qweight"):
        w = _at(placed, module)
        # Column j of eight lies at nibble (0, 4, 1, 5, 2, 6, 3, 7)[j]; 0x8 off every nibble makes 0..15 two's complement.
        order = (0, 4, 1, 5, 2, 6, 3, 7)
        expected = _words(_nibbles(raw[f"{module}.qweight"].numpy(), order)) ^ np.int32(-2004318072)
        np.testing.assert_array_equal(w.operands["weight"].numpy(), expected)
        offset = 8 - _nibbles(raw[f"{module}.qzeros"].numpy(), order).astype(np.float32)
        np.testing.assert_array_equal(w.operands["offset"].to(torch.float32).numpy().reshape(offset.shape), offset)
        scales = raw[f"{module}.scales"].to(w.dtype)
        assert torch.equal(w.operands["scale"].reshape(scales.shape), scales)


@pytest.mark.parametrize("name, bits, one", [("gptqmodel-4bit-g32-asym", 4, 1), ("gptqmodel-4bit-g64-v2", 4, 0),
                                             ("gptqmodel-8bit-g128", 8, 1), ("gptqmodel-4bit-g128-sym", 4, 1)])
def test_gptq_offsets_are_added_with_the_right_sign(name, bits, one):
    raw, placed = _raw(name), _placed(name)
    config = json.loads((DATA / name / "config.json").read_text())["quantization_config"]
    half, count = 2 ** (bits - 1), 32 // bits
    for module in _modules(raw, "qweight"):
        w, words = _at(placed, module), raw[f"{module}.qweight"].numpy().view(np.uint32)
        digits = [(words >> np.uint32(bits * i)) & np.uint32(2**bits - 1) for i in range(count)]
        codes = np.stack(digits, 1).reshape(-1, words.shape[1]).astype(np.int32) - half
        stored = w.operands["weight"].numpy()
        np.testing.assert_array_equal(stored, codes.astype(np.int8) if bits == 8 else _words((codes & 15).astype(np.uint8)))
        if config["sym"]:
            assert "offset" not in w.operands
            continue
        zeros = raw[f"{module}.qzeros"].numpy().view(np.uint32)
        zeros = np.stack([(zeros >> np.uint32(bits * i)) & np.uint32(2**bits - 1) for i in range(count)], -1).reshape(len(zeros), -1)
        # The operator adds: (u - half) + (half - z) = u - z, z one more than stored in version 1.
        offset = (half - (zeros.astype(np.float32) + one))
        np.testing.assert_array_equal(w.operands["offset"].to(torch.float32).numpy().reshape(offset.shape), offset)


def test_modelslim_static_int8():
    raw, placed = _raw("modelslim-w8a8"), _placed("modelslim-w8a8")
    modules = [m for m, kind in _types("modelslim-w8a8").items() if kind == "W8A8"]
    assert modules
    for module in modules:
        w = _at(placed, module)
        assert w.kind == "w8a8_static"
        assert torch.equal(w.operands["weight"], raw[f"{module}.weight"].t())
        deq = raw[f"{module}.deq_scale"]
        deq = deq.to(torch.int32).view(torch.float32) if deq.dtype == torch.int64 else deq
        torch.testing.assert_close(w.operands["deq_scale"], deq.reshape(-1), rtol=3e-7, atol=0)
        # The file's quant_bias holds a float bias, too: what is left of it is the bias.
        rest = (raw[f"{module}.quant_bias"] - w.operands["quant_bias"]).to(torch.float32) * deq.reshape(-1)
        bias = raw.get(f"{module}.bias", torch.zeros(len(rest)))
        torch.testing.assert_close(rest, bias.to(torch.float32), rtol=0, atol=float(deq.max()))


def test_modelslim_two_rows_in_a_byte_are_eight_columns_in_a_word():
    name = "modelslim-w4a8-dynamic-moe"
    raw, placed = _raw(name), _placed(name)
    modules = [m for m, kind in _types(name).items() if kind == "W4A8_DYNAMIC"]
    assert modules
    seen = 0
    for module in modules:
        w = _at(placed, module)
        assert w.kind == "w4a8"
        if raw[f"{module}.weight"].shape[0] * 2 != raw[f"{module}.weight_scale"].shape[0]:
            continue
        words = raw[f"{module}.weight"].t().contiguous().view(torch.int32)
        assert torch.equal(w.operands["weight"], words)
        if f"{module}.scale_bias" in raw:
            bias = raw[f"{module}.scale_bias"]
            torch.testing.assert_close(w.operands["correction"], bias.sum(-1), rtol=2e-3, atol=float(bias.abs().max()) * 2e-3)
            seen += 1
    assert seen


def test_modelslim_int4_per_byte():
    name = "modelslim-w4a4-dynamic"
    raw, placed = _raw(name), _placed(name)
    for module, kind in _types(name).items():
        if kind == "W4A4_DYNAMIC":
            w, codes = _at(placed, module), raw[f"{module}.weight"].numpy()
            if codes.shape[0] == raw[f"{module}.weight_scale"].shape[0]:
                np.testing.assert_array_equal(w.operands["weight"].t().numpy(), _words((codes & 15).astype(np.uint8)))
            assert w.operands["weight"].stride() == (1, codes.shape[1] // 8)            # a view of [N, K / 8]


@pytest.mark.parametrize("name, kind", [("modelslim-w8a8-mxfp8", "W8A8_MXFP8"), ("modelslim-w4a4-mxfp4", "W4A4_MXFP4")])
def test_modelslim_microscaled_weights_and_scales_are_views(name, kind):
    raw, placed = _raw(name), _placed(name, "A5")
    modules = [m for m, found in _types(name).items() if found == kind]
    assert modules
    for module in modules:
        w, own, scale = _at(placed, module), raw[f"{module}.weight"], raw[f"{module}.weight_scale"]
        assert torch.equal(w.operands["weight"].t().view(torch.uint8), own.view(torch.uint8)) and w.operands["weight"].stride(0) == 1
        pairs = scale.reshape(scale.shape[0], -1, 2).transpose(0, 1)
        assert torch.equal(w.operands["scale"], pairs) and w.operands["scale"].stride() == pairs.stride()

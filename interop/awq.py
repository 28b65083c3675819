"""AWQ checkpoints (AutoAWQ, GPTQModel's `awq`, auto-round's `auto_awq`): unsigned 4-bit groups with zero points.

`gemm`: `qweight` int32 [K, N / 8], `qzeros` int32 [K / g, N / 8], `scales` [K / g, N]; nibble i of word c belongs to the output
8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i]. `gemv`: `qweight` int32 [N, K / 8], `qzeros` int32 [N, w], `scales` [N, 8 w], nibbles in order, the
last axis of both padded. W[o, k] = scales (q - z). Smoothing is folded into the weights already. `gemv_fast`: `qweight` int16 [N / 4, K],
four outputs by 64 inputs interleaved; `scales` and `scaled_zeros` = -(scales z) float16 [G', N], G' padded.
Source: AutoAWQ, `awq/modules/linear/gemm.py`, `gemv.py`, `gemv_fast.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qfunc._spec import CHANNEL, WeightSpec, group

from ._family import Family, Source
from ._naming import named
from ._plan import KINDS, SCALES, Layer, Parts, value
from ._repack import AWQ_ORDER, awq_columns, by_rows, nibble_rows, stream


@dataclass(frozen=True)
class Settings:
    group: int | None
    version: str
    bits: int
    zeros: bool = False


def settings(source: Source) -> Settings:
    quant = source.quant
    bits = quant.integer("bits", "w_bit", low=1, high=8)
    if bits != 4 and not (quant.get("provider") == "auto-round" and bits in (5, 6, 7)):
        raise quant.fail("bits", "4 (auto-round: 5, 6 and 7, too)")
    zeros = quant.boolean("zero_point")
    version = quant.choice("version", VERSIONS, quant.choice("checkpoint_format", VERSIONS, "gemm"))
    if bits != 4 and version != "gemm":
        raise quant.fail("version", f"gemm for {bits} bits", version)
    return Settings(quant.group_size("group_size", "q_group_size", default=128), version, bits, zeros)


def layer(config: Settings, parts: Parts) -> Layer | None:
    if "qweight" not in parts:
        return None
    if config.zeros and config.version == "gemm" and "qzeros" not in parts:
        raise parts.fail("qzeros", "zero points, as zero_point is true", "none")
    return gemm_layer(config.group, parts, config.bits) if config.version == "gemm" else VERSIONS[config.version](config.group, parts)


def gemm_layer(size: int | None, parts: Parts, bits: int = 4) -> Layer:
    """The layer of AWQ's GEMM tensors with groups of `size` (None: whole rows).

    Of 5, 6 and 7 bits, which auto-round writes: a bit stream along the outputs, eight of them at a time in the same order.
    """
    weight = parts.take("qweight", "I32", ndim=2)
    if weight.shape[1] % bits and bits != 4:
        raise parts.fail("qweight", f"a multiple of {bits} words", weight.shape[1])
    ins, outs = weight.shape[0], weight.shape[1] * 32 // bits
    size = min(size or ins, ins)
    groups = -(-ins // size)
    scales = parts.take("scales", SCALES, (groups, outs))
    zeros = parts.take("qzeros", "I32", (groups, weight.shape[1])) if "qzeros" in parts else None
    scheme = named(WeightSpec(f"uint{bits}" if zeros else f"int{bits}", CHANNEL if groups == 1 else group(size), "int" if zeros else None,
                              KINDS[scales.dtype], scale_rule="minmax" if zeros else "amax"))
    extras = parts.bias(outs)
    parts.done()

    def build() -> dict[str, np.ndarray]:
        words, fill = weight.read().view(np.uint32), 0 if zeros else 2 ** (bits - 1)
        if bits == 4:
            codes = awq_columns(words, fill)
        else:
            codes = by_rows(in_order(words, bits, outs).T, np.ascontiguousarray, bits, ins, fill)
        leaves = {"codes": codes, "scale": np.ascontiguousarray(value(parts, "scales", scales).T)}
        if zeros:
            leaves["zero"] = np.ascontiguousarray(in_order(zeros.read().view(np.uint32), bits, outs).T)
        return leaves
    return Layer(parts.module, scheme, (ins, outs), build, extras, parts.all)


def in_order(words: np.ndarray, bits: int, outs: int) -> np.ndarray:
    """Codes uint8 [rows, N] of words uint32 [rows, N b / 32]."""
    slots = stream(words, bits, outs).reshape(len(words), -1, 8)
    return slots[:, :, np.argsort(AWQ_ORDER)].reshape(len(words), outs)


def gemv_layer(size: int | None, parts: Parts) -> Layer:
    """The layer of AWQ's GEMV tensors."""
    weight = parts.take("qweight", "I32", ndim=2)
    outs, ins = weight.shape[0], weight.shape[1] * 8
    size = min(size or ins, ins)
    groups = -(-ins // size)
    zeros = parts.take("qzeros", "I32", ndim=2)
    wide = zeros.shape[1]
    if zeros.shape[0] != outs or not groups <= 8 * wide:
        raise parts.fail("qzeros", f"shape [{outs}, {-(-groups // 8)}] or wider", list(zeros.shape))
    scales = parts.take("scales", SCALES, (outs, 8 * wide))
    scheme = named(WeightSpec("uint4", CHANNEL if groups == 1 else group(size), "int", KINDS[scales.dtype], scale_rule="minmax"))
    extras = parts.bias(outs)
    parts.done()

    def build() -> dict[str, np.ndarray]:
        return {"codes": nibble_rows(weight.read().view(np.uint8), ins),
                "scale": np.ascontiguousarray(value(parts, "scales", scales)[:, :groups]),
                "zero": np.ascontiguousarray(stream(zeros.read().view(np.uint32), 4, groups))}
    return Layer(parts.module, scheme, (ins, outs), build, extras, parts.all)


def fast_codes(words: np.ndarray) -> np.ndarray:
    """Codes uint8 [4 n, K] of gemv_fast's words uint16 [n, K]: nibbles of 4 outputs x 64 inputs in order, inputs shuffled by 32."""
    rows, ins = words.shape
    nibbles = (words[..., None] >> np.arange(0, 16, 4, dtype=np.uint16)).astype(np.uint8) & 15
    plain = nibbles.reshape(rows, ins // 64, 4, 64).transpose(0, 2, 1, 3)
    # Within 32 inputs the tool puts pairs (0, 1), (8, 9), ... side by side, then in each eight the even places before the odd ones.
    pairs = plain.reshape(-1, 4, 2, 4).transpose(0, 1, 3, 2).reshape(-1, 4, 4, 2)
    return pairs.transpose(0, 2, 1, 3).reshape(4 * rows, ins)


def fast_layer(size: int | None, parts: Parts) -> Layer:
    """The layer of AWQ's fast GEMV tensors."""
    weight = parts.take("qweight", "I16", ndim=2)
    outs, ins = weight.shape[0] * 4, weight.shape[1]
    if ins % 64:
        raise parts.fail("qweight", "a number of inputs that 64 divides", ins)
    size = min(size or ins, ins)
    groups = -(-ins // size)
    scales = parts.take("scales", SCALES, ndim=2)
    if scales.shape[0] < groups or scales.shape[1] != outs:
        raise parts.fail("scales", f"shape [{groups}, {outs}] or taller", list(scales.shape))
    zeros = parts.take("scaled_zeros", scales.dtype, scales.shape)
    scheme = named(WeightSpec("uint4", CHANNEL if groups == 1 else group(size), "int", KINDS[scales.dtype], scale_rule="minmax"))
    extras = parts.bias(outs)
    parts.done()

    def zero_points(scale: np.ndarray) -> np.ndarray:
        products = value(parts, "scaled_zeros", zeros)[:groups].T
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.rint(-products.astype(np.float32) / scale.astype(np.float32))
        found = np.where(np.isfinite(found), found, 0)
        again = -(scale.astype(np.float32) * found).astype(scale.dtype)
        if not ((found >= 0) & (found <= 15)).all() or (again != products).any():
            raise parts.fail("scaled_zeros", "products of the scales and zero points from 0 to 15", "others")
        return found.astype(np.uint8)

    def build() -> dict[str, np.ndarray]:
        scale = np.ascontiguousarray(value(parts, "scales", scales)[:groups].T)
        return {"codes": by_rows(weight.read().view(np.uint16), fast_codes, 4, ins, 0, each=4), "scale": scale,
                "zero": zero_points(scale)}
    return Layer(parts.module, scheme, (ins, outs), build, extras, parts.all)


VERSIONS = {"gemm": gemm_layer, "gemv": gemv_layer, "gemv_fast": fast_layer}
FIELDS = {
    "quant_method": "read", "bits": "read: 4, from auto-round 5 to 7, too", "w_bit": "read where bits is absent", "group_size": "read",
    "q_group_size": "read where group_size is absent", "zero_point": "read: true needs qzeros",
    "version": "read: gemm, gemv or gemv_fast",
    "checkpoint_format": "read where version is absent", "format": "repeats checkpoint_format", "method": "repeats quant_method",
    "modules_to_not_convert": "not needed: the tensors tell", "backend": "a choice of kernels", "do_fuse": "a choice of kernels",
    "fuse_max_seq_len": "a choice of kernels", "exllama_config": "a choice of kernels", "modules_to_fuse": "a choice of kernels",
    "meta": "how it was calibrated", "desc_act": "always false", "lm_head": "not needed: the tensors tell", "pack_dtype": "int32",
    "sym": "the zero points tell", "data_type": "repeats the method", "provider": "read: auto-round", "autoround_version": "who wrote it",
    "enable_quanted_input": "how it was calibrated", "to_quant_block_names": "not needed: the tensors tell",
    "iters": "how it was calibrated",
    "dynamic": "not needed: AWQ has one width",
}
FAMILY = Family("awq", settings, layer, frozenset({"qweight", "qzeros", "scaled_zeros"}), fields=FIELDS)

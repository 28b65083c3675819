"""GPTQ checkpoints (AutoGPTQ, GPTQModel, auto-round's `auto_gptq`): integer groups, packed into int32 words along the inputs.

Tensors of a layer with K inputs, N outputs, b bits and groups of g: `qweight` int32 [K b / 32, N], element j of a column in bits
b j .. b j + b - 1 of its words, least significant first; `qzeros` int32 [K / g, N b / 32], likewise along N; `scales` [K / g, N];
`g_idx` int32 [K], the group of each input. W[o, k] = scales[g_idx[k], o] (q - z), z being the stored zero (v2) or one more (v1).

The label v1 or v2 of symmetric checkpoints is often wrong, so their zeros are not read at all: z = 2^(b-1).
Source: GPTQModel, `gptqmodel/nn_modules/qlinear`; AutoGPTQ, `auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from qfunc._spec import CHANNEL, WeightSpec, group

from ._family import REQUIRED, Config, Family, Source
from ._naming import named
from ._plan import KINDS, SCALES, Layer, Parts, fill_of, value
from ._repack import stream, word_columns
from ._streams import column_stream

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Settings:
    """What a layer needs to know; `overrides` are GPTQModel's `dynamic` rules; `ordered`: the inputs' groups are no runs of them."""

    bits: int
    group: int | None
    symmetric: bool
    v2: bool
    config: Config
    overrides: dict
    ordered: bool = False

    def of(self, module: str) -> Settings | None:
        """The settings of one module, None where it is to stay in float."""
        rule = self.config.find(self.overrides, module, "signed")
        if rule is None:
            return self
        if rule.startswith("-"):
            return None
        override = Config(self.overrides[rule], self.config.where, f"dynamic[{rule!r}].")
        return replace(self, bits=width(override, self.bits, self.config.get("provider")),
                       group=override.group_size("group_size", default=self.group), symmetric=override.boolean("sym", self.symmetric),
                       ordered=override.boolean("desc_act", self.ordered))


def width(config: Config, default, provider) -> int:
    """The field `bits`."""
    bits = config.integer("bits", low=2, high=8, default=default)
    if bits not in BITS and provider != "auto-round":
        raise config.fail("bits", "2, 3, 4 or 8 (GPTQModel has other widths in a planar layout of its own, auto-round in the usual one)")
    return bits


def settings(source: Source) -> Settings:
    quant = source.quant
    quant.choice("pack_dtype", ("int32",), "int32")
    form = quant.choice("checkpoint_format", ("gptq", "gptq_v2", ""), quant.choice("format", ("gptq", "gptq_v2", ""), "gptq"))
    return Settings(width(quant, REQUIRED, quant.get("provider")), quant.group_size("group_size"), quant.boolean("sym", True),
                    form == "gptq_v2", quant, quant.sections("dynamic"), quant.boolean("desc_act"))


def layer(config: Settings, parts: Parts) -> Layer | None:
    if "qweight" not in parts:
        return None
    mine = config.of(parts.module)
    if mine is None:
        raise parts.fail("qweight", "a float layer, as the rule in `dynamic` says", "a quantized one")
    return packed_layer(mine, parts)


def packed_layer(config: Settings, parts: Parts) -> Layer:
    """The layer of GPTQ tensors under given bits, group size and zeros."""
    bits = config.bits
    weight = parts.take("qweight", "I32", ndim=2)
    outs = weight.shape[1]
    if weight.shape[0] * 32 % bits:
        raise parts.fail("qweight", f"rows that hold whole inputs of {bits} bits", list(weight.shape))
    ins = weight.shape[0] * 32 // bits
    size = min(config.group or ins, ins)
    groups = -(-ins // size)
    scales = parts.take("scales", SCALES, (groups, outs))
    zeros = parts.take("qzeros", "I32", (groups, -(-outs * bits // 32))) if "qzeros" in parts else None
    if zeros is None and not config.symmetric:
        raise parts.fail("qzeros", "zero points of an asymmetric layer", "none")
    order = _order(parts, ins, size, groups, config.ordered)
    grain = CHANNEL if groups == 1 else group(size)
    scheme = named(WeightSpec(f"int{bits}" if config.symmetric else f"uint{bits}", grain, None if config.symmetric else "int",
                              KINDS[scales.dtype], scale_rule="amax_half" if config.symmetric else "minmax", actorder=order is not None))
    extras = parts.bias(outs)
    parts.done()

    def build() -> dict[str, np.ndarray]:
        leaves = {"codes": _codes(weight.read().view(np.uint32), bits, ins, order, scheme.weight.code),
                  "scale": np.ascontiguousarray(value(parts, "scales", scales).T)}
        if not config.symmetric:
            z = stream(zeros.read().view(np.uint32), bits, outs).astype(np.int32) + (not config.v2)
            if z.max() > 255:
                raise parts.fail("qzeros", "zero points up to 255", f"{z.max()}")
            leaves["zero"] = np.ascontiguousarray(z.T.astype(np.uint8))
        if order is not None:
            leaves["perm"] = order
        return leaves
    return Layer(parts.module, scheme, (ins, outs), build, extras, parts.all)


def _codes(words: np.ndarray, bits: int, ins: int, order, code: str) -> np.ndarray:
    if order is None and bits == 4:
        return word_columns(words, ins, fill_of(code))
    codes = column_stream(words, bits, ins, order, fill_of(code))
    return np.bitwise_xor(codes, np.uint8(128), out=codes).view(np.int8) if code == "int8" else codes


def _order(parts: Parts, ins: int, size: int, groups: int, needed: bool) -> np.ndarray | None:
    """The order of the inputs that makes the groups consecutive, None where they are already."""
    index = parts.take("g_idx", "I32", [(ins,), (0,)]).read() if "g_idx" in parts else np.zeros(0, np.int32)
    if not index.size:
        if needed and groups > 1:
            raise parts.fail("g_idx", "the group of each input, as desc_act is true", "none")
        return None
    if index.min() < 0 or index.max() >= groups:
        raise parts.fail("g_idx", f"groups from 0 to {groups - 1}", f"{index.min()} to {index.max()}")
    if (np.diff(index) >= 0).all() and np.array_equal(index, np.arange(ins) // size):
        return None
    order = np.argsort(index, kind="stable").astype(np.int32)
    if not np.array_equal(index[order], np.arange(ins) // size):
        raise parts.fail("g_idx", f"groups of {size} inputs each", "groups of other sizes")
    return order


FIELDS = {
    "bits": "read", "group_size": "read", "sym": "read", "checkpoint_format": "read: v1 or v2 zero points of asymmetric layers",
    "format": "read where checkpoint_format is absent", "dynamic": "read: overrides and skips by module", "pack_dtype": "read: int32 only",
    "desc_act": "read: true needs the order, which is in g_idx", "quant_method": "read", "method": "repeats quant_method",
    "lm_head": "not needed: the tensors tell", "true_sequential": "how it was calibrated", "damp_percent": "how it was calibrated",
    "static_groups": "how it was calibrated", "meta": "how it was calibrated", "model_file_base_name": "not needed",
    "model_name_or_path": "not needed", "quantizer": "who wrote it", "modules_in_block_to_quantize": "not needed: the tensors tell",
    "block_name_to_quantize": "not needed: the tensors tell", "dataset": "how it was calibrated", "tokenizer": "how it was calibrated",
    "backend": "a choice of kernels", "exllama_config": "a choice of kernels", "use_exllama": "a choice of kernels",
    "disable_exllama": "a choice of kernels", "max_input_length": "a choice of kernels", "cache_block_outputs": "how it was calibrated",
    "batch_size": "how it was calibrated", "pad_token_id": "how it was calibrated", "model_seqlen": "how it was calibrated",
    "module_name_preceding_first_block": "how it was calibrated", "is_marlin_format": "read: see marlin",
    "use_cuda_fp16": "a choice of kernels",
    # auto-round's exports carry its own names, too
    "data_type": "repeats the method", "provider": "read: auto-round writes 5, 6 and 7 bits, too", "autoround_version": "who wrote it",
    "iters": "how it was calibrated",
    "enable_quanted_input": "how it was calibrated", "adapter": "not needed", "offload_to_disk": "how it was calibrated",
}
FAMILY = Family("gptq", settings, layer, frozenset({"qweight", "qzeros"}), fields=FIELDS)


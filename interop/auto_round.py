"""auto-round checkpoints (`quant_method: auto-round` or `intel/auto-round`): one of several packings, per-layer overrides.

`packing_format` `auto_round:auto_gptq`: GPTQ's tensors, zero points stored less one, without `g_idx`; plain `auto_round` and
`auto_round:gptqmodel`: zero points as they are; also of 5, 6 and 7 bits, as a dense stream. `auto_round:auto_awq`: AWQ's;
`auto_round:llm_compressor`, `auto_round:fp8`, `auto_round:fp8_static`: compressed-tensors' names, the tensors tell which format.
`extra_config`: bits, group_size, sym by exact name, then by regular expression; 16 bits and more mean float.
Source: auto-round 0.16, `auto_round/export/export_to_autoround`, `inference/backend.py` (`GPTQ_FORMAT`, `GPTQ_FORMAT_NO_ZP`),
`auto_round_extension/torch/qlinear_torch.py` and `qlinear_torch_zp.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from qfunc._spec import TENSOR, TOKEN, ActivationSpec, block, group

from . import _common as common
from . import awq, gptq
from ._family import Config, Family, Source
from ._plan import Layer, Parts

ZEROS_AS_THEY_ARE = ("auto_round", "auto_round:gptqmodel")
PACKINGS = (
    *ZEROS_AS_THEY_ARE, "auto_round:auto_gptq", "auto_round:gptq", "auto_round:auto_awq", "auto_round:awq", "auto_round:llm_compressor",
    "auto_round:fp8", "auto_round:fp8_static", "auto_gptq", "auto_awq", "auto_round:exllamav2", "llm_compressor")


@dataclass(frozen=True)
class Settings:
    packing: str
    extra: dict
    config: Config

    def of(self, module: str) -> Config:
        """The settings of one module: the global ones under those of its entry, exact names before patterns."""
        entries = sorted(self.extra, key=lambda name: name != module)
        rule = self.config.find(entries, module, "extra")
        if rule is None:
            return self.config
        return Config({**self.config.data, **self.extra[rule]}, self.config.where, f"extra_config[{rule!r}].")


def settings(source: Source) -> Settings:
    quant = source.quant
    return Settings(quant.choice("packing_format", PACKINGS, "auto_round"), quant.sections("extra_config"), quant)


MARKS = frozenset({"qweight", "weight_packed", "weight_scale", "weight_scale_inv"})


def layer(config: Settings, parts: Parts) -> Layer | None:
    if not MARKS & parts.tensors.keys():
        return None
    mine = config.of(parts.module)
    bits = mine.integer("bits", low=1, high=32)
    if bits >= 16:
        raise parts.fail("", f"a float layer, as {mine.prefix}bits = {bits} says", "quantized tensors")
    if "qweight" not in parts:
        return _named(mine, parts)
    if not str(mine.get("data_type") or "int").startswith("int"):
        raise mine.fail("data_type", "int for packed integers")
    size = mine.group_size("group_size", default=128)
    if "awq" in config.packing:
        if not 4 <= bits <= 7:
            raise mine.fail("bits", "4 to 7 in AWQ's packing")
        return awq.gemm_layer(size, parts, bits)
    if not 2 <= bits <= 8:
        raise mine.fail("bits", "2 to 8")
    symmetric, plain = mine.boolean("sym", True), config.packing in ZEROS_AS_THEY_ARE
    if not symmetric and not plain and "gptq" not in config.packing:
        raise mine.fail("packing_format", "a packing that says how zero points are stored", config.packing)
    return gptq.packed_layer(gptq.Settings(bits, size, symmetric, plain, mine, {}), parts)


def _named(mine: Config, parts: Parts) -> Layer:
    """A layer under compressed-tensors' names: its tensors tell the format, the configuration the activations."""
    act = activation(mine)
    if "weight_global_scale" in parts:
        return common.nv_layer(parts, "weight_packed", "weight_global_scale", "weight_scale", act, True,
                               common.inputs(parts, act, invert=True, scale="input_global_scale"))
    scale = parts.tensors.get("weight_scale")
    if scale is not None and scale.dtype in common.E8M0:
        return common.mx_layer(parts, "weight_packed" if "weight_packed" in parts else "weight", "weight_scale", act, "mx_floor")
    name = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
    size = mine.get("group_size")
    grain = block(*size) if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size) else None
    return common.byte_layer(parts, scale=name, grain=grain, activation=act, rule="full_range", readers=common.inputs(parts, act))


def activation(config: Config) -> ActivationSpec | None:
    """The activation spec of the `act_*` fields."""
    bits = config.integer("act_bits", low=1, high=32, default=16)
    if bits >= 16:
        return None
    kind = str(config.get("act_data_type") or config.get("data_type"))
    size = config.get("act_group_size")
    if kind.startswith("mx_fp"):
        rule = "mx_ceil_x" if "rceil" in kind else "mx_floor"
        return common.mx_input({4: "fp4_e2m1", 8: "fp8_e4m3"}.get(bits, ""), rule) if bits in (4, 8) else _unknown(config)
    if kind.startswith("nv_fp") and bits == 4:
        return common.NV_INPUT
    code = {"int": "int8", "fp": "fp8_e4m3", "fp8": "fp8_e4m3", "float": "fp8_e4m3", "fp8_e4m3": "fp8_e4m3"}.get(kind.split("_to_")[0])
    if code is None or bits != 8:
        return _unknown(config)
    if config.get("act_dynamic") is False:
        return ActivationSpec(code, TENSOR, mode="static")
    zero = "int" if code == "int8" and config.get("act_sym") is False else None
    grain = {None: TOKEN, -1: TOKEN, 0: TENSOR}.get(size) if not isinstance(size, list) else group(size[-1])
    return ActivationSpec(code, grain or group(size), zero=zero)


def _unknown(config: Config):
    raise config.fail("act_data_type", "int, fp, mx_fp or nv_fp activations of 4 or 8 bits")


FIELDS = {
    "quant_method": "read", "bits": "read", "group_size": "read", "sym": "read", "packing_format": "read", "extra_config": "read: bits, "
    "group_size, sym, act_*", "data_type": "read where act_data_type is absent", "act_bits": "read", "act_data_type": "read",
    "act_group_size": "read", "act_dynamic": "read", "act_sym": "read", "block_name_to_quantize": "the tensors tell",
    "to_quant_block_names":
    "the tensors tell", "autoround_version": "who wrote it", "iters": "how it was calibrated", "enable_quanted_input": "how it was "
    "calibrated", "backend": "a choice of kernels", "low_gpu_mem_usage": "how it was calibrated", "nsamples": "how it was calibrated",
    "seqlen": "how it was calibrated", "batch_size": "how it was calibrated", "lr": "how it was calibrated",
    "minmax_lr": "how it was calibrated",
    "enable_minmax_tuning": "how it was calibrated", "dataset": "how it was calibrated",
    "gradient_accumulate_steps": "how it was calibrated",
    "enable_norm_bias_tuning": "how it was calibrated", "super_bits": "not read: GGUF exports only", "super_group_size": "not read: GGUF "
    "exports only", "amp": "how it was calibrated", "scale_dtype": "the tensors tell", "damp_percent": "how it was calibrated",
    "true_sequential": "how it was calibrated", "desc_act": "always false", "lm_head": "the tensors tell",
    "quant_block_list": "the tensors tell",
}
FAMILY = Family("auto-round", settings, layer, MARKS, fields=FIELDS)


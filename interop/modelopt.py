"""NVIDIA ModelOpt checkpoints: `hf_quant_config.json`, or `quantization_config` with `quant_method: modelopt`.

| quant_algo | tensors of a layer |
|---|---|
| FP8 | `weight` e4m3, `weight_scale` and `input_scale` of one number |
| FP8_PER_CHANNEL_PER_TOKEN | `weight_scale` [N] |
| FP8_PB_WO, FP8_PB_REAL | `weight_scale` [N / 128, 1, K / 128, 1] of blocks of 128 x 128, activations in float |
| W8A16 | `weight` int8, `weight_scale` [N] |
| NVFP4, NVFP4_AWQ, W4A16_NVFP4 | `weight` nibbles, `weight_scale` e4m3 [N, K / 16], `weight_scale_2` (multiplies), `input_scale` |
| W4A16_AWQ, W4A8_AWQ | `weight` uint8 [N / 2, K], two outputs a byte, `weight_scale` [N, K / g], `pre_quant_scale`; FP8 activations |
| W8A8_SQ_PER_CHANNEL | `weight` int8, `weight_scale` [N], `input_scale`, `pre_quant_scale` |
| MXFP8, MXFP4 | `weight` e4m3 or nibbles, `weight_scale` exponents [N, K / 32] |
| MIXED_PRECISION | `quantized_layers` names the algorithm of each module |

`weight_scale_2` of W4A8_AWQ is the scale of an FP8 copy of the weight that a kernel may make; W = q weight_scale without it.
Source: ModelOpt, `modelopt/torch/export/quant_utils.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qfunc._spec import CHANNEL, TENSOR, ActivationSpec, WeightSpec, block, group

from . import _common as common
from ._family import Config, Family, Source
from ._naming import named
from ._plan import Layer, Parts, number, scale_reader
from ._refuse import folder_json
from ._repack import row_pairs


@dataclass(frozen=True)
class Settings:
    algo: str
    group: int | None
    layers: dict
    config: Config
    kv: str | None

    def of(self, module: str) -> tuple[str, int | None]:
        """Algorithm and group size of a module."""
        if self.algo != "mixed_precision":
            return self.algo, self.group
        entry = next((self.layers[n] for n in (module, f"model.{module}", module.removeprefix("model.")) if n in self.layers), None)
        if entry is None:
            raise self.config.fail("quantized_layers", f"an entry for {module}", "none")
        mine = Config(entry, self.config.where, f"quantized_layers.{module}.")
        return mine.choice("quant_algo", ALGOS), mine.group_size("group_size", default=self.group)


def settings(source: Source) -> Settings:
    quant = source.quant
    data = folder_json(source.path, "hf_quant_config.json")
    if data is not None:
        quant = Config(data, source.path / "hf_quant_config.json").section("quantization") or quant
    algo = quant.choice("quant_algo", (*ALGOS, "mixed_precision"), "fp8")
    quant.strings("exclude_modules", "ignore")
    kv = quant.get("kv_cache_quant_algo")
    if kv not in (None, "FP8", "auto"):
        raise quant.fail("kv_cache_quant_algo", "FP8 or null (other caches are not read)")
    fallback = source.quant.get("kv_cache_scheme")
    return Settings(algo, quant.group_size("group_size"), quant.sections("quantized_layers"), quant,
                    "fp8_e4m3" if kv == "FP8" or fallback else None)


def fp8(size, parts: Parts) -> Layer:
    act = common.STATIC_FP8
    return common.byte_layer(parts, grain=TENSOR, activation=act, dtypes=common.FP8, readers=common.inputs(parts, act))


def fp8_token(size, parts: Parts) -> Layer:
    return common.byte_layer(parts, grain=CHANNEL, activation=common.FP8_TOKEN, dtypes=common.FP8)


def fp8_blocks(size, parts: Parts) -> Layer:
    return common.byte_layer(parts, grain=block(128, 128), dtypes=common.FP8)


def nvfp4(size, parts: Parts) -> Layer:
    readers = {**common.inputs(parts, common.NV_INPUT), **common.smooth(parts, "pre_quant_scale", _inputs(parts))}
    return common.nv_layer(parts, "weight", "weight_scale_2", "weight_scale", common.NV_INPUT, False, readers)


def nvfp4_a16(size, parts: Parts) -> Layer:
    readers = common.smooth(parts, "pre_quant_scale", _inputs(parts))
    return common.nv_layer(parts, "weight", "weight_scale_2", "weight_scale", None, False, readers)


def _inputs(parts: Parts, each: int = 2) -> int:
    weight = parts.tensors.get("weight")
    return weight.shape[1] * each if weight is not None and len(weight.shape) == 2 else 0


def _int4(size, parts: Parts, activation: ActivationSpec | None) -> Layer:
    weight = parts.take("weight", "U8", ndim=2)
    outs, ins = weight.shape[0] * 2, weight.shape[1]
    grain = CHANNEL if size is None or size >= ins else group(size)
    kind, scale = scale_reader(parts, "weight_scale", grain, outs, ins)
    readers = {"codes": lambda: row_pairs(weight.read()), "scale": scale, **common.smooth(parts, "pre_quant_scale", ins),
               **common.inputs(parts, activation)}
    if activation is not None and "weight_scale_2" in parts:
        number(parts, "weight_scale_2")
    scheme = named(WeightSpec("int4", grain, scale_dtype=kind), activation)
    return common.finish(parts, scheme, outs, ins, readers)


def int8_smooth(size, parts: Parts) -> Layer:
    act = ActivationSpec("int8", TENSOR, mode="static")
    readers = {**common.inputs(parts, act), **common.smooth(parts, "pre_quant_scale", _inputs(parts, 1))}
    return common.byte_layer(parts, grain=CHANNEL, activation=act, dtypes=("I8",), readers=readers)


def int8_weight(size, parts: Parts) -> Layer:
    return common.byte_layer(parts, grain=CHANNEL, dtypes=("I8",))


def mxfp8(size, parts: Parts) -> Layer:
    return common.mx_layer(parts, "weight", "weight_scale", common.mx_input("fp8_e4m3", "mx_rceil"), "mx_rceil")


def mxfp4(size, parts: Parts) -> Layer:
    return common.mx_layer(parts, "weight", "weight_scale", common.mx_input("fp4_e2m1", "mx_rceil"), "mx_rceil")


ALGOS: dict[str, Callable[[int | None, Parts], Layer]] = {
    "fp8": fp8, "fp8_per_channel_per_token": fp8_token, "fp8_pb_wo": fp8_blocks, "nvfp4": nvfp4, "nvfp4_awq": nvfp4,
    "w4a16_nvfp4": nvfp4_a16,
    "w4a16_awq": lambda size, parts: _int4(size, parts, None), "w4a8_awq": lambda size, parts: _int4(size, parts, common.STATIC_FP8),
    "w8a8_sq_per_channel": int8_smooth, "w8a16": int8_weight, "fp8_pb_real": fp8_blocks, "mxfp8": mxfp8, "mxfp4": mxfp4,
}
MARKS = frozenset({"weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale"})


def layer(config: Settings, parts: Parts) -> Layer | None:
    if not MARKS & parts.tensors.keys():
        return None
    algo, size = config.of(parts.module)
    return ALGOS[algo](size, parts)


FIELDS = {
    "quant_method": "read", "quant_algo": "read", "group_size": "read",
    "quantized_layers": "read: quant_algo and group_size of each module",
    "kv_cache_quant_algo": "read: FP8 or null", "kv_cache_scheme": "read: whether there is one", "exclude_modules": "checked: the tensors "
    "tell", "ignore": "checked: the tensors tell", "config_groups": "repeats quant_algo", "producer": "who wrote it",
    "has_zero_point": "the tensors tell", "pre_quant_scale": "the tensors tell", "quantization": "read",
}
FAMILY = Family("modelopt", settings, layer, MARKS, fields=FIELDS, kv_code=lambda s: s.kv)

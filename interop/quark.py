"""AMD Quark checkpoints: a global configuration, overrides by layer and layer type, exclusions.

Tensors of a layer: `weight` (fp8 or int8 [N, K]; fp4 nibbles uint8 [N, K / 2]; int4 as two's complement or uint4 int32 [N, K / 8], nibbles
in the order 0 2 4 6 1 3 5 7, or 0 to 7 with `pack_method` "order"), `weight_scale`, `weight_zero_point` (packed as the weight is),
`input_scale`, `input_zero_point`. Integers in groups are transposed, scales and zero points too: [K, N / 8], [K / g, N], [K / g, N / 8].
A weight with two specs, fp8 per tensor then int4 per channel, has `weight_scale` and `weight_scale_2`: W = q weight_scale_2 weight_scale.
Source: Quark 0.13, `quark/torch/utils/pack.py`, `export/nn/modules/realquantizer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qfunc._spec import CHANNEL, TENSOR, TOKEN, ActivationSpec, Granularity, WeightSpec, block, group

from . import _common as common
from ._family import Config, Family, Source
from ._match import star
from ._naming import named
from ._plan import Layer, Parts, number, scale_reader
from ._repack import AWQ_ORDER, awq_columns, by_rows, nibble_rows, stream

MX_RULES = {"even": "mx_even1", "floor": "mx_floor", "ceil": "mx_ceil", None: "mx_even1"}
ACT_CODES = {"fp8_e4m3": "fp8_e4m3", "fp8_e5m2": "fp8_e5m2", "int8": "int8", "fp4": "fp4_e2m1", "fp6_e2m3": "fp6_e2m3",
             "fp6_e3m2": "fp6_e3m2"}


@dataclass(frozen=True)
class Settings:
    top: Config
    by_layer: dict
    by_type: dict
    exclude: tuple[str, ...]
    config: Config
    kv: bool
    ordered: bool

    def of(self, module: str) -> Config | None:
        """The configuration of a module: by its name, by its type, or the global one; None where it is excluded."""
        if self.config.find(self.exclude, module, "glob") is not None:
            return None
        rule = self.config.find(self.by_layer, module, "glob")
        if rule is not None:
            return Config(self.by_layer[rule], self.config.where, f"layer_quant_config[{rule!r}].")
        typed = next((n for n in self.by_type if star(n, "Linear") or star(n, "nn.Linear")), None)
        return self.top if typed is None else Config(self.by_type[typed], self.config.where, f"layer_type_quant_config[{typed!r}].")


def settings(source: Source) -> Settings:
    quant = source.quant
    top = quant.section("global_quant_config")
    if top is None:
        raise quant.fail("global_quant_config", "an object")
    export = quant.section("export")
    if export is not None:
        export.choice("pack_method", ("reorder", "order"), "reorder")
        export.choice("weight_format", ("real_quantized",), "real_quantized")
    by_layer = quant.sections("layer_quant_config")
    modules = {name.rpartition(".")[0] for name in source.files}
    for name in by_layer:
        # A pin on a layer of another name would leave that layer to the global format: its weight would be read as something else.
        if not any(c in name for c in "*?[") and not any(n in modules for n in (name, f"model.{name}", name.removeprefix("model."))):
            raise quant.fail(f"layer_quant_config[{name!r}]", "a layer of the checkpoint", "no such layer")
    groups = export.strings("kv_cache_group") if export is not None else []
    return Settings(top, by_layer, quant.sections("layer_type_quant_config"), tuple(quant.strings("exclude")), quant, bool(groups),
                    export is not None and export.get("pack_method") == "order")


def _weights(config: Config) -> list[Config]:
    found = config.get("weight")
    found = found if isinstance(found, list) else [found]
    if not found or not all(isinstance(x, dict) for x in found):
        raise config.fail("weight", "an object, or a list of them")
    return [Config(x, config.where, f"{config.prefix}weight.") for x in found]


def granularity(config: Config) -> Granularity:
    """The granularity of a weight spec."""
    how = config.choice("qscheme", ("per_tensor", "per_channel", "per_group", "per_block"), "per_tensor")
    if how == "per_group":
        size = config.group_size("group_size")
        return CHANNEL if size is None else group(size)
    if how == "per_block":
        shape = config.get("block_size")
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 2**20 for n in shape):
            raise config.fail("block_size", "two positive integers")
        return block(*shape)
    return TENSOR if how == "per_tensor" else CHANNEL


def activation(config: Config | None) -> ActivationSpec | None:
    """The activation spec of `input_tensors`."""
    if config is None:
        return None
    code = ACT_CODES[config.choice("dtype", ACT_CODES)]
    how = config.choice("qscheme", ("per_tensor", "per_channel", "per_group", "per_token"), "per_tensor")
    dynamic = config.boolean("is_dynamic")
    if how == "per_group":
        size = config.group_size("group_size")
        if config.get("scale_format") == "e8m0":
            return common.mx_input(code, MX_RULES[config.choice("scale_calculation_mode", MX_RULES)])
        if size is None:
            raise config.fail("group_size", "a positive integer")
        return ActivationSpec(code, group(size))
    zero = None if config.get("symmetric") in (True, None) else "int"
    if how == "per_tensor":
        return ActivationSpec(code, TENSOR, mode="dynamic" if dynamic else "static", zero=zero)
    if not dynamic:
        raise config.fail("is_dynamic", "true, as only one scale per tensor can be static")
    return ActivationSpec(code, TOKEN, zero=zero)


MARKS = frozenset({"weight_scale", "weight_zero_point", "input_scale"})


def layer(config: Settings, parts: Parts) -> Layer | None:
    if not MARKS & parts.tensors.keys():
        return None
    mine = config.of(parts.module)
    if mine is None:
        raise parts.fail("", "a float layer, as `exclude` says", "quantized tensors")
    specs, act = _weights(mine), activation(mine.section("input_tensors"))
    parts.drop("output_scale", "output_zero_point")
    if len(specs) == 2:
        return _int4_fp8(specs, act, parts, config.ordered)
    if len(specs) > 2:
        raise mine.fail("weight", "one or two specs", f"{len(specs)}")
    kind = specs[0].choice("dtype", (*WEIGHTS, *INTEGERS))
    if kind in INTEGERS and (kind != "int8" or specs[0].get("qscheme") == "per_group"):
        return integer_layer(kind, specs[0], act, parts, config.ordered)
    return WEIGHTS[kind](specs[0], act, parts)


def bytes_layer(spec: Config, act: ActivationSpec | None, parts: Parts) -> Layer:
    kind = {"fp8_e4m3": ("F8_E4M3",), "fp8_e5m2": ("F8_E5M2",), "int8": ("I8",)}[spec.get("dtype")]
    if spec.get("scale_format") == "e8m0":
        return common.mx_layer(parts, "weight", "weight_scale", act)
    return common.byte_layer(parts, grain=granularity(spec), activation=act, symmetric=spec.get("symmetric") in (True, None), dtypes=kind,
                             readers=common.inputs(parts, act))


def mxfp4_layer(spec: Config, act: ActivationSpec | None, parts: Parts) -> Layer:
    if spec.get("group_size") != 32 or spec.get("scale_format") != "e8m0":
        raise spec.fail("group_size", "groups of 32 under e8m0 scales", f"{spec.get('group_size')} under {spec.get('scale_format')}")
    return common.mx_layer(parts, "weight", "weight_scale", act, MX_RULES[spec.choice("scale_calculation_mode", MX_RULES)])


def _in_order(words: np.ndarray, ordered: bool) -> np.ndarray:
    """Words whose nibbles are a plain stream."""
    if ordered:
        return words
    out = np.zeros_like(words)
    for i, column in enumerate(AWQ_ORDER):
        out |= ((words >> np.uint32(4 * i)) & np.uint32(15)) << np.uint32(4 * column)
    return out


def _words(parts: Parts, ordered: bool, signed: bool = True) -> tuple:
    weight = parts.take("weight", "I32", ndim=2)
    outs, ins = weight.shape[0], weight.shape[1] * 8

    def codes():
        words = _in_order(weight.read().view(np.uint32), ordered)
        return nibble_rows(words.view(np.uint8), ins, 8 if signed else 0, 8 if signed else 0)
    return outs, ins, codes


def _columns(parts: Parts, ordered: bool, signed: bool) -> tuple:
    """The same, transposed: words [K, N / 8]."""
    weight = parts.take("weight", "I32", ndim=2)
    ins, outs = weight.shape[0], weight.shape[1] * 8

    def codes():
        words = weight.read().view(np.uint32) ^ np.uint32(0x88888888 if signed else 0)
        if not ordered:
            return awq_columns(words, 8 if signed else 0)
        return by_rows(stream(words, 4, outs).T, np.ascontiguousarray, 4, ins, 8 if signed else 0)
    return outs, ins, codes


def _bytes(parts: Parts) -> tuple:
    weight = parts.take("weight", "I8", ndim=2)
    return weight.shape[1], weight.shape[0], lambda: weight.read().T


def _zeros(parts: Parts, name: str) -> None:
    """Packed zero points of a symmetric weight: nothing but zeros may stand there."""
    if name in parts and parts.take(name, ("I32", "I8", "U8")).read().any():
        raise parts.fail(name, "zero points 0 of a symmetric weight", "others")


def integer_layer(kind: str, spec: Config, act: ActivationSpec | None, parts: Parts, ordered: bool) -> Layer:
    """Four-bit integers, and eight-bit ones in groups."""
    signed, grouped = kind != "uint4", spec.get("qscheme") == "per_group"
    if signed and spec.get("symmetric") is False:
        raise spec.fail("symmetric", "true (asymmetric signed integers are not read)")
    grain = granularity(spec)
    outs, ins, codes = _bytes(parts) if kind == "int8" else _columns(parts, ordered, signed) if grouped else _words(parts, ordered, signed)
    size, scale = scale_reader(parts, "weight_scale", grain, outs, ins, transposed=grouped)
    readers = {"codes": codes, "scale": lambda: np.ascontiguousarray(scale())}
    if signed:
        _zeros(parts, "weight_zero_point")
    else:
        readers["zero"] = _unsigned_zeros(parts, grain, outs, ins, ordered)
    weight = WeightSpec(kind, grain, None if signed else "int", size, scale_rule="amax" if signed else "minmax")
    return common.finish(parts, named(weight, act), outs, ins, {**readers, **common.inputs(parts, act)})


def _unsigned_zeros(parts: Parts, grain: Granularity, outs: int, ins: int, ordered: bool):
    """Zero points of uint4, packed along the outputs; of a whole tensor one that is not."""
    groups = -(-ins // grain.size) if grain.kind == "group" else 1
    if grain.kind == "tensor":
        return number(parts, "weight_zero_point", ("I32",), integer=True)
    words = -(-outs // 8)
    tensor = parts.take("weight_zero_point", "I32", [(groups, words)] + ([(words,)] if groups == 1 else []))

    def read():
        array = _in_order(tensor.read().view(np.uint32).reshape(groups, words), ordered)
        return np.ascontiguousarray(stream(array, 4, outs).T)
    return read


def _int4_fp8(specs: list[Config], act: ActivationSpec | None, parts: Parts, ordered: bool) -> Layer:
    kinds = [s.get("dtype") for s in specs]
    if kinds != ["fp8_e4m3", "int4"] or granularity(specs[0]) != TENSOR or granularity(specs[1]).kind == "group":
        raise specs[0].fail("dtype", "fp8_e4m3 per tensor, then int4 per channel", f"{kinds}")
    outs, ins, codes = _words(parts, ordered)
    grain = granularity(specs[1])
    kind, scale = scale_reader(parts, "weight_scale_2", grain, outs, ins)
    outer = number(parts, "weight_scale")
    _zeros(parts, "weight_zero_point_2")
    _zeros(parts, "weight_zero_point")
    scheme = named(WeightSpec("int4", grain, scale_dtype=kind, scale2_dtype="float32"), act)
    return common.finish(parts, scheme, outs, ins, {"codes": codes, "scale": scale, "scale2": outer, **common.inputs(parts, act)})


INTEGERS = ("int4", "uint4", "int8")
WEIGHTS = {"fp8_e4m3": bytes_layer, "fp8_e5m2": bytes_layer, "int8": bytes_layer, "fp4": mxfp4_layer}
FIELDS = {
    "quant_method": "read", "global_quant_config": "read: weight and input_tensors (dtype, qscheme, group_size, block_size, is_dynamic, "
    "symmetric, scale_format, scale_calculation_mode); output_tensors and bias only matter for the cache", "layer_quant_config": "read; a "
    "plain name must name a layer", "layer_type_quant_config": "read for Linear", "exclude": "read", "export": "read: pack_method, "
    "weight_format, kv_cache_group", "kv_cache_quant_config": "repeats the cache's scales", "kv_cache_post_rope": "not needed",
    "algo_config": "how it was calibrated", "quant_mode": "not needed", "softmax_quant_spec": "not needed", "version": "who wrote it",
}
FAMILY = Family("quark", settings, layer, MARKS, fields=FIELDS, kv_code=lambda s: "fp8_e4m3" if s.kv else None)

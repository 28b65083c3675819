"""msModelSlim checkpoints (Ascend): `quant_model_description*.json` gives every tensor a type string.

| type | tensors of a layer |
|---|---|
| W8A8 | int8 `weight`, `input_scale`, `input_offset`, `deq_scale` (= input scale x weight scale; int64 holds float32 bits), `quant_bias` |
| W8A8_DYNAMIC, W8A16 | int8 `weight`, `weight_scale`, `weight_offset` [N, 1] or [N, G] |
| W8A8_MIX | both of them: read as dynamic, the static scale kept as `input_scale`, `input_zero` |
| W4A4_DYNAMIC | one int4 per byte, or two rows, `weight_scale`; W4A4_FLATQUANT_DYNAMIC: `left_trans`, `right_trans`, `clip_ratio` |
| W4A8_DYNAMIC, W4A16 | two outputs per byte, or one code; `weight_scale`, `weight_scale_second` [N, G], `scale_bias` (checked) |
| WFP8AFP8_DYNAMIC | e4m3 `weight`, `weight_scale` [N, 1] |
| W8A8_MXFP8, W4A8_MXFP, W4A4_MXFP4 | e4m3 or nibbles, `weight_scale` exponents [N, K / 32] |
| W4A4_MXFP4_DUALSCALE | the same (in older exports e4m3 [N, K]) and `weight_dual_scale` float32 [N, K / 512, 1], which multiplies |

`quant_bias` already holds the zero point's share -offset sum_k(w) and the float bias, rounded; the bias is taken from the float tensor, or
worked back out of `quant_bias` where there is none. Online rotations (`heads_rotation`, `kronecker_rotation_m`, `_n`) stay beside
the kernel as leaves of those names; a layer that has them must apply them to its input. `mul_scale` becomes `smooth`.
Source: msModelSlim 26.1, `msmodelslim/core/quant_service/modelslim_v1/save/ascendv1.py`; vllm-ascend, `quantization/`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache

import ml_dtypes
import numpy as np

from qfunc._pack import unpack
from qfunc._scales import DUAL_SPAN
from qfunc._spec import CHANNEL, TENSOR, TOKEN, ActivationSpec, Granularity, WeightSpec, group

from . import _common as common
from ._family import Config, Family, Source
from ._naming import named
from ._paths import cache_scale
from ._plan import SCALES, Layer, Parts, number, scale_reader, value
from ._refuse import inside, refuse
from ._repack import byte_codes, nibble_rows, row_pairs

INT8, INT4 = ActivationSpec("int8", TOKEN), ActivationSpec("int4", TOKEN)
STATIC = ActivationSpec("int8", TENSOR, mode="static", zero="int")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
ROTATIONS = ("heads_rotation", "kronecker_rotation_m", "kronecker_rotation_n", "left_trans", "right_trans")


@dataclass(frozen=True)
class Settings:
    types: dict[str, str]
    parts: dict[str, list[str]]
    config: Config
    kv: str | None


def settings(source: Source) -> Settings:
    quant = source.quant
    types = {k: v for k, v in quant.data.items() if isinstance(v, str) and "." in k}
    quant.integer("group_size", low=0, high=2**20, default=0)
    cache_kind = quant.choice("kv_cache_type", ("c8", None), quant.get("kv_quant_type"))
    rotation = quant.section("metadata")
    quarot = rotation.section("quarot") if rotation is not None else None
    if quarot is not None:
        _rotations(source, quarot)
    section = quant
    for key in ("optional", "quarot", "rotation_map"):
        section = section.section(key) if section is not None else None
    for name in section.data.values() if section is not None else ():
        inside(source.path, name, quant.where)
    parts: dict[str, list[str]] = defaultdict(list)
    for name in types:
        module, part = split(name)
        parts[module].append(part)
    attention = sorted({kind for name, kind in types.items() if name.endswith(".quant_type")})
    if attention:
        count = sum(name.endswith(".quant_type") for name in types)
        source.notes.append(f"{count} attention layers are quantized at run time ({', '.join(attention)}): that is left to the model")
    return Settings(types, parts, quant, "int8" if cache_kind == "c8" else None)


def _rotations(source: Source, quarot: Config) -> None:
    """Every layer that the metadata says is rotated online must have its matrices."""
    for key, names in (("heads_rotation", ("heads_rotation",)), ("kronecker_rotation", ROTATIONS[1:3])):
        section = quarot.section(key)
        for module in section.strings("layers") if section is not None else ():
            missing = [n for n in names if f"{module}.{n}" not in source.files]
            if missing:
                raise refuse(source.path, f"{module}.{missing[0]}", f"the matrix of the online rotation ({key})", "none")


def layer(config: Settings, parts: Parts) -> Layer | None:
    kind = config.types.get(f"{parts.module}.weight")
    if kind is None:
        if MARKS & parts.tensors.keys():
            raise parts.fail("weight", f"a type in {config.config.where}", "none")
        return None
    if kind in ("FLOAT", "FLOAT32", "BF16", "FP16"):
        if MARKS & parts.tensors.keys():
            raise parts.fail("", "a float layer, as its type FLOAT says", "quantized tensors")
        return None
    if kind not in TYPES:
        raise parts.fail("weight", f"a type among FLOAT, {', '.join(TYPES)}", kind)
    missing = [part for part in config.parts[parts.module] if part not in parts and not cache_scale(parts.module, part)]
    if missing:
        raise parts.fail(missing[0], f"the tensor that {config.config.where} lists", "none")
    return TYPES[kind](config, parts)


def _extras(parts: Parts) -> dict:
    def reader(name: str):
        tensor = parts.take(name, SCALES)
        return lambda: value(parts, name, tensor)
    return {name: reader(name) for name in ROTATIONS if name in parts}


def _smooth(parts: Parts, ins: int) -> dict:
    return common.smooth(parts, "mul_scale", ins)


def _offset(parts: Parts, name: str = "weight_offset"):
    """A check that the offsets are 0, as they are for symmetric weights."""
    if name not in parts:
        return {}
    tensor = parts.take(name, (*SCALES, "I8", "I32"))

    def check():
        if np.asarray(tensor.read(), np.float32).any():
            raise parts.fail(name, "0 for a symmetric weight", "offsets")
    return {f"check {name}": check}


def _grain(parts: Parts, name: str, ins: int) -> Granularity:
    shape = parts.tensors[name].shape if name in parts else ()
    groups = shape[1] if len(shape) == 2 else 1
    if groups > 1 and ins % groups:
        raise parts.fail(name, f"a number of groups that divides {ins}", groups)
    return CHANNEL if groups <= 1 else group(ins // groups)


def dynamic8(activation: ActivationSpec | None):
    def read(config: Settings, parts: Parts) -> Layer:
        weight = parts.take("weight", "I8", ndim=2)
        outs, ins = weight.shape
        grain = _grain(parts, "weight_scale", ins)
        kind, scale = scale_reader(parts, "weight_scale", grain, outs, ins)
        readers = {"codes": weight.read, "scale": scale, **_offset(parts), **_smooth(parts, ins)}
        scheme = named(WeightSpec("int8", grain, scale_dtype=kind), activation)
        return common.finish(parts, scheme, outs, ins, readers, extras=_extras(parts))
    return read


def _static(parts: Parts, outs: int) -> dict:
    """input_scale, the weight scale that deq_scale implies, and the zero point."""
    deq = parts.take("deq_scale", ("F32", "I64"), [(outs,), (outs, 1)])
    scale = number(parts, "input_scale")
    offset = number(parts, "input_offset", (*SCALES, "I8", "I32"), integer=True)

    def deq_scale():
        array = deq.read()
        array = array.astype(np.int32).view(np.float32) if deq.dtype == "I64" else array
        if not np.isfinite(array).all():
            raise parts.fail("deq_scale", "finite numbers", "NaN or infinity")
        return array.reshape(outs, 1)

    def positive():
        array = scale()
        if not array.all():
            raise parts.fail("input_scale", "a scale that is not 0", "0")
        return array
    return {"deq": deq_scale, "input_scale": positive, "input_zero": offset}


def _bias(parts: Parts, weight, static: dict, outs: int) -> dict:
    """The bias, from the float tensor or out of quant_bias."""
    if "quant_bias" not in parts:
        return parts.bias(outs)
    packed = parts.take("quant_bias", "I32", (outs,))
    if "bias" in parts:
        return parts.bias(outs)

    def read():
        # Without a bias quant_bias is the zero point's share alone; only the numbers tell.
        total = packed.read().astype(np.int64) + int(static["input_zero"]()[0, 0]) * weight.read().sum(1, dtype=np.int64)
        return (total * static["deq"]()[:, 0]).astype(np.float32) if np.abs(total).max(initial=0) > 1 else None
    return {"bias": read}


def static8(config: Settings, parts: Parts) -> Layer:
    weight = parts.take("weight", "I8", ndim=2)
    outs, ins = weight.shape
    static = _static(parts, outs)
    parts.drop("weight_scale", "weight_offset")
    readers = {"codes": weight.read, "scale": lambda: static["deq"]() / static["input_scale"](), "input_scale": static["input_scale"],
               "input_zero": static["input_zero"], **_smooth(parts, ins)}
    extras = {**_bias(parts, weight, static, outs), **_extras(parts)}
    parts.done()
    return Layer(parts.module, named(WeightSpec("int8"), STATIC), (ins, outs), lambda: common.run(readers), extras, parts.all)


def mixed8(config: Settings, parts: Parts) -> Layer:
    weight = parts.take("weight", "I8", ndim=2)
    outs, ins = weight.shape
    kind, scale = scale_reader(parts, "weight_scale", CHANNEL, outs, ins)
    static = _static(parts, outs)
    readers = {"codes": weight.read, "scale": scale, "input_scale": static["input_scale"], "input_zero": static["input_zero"],
               **_offset(parts), **_smooth(parts, ins)}
    extras = {**_bias(parts, weight, static, outs), **_extras(parts)}
    parts.done()
    scheme = named(WeightSpec("int8", scale_dtype=kind), INT8)
    return Layer(parts.module, scheme, (ins, outs), lambda: common.run(readers), extras, parts.all)


def four(activation: ActivationSpec | None):
    def read(config: Settings, parts: Parts) -> Layer:
        weight = parts.take("weight", ("I8", "U8"), ndim=2)
        scales = parts.tensors.get("weight_scale")
        outs, ins = (scales.shape[0] if scales is not None and scales.shape else 0), weight.shape[1]
        if weight.shape[0] not in (outs, outs // 2) or (weight.shape[0] != outs and outs % 2):
            raise parts.fail("weight", f"{outs} rows, or {outs // 2} with two outputs a byte", list(weight.shape))
        pairs, second = weight.shape[0] != outs, "weight_scale_second" in parts
        act = activation
        if "clip_ratio" in parts:
            act = replace(activation, clip=_clip(parts))
        grain = _grain(parts, "weight_scale_second" if second else "weight_scale", ins)
        kind, scale = scale_reader(parts, "weight_scale_second" if second else "weight_scale", grain, outs, ins)
        readers = {"scale": scale}
        if second:
            readers["scale2"] = scale_reader(parts, "weight_scale", CHANNEL, outs, ins)[1]
            readers |= _offset(parts, "weight_offset_second")
        zero = _zero4(parts, outs, grain, ins) if activation is None else None
        readers |= {"zero": zero} if zero is not None else _offset(parts) if activation is not None else {}

        @cache
        def codes():
            return row_pairs(weight.read()) if pairs else byte_codes(_checked(parts, weight.read()), 4, 8, 8)
        readers["codes"] = codes
        if "scale_bias" in parts:
            readers["check scale_bias"] = _scale_bias(parts, codes, scale, readers.get("scale2"), outs, ins)
        spec = WeightSpec("int4" if zero is None else "uint4", grain, None if zero is None else "int", kind,
                          "float32" if second else None, scale_rule="amax" if zero is None else "minmax")
        return common.finish(parts, named(spec, act), outs, ins, {**readers, **_smooth(parts, ins)}, extras=_extras(parts))
    return read


def _checked(parts: Parts, codes: np.ndarray) -> np.ndarray:
    if codes.min() < -8 or codes.max() > 7:
        raise parts.fail("weight", "codes from -8 to 7", f"{codes.min()} to {codes.max()}")
    return codes


def _clip(parts: Parts) -> float:
    clip = float(number(parts, "clip_ratio")()[0, 0])
    if not 0 < clip <= 1:
        raise parts.fail("clip_ratio", "a fraction in (0, 1]", clip)
    return clip


def _zero4(parts: Parts, outs: int, grain: Granularity, ins: int):
    """Zero points of a weight-only layer, None where they are all 0."""
    if "weight_offset" not in parts:
        return None
    groups = 1 if grain.kind == "channel" else -(-ins // grain.size)
    tensor = parts.take("weight_offset", SCALES, [(outs, groups), (outs,)] if groups == 1 else (outs, groups))
    array = value(parts, "weight_offset", tensor).astype(np.float32).reshape(outs, groups)
    if not array.any():
        return None
    if (array != np.round(array)).any() or array.min() < -8 or array.max() > 247:
        raise parts.fail("weight_offset", "whole numbers from -8", f"{array.min()} to {array.max()}")
    return lambda: (array + 8).astype(np.uint8)


def _scale_bias(parts: Parts, codes, scale, scale2, outs: int, ins: int):
    """`scale_bias` is 8 sum_k(w), in one column or in 16 slices of the inputs: it tells whether the weight is the one that was saved."""
    tensor = parts.take("scale_bias", "F32", [(outs, 1), (outs, 16), (outs,)])

    def check():
        sums = tensor.read().reshape(outs, -1).sum(1)
        step = scale().astype(np.float32) * (1 if scale2 is None else scale2())
        groups = step.shape[1]
        values = unpack(codes(), 4, ins).astype(np.int8) - 8
        cells = values.reshape(outs, groups, -1).sum(-1, dtype=np.int64) if ins % groups == 0 else None
        want = 8 * (cells * step).sum(1)
        if np.abs(sums - want).max() > 1e-3 * max(float(np.abs(want).max()), float(8 * np.abs(step).max() * ins**0.5)):
            raise parts.fail("scale_bias", "8 times the row sums of the weight", "other numbers: the weight is not the one that was saved")
    return check


def fp8(config: Settings, parts: Parts) -> Layer:
    weight = parts.take("weight", common.FP8, ndim=2)
    outs, ins = weight.shape
    kind, scale = scale_reader(parts, "weight_scale", CHANNEL, outs, ins)
    readers = {"codes": weight.read, "scale": scale, **_offset(parts), **_smooth(parts, ins)}
    scheme = named(WeightSpec("fp8_e4m3", scale_dtype=kind), common.FP8_TOKEN)
    return common.finish(parts, scheme, outs, ins, readers, extras=_extras(parts))


def _e2m1_of_fp8(parts: Parts, array: np.ndarray) -> np.ndarray:
    """The codes of e2m1 numbers that stand in e4m3."""
    values = np.array([sign * value for sign in (1, -1) for value in E2M1], ml_dtypes.float8_e4m3fn).view(np.uint8)
    codes = np.full(256, 255, np.uint8)
    codes[values] = np.arange(16)
    found = codes[array.view(np.uint8)]
    if (found == 255).any():
        raise parts.fail("weight", "e4m3 numbers that e2m1 has, too", "others")
    return found


def dual(config: Settings, parts: Parts) -> Layer:
    weight = parts.take("weight", ("U8", "I8", "F8_E4M3"), ndim=2)
    outs, ins = weight.shape[0], weight.shape[1] * (1 if weight.dtype == "F8_E4M3" else 2)

    def codes():
        if weight.dtype == "F8_E4M3":               # older exports
            return byte_codes(_e2m1_of_fp8(parts, weight.read()), 4, 0, 0)
        return nibble_rows(weight.read().view(np.uint8), ins)
    _, exponents = scale_reader(parts, "weight_scale", common.MX, outs, ins, common.E8M0)
    spans = -(-ins // DUAL_SPAN)
    outer = parts.take("weight_dual_scale", "F32", [(outs, spans, 1), (outs, spans)])
    readers = {"codes": codes, "scale": exponents,
               "scale2": lambda: value(parts, "weight_dual_scale", outer).reshape(outs, spans), **_smooth(parts, ins)}
    spec = WeightSpec("fp4_e2m1", common.MX, scale_dtype="e8m0", scale2_dtype="float32", scale_rule="mx_dual", rounding="rha")
    scheme = named(spec, common.mx_input("fp4_e2m1", "mx_dual"))
    return common.finish(parts, scheme, outs, ins, readers, extras=_extras(parts))


def mx(code: str, rule: str, act: str, act_rule: str):
    def read(config: Settings, parts: Parts) -> Layer:
        weight = parts.tensors.get("weight")
        ins = weight.shape[1] * (2 if code == "fp4_e2m1" else 1) if weight is not None and len(weight.shape) == 2 else 0
        rotations = _extras(parts)
        activation = common.mx_input(act, act_rule, "rha")
        out = common.mx_layer(parts, "weight", "weight_scale", activation, rule, "rha", readers=_smooth(parts, ins))
        out.extras.update(rotations)
        return out
    return read


TYPES = {
    "W8A8": static8, "W8A8_DYNAMIC": dynamic8(INT8), "W8A16": dynamic8(None), "W8A8_MIX": mixed8, "W4A16": four(None),
    "W4A8_DYNAMIC": four(INT8),
    "W4A4_DYNAMIC": four(INT4), "W4A4_FLATQUANT_DYNAMIC": four(INT4), "WFP8AFP8_DYNAMIC": fp8, "W8A8FP8_DYNAMIC": fp8,
    "W8A8_MXFP8": mx("fp8_e4m3", "mx_floor", "fp8_e4m3", "mx_floor"), "W4A8_MXFP": mx("fp4_e2m1", "mx_even1", "fp8_e4m3", "mx_floor"),
    "W4A4_MXFP4": mx("fp4_e2m1", "mx_even1", "fp4_e2m1", "mx_even1"), "W4A4_MXFP4_DUALSCALE": dual,
}
MARKS = frozenset({"weight_scale", "deq_scale", "quant_bias", "input_scale", "input_offset"})


def split(name: str) -> tuple[str, str]:
    if name.endswith(".div.mul_scale"):
        return name.removesuffix(".div.mul_scale") + ".linear", "mul_scale"
    return tuple(name.rpartition(".")[::2])


FIELDS = {
    "<module>.<param>": "read: the type of each weight", "version": "not needed: shapes tell the packing", "model_quant_type": "not needed",
    "group_size": "checked: shapes tell", "kv_cache_type": "read", "kv_quant_type": "read", "fa_quant_type": "the tensors tell",
    "metadata": "read: quarot's heads_rotation and kronecker_rotation layers must have their matrices", "optional": "checked: names of "
    "rotation files; the global rotation is for drafts and tools", "ignore": "the tensors tell", "packed_modules_mapping": "not needed",
    "quant_method": "read",
}
FAMILY = Family("modelslim", settings, layer, MARKS, split, FIELDS, lambda s: s.kv)

"""torchao checkpoints in safetensors: flattened tensor subclasses, described by the file's own metadata.

A weight `X.weight` lies as `X._weight_qdata`, `X._weight_scale` and so on; the metadata has, under `X.weight`, JSON with the class
(`_type`) and its attributes (`_data`). MX and NVFP4 scales are in Blackwell's tiled layout (`is_swizzled_scales`).
Source: torchao 0.18, `torchao/prototype/safetensors`, `quantization/quantize_/workflows`, `prototype/mx_formats`.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from qfunc._spec import CHANNEL, TENSOR, TOKEN, ActivationSpec, Granularity, WeightSpec, block, group

from . import _common as common
from ._family import Config, Family, Source
from ._naming import named
from ._plan import Layer, Parts, number
from ._refuse import parse_json, refuse
from ._repack import nibble_rows, unswizzle

PREFIX = "_weight_"
MX_RULES = {"FLOOR": "mx_floor", "RCEIL": "mx_rceil", "CEIL": "mx_ceil", "EVEN": "mx_even"}
ELEMENTS = {"float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2", "float4_e2m1fn_x2": "fp4_e2m1"}


@dataclass(frozen=True)
class Settings:
    metadata: dict[str, str]
    where: object


def settings(source: Source) -> Settings:
    kinds = source.quant.get("quant_type")
    if not isinstance(kinds, dict | str):
        raise source.quant.fail("quant_type", "an object or a name")
    return Settings(source.files.metadata, source.files.files[0].path)




def _attributes(config: Settings, parts: Parts) -> tuple[str, Config]:
    name = f"{parts.module}.weight"
    text = config.metadata.get(name)
    if text is None:
        raise refuse(config.where, f"__metadata__[{name!r}]", "the description of the tensor", "none")
    where = f"{config.where}: __metadata__[{name!r}]"
    entry = Config(parse_json(text.encode(), where), where)
    data = entry.get("_data")
    return entry.choice("_type", [k.lower() for k in CLASSES]), Config(data if isinstance(data, dict) else {}, where)


def _plain(value):
    """`{"_type": ..., "_data": x}` as x, or as its type where the data are empty."""
    if isinstance(value, dict) and "_type" in value:
        return value["_data"] if isinstance(value.get("_data"), str) else value["_type"]
    return value


def _grain(attributes: Config, parts: Parts, outs: int, ins: int) -> Granularity:
    size = attributes.get("block_size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise attributes.fail("block_size", "two positive integers")
    if size == [outs, ins]:
        return TENSOR
    if size[0] == 1:
        return CHANNEL if size[1] >= ins else group(size[1])
    return block(*size)


def _granularity_of(act, where: Config) -> str:
    name = _plain(act.get("granularity")) if isinstance(act, dict) else None
    if name not in ("PerRow", "PerTensor"):
        raise where.fail("act_quant_kwargs", "PerRow or PerTensor", repr(name))
    return name


def _act(attributes: Config) -> dict | None:
    found = attributes.get("act_quant_kwargs")
    if found is None:
        return None
    data = found.get("_data") if isinstance(found, dict) else None
    if not isinstance(data, dict):
        raise attributes.fail("act_quant_kwargs", "an object")
    return data


def _matrix(parts: Parts, dtypes) -> tuple[int, int]:
    tensor = parts.tensors.get(PREFIX + "qdata")
    if tensor is None or len(tensor.shape) != 2 or tensor.dtype not in dtypes:
        found = "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise parts.fail(PREFIX + "qdata", f"a matrix of {' or '.join(dtypes)}", found)
    return tensor.shape


NAMES = {"weight": PREFIX + "qdata", "scale": PREFIX + "scale", "zero": PREFIX + "zero_point"}


def _symmetric(parts: Parts) -> bool:
    """Whether a weight has no zero points, which only the numbers tell: those of its first page here, the others when it is read."""
    name = NAMES["zero"]
    return name not in parts or not parts.tensors[name].read().reshape(-1)[:4096].any()


def int8(attributes: Config, parts: Parts) -> Layer:
    outs, ins = _matrix(parts, ("I8",))
    act = _act(attributes)
    spec = None
    if act is not None:
        zero = "int" if _plain(act.get("mapping_type")) == "ASYMMETRIC" else None
        row = _granularity_of(act, attributes) == "PerRow"
        spec = ActivationSpec("int8", TOKEN if row else TENSOR, zero=zero, scale_rule="minmax_inverse" if zero else "amax_half_inverse")
    return common.byte_layer(parts, **NAMES, grain=_grain(attributes, parts, outs, ins), activation=spec, symmetric=_symmetric(parts),
                             rule="amax_half", dtypes=("I8",))


def intx(attributes: Config, parts: Parts) -> Layer:
    outs, ins = _matrix(parts, ("I8",))
    kind = _plain(attributes.get("target_dtype"))
    if kind not in [f"int{b}" for b in range(2, 9)]:
        raise attributes.fail("target_dtype", "int2 to int8", repr(kind))
    how = attributes.choice("activation_quantization", (None, "int8_asym_per_token", "int8_sym_per_token"))
    spec = None if how is None else ActivationSpec("int8", TOKEN, zero="int" if "asym" in how else None,
                                                   scale_rule="minmax_inverse" if "asym" in how else "amax_half_inverse")
    return common.byte_layer(parts, **NAMES, grain=_grain(attributes, parts, outs, ins), activation=spec, bits=int(kind[3:]),
                             symmetric=_symmetric(parts), rule="amax_half", dtypes=("I8",))


def float8(attributes: Config, parts: Parts) -> Layer:
    outs, ins = _matrix(parts, common.FP8)
    grain, act = _grain(attributes, parts, outs, ins), _act(attributes)
    spec = None
    if act is not None and grain.kind == "block":
        spec = ActivationSpec("fp8_e4m3", group(grain.size))
    elif act is not None:
        spec = common.FP8_TOKEN if _granularity_of(act, attributes) == "PerRow" else common.FP8_TENSOR
    return common.byte_layer(parts, **NAMES, grain=grain, activation=spec, dtypes=common.FP8)


def _tiled(parts: Parts, name: str, dtypes, outs: int, groups: int, swizzled: bool):
    """A reader of block scales as bytes [outs, groups], tiled or not."""
    size = (-(-outs // 128) * 128) * (-(-groups // 4) * 4) if swizzled else outs * groups
    tensor = parts.take(name, dtypes)
    if int(np.prod(tensor.shape, dtype=np.int64)) != size:
        raise parts.fail(name, f"{size} scales", list(tensor.shape))

    def read():
        array = tensor.read().view(np.uint8).reshape(-1)
        return unswizzle(array, outs, groups) if swizzled else array.reshape(outs, groups)
    return read


def mx(attributes: Config, parts: Parts) -> Layer:
    code = ELEMENTS.get(_plain(attributes.get("elem_dtype")))
    if code is None or attributes.get("block_size") != 32:
        raise attributes.fail("elem_dtype", f"{', '.join(ELEMENTS)} in blocks of 32")
    codes = parts.take(PREFIX + "qdata", ("U8",) if code == "fp4_e2m1" else common.FP8, ndim=2)
    outs, ins = codes.shape[0], codes.shape[1] * (2 if code == "fp4_e2m1" else 1)
    groups = -(-ins // 32)
    swizzled = attributes.get("is_swizzled_scales")
    scales = _tiled(parts, PREFIX + "scale", common.E8M0, outs, groups, bool(swizzled) if swizzled is not None else
                    parts.tensors[PREFIX + "scale"].shape != (outs, groups))
    act = _act(attributes)
    rule = MX_RULES.get(_plain(act.get("scaling_mode")) if act else "RCEIL", "mx_rceil")
    spec = None if act is None else common.mx_input(ELEMENTS.get(_plain(act.get("elem_dtype")), code), rule)

    def exponents():
        array = scales()
        if (array == 255).any():
            raise parts.fail(PREFIX + "scale", "exponents below 255", "255, which is NaN")
        return array
    return common.finish(parts, named(WeightSpec(code, common.MX, scale_dtype="e8m0", scale_rule=rule), spec), outs, ins, {
        "codes": lambda: nibble_rows(codes.read(), ins) if code == "fp4_e2m1" else codes.read(), "scale": exponents})


def nvfp4(attributes: Config, parts: Parts) -> Layer:
    if attributes.get("block_size") not in (None, 16):
        raise attributes.fail("block_size", "16")
    codes = parts.take(PREFIX + "qdata", "U8", ndim=2)
    outs, ins = codes.shape[0], codes.shape[1] * 2
    scales = _tiled(parts, PREFIX + "scale", ("F8_E4M3",), outs, ins // 16, attributes.boolean("is_swizzled_scales"))
    outer = number(parts, PREFIX + "per_tensor_scale") if PREFIX + "per_tensor_scale" in parts else lambda: np.ones((1, 1), np.float32)
    act = None if _act(attributes) is None else common.NV_INPUT

    def inner():
        array = scales().view(ml_dtypes.float8_e4m3fn)
        if not np.isfinite(array.astype(np.float32)).all():
            raise parts.fail(PREFIX + "scale", "finite numbers", "NaN")
        return array
    readers = {"codes": lambda: nibble_rows(codes.read(), ins), "scale": inner, "scale2": outer}
    if PREFIX + "act_per_tensor_scale" in parts:
        readers["input_scale"] = number(parts, PREFIX + "act_per_tensor_scale")
    return common.finish(parts, named(common.NV_WEIGHT, act), outs, ins, readers)


CLASSES = {"Int8Tensor": int8, "IntxUnpackedToInt8Tensor": intx, "Float8Tensor": float8, "MXTensor": mx, "NVFP4Tensor": nvfp4}
_BY_LOWER = {name.lower(): read for name, read in CLASSES.items()}


def layer(config: Settings, parts: Parts) -> Layer | None:
    if PREFIX + "qdata" not in parts:
        return None
    kind, attributes = _attributes(config, parts)
    return _BY_LOWER[kind](attributes, parts)


FIELDS = {
    "quant_method": "read", "quant_type": "checked: each tensor's own description tells", "modules_to_not_convert": "the tensors tell",
    "include_input_output_embeddings": "the tensors tell", "untie_embedding_weights": "the tensors tell", "quant_type_kwargs": "the "
    "tensors tell",
}
FAMILY = Family("torchao", settings, layer, frozenset({PREFIX + "qdata"}), fields=FIELDS)

"""FP8 checkpoints with `quant_method: fp8` (one scale per tensor or channel, or DeepSeek's blocks), `fbgemm_fp8` and `blockwise_int8`.

`weight` e4m3 or int8 [N, K]; `weight_scale` or, in blocks of `weight_block_size` (out, in), `weight_scale_inv` [ceil(N/bn), ceil(K/bk)],
which multiplies despite its name (DeepSeek-V4: `scale`); `input_scale` (transformers: `activation_scale`) where activations are static.
Block scales may be exponents (e8m0); without blocks `weight_scale_inv` is one number.
`fbgemm_fp8`: scales per channel, activations per token, clipped to `activation_scale_ub` (`input_scale_ub` of the layer, where it has one).
Source: DeepSeek-V3, `inference/kernel.py`; transformers, `integrations/finegrained_fp8.py`; SGLang, `quantization/fp8.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from qfunc._spec import CHANNEL, TENSOR, TOKEN, ActivationSpec, block, group

from . import _common as common
from ._family import Family, Source
from ._plan import SCALES, Layer, Parts, number

MARKS = frozenset({"weight_scale", "weight_scale_inv", "input_scale", "activation_scale", "input_scale_ub"})
SCALE_NAMES = ("weight_scale_inv", "weight_scale", "scale")


@dataclass(frozen=True)
class Settings:
    block: tuple[int, int] | None
    static: bool
    kind: str
    fbgemm: bool = False
    bound: float | None = None


def settings(source: Source) -> Settings:
    quant = source.quant
    if quant.get("quant_method") == "fbgemm_fp8":
        bound = quant.get("activation_scale_ub", 1200.0)
        if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 < bound < 1e30:
            raise quant.fail("activation_scale_ub", "a positive number")
        return Settings(None, False, "F8_E4M3", True, float(bound))
    kind = "I8" if "int8" in quant.get("quant_method") else "F8_E4M3"
    static = quant.choice("activation_scheme", ("static", "dynamic"), "dynamic") == "static"
    quant.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    quant.choice("scale_fmt", ("ue8m0", "float", None))
    shape = quant.get("weight_block_size")
    if shape is not None and not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 2**20 for n in shape)):
        raise quant.fail("weight_block_size", "two positive integers")
    return Settings(None if shape is None else tuple(shape), static, kind)


def layer(config: Settings, parts: Parts) -> Layer | None:
    weight = parts.tensors.get("weight")
    name = next((n for n in SCALE_NAMES if n in parts), "weight_scale")
    if weight is not None and weight.dtype == "I8" and config.kind != "I8" and name in parts:
        return _nibbles(config, name, parts)
    if weight is None or weight.dtype != config.kind:
        return None
    if config.fbgemm:
        return _fbgemm(config, parts)
    if config.block is not None and name != "weight_scale":
        if name in parts and parts.tensors[name].dtype == "I32":
            raise parts.fail(name, "scales as floats or exponents", "int32, DeepGEMM's packed layout of exponents")
        out, size = config.block
        if config.static:
            act = ActivationSpec(common.CODES[config.kind], TENSOR, mode="static")
        else:
            act = ActivationSpec("int8", group(size), rounding="trunc") if config.kind == "I8" else ActivationSpec("fp8_e4m3", group(size))
        return common.byte_layer(parts, scale=name, grain=block(out, size), activation=act, dtypes=(config.kind,),
                                 scale_dtypes=(*SCALES, *common.E8M0), readers=_inputs(parts, act))
    code = common.CODES[config.kind]
    act = ActivationSpec(code, TENSOR, mode="static") if config.static else _dynamic(parts, name, code)
    return common.byte_layer(parts, scale=name, activation=act, dtypes=(config.kind,), readers=_inputs(parts, act))


def _inputs(parts: Parts, act: ActivationSpec) -> dict:
    return common.inputs(parts, act, scale="activation_scale" if "activation_scale" in parts else "input_scale")


def _nibbles(config: Settings, name: str, parts: Parts) -> Layer:
    """DeepSeek-V4's experts: two e2m1 in a byte that is called int8, under exponents for 32 of them; activations as everywhere else."""
    if config.block is None:
        raise parts.fail("weight", "e4m3, or two e2m1 a byte in a checkpoint of blocks", "I8")
    return common.mx_layer(parts, "weight", name, ActivationSpec("fp8_e4m3", group(config.block[1])), "mx_rceil")


def _fbgemm(config: Settings, parts: Parts) -> Layer:
    bound = config.bound
    if "input_scale_ub" in parts:
        bound = float(number(parts, "input_scale_ub")()[0, 0])
        if bound <= 0:
            raise parts.fail("input_scale_ub", "a positive number", bound)
    act = ActivationSpec("fp8_e4m3", TOKEN, bound=bound)
    return common.byte_layer(parts, grain=CHANNEL, activation=act, dtypes=("F8_E4M3",))


def _dynamic(parts: Parts, name: str, code: str) -> ActivationSpec:
    count = parts.tensors[name].shape if name in parts else ()
    return ActivationSpec(code, TENSOR if count in ((), (1,), (1, 1)) else TOKEN)


FIELDS = {
    "quant_method": "read", "activation_scheme": "read", "weight_block_size": "read", "fmt": "read: e4m3",
    "scale_fmt": "checked: the values "
    "are powers of two already", "ignored_layers": "not needed: the tensors tell", "modules_to_not_convert": "not needed: the tensors tell",
    "kv_cache_scheme": "not needed: the scales tell", "dequantize": "a choice at load", "exclude_modules": "not needed: the tensors tell",
    "activation_scale_ub": "read by fbgemm_fp8: what activations are clipped to",
}
FAMILY = Family("fp8", settings, layer, MARKS, fields=FIELDS, kv_code=lambda s: "fp8_e4m3")

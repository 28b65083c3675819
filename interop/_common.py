"""Layers that several families share: 8-bit codes, nibbles in bytes, two-level fp4, and the activation specs beside them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from qfunc._spec import CHANNEL, TENSOR, TOKEN, ActivationSpec, Granularity, WeightSpec, group

from ._naming import named
from ._plan import Layer, Parts, fill_of, number, scale_reader, value
from ._repack import byte_codes, nibble_rows

CODES = {"I8": "int8", "F8_E4M3": "fp8_e4m3", "F8_E5M2": "fp8_e5m2", "U8": "fp8_e4m3"}
FP8 = ("F8_E4M3", "F8_E5M2")
E8M0 = ("U8", "F8_E8M0")
MX = group(32)


def mx_input(code: str, rule: str, rounding: str = "rne") -> ActivationSpec:
    """Activations in blocks of 32 under powers of two."""
    return ActivationSpec(code, MX, scale_dtype="e8m0", scale_rule=rule, rounding=rounding)


NV_INPUT = ActivationSpec("fp4_e2m1", group(16), scale_dtype="fp8_e4m3", outer="tensor")
NV_WEIGHT = WeightSpec("fp4_e2m1", group(16), scale_dtype="fp8_e4m3", scale2_dtype="float32", scale_rule="two_level")


def guess_grain(parts: Parts, name: str, outs: int, ins: int) -> Granularity:
    """One scale per tensor or per channel, as the size of the scale says."""
    count = int(np.prod(parts.tensors[name].shape, dtype=np.int64)) if name in parts else 0
    if count not in (1, outs):
        raise parts.fail(name, f"1 or {outs} scales", f"{count}" if name in parts else "no such tensor")
    return TENSOR if count == 1 and outs != 1 else CHANNEL


def inputs(parts: Parts, activation: ActivationSpec | None, invert: bool = False, scale: str = "input_scale",
           zero: str = "input_zero_point"):
    """Readers of the calibrated activation scale and zero point that a layer has, by leaf name."""
    out: dict[str, Callable[[], np.ndarray]] = {}
    if scale in parts:
        read = number(parts, scale)
        out["input_scale"] = partial(_inverse, parts, scale, read) if invert else read
    elif activation is not None and activation.mode == "static":
        raise parts.fail(scale, "the scale of a static activation", "none")
    if zero in parts:
        offset = number(parts, zero, ("I8", "I32", "F32", "F16", "BF16", "U8"), integer=True)
        if activation is not None and activation.zero == "int":
            out["input_zero"] = offset
        else:
            out["input_zero"] = _zero_check(parts, zero, offset)
    elif activation is not None and activation.mode == "static" and activation.zero == "int":
        raise parts.fail(zero, "the zero point of an asymmetric activation", "none")
    return out


def _inverse(parts: Parts, name: str, read) -> np.ndarray:
    array = read()
    if not array.all():
        raise parts.fail(name, "a divisor that is not 0", "0")
    return np.float32(1) / array


def _zero_check(parts: Parts, name: str, read):
    def check():
        if read().any():
            raise parts.fail(name, "0, as the activation is symmetric", read().tolist())
        return None
    return check


def smooth(parts: Parts, name: str, ins: int) -> dict[str, Callable[[], np.ndarray]]:
    """The factors that the activation is multiplied by, where the layer has them."""
    if name not in parts:
        return {}
    tensor = parts.take(name, ("F32", "F16", "BF16"), [(ins,), (1, ins)])
    return {"smooth": lambda: value(parts, name, tensor).astype(np.float32).reshape(ins)}


def run(readers: dict) -> dict[str, np.ndarray]:
    """Call readers, dropping those that only checked something."""
    return {name: array for name, read in readers.items() if (array := read()) is not None}


def finish(parts: Parts, scheme, outs: int, ins: int, readers: dict, **fields) -> Layer:
    """The layer of these readers, once every tensor of the module is spoken for."""
    extras = parts.bias(outs)
    parts.done()
    return Layer(parts.module, scheme, (ins, outs), lambda: run(readers), {**extras, **fields.pop("extras", {})}, parts.all, **fields)


def zero_points(parts: Parts, name: str, outs: int, groups: int, symmetric: bool, offset: int = 128):
    """A reader of signed zero points as unsigned ones; those of a symmetric weight must be 0 and give nothing."""
    allowed = [(outs, groups)] + ([(outs,)] if groups == 1 else []) + ([(), (1,), (1, 1)] if outs == groups == 1 else [])
    tensor = parts.take(name, ("I8", "I32"), allowed)

    def read():
        array = tensor.read().astype(np.int32).reshape(outs, groups)
        if symmetric:
            if array.any():
                raise parts.fail(name, "zero points 0 of a symmetric weight", "others")
            return None
        if array.min() < -offset or array.max() > 255 - offset:
            raise parts.fail(name, f"zero points from {-offset} to {255 - offset}", f"{array.min()} to {array.max()}")
        return (array + offset).astype(np.uint8)
    return read


def byte_layer(parts: Parts, *, weight="weight", scale="weight_scale", zero="weight_zero_point", grain: Granularity | None = None,
               activation: ActivationSpec | None = None, bits: int = 8, symmetric: bool = True, rule: str = "amax", dtypes=("I8", *FP8),
               scale_dtypes=None, readers: dict | None = None) -> Layer:
    """A layer of one code a byte: int8 or fp8 [N, K], or narrower integers in int8.

    `grain` None: per tensor or channel, by the size of the scale. `readers` add leaves; `zero` is read where the tensor exists.
    """
    codes = parts.take(weight, dtypes, ndim=2)
    outs, ins = codes.shape
    grain = grain or guess_grain(parts, scale, outs, ins)
    if grain.kind == "group" and grain.size >= ins and int(np.prod(parts.tensors[scale].shape, dtype=np.int64)) == outs \
            and "E8M0" not in parts.tensors[scale].dtype and parts.tensors[scale].dtype != "U8":
        grain = CHANNEL
    kind, read_scale = scale_reader(parts, scale, grain, outs, ins, scale_dtypes or ("F32", "F16", "BF16", "F64"))
    code = CODES[codes.dtype] if bits == 8 else f"int{bits}"
    more = dict(readers or {})
    if zero in parts:
        groups = parts.tensors[zero].shape
        tall = outs if grain.kind in ("channel", "group") else 1
        wide = groups[1] if len(groups) == 2 else 1
        more["zero"] = zero_points(parts, zero, tall, wide, symmetric, 2 ** (bits - 1))
    elif not symmetric:
        raise parts.fail(zero, "zero points of an asymmetric weight", "none")
    if not symmetric:
        code = "u" + code
    scheme = named(WeightSpec(code, grain, None if symmetric else "int", kind, scale_rule=rule if symmetric else "minmax"), activation)

    def read_codes():
        array = codes.read()
        if bits < 8:
            low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            if array.min() < low or array.max() > high:
                raise parts.fail(weight, f"codes from {low} to {high}", f"{array.min()} to {array.max()}")
            return byte_codes(array, bits, 2 ** (bits - 1), fill_of(code))
        return array if symmetric else array.view(np.uint8) ^ np.uint8(128)
    return finish(parts, scheme, outs, ins, {"codes": read_codes, "scale": read_scale, **more})


def mx_layer(parts: Parts, weight: str, scale: str, activation: ActivationSpec | None, rule: str = "mx_even1", rounding: str = "rne",
             code: str | None = None, readers: dict | None = None) -> Layer:
    """MX weights: fp8 [N, K], or nibbles uint8 [N, K / 2] (low first), under exponents uint8 [N, ceil(K / 32)]."""
    tensor = parts.take(weight, ("U8", "I8", "F4", *FP8), ndim=2)
    outs, ins = tensor.shape
    if tensor.dtype in ("U8", "I8"):
        ins *= 2
    code = CODES[tensor.dtype] if tensor.dtype in FP8 else "fp4_e2m1"
    kind, read_scale = scale_reader(parts, scale, MX, outs, ins, E8M0)
    scheme = named(WeightSpec(code, MX, scale_dtype=kind, scale_rule=rule, rounding=rounding), activation)

    def codes():
        return tensor.read() if tensor.dtype in FP8 else nibble_rows(tensor.read().view(np.uint8), ins)
    return finish(parts, scheme, outs, ins, {"codes": codes, "scale": read_scale, **(readers or {})})


def nv_layer(parts: Parts, weight: str, outer: str, inner: str, activation: ActivationSpec | None, invert: bool, readers: dict) -> Layer:
    """NVFP4 weights: nibbles uint8 [N, K / 2] (low first), e4m3 scales [N, K / 16], one outer scale, a divisor where `invert`."""
    tensor = parts.take(weight, ("U8", "F4"), ndim=2)
    outs, ins = tensor.shape
    if tensor.dtype == "U8":
        ins *= 2
    if ins % 16:
        raise parts.fail(weight, "a number of inputs that 16 divides", ins)
    _, read_scale = scale_reader(parts, inner, group(16), outs, ins, ("F8_E4M3",))
    read_outer = number(parts, outer)
    scale2 = partial(_inverse, parts, outer, read_outer) if invert else read_outer
    return finish(parts, named(NV_WEIGHT, activation), outs, ins,
                  {"codes": lambda: nibble_rows(tensor.read().view(np.uint8), ins), "scale": read_scale, "scale2": scale2, **readers})


STATIC_FP8, FP8_TOKEN, FP8_TENSOR = (ActivationSpec("fp8_e4m3", TENSOR, mode="static"), ActivationSpec("fp8_e4m3", TOKEN),
                                     ActivationSpec("fp8_e4m3", TENSOR))

"""Quantization of activations out of elementwise torch operations: `qfunc._activation`, operation by operation, in float32.

It serves what the device has no operator for (float32 input, clipping, zero points, rules and roundings that differ) and gives JAX's
form of what was quantized natively. Formulas and names are those of `qfunc._activation` and `qfunc._scales`, which are the specification.
"""

from __future__ import annotations

import torch

from qfunc._codes import code as element_code
from qfunc._numerics import TINY
from qfunc._scales import INVERSE, MX_ELEMENTS
from qfunc._spec import ActivationSpec

FLOAT8 = {"fp8_e4m3": (torch.float8_e4m3fn, 4, 3), "fp8_e5m2": (torch.float8_e5m2, 5, 2)}
MINIFLOAT = {"fp4_e2m1": (2, 1), "fp6_e2m3": (2, 3), "fp6_e3m2": (3, 2)}
SMALLEST_E4M3, LARGEST_E4M3 = 2.0**-9, 448.0


def usable(scale: torch.Tensor) -> torch.Tensor:
    """1 where a scale is too small to divide by, NaN where it is not finite."""
    scale = torch.where(scale.abs() < TINY, torch.ones_like(scale), scale)
    return torch.where(torch.isfinite(scale), scale, torch.full_like(scale, float("nan")))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float32).contiguous().view(torch.int32)


def power(exponent: torch.Tensor) -> torch.Tensor:
    """2^(E - 127) of exponent bytes E (int32); 255 is NaN, 0 the subnormal 2^-127."""
    field = torch.where(exponent == 0, torch.full_like(exponent, 0x00400000), exponent << 23)
    return torch.where(exponent == 255, torch.full_like(exponent, 0x7FC00000), field).view(torch.float32)


def round_by(x: torch.Tensor, rounding: str) -> torch.Tensor:
    """`rne` half to even, `rha` half away from zero, `trunc` toward zero."""
    if rounding == "rne":
        return torch.round(x)
    whole = torch.trunc(x)
    return whole if rounding == "trunc" else whole + torch.where((x - whole).abs() >= 0.5, torch.sign(x), torch.zeros_like(x))


def _even(amax, name: str, mantissa: int):
    return (((bits(amax) + (1 << (22 - mantissa))) >> 23) & 255) - MX_ELEMENTS[name][0]


def _ceil(x):
    return ((bits(x) >> 23) & 255) + ((bits(x) & 0x7FFFFF) != 0).to(torch.int32)


MX_RULES = {
    "mx_floor": lambda amax, name: ((bits(amax) >> 23) & 255) - MX_ELEMENTS[name][0],
    "mx_even": lambda amax, name: _even(amax, name, MX_ELEMENTS[name][1]),
    "mx_even1": lambda amax, name: _even(amax, name, 1),
    "mx_ceil": lambda amax, name: _ceil(amax) - MX_ELEMENTS[name][0],
    "mx_rceil": lambda amax, name: _ceil(amax / element_code(name).highest),
    "mx_ceil_x": lambda amax, name: _ceil(amax / 7.25),
}


def exponents(amax: torch.Tensor, name: str, rule: str) -> torch.Tensor:
    """The exponent byte of each block, uint8: 127 for a block of zeros, 255 where its largest element is not finite."""
    byte = MX_RULES[rule](amax, name).clamp(1, 254)
    byte = torch.where(amax == 0, torch.full_like(byte, 127), byte)
    return torch.where(torch.isfinite(amax), byte, torch.full_like(byte, 255)).to(torch.uint8)


def _rounded(x, rounding: str, exponent_bits: int, mantissa_bits: int, largest: float):
    lowest = 2 - 2 ** (exponent_bits - 1)
    size = x.abs()
    exponent = ((bits(size) >> 23) - 127).clamp(min=lowest)
    step = power(exponent - mantissa_bits + 127)
    return (round_by(size / step, rounding) * step).clamp(max=largest)


def encode(x: torch.Tensor, name: str, rounding: str) -> torch.Tensor:
    """Numbers already divided by their scale as codes: int8, float8, or uint8 for the small floats."""
    element = element_code(name)
    if element.integer:
        return round_by(x, rounding).clamp(element.lowest, element.highest).to(torch.int8)
    if name in FLOAT8:
        dtype, exponent_bits, mantissa_bits = FLOAT8[name]
        x = x.clamp(-element.highest, element.highest)
        if rounding != "rne":
            x = torch.copysign(_rounded(x, rounding, exponent_bits, mantissa_bits, element.highest), x)
        return x.to(dtype)
    exponent_bits, mantissa_bits = MINIFLOAT[name]
    lowest = 2 - 2 ** (exponent_bits - 1)
    value = _rounded(x, rounding, exponent_bits, mantissa_bits, element.highest)
    exponent = ((bits(value) >> 23) - 127).clamp(min=lowest)
    mantissa = (value * power(mantissa_bits - exponent + 127)).to(torch.int32)
    sign = (bits(x) >> 31) & 1
    return ((sign << (exponent_bits + mantissa_bits)) | (mantissa + ((exponent - lowest) << mantissa_bits))).to(torch.uint8)


def decode(codes: torch.Tensor, name: str) -> torch.Tensor:
    """The values of codes, float32."""
    if name not in MINIFLOAT:
        return codes.to(torch.float32)
    exponent_bits, mantissa_bits = MINIFLOAT[name]
    lowest, wide = 2 - 2 ** (exponent_bits - 1), codes.to(torch.int32)
    magnitude = wide & (2 ** (exponent_bits + mantissa_bits) - 1)
    field, mantissa = magnitude >> mantissa_bits, magnitude & (2**mantissa_bits - 1)
    normal = (((field + lowest - 1 + 127) << 23) | (mantissa << (23 - mantissa_bits))).view(torch.float32)
    value = torch.where(field == 0, mantissa.to(torch.float32) * 2.0 ** (lowest - mantissa_bits), normal)
    return torch.where(wide >> (exponent_bits + mantissa_bits) == 1, -value, value)


def wide(scale: torch.Tensor, spec: ActivationSpec, columns: int) -> torch.Tensor:
    """Scales per group as one per element; others broadcast already."""
    return scale.repeat_interleave(spec.granularity.size, -1)[..., :columns] if spec.granularity.kind == "group" else scale


def _cells(x, spec: ActivationSpec, scope: int, reduce: str):
    kind, function = spec.granularity.kind, getattr(torch, reduce)
    if kind == "tensor":
        return _tensor(x, scope, function)
    if kind == "token":
        return function(x, -1, keepdim=True)
    size = spec.granularity.size
    return function(torch.nn.functional.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size)), -1)


def _tensor(x, scope: int, function):
    flat = x.reshape(*x.shape[:scope], -1)
    # There may be no rows: the largest of nothing is 0.
    flat = torch.nn.functional.pad(flat, (0, 1))
    return function(flat, -1).reshape(*x.shape[:scope], *[1] * (x.ndim - scope))


def _calibrated(value, x, scope: int, dtype):
    batch = value.shape[:min(scope, max(value.ndim - 2, 0))]
    return value.to(dtype).reshape(*batch, *[1] * (x.ndim - len(batch)))


def _scale_zero(x, spec: ActivationSpec, scale, zero, scope: int):
    element = element_code(spec.code)
    if spec.outer is not None:
        return _two_level(x, spec, scale, scope), None
    if scale is not None and spec.granularity.kind == "tensor":
        return _calibrated(scale, x, scope, torch.float32), None if spec.zero is None else _calibrated(zero, x, scope, torch.int32)
    if spec.mode == "static":
        raise ValueError("a static activation scheme needs the calibrated input_scale of the weight, found none")
    if spec.zero == "int":
        low, high = (_cells(x, spec, scope, end) * spec.clip for end in ("amin", "amax"))
        low, high, steps = low.clamp(max=0), high.clamp(min=0), element.highest - element.lowest
        found = usable((high - low) / steps if spec.scale_rule == "minmax_inverse" else high / steps - low / steps)
        middle = (element.lowest - torch.round(low / found)).clamp(element.lowest, element.highest)
        return found, torch.where(torch.isfinite(middle), middle, torch.zeros_like(middle)).to(torch.int32)
    amax = _cells(x.abs(), spec, scope, "amax")
    if spec.clip != 1:
        amax = amax * spec.clip
    if spec.scale_rule == "mx_dual":
        spans = torch.nn.functional.pad(x.abs(), (0, -x.shape[-1] % 512)).unflatten(-1, (-1, 512))
        outer = usable(spans.amax(-1) * spec.clip / element.highest)
        outer = outer.repeat_interleave(512 // spec.granularity.size, -1)[..., :amax.shape[-1]]
        return power(exponents(amax / outer, spec.code, "mx_floor").to(torch.int32)) * outer, None
    if spec.scale_rule in MX_RULES:
        return power(exponents(amax, spec.code, spec.scale_rule).to(torch.int32)), None
    if spec.scale_rule == "full_range":
        low, high = (_cells(x, spec, scope, end) * spec.clip for end in ("amin", "amax"))
        return usable(-torch.where(high.abs() >= low.abs(), high, low) / -element.lowest), None
    if spec.scale_rule == "amax_half_inverse":
        return usable((amax / (element.highest + 0.5)).clamp(min=2**-23)), None
    return usable(amax / {"amax": element.highest, "amax_half": element.highest + 0.5}[spec.scale_rule]), None


def _two_level(x, spec: ActivationSpec, scale, scope: int):
    highest = element_code(spec.code).highest
    if scale is not None and spec.outer == "tensor":
        outer = _calibrated(scale, x, scope, torch.float32)
    else:
        amax = _tensor(x.abs(), scope, torch.amax) if spec.outer == "tensor" else x.abs().amax(-1, keepdim=True)
        outer = usable(amax * spec.clip / (highest * LARGEST_E4M3))
    inner = _cells(x.abs(), spec, scope, "amax") * spec.clip / highest / outer
    return inner.clamp(SMALLEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn).to(torch.float32) * outer


def quantize(x: torch.Tensor, spec: ActivationSpec, scale=None, zero=None, scope: int = 0):
    """`qfunc._activation.quantize_rows`: x [..., M, K] as (codes, scale float32, zero int32 or None), in JAX's form."""
    element = element_code(spec.code)
    x = x.to(torch.float32)
    x = x if spec.bound is None else x.clamp(-spec.bound, spec.bound)
    scale, zero = _scale_zero(x, spec, scale, zero, scope)
    y = x * wide(1 / scale, spec, x.shape[-1]) if spec.scale_rule in INVERSE else x / wide(scale, spec, x.shape[-1])
    if not element.integer:
        return encode(y, spec.code, spec.rounding), scale, None
    y = round_by(y, spec.rounding)
    if zero is not None:
        y = y + wide(zero, spec, x.shape[-1]).to(torch.float32)
    spared = zero is None and spec.mode == "dynamic" and spec.scale_rule == "amax"
    return y.clamp(-element.highest if spared else element.lowest, element.highest).to(torch.int8), scale, zero

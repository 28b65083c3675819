"""Quantized rows on the device: made when a matmul first needs them, in the form it needs, and shared by all that take them.

The device's own operators are used where they compute exactly what the activation's spec says; everything else is composed of elementwise
operations (`_compose`), which is correct and takes some eight small kernels where the operator takes one:

- `npu_dynamic_quant`: int8, int4 (packed) and e4m3 per token, s = amax / c, half to even, of 16-bit input. A row of zeros gets s = 0
  there, where the specification says 1: the product is 0 either way, and `plain` says 1.
- `npu_quantize`, dividing by the float32 scale: static int8. SGLang multiplies by a reciprocal rounded to 16 bits instead.
- `npu_dynamic_mx_quant`: the rules of `MX_OPERATOR`. e4m3 knows only half to even: ModelSlim's half away from zero is composed.
"""

from __future__ import annotations

import numpy as np
import torch

from qfunc._activation import QuantizedActivation
from qfunc._codes import code as element_code
from qfunc._spec import ActivationSpec

from . import _bits, _compose
from ._npu import FP4, operator
from ._placed import Part

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
TOKEN_TYPES = {"int8": torch.int8, "int4": torch.quint4x2, "fp8_e4m3": torch.float8_e4m3fn}
# The next float32 after 6 and before 7: with any other `dst_type_max` than 6 and 7 the operator rounds amax / dst_type_max up to a power
# of two, by division; so these two say "above 6" (round the exponent up) and "7 and above", for every amax that is not between the two.
_ABOVE_6, _BELOW_7 = (float(np.nextafter(np.float32(a), np.float32(b))) for a, b in ((6, 7), (7, 6)))
MX_OPERATOR = {
    ("fp8_e4m3", "mx_floor"): (0, 0.0), ("fp8_e4m3", "mx_rceil"): (1, 0.0),
    ("fp4_e2m1", "mx_floor"): (0, 0.0), ("fp4_e2m1", "mx_rceil"): (2, _ABOVE_6), ("fp4_e2m1", "mx_even"): (2, _BELOW_7),
    ("fp4_e2m1", "mx_even1"): (2, _BELOW_7), ("fp4_e2m1", "mx_ceil_x"): (2, 7.25),
}
"""(element, scale rule) to (scale_alg, dst_type_max) of `npu_dynamic_mx_quant`."""
MX_ROUNDING = {("fp8_e4m3", "rne"): "rint", ("fp4_e2m1", "rne"): "rint", ("fp4_e2m1", "rha"): "round"}


def dynamic_natively(s: ActivationSpec) -> bool:
    """True where npu_dynamic_quant computes what the spec says."""
    return s.code in TOKEN_TYPES and s.granularity.kind == "token" and s.mode == "dynamic" and s.zero is None and s.clip == 1 and (
        s.outer is None and s.outlier_threshold is None and (s.scale_rule, s.rounding, s.scale_dtype) == ("amax", "rne", "float32"))


def composed(spec: ActivationSpec | None) -> str:
    """Why activations of 16 bits are quantized by elementwise operations instead of an operator; empty where they are not."""
    if spec is None or dynamic_natively(spec):
        return ""
    if spec.scale_rule == "mx_dual":
        return "" if ("fp4_e2m1", spec.rounding) in MX_ROUNDING else f"npu_dynamic_dual_level_mx_quant does not round by {spec.rounding}"
    if spec.scale_dtype == "e8m0":
        known = (spec.code, spec.scale_rule) in MX_OPERATOR and (spec.code, spec.rounding) in MX_ROUNDING and spec.clip == 1
        return "" if known else f"npu_dynamic_mx_quant has no {spec.code} by {spec.scale_rule}, {spec.rounding}, clip {spec.clip:g}"
    if spec.mode == "static":
        return "" if spec.code == "int8" and spec.rounding == "rne" else f"npu_quantize makes no {spec.code}"
    what = [name for name, holds in (("clipping", spec.clip != 1), ("zero points", spec.zero is not None),
                                     (f"scales per {spec.granularity}", spec.granularity.kind != "token"),
                                     (f"the rule {spec.scale_rule}", spec.scale_rule != "amax")) if holds]
    return f"npu_dynamic_quant has no {', '.join(what) or spec.code}"


class Rows:
    """An activation [..., M, K] to be quantized by `spec`, or quantized already.

    Arguments: `x` float, or None with `plain`, the (codes, scale, zero) of `quantize_activation`; `scale`, `zero`, the calibrated ones of a
    static spec, [..., 1, 1]; `scope`, how many leading axes are tensors of their own to a scale per tensor.
    """

    def __init__(self, x, spec: ActivationSpec, *, scale=None, zero=None, scope: int = 0, plain=None):
        self.x, self.spec, self.scale, self.zero, self.scope = x, spec, scale, zero, scope
        self.shape = tuple((x if x is not None else plain[0]).shape)
        self._made = {"plain": QuantizedActivation(*plain)} if plain is not None else {}

    @classmethod
    def ready(cls, form: str, made: tuple, shape: tuple[int, ...], spec: ActivationSpec) -> Rows:
        """Rows that a fused operator has quantized already: `made` is what `token` or `mx`, the `form`, gives."""
        rows = object.__new__(cls)
        rows.x, rows.spec, rows.scale, rows.zero, rows.scope, rows.shape, rows._made = None, spec, None, None, 0, shape, {form: made}
        return rows

    def __getitem__(self, index: int) -> Rows:
        if self.x is None:
            plain = [None if part is None else part[index if part.shape[0] > 1 else 0] for part in self._made["plain"]]
            return Rows(None, self.spec, scope=max(self.scope - 1, 0), plain=plain)
        own = [None if value is None else value[index if value.shape[0] > 1 else 0] if value.ndim > 2 else value
               for value in (self.scale, self.zero)]
        return Rows(self.x[index], self.spec, scale=own[0], zero=own[1], scope=max(self.scope - 1, 0))

    def parts(self) -> list[Part]:
        """What `quantize_activation` gives back: codes, scale and, where asymmetric, zero."""
        return [Part(self, name) for name in ("codes", "scale", "zero")[:3 if self.spec.zero is not None else 2]]

    def part_shape(self, name: str) -> tuple[int, ...]:
        grain = self.spec.granularity
        if name == "codes":
            return self.shape
        if grain.kind == "tensor" and self.spec.outer is None:
            return (*self.shape[:self.scope], *[1] * (len(self.shape) - self.scope))
        return (*self.shape[:-1], -(-self.shape[-1] // grain.size) if grain.kind == "group" else 1)

    def part_tensor(self, name: str) -> torch.Tensor:
        return getattr(self.plain(), name)

    def _once(self, name: str, make):
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def take(self, rows: torch.Tensor) -> Rows:
        """The rows at these indices of the first axis, each with its own scale; the same object for the same indices, so that what
        several matmuls take is quantized once."""
        # The indices are kept with what was made of them: their id stays theirs.
        return self._once(("take", id(rows)), lambda: (rows, self._taken(rows)))[1]

    def _taken(self, rows: torch.Tensor) -> Rows:
        if self.x is not None:
            return Rows(self.x.index_select(0, rows), self.spec, scale=self.scale, zero=self.zero, scope=self.scope)
        parts = [part if part is None or part.shape[0] == 1 else part.index_select(0, rows) for part in self.plain()]
        return Rows(None, self.spec, plain=tuple(parts), scope=self.scope)

    @property
    def flat(self) -> torch.Tensor:
        """x as [rows, K], row by row in memory."""
        return self._once("flat", lambda: self.x.reshape(-1, self.shape[-1]).contiguous())

    def plain(self) -> QuantizedActivation:
        """Codes, scale and zero point in JAX's form."""
        return self._once("plain", self._plain)

    def _plain(self) -> QuantizedActivation:
        if self._native() and self.spec.code != "int4":
            codes, scale = self.token()
            scale = torch.where(scale == 0, torch.ones_like(scale), scale).reshape(*self.shape[:-1], 1)
            return QuantizedActivation(codes.reshape(self.shape), scale, None)
        return QuantizedActivation(*_compose.quantize(self.x, self.spec, self.scale, self.zero, self.scope))

    def _native(self) -> bool:
        return self.x is not None and self.x.dtype in SIXTEEN_BIT and dynamic_natively(self.spec)

    def per_row(self, value: torch.Tensor) -> torch.Tensor:
        """A scale or zero point per token or tensor, in JAX's form, as [rows]."""
        return value.expand(*self.shape[:-1], 1).reshape(-1)

    def token(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [rows, K] (int8, e4m3; int4 as int32 [rows, K / 8]) and float32 scales [rows]; without the zero points."""
        return self._once("token", self._token)

    def _token(self):
        if self._native():
            return operator("npu_dynamic_quant")(self.flat, dst_type=TOKEN_TYPES[self.spec.code])
        if self._static() and "plain" not in self._made:
            return self._quantized_static(), self.per_row(self.scale.to(torch.float32))
        plain = self.plain()
        codes = plain.codes.reshape(-1, self.shape[-1])
        return _bits.int4x8(codes) if self.spec.code == "int4" else codes, self.per_row(plain.scale)

    def _static(self) -> bool:
        s = self.spec
        return self.x is not None and s.code == "int8" and s.mode == "static" and s.rounding == "rne" and self.scale.numel() == 1

    def _quantized_static(self):
        """int8 [rows, K] by the operator, which divides by the scale, rounds and adds the zero point."""
        zero = torch.zeros(1, dtype=torch.int32, device=self.flat.device) if self.zero is None else self.zero.reshape(1)
        return operator("npu_quantize")(self.flat, self.scale.to(torch.float32).reshape(1), zero, torch.qint8, -1, True)

    def zeros(self) -> torch.Tensor | None:
        """Zero points int32 [rows], None where symmetric."""
        if self.spec.zero is None:
            return None
        return self.per_row(self.zero.to(torch.int32) if self._static() else self.plain().zero)

    def codes16(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes less their zero points as 16-bit floats [rows, K], exact (they stay within 256), and float32 scales [rows].

        For float16 the codes are 1 / 128 of themselves and the scales 128 times: their sums would leave its range.
        """
        if self.spec.code == "int4":
            plain = self.plain()
            codes, scale = plain.codes.reshape(-1, self.shape[-1]), self.per_row(plain.scale)
        else:
            codes, scale = self.token()
            zero = self.zeros()
            codes = codes if zero is None else codes.to(torch.int32) - zero[:, None]
        if dtype == torch.float16:
            return codes.to(dtype) / 128, scale * 128
        return codes.to(dtype), scale

    def mx(self) -> tuple[torch.Tensor, torch.Tensor]:
        """e4m3 [rows, K] or e2m1 uint8 [rows, K / 2], and exponent bytes uint8 [rows, ceil(K / 64), 2]."""
        return self._once("mx", self._mx)

    def _mx(self):
        s = self.spec
        rule, rounding = MX_OPERATOR.get((s.code, s.scale_rule)), MX_ROUNDING.get((s.code, s.rounding))
        if self.x is not None and rule is not None and rounding is not None and s.clip == 1 and self.x.dtype in SIXTEEN_BIT:
            kind = torch.float8_e4m3fn if s.code == "fp8_e4m3" else FP4
            return operator("npu_dynamic_mx_quant")(self.flat, dst_type=kind, round_mode=rounding, scale_alg=rule[0], dst_type_max=rule[1])
        plain = self.plain()
        codes = plain.codes.reshape(-1, self.shape[-1])
        scale = ((_compose.bits(plain.scale) >> 23) & 255).to(torch.uint8).reshape(codes.shape[0], -1)
        scale = torch.nn.functional.pad(scale, (0, scale.shape[-1] % 2)).unflatten(-1, (-1, 2))
        return _bits.pairs(codes) if element_code(s.code).bits == 4 else codes, scale


def rows_of(x, spec: ActivationSpec | None, **named):
    """Operands of x as `Rows`: parts of one, plain codes and scales, or a float tensor; the float tensor itself where spec is None."""
    if isinstance(x[0], Part) and isinstance(x[0].owner, Rows):
        return x[0].owner
    tensors = [part.tensor() if isinstance(part, Part) else part for part in x]
    if len(tensors) > 1:
        return Rows(None, spec, plain=(*tensors, None)[:3], scope=named.get("scope", 0))
    return tensors[0] if spec is None else Rows(tensors[0], spec, **named)

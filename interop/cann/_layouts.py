"""From the canonical leaves of a weight to the operands of its operator, once, and back to the codes.

Every builder takes a `Source` and returns `Laid`: tensors by name on the host (or on meta), facts for the call, and how to get the codes
back, from `base` where `weight` is a view of what lies in NZ. N is out, K is in, G = K / g groups, E experts; a leading E only for
stacks. The tables of shapes and types are op-plugin's operator pages; the re-layouts are those of SGLang's and vllm-ascend's loaders, with
their faults left out (named where they were).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from qfunc.kernels._dispatch import Packed

from . import _bits
from ._kinds import DUAL_BLOCK, MIXED_GROUP, Facts
from ._npu import FP4, format_cast


@dataclass
class Source:
    """The leaves of one matrix or stack of experts as tensors, and what is asked of them."""

    packed: Packed
    leaves: dict[str, torch.Tensor]
    columns: int
    rows: int
    experts: bool
    dtype: torch.dtype
    put: Callable[[torch.Tensor], torch.Tensor]

    @property
    def code(self) -> str:
        return self.packed.scheme.weight.code

    @property
    def facts(self) -> Facts:
        return Facts(self.packed.scheme.weight, self.packed.scheme.activation, self.experts, self.columns, self.rows)

    def integers(self) -> torch.Tensor:
        """int8 [.., N, K]: the stored integers, unsigned ones less half their range."""
        return _bits.signed(self.leaves["codes"], self.code, self.columns)

    def scales(self) -> torch.Tensor:
        """float32 [.., N, G] or [.., N, 1]: all levels multiplied, one scale per tensor repeated for its channels."""
        scale = self.leaves["scale"].to(torch.float32)
        if "scale2" in self.leaves:
            scale = scale * self.leaves["scale2"].to(torch.float32)
        scale = scale.expand(*scale.shape[:-2], self.rows, scale.shape[-1])
        # A group that is all of K is one scale per channel.
        return scale


@dataclass
class Laid:
    """What a builder returns."""

    operands: dict[str, torch.Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    codes: Callable | None = None


def _turned(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(-1, -2).contiguous()


def w8a8(s: Source) -> Laid:
    """int8 [.., K, N] in NZ; `scale` [.., N]: float32, for stacks in the type that the grouped operator pairs with its output.

    The grouped operator takes bfloat16 scales for bfloat16 output and float32 ones for float16. `sums` int32 [N], where x has zero points.
    """
    scale = s.scales()[..., 0]
    operands = {"weight": format_cast(s.put(_turned(s.integers()))), "scale": scale}
    if s.experts and s.dtype == torch.bfloat16:
        operands["scale"] = scale.to(torch.bfloat16)
    if s.packed.scheme.activation.zero is not None:
        operands["sums"] = s.integers().sum(-1, dtype=torch.int32)
    return Laid(operands, codes=lambda o: _bits.stored(_turned(o["weight"]), s.code))


def w8a8_static(s: Source) -> Laid:
    """As `w8a8`, with the input's scale float32 [1], zero int32 [1] and `quant_bias` int32 [N] = -zero sum_k w.

    SGLang keeps the input's scale in the model's type and multiplies by its 16-bit reciprocal, while deq_scale was made with the float32
    one; here the float32 scale divides. A fused layer takes the last shard's input scale there; here every projection has its own.

    Stacks, which SGLang refuses: input scales and zeros [E], `quant_bias` [E, N], for the grouped operator's form with a scale per row.
    """
    laid, count = w8a8(s), s.leaves["codes"].shape[0] if s.experts else 1
    laid.operands["input_scale"] = s.leaves["input_scale"].to(torch.float32).reshape(-1).expand(count)
    zero = s.leaves.get("input_zero", torch.zeros_like(s.leaves["input_scale"])).to(torch.int32).reshape(-1).expand(count)
    laid.operands["input_zero"] = zero
    if s.packed.scheme.activation.zero is not None:
        laid.operands["quant_bias"] = -(zero[:, None] if s.experts else zero) * laid.operands["sums"]
    if s.experts:
        return laid
    laid.operands["deq_scale"] = laid.operands["scale"] * laid.operands["input_scale"]
    if s.dtype == torch.float16:
        laid.operands["deq_scale64"] = _bits.float_bits(_bits.short_float(laid.operands["deq_scale"]))
    return laid


def _four_bits(s: Source) -> tuple[torch.Tensor, Callable]:
    """int4 in int32 [K, N / 8], eight outputs a word, and the way back."""
    words = _bits.int4x8(_turned(s.integers()))
    return words, lambda o: _bits.stored(_turned(_bits.from_int4x8(o["base"])), s.code)


def _four_bits_nz(s: Source) -> tuple[torch.Tensor, Callable]:
    """The same for stacks: bytes [E, K, N / 2] in NZ, to be seen as int32 [E, K, N / 8], as the grouped operator wants them."""
    data = format_cast(s.put(_bits.pairs(_turned(s.integers())).view(torch.int8)))
    return data, lambda o: _bits.stored(_turned(_bits.from_int4x8(o["base"].view(torch.int32))), s.code)


def w4a4(s: Source) -> Laid:
    """Matrices: int32 [K / 8, N], a transposed view of [N, K / 8], and float32 scales [N] (op-plugin's table; SGLang passes 16-bit ones).

    Stacks: int32 [E, K, N / 8] in NZ and scales as float32 bits in int64 [E, N]. An online rotation that a checkpoint names for such a
    layer is applied to x by the layer, in front of this product; SGLang 0.5.23 ignores it.
    """
    scale = s.scales()[..., 0]
    if s.experts:
        data, back = _four_bits_nz(s)
        return Laid({"weight": data.view(torch.int32), "base": data, "scale": _bits.float_bits(scale)}, codes=back)
    words = _bits.int4x8(s.integers())
    return Laid({"weight": s.put(words).t(), "scale": scale}, codes=lambda o: _bits.stored(_bits.from_int4x8(o["weight"].t()), s.code))


def w4a8(s: Source) -> Laid:
    """int4 in int32 [.., K, N / 8]; scales as float32 bits in int64, [K / 256, N] for matrices, [E, 1 or G, N] for stacks.

    The kernel splits x into two nibbles, the lower one less 8, and adds `correction` = 8 sum_k(w s), float32 [.., N], to make up for it:
    that is arithmetic of the device, not part of the result (ModelSlim's `scale_bias`, recomputed here and so never out of step). SGLang
    knows experts per channel alone, and under tensor parallelism adds the whole correction on every rank.
    """
    scale = s.scales()
    q, groups = s.integers(), scale.shape[-1]
    if not s.experts:
        groups = s.columns // MIXED_GROUP
        scale = scale.repeat_interleave(groups // scale.shape[-1], -1)
    if groups > 1:
        scale = _bits.short_float(scale)            # the fixed-point pipe keeps 10 bits of mantissa; so does the correction then
    sums = q.unflatten(-1, (groups, -1)).sum(-1, dtype=torch.int32).to(torch.float32)
    correction = 8 * (sums * scale).sum(-1)
    base, back = _four_bits_nz(s) if s.experts else _four_bits(s)
    words = base.view(torch.int32)
    operands = {"weight": words, "base": base, "scale": _bits.float_bits(_turned(scale)), "correction": correction}
    return Laid(operands, {"groups": groups}, back)


def a16(s: Source) -> Laid:
    """Weight-only: int4 in int32 [.., K, N / 8] or int8 [.., K, N], never NZ; `scale`, `offset` [.., G, N] or [.., N] in x's type.

    The operator computes (w + offset) scale, so a zero point z of b-bit codes becomes the offset 2^(b-1) - z. SGLang 0.5.23 passes
    z - 2^(b-1) for asymmetric GPTQ, which is wrong for all but symmetric checkpoints, and hands over the groups -1 and K, which the
    operator refuses; here one scale per channel is group 0. It makes negative scales of GPTQ experts positive by negating weights, where
    -8 becomes 7; here they keep their sign. Codes of 2 and 3 bits become int4, of 5 to 7 bits int8, exactly.

    The grouped operator takes int8 only with one scale per channel. In groups they go as two int4 planes w = 16 h + l + 8 along K, and x
    twice: exact, at twice the multiplications.
    """
    q, scale, facts = s.integers(), s.scales(), s.facts
    half = 2 ** (facts.bits - 1)
    offset = None if facts.weight.zero is None else half - s.leaves["zero"].to(torch.float32).expand(scale.shape)
    planes = s.experts and not facts.narrow and facts.group > 0

    def laid_out(x):
        x = _turned(x).to(s.dtype)
        return x if facts.group else x[..., 0, :].contiguous()

    if planes:
        low = (0.0 if offset is None else offset) + 8.0
        low = low if torch.is_tensor(low) else torch.full_like(scale, low)
        words = _bits.int4x8(_turned(torch.cat([q >> 4, (q & 15) - 8], -1)))
        operands = {"weight": words, "scale": laid_out(torch.cat([scale * 16, scale], -1)),
                    "offset": laid_out(torch.cat([torch.zeros_like(scale), low], -1))}

        def back(o):
            high, low = _turned(_bits.from_int4x8(o["weight"])).chunk(2, -1)
            return _bits.stored((high << 4) + low + 8, s.code)
        return Laid(operands, {"group": facts.group, "planes": True}, back)

    if facts.narrow:
        weight, back = _bits.int4x8(_turned(q)), lambda o: _bits.stored(_turned(_bits.from_int4x8(o["weight"])), s.code)
    else:
        weight, back = _turned(q), lambda o: _bits.stored(_turned(o["weight"]), s.code)
    operands = {"weight": weight, "scale": laid_out(scale)}
    if offset is not None:
        operands["offset"] = laid_out(offset)
    return Laid(operands, {"group": facts.group}, back)


def fp8(s: Source) -> Laid:
    """e4m3 [.., K, N], a transposed view of [.., N, K], and float32 scales [.., N]."""
    weight = s.put(s.leaves["codes"]).transpose(-1, -2)
    return Laid({"weight": weight, "scale": s.scales()[..., 0]}, codes=lambda o: o["weight"].transpose(-1, -2).contiguous())


def block8(s: Source) -> Laid:
    """int8 [K, N], or e4m3 [.., K, N] as a view of [.., N, K]; float32 scales [.., ceil(K / 128), ceil(N / 128)], turned as the weight is.

    SGLang requantizes such checkpoints to MXFP8 on A5 where their scales are no powers of two; the operators know blocks as they are.
    """
    scale = s.leaves["scale"]
    if s.code == "int8":
        return Laid({"weight": _turned(s.leaves["codes"]), "scale": _turned(scale)}, codes=lambda o: _turned(o["weight"]))
    return Laid({"weight": s.put(s.leaves["codes"]).transpose(-1, -2), "scale": s.put(scale).transpose(-1, -2)},
                codes=lambda o: o["weight"].transpose(-1, -2).contiguous())


def _mx_scale(s: Source) -> torch.Tensor:
    """Exponent bytes in pairs, [.., K / 64, N, 2]: a view of [.., N, K / 64, 2], completed by a 0 where their number is odd."""
    scale = s.leaves["scale"]
    scale = torch.nn.functional.pad(scale, (0, scale.shape[-1] % 2))
    return s.put(scale.unflatten(-1, (-1, 2))).transpose(-2, -3)


def mxfp8(s: Source) -> Laid:
    """e4m3 [.., K, N] and exponents [.., K / 64, N, 2]: both transposed views of what lies row by row, stacks in NZ below the view."""
    weight = s.put(s.leaves["codes"])
    weight = format_cast(weight) if s.experts else weight
    return Laid({"weight": weight.transpose(-1, -2), "base": weight, "scale": _mx_scale(s)}, codes=lambda o: o["base"])


def mxfp4(s: Source) -> Laid:
    """e2m1, two a byte, [.., K / 2, N], a view of [.., N, K / 2]; NZ where the operator wants it: with e4m3 activations, and in stacks."""
    data = s.put(_bits.pairs(_bits.unpack(s.leaves["codes"], 4, s.columns)))
    if s.packed.scheme.activation.code == "fp8_e4m3":
        data = format_cast(data, customize_dtype=torch.float8_e4m3fn, input_dtype=FP4)
    elif s.experts:
        data = format_cast(data)

    return Laid({"weight": data.transpose(-1, -2), "base": data, "scale": _mx_scale(s)},
                codes=lambda o: _bits.pack(_bits.nibbles(o["base"]), 4, 0))


def mxfp4_dual(s: Source) -> Laid:
    """e2m1 as int8 [N, K / 2] in NZ, not turned; `scale` uint8 [N, K / 64, 2]; `level0` float32 [K / 512, N], ones where there is none."""
    data = _bits.pairs(_bits.unpack(s.leaves["codes"], 4, s.columns)).view(torch.int8)
    level0 = s.leaves.get("scale2")
    if level0 is None:
        level0 = torch.ones((s.rows, s.columns // DUAL_BLOCK), dtype=torch.float32, device=data.device)
    data = format_cast(s.put(data), customize_dtype=torch.int8)
    return Laid({"weight": data, "scale": s.leaves["scale"].unflatten(-1, (-1, 2)), "level0": _turned(level0.to(torch.float32))},
                codes=lambda o: _bits.pack(_bits.nibbles(o["weight"]), 4, 0))


LAYOUTS: dict[str, Callable[[Source], Laid]] = {
    "w8a8": w8a8, "w8a8_static": w8a8_static, "w4a4": w4a4, "w4a8": w4a8, "a16": a16, "codes16": a16, "fp8": fp8, "w8a8_block": block8,
    "fp8_block": block8, "mxfp8": mxfp8, "mxfp4_a8": mxfp4, "mxfp4": mxfp4, "mxfp4_dual": mxfp4_dual,
}

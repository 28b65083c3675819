"""`moe`: a mixture of experts in the operators that Ascend has for it, for direct use: route, two grouped matmuls, combine.

    experts = place_experts(gate, up, down, soc="A2")
    y = moe(experts, x, weights, choice)

`npu_moe_init_routing_v2` sorts the rows by expert, and quantizes them where the first matmul takes int8 or the OCP form of MXFP8; gate and
up are one stack, placed together; `npu_dequant_swiglu_quant` (int8) and `npu_grouped_matmul_swiglu_quant_v2` (microscaled) fuse what stands
between the matmuls, as SGLang does; `npu_moe_finalize_routing` weighs and adds up. A fused operator rounds in other places than the
layers of qfunc, which round to the model's type after each step: results agree as two evaluations in 16 bits do, not bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qfunc._qtensor import QTensor
from qfunc._spec import CHANNEL

from . import _grouped, _soc
from ._leaves import leaves_of
from ._npu import E8M0, FP4, operator
from ._place import SIXTEEN, PlacementError, place_leaves, refusal
from ._placed import Placed
from ._quantize import SIXTEEN_BIT, Rows, dynamic_natively

PLAIN, INT8, MX = -1, 1, 3
"""What routing makes of the rows: `quant_mode`."""


@dataclass(frozen=True)
class Experts:
    """Placed experts: `gate_up` (E, hidden, 2 inner), gate in front, and `down` (E, inner, hidden)."""

    gate_up: Placed
    down: Placed

    @property
    def count(self) -> int:
        return self.down.shape[0]


def place_experts(gate: QTensor, up: QTensor, down: QTensor, device: str = "npu", soc: str = "A2", *, dtype: str | None = None,
                  dequantize: bool = False) -> Experts:
    """Place the three stacks (E, hidden, inner), (E, hidden, inner), (E, inner, hidden) of a mixture; the arguments are those of `place`.

    Gate and up must have the same scheme, down may have another (ModelSlim's mixed bits). Raises PlacementError as `place` does, and
    ValueError where gate and up cannot be one stack.
    """
    _soc.check_soc(soc)
    both = joined(gate, up)
    refused, out = [], []
    for name, (packed, leaves, shape) in (("gate_up", both), ("down", (*leaves_of(down), down.matrix_shape))):
        why = refusal(packed.scheme, shape, soc, True)
        if why is not None and not dequantize:
            refused.append((name, why))
        target = torch.device("meta") if leaves["codes"].is_meta else torch.device(device)
        kind = SIXTEEN[dtype] if dtype else SIXTEEN.get(packed.dtype, torch.bfloat16)
        out.append((packed, leaves, {"soc": soc, "device": target, "dtype": kind, "dequantize": why is not None, "experts": True}))
    if refused:
        raise PlacementError(refused)
    return Experts(*(place_leaves(packed, leaves, **named) for packed, leaves, named in out))


def joined(gate: QTensor, up: QTensor):
    """(static record, leaves, shape) of gate and up as one stack, gate's outputs first."""
    (first, a), (second, b) = leaves_of(gate), leaves_of(up)
    if first != second or gate.matrix_shape[:-1] != up.matrix_shape[:-1]:
        raise ValueError(f"gate and up are no one stack: {gate!r} and {up!r}; leave them apart and use grouped_matmul")
    scheme, whole = first.scheme, {}
    blocks = scheme.weight.granularity.kind == "block"
    for name in a:
        if name in ("smooth", "perm", "input_scale", "input_zero"):
            if not a[name].is_meta and not torch.equal(a[name], b[name]):
                raise ValueError(f"gate and up see the same input, but their {name} differ; leave them apart and use grouped_matmul")
            whole[name] = a[name]
            continue
        sides = [a[name], b[name]]
        if scheme.weight.granularity.kind == "tensor" and name in ("scale", "zero", "scale2"):
            sides = [leaf.expand(*leaf.shape[:-2], q.matrix_shape[-1], 1) for leaf, q in zip(sides, (gate, up), strict=True)]
        elif blocks and gate.matrix_shape[-1] % scheme.weight.granularity.out:
            raise ValueError(f"gate's outputs, {gate.matrix_shape[-1]}, are no whole blocks of {scheme.weight.granularity}")
        elif name != "codes" and sides[0].shape[-2] == 1 and not (blocks and name in ("scale", "zero")):
            sides = [leaf.expand(*leaf.shape[:-2], q.matrix_shape[-1], leaf.shape[-1]) for leaf, q in zip(sides, (gate, up), strict=True)]
        whole[name] = torch.cat(sides, -2)
    if scheme.weight.granularity.kind == "tensor":
        first = _with_scheme(first, scheme.replace(weight_granularity=CHANNEL))
    *lead, columns, rows = gate.matrix_shape
    return first, whole, (*lead, columns, rows + up.matrix_shape[-1])


def _with_scheme(packed, scheme):
    return type(packed)(scheme, packed.dtype, packed.layout, packed.pad, packed.fields)


def silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) up: the activation of Llama, Qwen and DeepSeek."""
    return torch.nn.functional.silu(gate) * up


def moe(experts: Experts, x: torch.Tensor, weights: torch.Tensor, choice: torch.Tensor, combine: Callable = silu) -> torch.Tensor:
    """Sum over each token's experts of weight times down(combine(gate(x), up(x))).

    Arguments:
        x: [M, hidden], the 16-bit type that the experts were placed for.
        weights: float [M, k]; choice: integers [M, k], the experts of each token.
        combine: `silu` runs in the device's fused operators; another function of (gate, up) (clamped, swish with an offset) runs as it is,
            in float32: the fused operators know no limits.

    Returns: [M, hidden] in the type of x; of a slice of the inner size (tensor parallel), the partial sum. No tokens give no rows.
    Raises ValueError where types do not fit.
    """
    w13, w2 = experts.gate_up, experts.down
    if x.dtype not in SIXTEEN_BIT or x.dtype != w13.dtype:
        raise ValueError(f"moe: the experts were placed for {w13.dtype}, found x of {x.dtype}")
    if not x.shape[0]:
        return x.new_zeros((0, w2.shape[-1]))
    choice = choice.to(torch.int32)
    mode = routed(w13)
    rows, back, counts, scale = operator("npu_moe_init_routing_v2")(
        x, choice, active_num=choice.numel(), expert_num=experts.count, expert_tokens_num_type=1, expert_tokens_num_flag=True,
        active_expert_range=[0, experts.count], quant_mode=mode)
    counts, spec = counts.to(torch.int64), w13.scheme.activation
    source = rows
    if mode == INT8:
        source = Rows.ready("token", (rows, scale), tuple(rows.shape), spec)
    elif mode == MX:
        scale = scale.view(torch.uint8).reshape(rows.shape[0], -1, 2)
        source = Rows.ready("mx", (rows, scale), tuple(rows.shape), spec)
    hidden = _inner(w13, w2, _as_rows(w13, source, counts), counts, combine, x.dtype)
    y = _grouped.multiply(w2, hidden, counts, x.dtype).to(x.dtype)
    return operator("npu_moe_finalize_routing")(y, None, None, None, weights.to(x.dtype), back, choice, drop_pad_mode=2)


def routed(w13: Placed) -> int:
    """In which form routing hands the rows on: quantized where it computes just what the scheme says."""
    spec, plain = w13.scheme.activation, not {"smooth", "perm"} & w13.operands.keys()
    if w13.kind in ("w8a8", "w4a8") and plain and dynamic_natively(spec):
        return INT8
    return MX if w13.kind == "mxfp8" and plain and _ocp(spec) else PLAIN


def _ocp(spec) -> bool:
    """The form in which fused operators quantize: exponent rounded down, elements half to even."""
    return (spec.code, spec.scale_rule, spec.rounding, spec.clip) == ("fp8_e4m3", "mx_floor", "rne", 1)


def _as_rows(w: Placed, x, counts):
    if isinstance(x, Rows):
        return x
    return _grouped.prepared(w, x, _grouped.owners(counts, x.shape[0]) if _grouped.by_expert(w) else None)


def _inner(w13: Placed, w2: Placed, rows, counts, combine: Callable, dtype: torch.dtype):
    """From the routed rows to the input of the second matmul."""
    fused = combine is silu
    if fused and w13.kind == w2.kind and w13.kind in ("mxfp8", "mxfp4_a8") and _ocp(w2.scheme.activation):
        return _fused_mx(w13, w2, rows, counts)
    h = _grouped.multiply(w13, rows, counts, dtype).to(dtype)
    if fused and w2.kind in ("w8a8", "w4a8") and dynamic_natively(w2.scheme.activation):
        made = operator("npu_dequant_swiglu_quant")(h, activate_left=True, quant_mode=1)
        return Rows.ready("token", made, (h.shape[0], h.shape[1] // 2), w2.scheme.activation)
    if fused:
        h = operator("npu_swiglu")(h, dim=-1)
    else:
        h = combine(*h.to(torch.float32).chunk(2, -1)).to(dtype)
    return _as_rows(w2, h, counts)


def _fused_mx(w13: Placed, w2: Placed, rows: Rows, counts):
    codes, scale = rows.mx()
    named = {"weight_dtype": FP4} if w13.kind == "mxfp4_a8" else {}
    made = operator("npu_grouped_matmul_swiglu_quant_v2")(
        codes, [w13.operands["weight"]], [w13.operands["scale"]], scale, counts.cumsum(0), dequant_mode=2, dequant_dtype=torch.float32,
        quant_mode=2, quant_dtype=torch.float8_e4m3fn, weight_scale_dtype=E8M0, x_scale_dtype=E8M0, **named)
    return Rows.ready("mx", made, (codes.shape[0], w2.shape[-2]), w2.scheme.activation)

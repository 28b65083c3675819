"""The second judge: what torch_npu's Meta functions let pass and op-plugin's C++ or the operators' tables of data types refuse.

Each rule sees one call with its arguments by name (defaults filled in) and raises `Refused`. The rules are those of op-plugin's operator
pages (`docs/zh/custom_APIs/torch_npu`) and `op_plugin/ops/opapi`, narrowed to the forms that the bridge uses: a legal call of another form
is refused as well, since the bridge has no reason to make it. `on(soc)` adds the generation that an operator needs.
"""

from __future__ import annotations

from npu_call import FP4, Call, Refused, need, number, on, sixteen, types
from npu_rules_grouped import finalize_routing, grouped, grouped_swiglu, init_routing, swiglu, swiglu_quant
from npu_rules_matmul import dual_matmul, quant_matmul, weight_quant

__all__ = ["RULES", "Refused", "check", "on"]


def check(name: str, overload, args, named) -> None:
    """Judge one call of `npu::<name>`."""
    if name not in RULES:
        raise Refused(f"{name}: the bridge makes no such call")
    arguments = overload._schema.arguments
    full = {a.name: a.default_value for a in arguments if a.has_default_value()}
    full.update(zip((a.name for a in arguments), args, strict=False))
    unknown = set(named) - {a.name for a in arguments}
    need(not unknown, name, f"unknown {', '.join(sorted(unknown))}")
    full.update(named)
    try:
        RULES[name](Call(name, full))
    except Refused:
        raise
    except (ValueError, IndexError, TypeError, AttributeError, ZeroDivisionError) as error:
        # Rules take shapes apart as the form has them.
        raise Refused(f"{name}: an argument of another rank or kind ({error})") from error


def quantize(c: Call):
    """Division by one float32 scale or one for each channel; the zero point int32 of the same length (table for div_mode True)."""
    t = types()
    c.not_a5()
    c.need(c.self.dtype in (t.float32, *sixteen()) and c.self.dim() == 2, "x [rows, K] in floating point")
    c.need(c.div_mode and c.axis == -1 and number(c.dtype) == 12, "division along the last axis, to qint8")
    c.tensor("scales", (1,) if c.scales.numel() == 1 else (c.self.shape[1],), (t.float32,))
    c.tensor("zero_points", c.scales.shape, (t.int32,))


def dynamic_quant(c: Call):
    c.need(c.input.dtype in sixteen() and c.input.dim() == 2, "x [rows, K], float16 or bfloat16")
    kind = number(c.dst_type)
    c.need(kind in (1, 16, 24), "to int8, quint4x2 or e4m3")
    c.need(kind != 16 or c.input.shape[-1] % 8 == 0, "int4: K % 8 == 0")
    c.need(c.smooth_scales is None and c.group_index is None and c.quant_mode == "pertoken" and c.dst_type_max == 0, "one scale per token")
    c.need(c.input.is_contiguous(), "contiguous rows")
    c.a5() if kind == 24 else c.not_a5()


def mx_quant(c: Call):
    c.a5()
    kind = number(c.dst_type)
    c.need(c.input.dtype in sixteen() and c.input.dim() == 2, "x [rows, K], float16 or bfloat16")
    c.need(kind in (24, FP4) and c.axis == -1 and c.block_size == 32 and c.max_low_bound == 0, "blocks of 32 to e4m3 or e2m1")
    c.need(c.round_mode in (("rint", "round") if kind == FP4 else ("rint",)), "e4m3 rounds to even alone")
    c.need(c.scale_alg in ((0, 2) if kind == FP4 else (0, 1)), "scale_alg")
    c.need(c.dst_type_max == 0 if c.scale_alg != 2 else 6 <= c.dst_type_max <= 12, "dst_type_max")
    c.need(kind != FP4 or c.input.shape[-1] % 64 == 0, "e2m1: K % 64 == 0")


def dual_quant(c: Call):
    c.a5()
    c.need(c.input.dtype in sixteen() and c.input.dim() == 2 and c.input.shape[1] % 512 == 0, "x [rows, K], K % 512 == 0")
    if c.smooth_scale is not None:
        c.tensor("smooth_scale", (c.input.shape[1],), (c.input.dtype,))


def format_cast(c: Call):
    t = types()
    tile = {t.float16: 16, t.bfloat16: 16, t.uint8: 64, t.int32: 64}.get(c.self.dtype, 32)
    c.need(c.acl_format == 29 and c.self.dim() in (2, 3) and c.self.is_contiguous(), "to FRACTAL_NZ, a contiguous matrix or stack")
    c.need(c.self.shape[-2] % 16 == 0 and c.self.shape[-1] % tile == 0, f"whole tiles of 16 x {tile}")


RULES = {
    "npu_quantize": quantize, "npu_dynamic_quant": dynamic_quant, "npu_quant_matmul": quant_matmul,
    "npu_weight_quant_batchmatmul": weight_quant, "npu_grouped_matmul": grouped, "npu_grouped_matmul_swiglu_quant_v2": grouped_swiglu,
    "npu_dynamic_mx_quant": mx_quant, "npu_dynamic_dual_level_mx_quant": dual_quant, "npu_dual_level_quant_matmul": dual_matmul,
    "npu_moe_init_routing_v2": init_routing, "npu_moe_finalize_routing": finalize_routing, "npu_swiglu": swiglu,
    "npu_dequant_swiglu_quant": swiglu_quant, "npu_format_cast": format_cast,
}

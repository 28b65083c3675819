"""Rules of the products of experts, and of what stands around them: routing, activation, combining."""

from __future__ import annotations

from npu_call import E8M0, FP4, LAST, Call, number, output, sixteen, types


def grouped(c: Call):
    t = types()
    x, w, out = c.first("x"), c.first("weight"), output(c)
    c.need(c.split_item == 2 and c.group_type == 0 and c.group_list_type == 1, "one x, one stack, counts along the rows")
    c.need(out in sixteen(), "to float16 or bfloat16")
    c.need(x.dim() == 2 and w.dim() == 3, "x [rows, K], weight [E, K, N]")
    experts = w.shape[0]
    c.need(experts <= 1024, "up to 1024 groups")
    c.tensor("group_list", (experts,), (t.int64,))
    c.need(c.group_list is not None, "group_list")
    c.need(c.group_list.is_meta or int(c.group_list.sum()) == x.shape[0], "counts that add up to all rows")
    absent = (c.offset, c.activation_input, c.activation_quant_scale, c.activation_quant_offset, c.tuning_config)
    c.need(not any(absent) and c.act_type == 0, "no other argument")
    c.need(x.shape[-1] <= LAST and w.shape[-1] <= LAST, f"last axes up to {LAST}")
    kind = _grouped_mx if c.per_token_scale_dtype is not None else _grouped_float if x.dtype in sixteen() else _grouped_codes
    kind(c, x, w, out, experts)


def _grouped_float(c: Call, x, w, out, experts: int):
    t = types()
    c.need(c.first("scale") is None and c.first("per_token_scale") is None and c.first("bias") is None, "no scale of codes, no bias")
    c.need(out == x.dtype, "the result has x's type")
    scale, offset = c.first("antiquant_scale"), c.first("antiquant_offset")
    if w.dtype == x.dtype:
        c.need(w.shape[1] == x.shape[1] and scale is None and offset is None, "floating point has no scales")
        return
    c.not_a5()
    c.need(w.dtype in (t.int8, t.int32) and w.shape[1] == x.shape[1], "int8 or int4 weight [E, K, N]")
    n = w.shape[2] * (8 if w.dtype == t.int32 else 1)
    c.need(scale is not None and offset is not None and scale.shape == offset.shape, "antiquant scale and offset, alike")
    grouped = w.dtype == t.int32 and scale.dim() == 3 and x.shape[1] % scale.shape[1] == 0
    c.need(scale.dim() == 2 or grouped, "int8 has one scale per channel; the groups of int4 divide K")
    shape = (experts, n) if scale.dim() == 2 else (experts, scale.shape[1], n)
    c.tensor("antiquant_scale", shape, (x.dtype,), scale)
    c.tensor("antiquant_offset", shape, (x.dtype,), offset)


def _grouped_codes(c: Call, x, w, out, experts: int):
    t = types()
    scale, token, bias = c.first("scale"), c.first("per_token_scale"), c.first("bias")
    c.need(c.first("antiquant_scale") is None and c.first("antiquant_offset") is None, "no antiquant scale")
    c.need(c.x_dtype is None and c.weight_dtype is None and c.scale_dtype is None, "types that torch knows")
    c.need(scale is not None and token is not None, "scale and per_token_scale")
    blocks = x.dtype == t.float8_e4m3fn and scale.dim() == 3
    c.tensor("per_token_scale", (x.shape[0], -(-x.shape[1] // 128)) if blocks else (x.shape[0],), (t.float32,), token)
    if blocks:
        c.tensor("scale", (experts, -(-w.shape[1] // 128), -(-w.shape[2] // 128)), (t.float32,), scale)
        c.need(w.stride(1) == 1 and scale.stride(2) >= scale.stride(1) or 1 in scale.shape[1:], "weight and scale transposed alike")
    columns, n = x.shape[1] * (8 if x.dtype == t.int32 else 1), w.shape[2] * (8 if w.dtype == t.int32 else 1)
    c.need(w.shape[1] == columns, "K of x and weight")
    if x.dtype == t.float8_e4m3fn:
        c.a5()
        c.need(w.dtype == x.dtype and bias is None, "e4m3 x e4m3, no bias")
        return None if blocks else c.tensor("scale", (experts, n), (t.float32,), scale)
    c.not_a5()
    c.need((x.dtype, w.dtype) in ((t.int8, t.int8), (t.int8, t.int32), (t.int32, t.int32)), "int8 x int8, int8 x int4 or int4 x int4")
    if w.dtype == t.int8:
        c.tensor("bias", (experts, n), (t.int32,), bias)
        return c.tensor("scale", (experts, n), (t.bfloat16,) if out == t.bfloat16 else (t.float32,), scale)
    mixed = x.dtype == t.int8
    groups = scale.shape[1] if scale.dim() == 3 else 1
    c.tensor("scale", (experts, groups, n) if mixed else (experts, n), (t.int64,), scale)
    c.need(columns % groups == 0, "groups divide K")
    c.need((bias is not None) == mixed, "int8 x int4 needs 8 sum_k(w s), int4 x int4 has no bias")
    if mixed:
        c.tensor("bias", (experts, n), (t.float32,), bias)


def _grouped_mx(c: Call, x, w, out, experts: int):
    t = types()
    c.a5()
    fourx, fourw = c.x_dtype == FP4, c.weight_dtype == FP4
    columns, n, count = x.shape[1] * (1 + fourx), w.shape[2], -(-x.shape[1] * (1 + fourx) // 64)
    mixed = fourw and not fourx
    c.need(c.per_token_scale_dtype == E8M0 and (c.scale_dtype == E8M0) == (not mixed), "scales are e8m0")
    c.need(x.dtype == (t.uint8 if fourx else t.float8_e4m3fn) and w.dtype == (t.uint8 if fourw else t.float8_e4m3fn), "carriers")
    c.need((not fourx or fourw) and w.shape[1] * (1 + fourw) == columns, "K of x and weight")
    c.need(not fourw or columns % 64 == 0, "e2m1: K % 64 == 0")
    scale = c.first("antiquant_scale") if mixed else c.first("scale")
    other = c.first("scale") if mixed else c.first("antiquant_scale")
    c.need(scale is not None and other is None, "e4m3 x e2m1 takes its scale as antiquant_scale, the others as scale")
    c.tensor("scale", (experts, count, n, 2), (t.uint8,), scale)
    c.tensor("per_token_scale", (x.shape[0], count, 2), (t.uint8,), c.first("per_token_scale"))
    c.need(c.first("per_token_scale") is not None and c.first("bias") is None and c.first("antiquant_offset") is None, "no bias, no offset")
    c.need(w.stride(1) == 1 and scale.stride(2) > scale.stride(1) or 1 in (n, count), "weight and scale transposed alike")


def grouped_swiglu(c: Call):
    t = types()
    c.a5()
    w, scale, four = c.first("weight"), c.first("weight_scale"), c.weight_dtype == FP4
    (rows, columns), (experts, held, n) = c.x.shape, w.shape
    c.need(c.x.dtype == t.float8_e4m3fn and c.x_dtype is None, "x e4m3")
    c.need(held * (1 + four) == columns and w.dtype == (t.uint8 if four else t.float8_e4m3fn) and c.weight_dtype in (None, FP4), "weight")
    c.tensor("weight_scale", (experts, -(-columns // 64), n, 2), (t.uint8,), scale)
    c.tensor("x_scale", (rows, -(-columns // 64), 2), (t.uint8,))
    c.tensor("group_list", (experts,), (t.int64,))
    c.need(n % 128 == 0, "half of N in pairs of blocks: N % 128 == 0")
    c.need(c.group_list_type == 0 and c.dequant_mode == c.quant_mode == 2, "running totals; MX modes")
    c.need(number(c.dequant_dtype) == 6 and number(c.quant_dtype) == 24, "by way of float32, to e4m3")
    c.need(c.weight_scale_dtype == E8M0 and c.x_scale_dtype == E8M0, "scales are e8m0")
    absent = (c.smooth_scale, c.weight_assist_matrix, c.bias, c.tuning_config)
    c.need(all(a is None for a in absent), "no other argument")


def init_routing(c: Call):
    t = types()
    c.need(c.x.dtype in sixteen() and c.x.dim() == 2, "x [M, H], 16-bit")
    c.need(c.expert_idx.dtype == t.int32 and c.expert_idx.dim() == 2 and c.x.shape[0] == c.expert_idx.shape[0], "experts int32 [M, k]")
    c.need(c.active_num == c.expert_idx.numel() and c.expert_num > 0, "all rows are active")
    c.need(c.expert_tokens_num_type == 1 and c.expert_tokens_num_flag, "counts")
    c.need(list(c.active_expert_range) == [0, c.expert_num], "all experts")
    c.need(c.quant_mode in (-1, 1, 3) and c.scale is None and c.offset is None and c.drop_pad_mode == 0 and c.row_idx_type == 0, "form")
    c.need(c.expert_capacity == -1 and c.x_dtype is None, "no capacity")
    if c.quant_mode == 3:
        c.a5()
    if c.quant_mode == 1:
        c.not_a5()


def finalize_routing(c: Call):
    t = types()
    rows = c.expanded_permuted_rows
    c.need(c.skip1 is None and c.skip2 is None and c.bias is None and c.drop_pad_mode == 2 and c.k == 1, "form")
    c.need(c.scales is not None and c.scales.dim() == 2 and rows.dim() == 2 and rows.dtype in sixteen(), "scales [M, k], rows [M k, H]")
    c.tensor("scales", c.scales.shape, (rows.dtype,))
    c.tensor("expanded_src_to_dst_row", (c.scales.numel(),), (t.int32,))
    experts = c.export_for_source_row if hasattr(c, "export_for_source_row") else c.expert_for_source_row
    c.tensor("experts", c.scales.shape, (t.int32,), experts)
    c.need(experts is not None and rows.shape[0] == c.scales.numel(), "one row for each choice")


def swiglu(c: Call):
    c.need(c.self.dim() == 2 and c.self.shape[1] % 2 == 0 and c.self.dtype in sixteen() and c.dim == -1, "16-bit rows of two halves")


def swiglu_quant(c: Call):
    c.not_a5()
    c.need(c.x.dim() == 2 and c.x.shape[1] % 2 == 0 and c.x.dtype in sixteen(), "16-bit rows of two halves")
    absent = (c.weight_scale, c.activation_scale, c.bias, c.quant_scale, c.quant_offset, c.group_index, c.dst_type, c.round_mode,
              c.activate_dim)
    c.need(all(a is None for a in absent) and c.activate_left and c.quant_mode == 1 and c.swiglu_mode == 0, "form")

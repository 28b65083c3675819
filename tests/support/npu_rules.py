"""The second judge: what torch_npu's Meta functions let pass and op-plugin's C++ or the operators' tables of data types refuse.

Each rule sees one call with its arguments by name (defaults filled in) and raises `Refused`. The rules are those of op-plugin's operator
pages (`docs/zh/custom_APIs/torch_npu`) and `op_plugin/ops/opapi`, narrowed to the forms that the bridge uses: a legal call of another form
is refused as well, since the bridge has no reason to make it. `on(soc)` adds the generation that an operator needs.
"""

from __future__ import annotations

import contextlib
import contextvars

from npu_host import HANDLES

E8M0, FP4 = HANDLES["float8_e8m0fnu"], HANDLES["float4_e2m1fn_x2"]
LAST = 65535
_soc: contextvars.ContextVar[str | None] = contextvars.ContextVar("npu_rules_soc", default=None)


class Refused(ValueError):
    """A call that the device's software would refuse, or that the bridge has no reason to make."""


@contextlib.contextmanager
def on(soc: str):
    """Judge calls as they would be made on one generation."""
    token = _soc.set(soc)
    try:
        yield
    finally:
        _soc.reset(token)


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
        RULES[name](_Call(name, full))
    except Refused:
        raise
    except (ValueError, IndexError, TypeError, AttributeError, ZeroDivisionError) as error:
        # Rules take shapes apart as the form has them.
        raise Refused(f"{name}: an argument of another rank or kind ({error})") from error


def need(holds, name: str, rule: str) -> None:
    if not holds:
        raise Refused(f"{name}: {rule}")


class _Call:
    """Arguments as attributes, the first of a list of tensors as `<name>_`, and short forms of the questions that rules ask."""

    def __init__(self, name, arguments):
        self.__dict__.update(arguments, op=name)
        for key, value in arguments.items():
            if isinstance(value, (list, tuple)) and value and hasattr(value[0], "dim"):
                need(len(value) == 1, name, f"{key}: a list of one tensor")
                setattr(self, key + "_", value[0])

    def need(self, holds, rule: str):
        need(holds, self.op, rule)

    def first(self, key: str):
        """The one tensor of a list argument, or None."""
        return getattr(self, key + "_", None)

    def tensor(self, key: str, shape, dtypes, value=None):
        """A tensor, where it is given, has this shape and one of these types."""
        value = getattr(self, key) if value is None else value
        if value is not None:
            self.need(value.dtype in dtypes, f"{key}: {' or '.join(map(str, dtypes))}, found {value.dtype}")
            self.need(tuple(value.shape) == tuple(shape), f"{key}: shape {tuple(shape)}, found {tuple(value.shape)}")

    def a5(self):
        self.need(_soc.get() in (None, "A5"), f"runs on A5, found {_soc.get()}")

    def not_a5(self):
        self.need(_soc.get() != "A5", "not shown to run on A5")


def _t():
    import torch
    return torch


def _sixteen():
    return (_t().float16, _t().bfloat16)


def _out(c: _Call):
    """The type that output_dtype names."""
    t = _t()
    return {5: t.float16, 15: t.bfloat16, 6: t.float32, 3: t.int32, None: None}.get(_number(c.output_dtype), "other")


def _number(dtype):
    t = _t()
    return {t.float16: 5, t.bfloat16: 15, t.float32: 6, t.int32: 3, t.int8: 1, t.qint8: 12, t.quint4x2: 16, t.float8_e4m3fn: 24}.get(
        dtype, dtype)


def quantize(c: _Call):
    """Division by one float32 scale or one for each channel; the zero point int32 of the same length (table for div_mode True)."""
    t = _t()
    c.not_a5()
    c.need(c.self.dtype in (t.float32, *_sixteen()) and c.self.dim() == 2, "x [rows, K] in floating point")
    c.need(c.div_mode and c.axis == -1 and _number(c.dtype) == 12, "division along the last axis, to qint8")
    c.tensor("scales", (1,) if c.scales.numel() == 1 else (c.self.shape[1],), (t.float32,))
    c.tensor("zero_points", c.scales.shape, (t.int32,))


def dynamic_quant(c: _Call):
    c.need(c.input.dtype in _sixteen() and c.input.dim() == 2, "x [rows, K], float16 or bfloat16")
    kind = _number(c.dst_type)
    c.need(kind in (1, 16, 24), "to int8, quint4x2 or e4m3")
    c.need(kind != 16 or c.input.shape[-1] % 8 == 0, "int4: K % 8 == 0")
    c.need(c.smooth_scales is None and c.group_index is None and c.quant_mode == "pertoken" and c.dst_type_max == 0, "one scale per token")
    c.need(c.input.is_contiguous(), "contiguous rows")
    c.a5() if kind == 24 else c.not_a5()


def quant_matmul(c: _Call):
    t = _t()
    c.need(c.x1.dim() == 2 and c.x2.dim() == 2, "matrices, flattened to two axes")
    c.need(c.x1.shape[-1] <= LAST and c.x2.shape[-1] <= LAST, f"last axes up to {LAST}")
    c.need(c.x1.is_contiguous(), "x1 contiguous")
    c.need(c.y_scale is None, "no y_scale")
    forms = {(t.int8, t.int8): _matmul_int8, (t.int32, t.int32): _matmul_int4, (t.int8, t.int32): _matmul_mixed}
    if c.scale_dtype is not None:
        return _matmul_mx(c)
    if c.group_sizes is not None:
        return _matmul_block(c)
    c.need(c.group_sizes is None and c.x1_dtype is None and c.x2_dtype is None and c.pertoken_scale_dtype is None, "arguments of MX alone")
    if c.x1.dtype == t.float8_e4m3fn:
        return _matmul_fp8(c)
    c.not_a5()
    c.need((c.x1.dtype, c.x2.dtype) in forms, "int8 x int8, int4 x int4 or int8 x int4")
    forms[c.x1.dtype, c.x2.dtype](c)


def _matmul_block(c: _Call):
    t = _t()
    (rows, columns), n = c.x1.shape, c.x2.shape[1]
    c.need(list(c.group_sizes) == [1, 128, 128] and c.x1.dtype == c.x2.dtype and c.x2.shape[0] == columns, "blocks of [1, 128, 128]")
    absent = (c.x1_dtype, c.x2_dtype, c.pertoken_scale_dtype, c.offset)
    c.need(all(a is None for a in absent) and _out(c) == t.bfloat16, "to bfloat16")
    c.need(c.pertoken_scale is not None, "a scale per group of x")
    c.tensor("pertoken_scale", (rows, -(-columns // 128)), (t.float32,))
    c.tensor("scale", (-(-columns // 128), -(-n // 128)), (t.float32,))
    if c.x1.dtype == t.int8:
        c.not_a5()
        c.need(c.x2.is_contiguous() and c.scale.is_contiguous(), "x2 [K, N], contiguous, and its scale likewise")
        return c.tensor("bias", (n,), (t.float32,))
    c.a5()
    c.need(c.x1.dtype == t.float8_e4m3fn and c.bias is None and c.x2.stride(0) == 1, "e4m3, x2 a view of [N, K], no bias")
    c.need(c.scale.stride(0) == 1 or c.scale.shape[0] == 1, "x2 and scale transposed alike")


def _matmul_int8(c: _Call):
    t = _t()
    (rows, columns), n, out = c.x1.shape, c.x2.shape[1], _out(c)
    c.need(c.x2.shape[0] == columns and c.x2.is_contiguous(), "x2 [K, N], contiguous")
    c.need(c.offset is None, "no offset")
    c.need(out in (t.int32, *_sixteen()), "to int32, float16 or bfloat16")
    token = c.pertoken_scale is not None
    if token:
        c.need(out != t.int32, "int32 sums have no scale per token")
        c.tensor("pertoken_scale", (rows,), (t.float32,))
    scales = {t.bfloat16: (t.float32, t.bfloat16), t.int32: (t.float32, t.bfloat16), t.float16: (t.float32,) if token else (t.int64,)}
    c.tensor("scale", (n,), scales[out])
    biases = {t.bfloat16: (t.int32, t.bfloat16, t.float32), t.int32: (t.int32,), t.float16: (t.int32, t.float16, t.float32) if token else (
        t.int32,)}
    c.tensor("bias", (n,), biases[out])


def _matmul_int4(c: _Call):
    t = _t()
    rows, columns = c.x1.shape[0], c.x1.shape[1] * 8
    view = c.x2.stride(0) == 1 and c.x2.stride(1) == c.x2.shape[0]
    n = c.x2.shape[1] if view else c.x2.shape[1] * 8
    whole = c.x2.is_contiguous() and c.x2.shape[0] == columns
    c.need(view and c.x2.shape[0] * 8 == columns or whole, "x2 [K, N / 8], or a view of [N, K / 8]")
    c.need(c.offset is None and c.bias is None, "no offset and no bias")
    c.need(c.pertoken_scale is not None and _out(c) in _sixteen(), "a scale per token; to float16 or bfloat16")
    c.tensor("pertoken_scale", (rows,), (t.float32,))
    c.tensor("scale", (n,), (t.float32,))


def _matmul_mixed(c: _Call):
    t = _t()
    (rows, columns), n = c.x1.shape, c.x2.shape[1] * 8
    c.need(c.x2.shape[0] == columns and c.x2.is_contiguous(), "x2 [K, N / 8], contiguous")
    c.need(columns % 256 == 0, "K % 256 == 0")
    c.need(c.bias is None and c.offset is not None and c.pertoken_scale is not None and _out(c) in _sixteen(), "offset and scale per token")
    c.tensor("scale", (columns // 256, n), (t.int64,))
    c.tensor("offset", (n,), (t.float32,))
    c.tensor("pertoken_scale", (rows, 1), (t.float32,))


def _matmul_fp8(c: _Call):
    t = _t()
    c.a5()
    c.need(c.x2.dtype == t.float8_e4m3fn and c.x2.shape[0] == c.x1.shape[1] and c.x2.stride(0) == 1, "x2 e4m3 [K, N], a view of [N, K]")
    c.need(c.bias is None and c.offset is None and _out(c) in _sixteen(), "no bias; to float16 or bfloat16")
    c.need(c.pertoken_scale is not None, "a scale per token")
    c.tensor("scale", (c.x2.shape[1],), (t.float32,))
    c.tensor("pertoken_scale", (c.x1.shape[0],), (t.float32,))


def _matmul_mx(c: _Call):
    t = _t()
    c.a5()
    four1, four2 = c.x1_dtype == FP4, c.x2_dtype == FP4
    rows, columns, n = c.x1.shape[0], c.x1.shape[1] * (1 + four1), c.x2.shape[1]
    c.need(c.scale_dtype == E8M0 and c.pertoken_scale_dtype == E8M0, "both scales are e8m0")
    c.need(c.x1.dtype == (t.uint8 if four1 else t.float8_e4m3fn) and c.x2.dtype == (t.uint8 if four2 else t.float8_e4m3fn), "carriers")
    c.need(not four1 or four2, "e2m1 x goes with an e2m1 weight")
    c.need(c.x2.shape[0] * (1 + four2) == columns, "x2 [K, N]")
    c.need(not four2 or columns % 64 == 0, "e2m1: K % 64 == 0")
    c.need(list(c.group_sizes or ()) == ([0, 0, 32] if four2 and not four1 else [1, 1, 32]), "group_sizes")
    c.tensor("pertoken_scale", (rows, -(-columns // 64), 2), (t.uint8,))
    c.tensor("scale", (-(-columns // 64), n, 2), (t.uint8,))
    c.need(c.x2.stride(0) == 1 and c.scale.stride(1) > c.scale.stride(0) or 1 in (n, c.scale.shape[0]), "x2 and scale transposed alike")
    c.need(c.offset is None and _out(c) in _sixteen(), "to float16 or bfloat16")
    c.tensor("bias", (1, n) if four2 and not four1 else (n,), (t.float32,))


def weight_quant(c: _Call):
    t = _t()
    c.not_a5()
    c.need(c.x.dim() == 2 and c.weight.dim() == 2, "matrices, flattened to two axes")
    c.need(c.x.dtype in _sixteen() and c.weight.dtype in (t.int8, t.int32), "16-bit x, int8 or int4 weight")
    columns, n, size = c.x.shape[1], c.weight.shape[1] * (8 if c.weight.dtype == t.int32 else 1), c.antiquant_group_size
    c.need(c.weight.shape[0] == columns, "K of x and weight")
    c.need(0 < c.x.shape[0] and 0 < columns <= LAST and 0 < n <= LAST, f"no empty operand, K and N up to {LAST}")
    c.need(size == 0 or size % 32 == 0 and 32 <= size <= columns - 1, "groups of 0, or a multiple of 32 below K")
    shape = (-(-columns // size), n) if size else (n,)
    c.tensor("antiquant_scale", shape, (c.x.dtype,))
    c.tensor("antiquant_offset", shape, (c.x.dtype,))
    c.tensor("bias", (n,), (t.float32,) if c.x.dtype == t.bfloat16 else (t.float16,))
    c.need(c.quant_scale is None and c.quant_offset is None and c.inner_precise == 0 and c.weight_dtype is None, "no other argument")


def grouped(c: _Call):
    t = _t()
    x, w, out = c.first("x"), c.first("weight"), _out(c)
    c.need(c.split_item == 2 and c.group_type == 0 and c.group_list_type == 1, "one x, one stack, counts along the rows")
    c.need(out in _sixteen(), "to float16 or bfloat16")
    c.need(x.dim() == 2 and w.dim() == 3, "x [rows, K], weight [E, K, N]")
    experts = w.shape[0]
    c.need(experts <= 1024, "up to 1024 groups")
    c.tensor("group_list", (experts,), (t.int64,))
    c.need(c.group_list is not None, "group_list")
    c.need(c.group_list.is_meta or int(c.group_list.sum()) == x.shape[0], "counts that add up to all rows")
    absent = (c.offset, c.activation_input, c.activation_quant_scale, c.activation_quant_offset, c.tuning_config)
    c.need(not any(absent) and c.act_type == 0, "no other argument")
    c.need(x.shape[-1] <= LAST and w.shape[-1] <= LAST, f"last axes up to {LAST}")
    kind = _grouped_mx if c.per_token_scale_dtype is not None else _grouped_float if x.dtype in _sixteen() else _grouped_codes
    kind(c, x, w, out, experts)


def _grouped_float(c: _Call, x, w, out, experts: int):
    t = _t()
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


def _grouped_codes(c: _Call, x, w, out, experts: int):
    t = _t()
    scale, token, bias = c.first("scale"), c.first("per_token_scale"), c.first("bias")
    c.need(c.first("antiquant_scale") is None and c.first("antiquant_offset") is None, "no antiquant scale")
    c.need(c.x_dtype is None and c.weight_dtype is None and c.scale_dtype is None, "types that torch knows")
    c.need(scale is not None and token is not None, "scale and per_token_scale")
    c.tensor("per_token_scale", (x.shape[0],), (t.float32,), token)
    columns, n = x.shape[1] * (8 if x.dtype == t.int32 else 1), w.shape[2] * (8 if w.dtype == t.int32 else 1)
    c.need(w.shape[1] == columns, "K of x and weight")
    if x.dtype == t.float8_e4m3fn:
        c.a5()
        c.need(w.dtype == x.dtype and bias is None, "e4m3 x e4m3, no bias")
        return c.tensor("scale", (experts, n), (t.float32,), scale)
    c.not_a5()
    c.need((x.dtype, w.dtype) in ((t.int8, t.int8), (t.int8, t.int32), (t.int32, t.int32)), "int8 x int8, int8 x int4 or int4 x int4")
    if w.dtype == t.int8:
        c.need(bias is None, "a float bias is added afterwards")
        return c.tensor("scale", (experts, n), (t.bfloat16,) if out == t.bfloat16 else (t.float32,), scale)
    mixed = x.dtype == t.int8
    groups = scale.shape[1] if scale.dim() == 3 else 1
    c.tensor("scale", (experts, groups, n) if mixed else (experts, n), (t.int64,), scale)
    c.need(columns % groups == 0, "groups divide K")
    c.need((bias is not None) == mixed, "int8 x int4 needs 8 sum_k(w s), int4 x int4 has no bias")
    if mixed:
        c.tensor("bias", (experts, n), (t.float32,), bias)


def _grouped_mx(c: _Call, x, w, out, experts: int):
    t = _t()
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


def grouped_swiglu(c: _Call):
    t = _t()
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
    c.need(_number(c.dequant_dtype) == 6 and _number(c.quant_dtype) == 24, "by way of float32, to e4m3")
    c.need(c.weight_scale_dtype == E8M0 and c.x_scale_dtype == E8M0, "scales are e8m0")
    absent = (c.smooth_scale, c.weight_assist_matrix, c.bias, c.tuning_config)
    c.need(all(a is None for a in absent), "no other argument")


def mx_quant(c: _Call):
    c.a5()
    kind = _number(c.dst_type)
    c.need(c.input.dtype in _sixteen() and c.input.dim() == 2, "x [rows, K], float16 or bfloat16")
    c.need(kind in (24, FP4) and c.axis == -1 and c.block_size == 32 and c.max_low_bound == 0, "blocks of 32 to e4m3 or e2m1")
    c.need(c.round_mode in (("rint", "round") if kind == FP4 else ("rint",)), "e4m3 rounds to even alone")
    c.need(c.scale_alg in ((0, 2) if kind == FP4 else (0, 1)), "scale_alg")
    c.need(c.dst_type_max == 0 if c.scale_alg != 2 else 6 <= c.dst_type_max <= 12, "dst_type_max")
    c.need(kind != FP4 or c.input.shape[-1] % 64 == 0, "e2m1: K % 64 == 0")


def dual_quant(c: _Call):
    c.a5()
    c.need(c.input.dtype in _sixteen() and c.input.dim() == 2 and c.input.shape[1] % 512 == 0, "x [rows, K], K % 512 == 0")
    if c.smooth_scale is not None:
        c.tensor("smooth_scale", (c.input.shape[1],), (c.input.dtype,))


def dual_matmul(c: _Call):
    t = _t()
    c.a5()
    rows, n, columns = c.x1.shape[0], c.x2.shape[0], c.x1.shape[1] * 2
    c.need(c.x1.dim() == c.x2.dim() == 2, "matrices")
    c.need(columns % 512 == 0 and c.x2.shape[1] * 2 == columns, "x1 [M, K / 2], x2 [N, K / 2], K % 512 == 0")
    c.need(c.x1.dtype == t.uint8 and c.x2.dtype == t.int8, "two e2m1 a byte")
    c.tensor("x1_level0_scale", (rows, columns // 512), (t.float32,))
    c.tensor("x2_level0_scale", (columns // 512, n), (t.float32,))
    c.tensor("x1_level1_scale", (rows, columns // 64, 2), (t.uint8,))
    c.tensor("x2_level1_scale", (n, columns // 64, 2), (t.uint8,))
    c.tensor("bias", (n,), (t.float32,))
    c.need(_out(c) in _sixteen(), "to float16 or bfloat16")


def init_routing(c: _Call):
    t = _t()
    c.need(c.x.dtype in _sixteen() and c.x.dim() == 2, "x [M, H], 16-bit")
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


def finalize_routing(c: _Call):
    t = _t()
    rows = c.expanded_permuted_rows
    c.need(c.skip1 is None and c.skip2 is None and c.bias is None and c.drop_pad_mode == 2 and c.k == 1, "form")
    c.need(c.scales is not None and c.scales.dim() == 2 and rows.dim() == 2 and rows.dtype in _sixteen(), "scales [M, k], rows [M k, H]")
    c.tensor("scales", c.scales.shape, (rows.dtype,))
    c.tensor("expanded_src_to_dst_row", (c.scales.numel(),), (t.int32,))
    experts = c.export_for_source_row if hasattr(c, "export_for_source_row") else c.expert_for_source_row
    c.tensor("experts", c.scales.shape, (t.int32,), experts)
    c.need(experts is not None and rows.shape[0] == c.scales.numel(), "one row for each choice")


def swiglu(c: _Call):
    c.need(c.self.dim() == 2 and c.self.shape[1] % 2 == 0 and c.self.dtype in _sixteen() and c.dim == -1, "16-bit rows of two halves")


def swiglu_quant(c: _Call):
    c.not_a5()
    c.need(c.x.dim() == 2 and c.x.shape[1] % 2 == 0 and c.x.dtype in _sixteen(), "16-bit rows of two halves")
    absent = (c.weight_scale, c.activation_scale, c.bias, c.quant_scale, c.quant_offset, c.group_index, c.dst_type, c.round_mode,
              c.activate_dim)
    c.need(all(a is None for a in absent) and c.activate_left and c.quant_mode == 1 and c.swiglu_mode == 0, "form")


def format_cast(c: _Call):
    t = _t()
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

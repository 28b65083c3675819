"""Rules of the matrix products: `npu_quant_matmul` in all of its forms, weight-only, and dual-level."""

from __future__ import annotations

from npu_call import E8M0, FP4, LAST, Call, output, sixteen, types


def quant_matmul(c: Call):
    t = types()
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


def _matmul_block(c: Call):
    t = types()
    (rows, columns), n = c.x1.shape, c.x2.shape[1]
    c.need(list(c.group_sizes) == [1, 128, 128] and c.x1.dtype == c.x2.dtype and c.x2.shape[0] == columns, "blocks of [1, 128, 128]")
    absent = (c.x1_dtype, c.x2_dtype, c.pertoken_scale_dtype, c.offset)
    c.need(all(a is None for a in absent) and output(c) == t.bfloat16, "to bfloat16")
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


def _matmul_int8(c: Call):
    t = types()
    (rows, columns), n, out = c.x1.shape, c.x2.shape[1], output(c)
    c.need(c.x2.shape[0] == columns and c.x2.is_contiguous(), "x2 [K, N], contiguous")
    c.need(c.offset is None, "no offset")
    c.need(out in (t.int32, *sixteen()), "to int32, float16 or bfloat16")
    token = c.pertoken_scale is not None
    if token:
        c.need(out != t.int32, "int32 sums have no scale per token")
        c.tensor("pertoken_scale", (rows,), (t.float32,))
    scales = {t.bfloat16: (t.float32, t.bfloat16), t.int32: (t.float32, t.bfloat16), t.float16: (t.float32,) if token else (t.int64,)}
    c.tensor("scale", (n,), scales[out])
    biases = {t.bfloat16: (t.int32, t.bfloat16, t.float32), t.int32: (t.int32,), t.float16: (t.int32, t.float16, t.float32) if token else (
        t.int32,)}
    c.tensor("bias", (n,), biases[out])


def _matmul_int4(c: Call):
    t = types()
    rows, columns = c.x1.shape[0], c.x1.shape[1] * 8
    view = c.x2.stride(0) == 1 and c.x2.stride(1) == c.x2.shape[0]
    n = c.x2.shape[1] if view else c.x2.shape[1] * 8
    whole = c.x2.is_contiguous() and c.x2.shape[0] == columns
    c.need(view and c.x2.shape[0] * 8 == columns or whole, "x2 [K, N / 8], or a view of [N, K / 8]")
    c.need(c.offset is None and c.bias is None, "no offset and no bias")
    c.need(c.pertoken_scale is not None and output(c) in sixteen(), "a scale per token; to float16 or bfloat16")
    c.tensor("pertoken_scale", (rows,), (t.float32,))
    c.tensor("scale", (n,), (t.float32,))


def _matmul_mixed(c: Call):
    t = types()
    (rows, columns), n = c.x1.shape, c.x2.shape[1] * 8
    c.need(c.x2.shape[0] == columns and c.x2.is_contiguous(), "x2 [K, N / 8], contiguous")
    c.need(columns % 256 == 0, "K % 256 == 0")
    c.need(c.bias is None and c.offset is not None and c.pertoken_scale is not None, "offset and scale per token")
    c.need(output(c) in sixteen(), "to float16 or bfloat16")
    c.tensor("scale", (columns // 256, n), (t.int64,))
    c.tensor("offset", (n,), (t.float32,))
    c.tensor("pertoken_scale", (rows, 1), (t.float32,))


def _matmul_fp8(c: Call):
    t = types()
    c.a5()
    c.need(c.x2.dtype == t.float8_e4m3fn and c.x2.shape[0] == c.x1.shape[1] and c.x2.stride(0) == 1, "x2 e4m3 [K, N], a view of [N, K]")
    c.need(c.bias is None and c.offset is None and output(c) in sixteen(), "no bias; to float16 or bfloat16")
    c.need(c.pertoken_scale is not None, "a scale per token")
    c.tensor("scale", (c.x2.shape[1],), (t.float32,))
    c.tensor("pertoken_scale", (c.x1.shape[0],), (t.float32,))


def _matmul_mx(c: Call):
    t = types()
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
    c.need(c.offset is None and output(c) in sixteen(), "to float16 or bfloat16")
    c.tensor("bias", (1, n) if four2 and not four1 else (n,), (t.float32,))


def weight_quant(c: Call):
    t = types()
    c.not_a5()
    c.need(c.x.dim() == 2 and c.weight.dim() == 2, "matrices, flattened to two axes")
    c.need(c.x.dtype in sixteen() and c.weight.dtype in (t.int8, t.int32), "16-bit x, int8 or int4 weight")
    columns, n, size = c.x.shape[1], c.weight.shape[1] * (8 if c.weight.dtype == t.int32 else 1), c.antiquant_group_size
    c.need(c.weight.shape[0] == columns, "K of x and weight")
    c.need(0 < c.x.shape[0] and 0 < columns <= LAST and 0 < n <= LAST, f"no empty operand, K and N up to {LAST}")
    c.need(size == 0 or size % 32 == 0 and 32 <= size <= columns - 1, "groups of 0, or a multiple of 32 below K")
    shape = (-(-columns // size), n) if size else (n,)
    c.tensor("antiquant_scale", shape, (c.x.dtype,))
    c.tensor("antiquant_offset", shape, (c.x.dtype,))
    c.tensor("bias", (n,), (t.float32,) if c.x.dtype == t.bfloat16 else (t.float16,))
    c.need(c.quant_scale is None and c.quant_offset is None and c.inner_precise == 0 and c.weight_dtype is None, "no other argument")


def dual_matmul(c: Call):
    t = types()
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
    c.need(output(c) in sixteen(), "to float16 or bfloat16")

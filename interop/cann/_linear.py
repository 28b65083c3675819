"""`linear`: one placed matrix times rows, by the operator of its kind.

Accumulation is the operator's: int32 for integers, float32 for the rest. A float32 result (partial sums of tensor parallelism) comes
from int32 sums where the operator gives them out (`w8a8`), else from the operator's 16-bit result. The bias is added in float32 by the
operator where its table of data types has one, after it where not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import _compose
from ._npu import E8M0, FP4, operator
from ._placed import Placed
from ._quantize import MX_ROUNDING, SIXTEEN_BIT, Rows


def linear(w: Placed, x, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None, scope: int = 0) -> torch.Tensor:
    """y = x @ w (+ bias).

    Arguments:
        w: a placed matrix (in, out).
        x: float [..., in], quantized here as the scheme says, or `Rows` that several weights share.
        bias: float [out]. out_dtype: by default that of x.
        scope: how many leading axes of x are tensors of their own to a scale per tensor.

    Returns: [..., out]. No rows give no rows, without a call of the device. Raises ValueError where sizes or types do not fit.
    """
    if w.experts or w.children or len(w.shape) != 2:
        raise ValueError(f"linear: expected one matrix (in, out), found {w!r}")
    columns, rows = w.shape
    if tuple(x.shape[-1:]) != (columns,):
        raise ValueError(f"linear: x ends in {tuple(x.shape[-1:])}, the weight contracts {columns}; {w!r}")
    if out_dtype is None:
        out_dtype = w.dtype if isinstance(x, Rows) and x.x is None else (x.x if isinstance(x, Rows) else x).dtype
    lead = tuple(x.shape[:-1])
    source = prepared(w, x, scope)
    if 0 in lead or not rows:
        return torch.zeros((*lead, rows), dtype=out_dtype, device=w.device)
    bias = None if bias is None else bias.to(torch.float32)
    return LINEAR[w.kind](w, source, bias, out_dtype).reshape(*lead, rows)


def prepared(w: Placed, x, scope: int = 0) -> Rows | torch.Tensor:
    """x smoothed, in the weight's order, and as `Rows` where the kind multiplies codes."""
    perm, smooth, spec = w.operands.get("perm"), w.operands.get("smooth"), w.scheme.activation
    if isinstance(x, Rows):
        return _reordered(x, perm) if perm is not None and w.kind != "float" else x
    if spec is not None and spec.bound is not None:
        x = x.clamp(-spec.bound, spec.bound)
    if smooth is not None:
        x = x.to(torch.float32) * smooth
    if perm is not None:
        x = x.index_select(-1, perm)
    if w.kind in ("a16", "float") or spec is None:
        return x
    return Rows(x, spec, scale=w.operands.get("input_scale"), zero=w.operands.get("input_zero"), scope=scope)


def _reordered(x: Rows, perm: torch.Tensor) -> Rows:
    if x.x is not None:
        return Rows(x.x.index_select(-1, perm), x.spec, scale=x.scale, zero=x.zero, scope=x.scope)
    plain = x.plain()
    return Rows(None, x.spec, scope=x.scope, plain=plain._replace(codes=plain.codes.index_select(-1, perm)))


def floats(w: Placed, x) -> torch.Tensor:
    """Float rows [rows, K] in the weight's 16-bit type; float32 ones are rounded to it, another 16-bit type is refused."""
    if isinstance(x, Rows):
        x = x.x if x.x is not None else _dequantized(x)
    if x.dtype in SIXTEEN_BIT and x.dtype != w.dtype:
        wanted = str(x.dtype).removeprefix("torch.")
        raise ValueError(f"{w!r} was placed for {w.dtype}, found x of {x.dtype}; place it with dtype={wanted!r}")
    return x.reshape(-1, x.shape[-1]).to(w.dtype).contiguous()


def _dequantized(rows: Rows) -> torch.Tensor:
    codes, scale, zero = rows.plain()
    values = _compose.decode(codes, rows.spec.code)
    if zero is not None:
        values = values - _compose.wide(zero, rows.spec, rows.shape[-1])
    return values * _compose.wide(scale, rows.spec, rows.shape[-1])


def sixteen(w: Placed, out_dtype: torch.dtype) -> torch.dtype:
    """The type that the operator is asked for."""
    return out_dtype if out_dtype in SIXTEEN_BIT else w.dtype


def finish(y: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """y plus a float32 bias, in `out_dtype`."""
    return (y if bias is None else y.to(torch.float32) + bias).to(out_dtype)


def _int32(w: Placed, codes: torch.Tensor) -> torch.Tensor:
    return operator("npu_quant_matmul")(codes, w.operands["weight"], w.operands["scale"], output_dtype=torch.int32)


def _w8a8(w: Placed, x: Rows, bias, out_dtype):
    o, (codes, scale), zeros = w.operands, x.token(), x.zeros()
    if zeros is None and out_dtype in SIXTEEN_BIT:
        return operator("npu_quant_matmul")(codes, o["weight"], o["scale"], pertoken_scale=scale, bias=bias, output_dtype=out_dtype)
    total = _int32(w, codes)
    if zeros is not None:
        total = total - zeros[:, None] * o["sums"]
    return finish(total.to(torch.float32) * scale[:, None] * o["scale"], bias, out_dtype)


def _w8a8_static(w: Placed, x: Rows, bias, out_dtype):
    """The operator takes one bias, so a float one takes `quant_bias` along, in float32.

    A float16 result without scales per token knows neither float scales nor float biases, only 64-bit scales of 10 bits of mantissa and
    int32 biases; a float bias is therefore given to the form with a scale per token, all of them the input's. (ModelSlim rounds the bias
    to whole steps of deq_scale instead.)
    """
    o = w.operands
    if x.scale is not o["input_scale"] or out_dtype not in SIXTEEN_BIT:         # rows that were quantized by another scale
        return _w8a8(w, x, bias, out_dtype)
    codes, fixed = x.token()[0], o.get("quant_bias")
    matmul = operator("npu_quant_matmul")
    if bias is not None and fixed is not None:
        bias = bias + fixed * o["deq_scale"]
    if out_dtype == torch.bfloat16:
        return matmul(codes, o["weight"], o["deq_scale"], bias=fixed if bias is None else bias, output_dtype=out_dtype)
    if bias is not None or "deq_scale64" not in o:
        token = o["input_scale"].expand(codes.shape[0]).contiguous()
        return matmul(codes, o["weight"], o["scale"], pertoken_scale=token, bias=fixed if bias is None else bias, output_dtype=out_dtype)
    return matmul(codes, o["weight"], o["deq_scale64"], bias=fixed, output_dtype=out_dtype)


def _w4a4(w: Placed, x: Rows, bias, out_dtype):
    codes, scale = x.token()
    y = operator("npu_quant_matmul")(codes, w.operands["weight"], w.operands["scale"], pertoken_scale=scale,
                                     output_dtype=sixteen(w, out_dtype))
    return finish(y, bias, out_dtype)


def _w4a8(w: Placed, x: Rows, bias, out_dtype):
    codes, scale = x.token()
    y = operator("npu_quant_matmul")(codes, w.operands["weight"], w.operands["scale"], offset=w.operands["correction"],
                                     pertoken_scale=scale[:, None], output_dtype=sixteen(w, out_dtype))
    return finish(y, bias, out_dtype)


def _weight_only(w: Placed, x: torch.Tensor, bias):
    o = w.operands
    if bias is not None:
        bias = bias.to(torch.float32 if x.dtype == torch.bfloat16 else x.dtype)
    return operator("npu_weight_quant_batchmatmul")(x, o["weight"], antiquant_scale=o["scale"], antiquant_offset=o.get("offset"), bias=bias,
                                                    antiquant_group_size=w.meta["group"])


def _a16(w: Placed, x, bias, out_dtype):
    inside = out_dtype in SIXTEEN_BIT
    return finish(_weight_only(w, floats(w, x), bias if inside else None), None if inside else bias, out_dtype)


def _codes16(w: Placed, x: Rows, bias, out_dtype):
    codes, scale = x.codes16(w.operands["scale"].dtype)
    return finish(_weight_only(w, codes, None).to(torch.float32) * scale[:, None], bias, out_dtype)


def _fp8(w: Placed, x: Rows, bias, out_dtype):
    """The bias is added outside: vllm-ascend found the operator's own wrong for fp8."""
    codes, scale = x.token()
    y = operator("npu_quant_matmul")(codes, w.operands["weight"], w.operands["scale"], pertoken_scale=scale,
                                     output_dtype=sixteen(w, out_dtype))
    return finish(y, bias, out_dtype)


def _block8(w: Placed, x: Rows, bias, out_dtype):
    """Groups of 128 of x against blocks of the weight; the operator gives bfloat16 alone, and takes a bias for int8 alone."""
    plain = x.plain()
    codes, scale = (part.reshape(-1, part.shape[-1]).contiguous() for part in (plain.codes, plain.scale))
    inside = w.kind == "w8a8_block" and out_dtype == torch.bfloat16
    y = operator("npu_quant_matmul")(codes, w.operands["weight"], w.operands["scale"], pertoken_scale=scale, bias=bias if inside else None,
                                     output_dtype=torch.bfloat16, group_sizes=[1, 128, 128])
    return finish(y, None if inside else bias, out_dtype)


MX_FORM = {"mxfp8": {"group_sizes": [1, 1, 32]}, "mxfp4_a8": {"group_sizes": [0, 0, 32], "x2_dtype": FP4},
           "mxfp4": {"group_sizes": [1, 1, 32], "x1_dtype": FP4, "x2_dtype": FP4}}


def _mx(w: Placed, x: Rows, bias, out_dtype):
    """The numbers of e8m0 and e2m1 are torch_npu's own: its checks refuse torch's, which SGLang passes. e4m3 x e2m1 has a bias [1, N]."""
    codes, scale = x.mx()
    if bias is not None and w.kind == "mxfp4_a8":
        bias = bias[None]
    inside = out_dtype in SIXTEEN_BIT
    y = operator("npu_quant_matmul")(codes, w.operands["weight"], w.operands["scale"], pertoken_scale=scale, scale_dtype=E8M0,
                                     pertoken_scale_dtype=E8M0, bias=bias if inside else None, output_dtype=sixteen(w, out_dtype),
                                     **MX_FORM[w.kind])
    return finish(y, None if inside or bias is None else bias.reshape(-1), out_dtype)


def _dual(w: Placed, x: Rows, bias, out_dtype):
    """Both sides have a float32 scale over 512 on top of the powers of two over 32; x gets its own, whatever the scheme says of it."""
    o, rounding = w.operands, MX_ROUNDING["fp4_e2m1", x.spec.rounding if x.spec.scale_rule == "mx_dual" else "rne"]
    codes, level0, level1 = operator("npu_dynamic_dual_level_mx_quant")(floats(w, x), round_mode=rounding)
    y = operator("npu_dual_level_quant_matmul")(codes, o["weight"], level0, o["level0"], level1, o["scale"], bias=bias,
                                                output_dtype=sixteen(w, out_dtype))
    return y.to(out_dtype)


def _float(w: Placed, x, bias, out_dtype):
    return finish(torch.nn.functional.linear(floats(w, x), w.operands["weight"]), bias, out_dtype)


LINEAR: dict[str, Callable] = {
    "w8a8": _w8a8, "w8a8_static": _w8a8_static, "w4a4": _w4a4, "w4a8": _w4a8, "a16": _a16, "codes16": _codes16, "fp8": _fp8,
    "w8a8_block": _block8, "fp8_block": _block8,
    "mxfp8": _mx, "mxfp4_a8": _mx, "mxfp4": _mx, "mxfp4_dual": _dual, "float": _float,
}

"""`grouped_matmul`: rows sorted by expert, each times the matrix of its expert in a placed stack.

The operator wants the counts of its groups to add up to all rows. Rows beyond the sum of the sizes are therefore counted to the last
expert and set to zero afterwards; SGLang leaves what is there. int8 results take float biases only after the operator, whose own bias
is an int32 before the scales: the place of a static zero point's correction.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import _compose, _linear
from ._npu import E8M0, FP4, operator
from ._placed import Placed
from ._quantize import Rows


def grouped_matmul(w: Placed, x, sizes: torch.Tensor, bias: torch.Tensor | None = None,
                   out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """y [T, N]: the first sizes[0] rows of x belong to expert 0, and so on; rows beyond the sum of the sizes give zeros.

    Arguments:
        w: a placed stack (E, in, out). x: float [T, in], or `Rows`.
        sizes: integers [E]. bias: float [E, out]. out_dtype: by default that of x.

    Raises ValueError where sizes or types do not fit.
    """
    w = w.form(True)
    if not w.experts or w.children or len(w.shape) != 3:
        raise ValueError(f"grouped_matmul: expected a stack of experts (E, in, out), found {w!r}")
    count, columns, rows = w.shape
    if len(x.shape) != 2 or x.shape[1] != columns or tuple(sizes.shape) != (count,):
        raise ValueError(f"grouped_matmul: expected x [T, {columns}] and sizes [{count}], found {tuple(x.shape)} and {tuple(sizes.shape)}")
    if out_dtype is None:
        out_dtype = w.dtype if isinstance(x, Rows) and x.x is None else (x.x if isinstance(x, Rows) else x).dtype
    total = x.shape[0]
    if not total or not rows:
        return torch.zeros((total, rows), dtype=out_dtype, device=w.device)
    sizes = sizes.to(torch.int64)
    held = sizes.sum()
    counts = torch.cat([sizes[:-1], (total - sizes[:-1].sum()).reshape(1)])
    owner = None
    if bias is not None or by_expert(w):
        owner = owners(sizes, total)
    y = multiply(w, prepared(w, x, owner), counts, out_dtype)
    y = _linear.finish(y, None if bias is None else bias.to(torch.float32)[owner], out_dtype)
    return torch.where((torch.arange(total, device=y.device) < held)[:, None], y, torch.zeros_like(y))


def by_expert(w: Placed) -> bool:
    """True where what becomes of a row before the product is its expert's own."""
    return w.kind == "w8a8_static" or bool({"smooth", "perm"} & w.operands.keys())


def owners(sizes: torch.Tensor, total: int) -> torch.Tensor:
    """The expert of each of `total` rows; the last one has the rows beyond the sizes."""
    return torch.searchsorted(sizes.cumsum(0), torch.arange(total, device=sizes.device), right=True).clamp(max=sizes.shape[0] - 1)


def prepared(w: Placed, x, owner) -> Rows | torch.Tensor:
    """x smoothed and ordered as each row's expert asks, and as `Rows` where the kind multiplies codes.

    `owner`: the expert of each row, where `by_expert` asks for it. Static scales are each row's own expert's, which no operator knows.
    """
    perm, smooth, spec = w.operands.get("perm"), w.operands.get("smooth"), w.scheme.activation
    if isinstance(x, Rows):
        if "quant_bias" in w.operands:
            raise ValueError(f"{w!r}: rows quantized beforehand have other zero points than the experts; give them in floating point")
        if perm is None or w.kind == "float":
            return x
        plain = x.plain()
        return Rows(None, x.spec, plain=plain._replace(codes=plain.codes.gather(-1, perm[owner])))
    if spec is not None and spec.bound is not None:
        x = x.clamp(-spec.bound, spec.bound)
    if smooth is not None:
        x = x.to(torch.float32) * smooth[owner]
    if perm is not None:
        x = x.gather(-1, perm[owner])
    if w.kind == "w8a8_static":
        scale, zero = (w.operands[name][owner][:, None, None] for name in ("input_scale", "input_zero"))
        codes, scale, _ = _compose.quantize(x[:, None], spec, scale, zero, 1)
        return Rows.ready("token", (codes[:, 0], scale.reshape(-1)), tuple(x.shape), spec)
    return x if w.kind in ("a16", "float") or spec is None else Rows(x, spec)


def multiply(w: Placed, x, counts: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """The operator's call: counts int64 [E] that add up to all rows; no bias. The result is 16-bit, or float32 where a scale followed."""
    return GROUPED[w.kind](w, x, counts, _linear.sixteen(w, out_dtype))


def call(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, out_dtype: torch.dtype, **named) -> torch.Tensor:
    """npu_grouped_matmul of one x and one stack, grouped along the rows by counts. Tensors among `named` become lists of one."""
    named = {name: [value] if torch.is_tensor(value) else value for name, value in named.items()}
    return operator("npu_grouped_matmul")(x=[x], weight=[weight], split_item=2, group_type=0, group_list=counts, group_list_type=1,
                                          output_dtype=out_dtype, **named)[0]


def _integers(w: Placed, x: Rows, counts, out_dtype):
    codes, scale = x.token()
    o = w.operands
    if o["weight"].dtype == torch.int8 and o["scale"].dtype != (torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32):
        raise ValueError(f"{w!r} was placed for {w.dtype}, found a result of {out_dtype}; place it with the other dtype")
    extra = {"bias": o["correction"]} if w.kind == "w4a8" else {"bias": o["quant_bias"]} if "quant_bias" in o else {}
    return call(codes, o["weight"], counts, out_dtype, scale=o["scale"], per_token_scale=scale, **extra)


def weight_only(w: Placed, x: torch.Tensor, counts, out_dtype):
    """16-bit x times an int4 or int8 stack; groups of int8 take x twice, once for each half of the bits."""
    o = w.operands
    if w.meta.get("planes"):
        x = torch.cat([x, x], -1)
    extra = {"antiquant_offset": o["offset"]} if "offset" in o else {"antiquant_offset": torch.zeros_like(o["scale"])}
    return call(x, o["weight"], counts, out_dtype, antiquant_scale=o["scale"], **extra)


def _a16(w: Placed, x, counts, out_dtype):
    return weight_only(w, _linear.floats(w, x), counts, w.dtype)


def _codes16(w: Placed, x: Rows, counts, out_dtype):
    codes, scale = x.codes16(w.operands["scale"].dtype)
    return weight_only(w, codes, counts, codes.dtype).to(torch.float32) * scale[:, None]


def _fp8(w: Placed, x: Rows, counts, out_dtype):
    codes, scale = x.token()
    return call(codes, w.operands["weight"], counts, out_dtype, scale=w.operands["scale"], per_token_scale=scale)


def _block8(w: Placed, x: Rows, counts, out_dtype):
    """Groups of 128 of x against blocks of 128 x 128."""
    plain = x.plain()
    codes, scale = plain.codes.contiguous(), plain.scale.to(torch.float32).contiguous()
    return call(codes, w.operands["weight"], counts, out_dtype, scale=w.operands["scale"], per_token_scale=scale)


def _mxfp8(w: Placed, x: Rows, counts, out_dtype):
    codes, scale = x.mx()
    return mx_call(w, codes, scale, counts, out_dtype)


MX_FORM = {"mxfp8": {"scale_dtype": E8M0}, "mxfp4_a8": {"weight_dtype": FP4},
           "mxfp4": {"scale_dtype": E8M0, "x_dtype": FP4, "weight_dtype": FP4}}


def mx_call(w: Placed, codes, scale, counts, out_dtype):
    """Blocks of 32 under powers of two. The e4m3 x e2m1 form takes the weight's scale as `antiquant_scale`."""
    name = "antiquant_scale" if w.kind == "mxfp4_a8" else "scale"
    return call(codes, w.operands["weight"], counts, out_dtype, per_token_scale=scale, per_token_scale_dtype=E8M0,
                **{name: w.operands["scale"]}, **MX_FORM[w.kind])


def _float(w: Placed, x, counts, out_dtype):
    return call(_linear.floats(w, x), w.operands["weight"].transpose(-1, -2), counts, w.dtype)


GROUPED: dict[str, Callable] = {
    "w8a8": _integers, "w8a8_static": _integers, "fp8_block": _block8,
    "w4a4": _integers, "w4a8": _integers, "a16": _a16, "codes16": _codes16, "fp8": _fp8, "mxfp8": _mxfp8,
    "mxfp4_a8": _mxfp8, "mxfp4": _mxfp8, "float": _float,
}

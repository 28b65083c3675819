"""CPU kernels behind torch_npu's schemas, by the operators' documented numerics.

Every call is first put to torch_npu's own Meta function on meta copies of the operands (strides kept), then to the eager rules
(`npu_rules`), then computed, and the result is compared in shape and type with what Meta said. Products are summed exactly (float64
holds every integer sum and every sum of small floats here), scales applied in float32, one cast at the end.

    calls = npu_cpu.install()        # loads the host, registers the kernels; the list of calls, (name, positional, named), grows
"""

from __future__ import annotations

import functools

import npu_host
import npu_rules

E8M0, FP4 = npu_host.HANDLES["float8_e8m0fnu"], npu_host.HANDLES["float4_e2m1fn_x2"]


def _types():
    import torch
    return {1: torch.int8, 3: torch.int32, 5: torch.float16, 6: torch.float32, 15: torch.bfloat16}


def unpack8(words):
    """int32 [.., n] to int8 [.., 8 n], lowest nibble first."""
    import torch
    nibbles = (words.contiguous().to(torch.int64).unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15
    return torch.where(nibbles > 7, nibbles - 16, nibbles).to(torch.int8).flatten(-2)


def pack8(values):
    """int8 [.., 8 n] to int32 [.., n]."""
    import torch
    digits = (values.to(torch.int64) & 15).unflatten(-1, (-1, 8))
    words = (digits << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


@functools.cache
def _e2m1():
    import torch
    half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    return torch.tensor(half + [-v for v in half])


def from_e2m1(data):
    """uint8 [.., n] to float32 [.., 2 n], low nibble first."""
    import torch
    return _e2m1()[torch.stack([data & 15, data >> 4], -1).long()].flatten(-2)


def powers(byte):
    """2^(b - 127), 255 is NaN."""
    import torch
    value = torch.exp2(byte.to(torch.float64) - 127)
    return torch.where(byte == 255, torch.full_like(value, float("nan")), value).to(torch.float32)


def product(x, w):
    import torch
    return x.to(torch.float64) @ w.to(torch.float64)


def scale64(scale):
    """The float32 in the low word of a 64-bit scale; other scales as float32."""
    import torch
    if scale.dtype != torch.int64:
        return scale.to(torch.float32)
    low = scale & 0xFFFFFFFF
    low = torch.where(low >= 2**31, low - 2**32, low).to(torch.int32)
    return low.contiguous().view(torch.float32)


def short(scale):
    """Less the 13 bits that the fixed-point pipe drops."""
    import torch
    return (scale.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def quantize(x, scales, zero_points, dtype, axis=1, div_mode=True):
    import torch
    x, scales = x.to(torch.float32), scales.to(torch.float32)
    y = torch.round(x / scales if div_mode else x * scales)
    if zero_points is not None:
        y = y + zero_points.to(torch.float32)
    return y.clamp(-128, 127).to(torch.int8)


def dynamic_quant(x, *, smooth_scales=None, group_index=None, dst_type=None, quant_mode="pertoken", dst_type_max=0.0):
    import torch
    top = {16: 7, 24: 448.0}.get(dst_type, 127)
    x = x.to(torch.float32) if smooth_scales is None else x.to(torch.float32) * smooth_scales.to(torch.float32)
    scale = x.abs().amax(-1) / top
    y = torch.where(scale[..., None] > 0, x / scale[..., None], torch.zeros(()))
    if dst_type == 24:
        return y.clamp(-top, top).to(torch.float8_e4m3fn), scale
    y = torch.round(y).clamp(-top, top).to(torch.int8)
    return (pack8(y) if dst_type == 16 else y), scale


def quant_matmul(x1, x2, scale, *, offset=None, pertoken_scale=None, bias=None, output_dtype=None, x1_dtype=None, x2_dtype=None,
                 pertoken_scale_dtype=None, scale_dtype=None, group_sizes=None, y_scale=None):
    import torch
    out = _types()[output_dtype]
    if scale_dtype == E8M0:
        x = from_e2m1(x1) if x1_dtype == FP4 else x1.to(torch.float32)
        w = from_e2m1(x2.t().contiguous()) if x2_dtype == FP4 else x2.t().to(torch.float32)
        y = product(spread(x, pertoken_scale), spread(w, scale.transpose(0, 1)).t()).to(torch.float32)
        return (y if bias is None else y + bias.to(torch.float32)).to(out)
    if group_sizes is not None:
        y = _blocks(x1, x2, pertoken_scale, scale)
        return (y if bias is None else y + bias).to(out)
    if x1.dtype == torch.int8 and x2.dtype == torch.int32:
        y = _nibbles(x1, unpack8(x2), scale64(scale)) + offset
        return (y.to(torch.float32) * pertoken_scale).to(out)
    if x1.dtype == torch.int32:
        x1 = unpack8(x1)
        # Told by shape, since a transposed view of one column counts as contiguous.
        x2 = unpack8(x2.t()).t() if x2.shape[0] * 8 == x1.shape[1] else unpack8(x2)
    y = product(x1, x2)
    if bias is not None and bias.dtype == torch.int32:
        y = y + bias
    if out == torch.int32:
        return y.to(torch.int32)
    scale = short(scale64(scale)) if out == torch.float16 and pertoken_scale is None else scale64(scale)
    y = y.to(torch.float32) * scale
    if pertoken_scale is not None:
        y = y * pertoken_scale[:, None]
    if bias is not None and bias.dtype != torch.int32:
        y = y + bias.to(torch.float32)
    return y.to(out)


def _blocks(x, w, x_scale, w_scale):
    """Sum over spans of 128 inputs of products times the scales of x's group and the weight's block."""
    wide = w_scale.repeat_interleave(128, 1)[:, :w.shape[1]]
    parts = [product(a, b).to(x_scale.dtype) * s[:, None] * t for a, b, s, t in
             zip(x.split(128, 1), w.split(128, 0), x_scale.unbind(1), wide, strict=True)]
    return sum(parts[1:], parts[0])


def _nibbles(x, w, scale):
    """int8 x as the kernel has it: a signed high and a lower nibble less 8, times int4 w [K, N]; scale [G, N]. Lacks 8 sum_k(w s)."""
    import torch
    wide = x.to(torch.int16)
    shifted = (wide >> 4) * 16 + (wide & 15) - 8
    groups = scale.shape[0]
    parts = [product(a, b).to(torch.float32) * s for a, b, s in
             zip(shifted.chunk(groups, -1), w.chunk(groups, 0), scale, strict=True)]
    return sum(parts[1:], parts[0])


def spread(x, scale):
    """x [rows, K] times powers of two of its blocks of 32, scale bytes [rows, K / 64, 2]."""
    return x * powers(scale.flatten(1)).repeat_interleave(32, -1)[:, :x.shape[1]]


def weight_quant(x, weight, antiquant_scale, antiquant_offset=None, quant_scale=None, quant_offset=None, bias=None, antiquant_group_size=0,
                 inner_precise=0, weight_dtype=None):
    import torch
    w = (unpack8(weight) if weight.dtype == torch.int32 else weight).to(torch.float32)

    def wide(t):
        t = t.to(torch.float32)
        return t.repeat_interleave(antiquant_group_size, 0)[:w.shape[0]] if antiquant_group_size else t

    w = (w if antiquant_offset is None else w + wide(antiquant_offset)) * wide(antiquant_scale)
    y = product(x, w).to(torch.float32)
    return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)


def _mx_exponent(amax, fp4: bool, scale_alg: int, dst_type_max: float):
    import torch
    bits = amax.contiguous().view(torch.int32)
    if scale_alg == 0:
        return ((bits >> 23) & 255) - (2 if fp4 else 8)
    if fp4 and dst_type_max in (0.0, 6.0, 7.0):
        raise NotImplementedError("which mantissa bits count is not told apart in the operator's page")
    bits = (amax / (dst_type_max if fp4 else 448.0)).contiguous().view(torch.int32)
    return ((bits >> 23) & 255) + ((bits & 0x7FFFFF) != 0).to(torch.int32)


def dynamic_mx_quant(x, *, axis=-1, round_mode="rint", dst_type=FP4, block_size=32, scale_alg=0, dst_type_max=0.0, max_low_bound=0.0):
    import torch
    fp4, columns = dst_type == FP4, x.shape[-1]
    blocks = torch.nn.functional.pad(x.to(torch.float32), (0, -columns % 32)).unflatten(-1, (-1, 32))
    amax = blocks.abs().amax(-1)
    byte = torch.where(amax > 0, _mx_exponent(amax, fp4, scale_alg, dst_type_max), torch.zeros((), dtype=torch.int32)).clamp(0, 254)
    y = (blocks / powers(byte)[..., None]).flatten(-2)[..., :columns]
    scale = torch.nn.functional.pad(byte.to(torch.uint8), (0, byte.shape[-1] % 2)).unflatten(-1, (-1, 2))
    return (to_e2m1(y, round_mode) if fp4 else y.clamp(-448, 448).to(torch.float8_e4m3fn)), scale


def to_e2m1(y, round_mode: str):
    """The nearest of the sixteen values, saturating; ties by `round_mode`: `rint` to the even code, `round` away from zero."""
    import torch
    size, table = y.abs().clamp(max=6.0), _e2m1()[:8]
    lower = torch.searchsorted(table, size.contiguous(), right=True) - 1
    upper = (lower + 1).clamp(max=7)
    below, above = size - table[lower], table[upper] - size
    up = (above < below) | (above == below) & ((lower % 2 == 1) if round_mode == "rint" else torch.ones_like(lower, dtype=torch.bool))
    code = torch.where(up & (below > 0), upper, lower) | (torch.signbit(y).long() << 3)
    return (code[..., 0::2] | (code[..., 1::2] << 4)).to(torch.uint8)


def dual_quant(x, *, smooth_scale=None, round_mode="rint"):
    """Level 0: amax over 512 / 6, float32; then powers of two over 32 of what is left."""
    import torch
    x = x.to(torch.float32) if smooth_scale is None else x.to(torch.float32) * smooth_scale.to(torch.float32)
    columns = x.shape[-1]
    level0 = torch.nn.functional.pad(x, (0, -columns % 512)).unflatten(-1, (-1, 512)).abs().amax(-1) / 6
    inner = x / torch.where(level0 == 0, torch.ones(()), level0).repeat_interleave(512, -1)[..., :columns]
    codes, level1 = dynamic_mx_quant(inner, dst_type=FP4, round_mode=round_mode)
    return codes, level0, level1


def dual_matmul(x1, x2, x1_level0_scale, x2_level0_scale, x1_level1_scale, x2_level1_scale, *, bias=None, output_dtype=15):
    import torch
    x, w = (from_e2m1(data.view(torch.uint8)) for data in (x1, x2))
    x, w = spread(x, x1_level1_scale), spread(w, x2_level1_scale)
    y = 0
    for b, (xs, ws) in enumerate(zip(x.split(512, -1), w.split(512, -1), strict=True)):
        y = y + product(xs, ws.t()).to(torch.float32) * x1_level0_scale[:, b, None] * x2_level0_scale[b]
    return (y if bias is None else y + bias).to(_types()[output_dtype])


def grouped_matmul(x, weight, *, bias=None, scale=None, offset=None, antiquant_scale=None, antiquant_offset=None, per_token_scale=None,
                   group_list=None, activation_input=None, activation_quant_scale=None, activation_quant_offset=None, split_item=0,
                   group_type=None, group_list_type=0, act_type=0, tuning_config=None, output_dtype=None, x_dtype=None, weight_dtype=None,
                   scale_dtype=None, per_token_scale_dtype=None):
    import torch
    x, weight = x[0], weight[0]
    first = {name: value[0] for name, value in (("scale", scale), ("token", per_token_scale), ("anti", antiquant_scale),
                                                ("offset", antiquant_offset), ("bias", bias)) if value}
    out = x.dtype if output_dtype is None else _types()[output_dtype]
    assert group_list_type == 1 and int(group_list.sum()) == x.shape[0], "the counts of all groups must add up to the rows"
    results, start = [], 0
    for e, count in enumerate(group_list.tolist()):
        own = {name: value[start:start + count] if name == "token" else value[e] for name, value in first.items()}
        rows = x[start:start + count]
        y = _group(rows, weight[e], own, x_dtype == FP4, weight_dtype == FP4, per_token_scale_dtype == E8M0)
        results.append(y.to(out))
        start += count
    return [torch.cat(results)]


def _group(x, w, own, x4: bool, w4: bool, mx: bool):
    import torch
    if mx:
        x = from_e2m1(x) if x4 else x.to(torch.float32)
        w = from_e2m1(w.t().contiguous()) if w4 else w.t().to(torch.float32)
        scale = own.get("scale", own.get("anti"))
        return product(spread(x, own["token"]), spread(w, scale.transpose(0, 1)).t()).to(torch.float32)
    mixed = x.dtype == torch.int8 and w.dtype == torch.int32
    x = unpack8(x) if x.dtype == torch.int32 else x
    w = unpack8(w) if w.dtype == torch.int32 else w
    if "anti" in own:
        groups = own["anti"].reshape(-1, w.shape[1]).shape[0]

        def wide(t):
            return t.reshape(groups, -1).to(torch.float32).repeat_interleave(w.shape[0] // groups, 0)

        return product(x, (w.to(torch.float32) + wide(own["offset"])) * wide(own["anti"])).to(torch.float32)
    if "scale" not in own:
        return product(x, w).to(torch.float32)
    scale = scale64(own["scale"])
    if scale.dim() == 2 and x.dtype == torch.float8_e4m3fn:
        return _blocks(x, w, own["token"], scale)
    if mixed:
        y = _nibbles(x, w, scale.reshape(-1, w.shape[1])) + own["bias"]
    else:
        y = (product(x, w) + own.get("bias", 0)).to(torch.float32) * scale
    return y * own["token"][:, None] if "token" in own else y


def swiglu(x, dim=-1):
    import torch
    left, right = x.to(torch.float32).chunk(2, dim)
    return (torch.nn.functional.silu(left) * right).to(x.dtype)


def dequant_swiglu_quant(x, *, weight_scale=None, activation_scale=None, bias=None, quant_scale=None, quant_offset=None, group_index=None,
                         activate_left=False, quant_mode=0, **rest):
    import torch
    return dynamic_quant(swiglu(x.to(torch.float32)))


def grouped_swiglu_mx(x, weight, weight_scale, x_scale, group_list, *, weight_dtype=None, x_dtype=None, **rest):
    import torch
    counts = torch.diff(group_list, prepend=group_list.new_zeros(1))
    named = {"antiquant_scale": weight_scale} if weight_dtype == FP4 else {"scale": weight_scale}
    y = grouped_matmul([x], weight, per_token_scale=[x_scale], group_list=counts, group_list_type=1, output_dtype=6,
                       weight_dtype=weight_dtype, per_token_scale_dtype=E8M0, **named)[0]
    return dynamic_mx_quant(swiglu(y), dst_type=24)


def init_routing(x, expert_idx, *, scale=None, offset=None, active_num=-1, expert_capacity=-1, expert_num=-1, drop_pad_mode=0,
                 expert_tokens_num_type=0, expert_tokens_num_flag=False, quant_mode=-1, active_expert_range=(), row_idx_type=0,
                 x_dtype=None):
    import torch
    flat = expert_idx.reshape(-1).to(torch.int64)
    order = torch.argsort(flat, stable=True)
    row = torch.empty_like(order)
    row[order] = torch.arange(order.numel())
    counts, y = torch.bincount(flat, minlength=expert_num), x[order // expert_idx.shape[1]]
    if quant_mode == 1:
        codes, scales = dynamic_quant(y)
        return codes, row.to(torch.int32), counts, scales
    if quant_mode == 3:
        codes, scales = dynamic_mx_quant(y, dst_type=24)
        return codes, row.to(torch.int32), counts, scales.flatten(1).view(torch.float8_e8m0fnu)
    return y, row.to(torch.int32), counts, torch.zeros(y.shape[0])


def finalize_routing(rows, skip1, skip2, bias, scales, expanded_src_to_dst_row, expert_for_source_row, drop_pad_mode=0, k=1):
    import torch
    y = rows.to(torch.float32)[expanded_src_to_dst_row.long()].unflatten(0, tuple(scales.shape))
    return (y * scales.to(torch.float32)[..., None]).sum(1).to(rows.dtype)


def format_cast(t, acl_format, *, customize_dtype=None, input_dtype=None):
    import torch
    return t.clone(memory_format=torch.preserve_format)


def _format_cast_meta(t, acl_format, *, customize_dtype=None, input_dtype=None):
    import torch
    return torch.empty_like(t)


def _dual_matmul_meta(x1, x2, *scales, bias=None, output_dtype=15):
    return x1.new_empty((x1.shape[0], x2.shape[0]), dtype=_types()[output_dtype])


KERNELS = {
    "npu_quantize": quantize, "npu_dynamic_quant": dynamic_quant, "npu_quant_matmul": quant_matmul,
    "npu_weight_quant_batchmatmul": weight_quant, "npu_dynamic_mx_quant": dynamic_mx_quant,
    "npu_dynamic_dual_level_mx_quant": dual_quant, "npu_dual_level_quant_matmul": dual_matmul, "npu_grouped_matmul": grouped_matmul,
    "npu_swiglu": swiglu, "npu_dequant_swiglu_quant": dequant_swiglu_quant, "npu_grouped_matmul_swiglu_quant_v2": grouped_swiglu_mx,
    "npu_moe_init_routing_v2": init_routing, "npu_moe_finalize_routing": finalize_routing, "npu_format_cast": format_cast,
}
OWN_META = {"npu_format_cast": _format_cast_meta, "npu_dual_level_quant_matmul": _dual_matmul_meta}
"""Operators for which torch_npu has no Meta function; shapes as op-plugin's pages and C++ give them."""

_calls: list = []
_keep: list = []


def _meta(value):
    import torch
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
        return [_meta(item) for item in value]
    return value


def install() -> list:
    """Load the host and register the kernels, once. The list of calls made from then on; clear it as you like."""
    host = npu_host.host()
    if not _keep:
        _register(host)
    return _calls


def _register(host):
    import torch
    library = torch.library.Library("npu", "IMPL")
    _keep.append(library)
    for name, function in OWN_META.items():
        library.impl(name, function, "Meta")
    for name, function in KERNELS.items():
        library.impl(name, functools.partial(_judged, name, function), "CPU")


def _judged(name, function, *args, **named):
    import torch
    overload = getattr(torch.ops.npu, name).default
    wanted = overload(*map(_meta, args), **{key: _meta(value) for key, value in named.items()})
    npu_rules.check(name, overload, args, named)
    result = function(*args, **named)
    pairs = zip(*(out if isinstance(out, (list, tuple)) else [out] for out in (wanted, result)), strict=True)
    for want, got in pairs:
        assert (tuple(want.shape), want.dtype) == (tuple(got.shape), got.dtype), (name, want.shape, want.dtype, got.shape, got.dtype)
    _calls.append((name, args, named))
    return result

"""Key/value caches in int8, for direct use: `npu_quantize` in, elementwise operations out.

Inside a traced model the cache of `layers` is ordinary arithmetic and needs nothing of this. Formula: codes = clip(round(x / scale) +
zero), x ~ (codes - zero) scale, with one number, one per head or one per channel (ModelSlim's C8; none of it is read by SGLang 0.5.23).
"""

from __future__ import annotations

import torch

from ._npu import operator


def _per_channel(value: torch.Tensor, heads: int, size: int, name: str) -> torch.Tensor:
    shapes = {1: (1, 1), heads: (heads, 1), heads * size: (heads, size)}
    if value.numel() not in shapes:
        raise ValueError(f"{name}: expected 1, {heads} or {heads * size} numbers, found {value.numel()}")
    return value.reshape(shapes[value.numel()]).expand(heads, size).reshape(-1)


def write_cache(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None) -> torch.Tensor:
    """Rows [..., heads, size] as int8 of the same shape; `scale`, `zero` of 1, heads or heads x size numbers."""
    heads, size = x.shape[-2:]
    scale = _per_channel(scale.to(torch.float32), heads, size, "scale").contiguous()
    zero = torch.zeros_like(scale) if zero is None else _per_channel(zero, heads, size, "zero")
    if not x.numel():
        return x.to(torch.int8)
    codes = operator("npu_quantize")(x.reshape(-1, heads * size), scale, zero.to(torch.int32).contiguous(), torch.qint8, -1, True)
    return codes.reshape(x.shape)


def read_cache(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None, dtype: torch.dtype = torch.bfloat16):
    """The inverse: [..., heads, size] in `dtype`, computed in float32."""
    heads, size = codes.shape[-2:]
    values = codes.to(torch.float32)
    if zero is not None:
        values = values - _per_channel(zero.to(torch.float32), heads, size, "zero").reshape(heads, size)
    return (values * _per_channel(scale.to(torch.float32), heads, size, "scale").reshape(heads, size)).to(dtype)

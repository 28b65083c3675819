"""The key/value cache: a pytree of fixed length, in floating point, int8 or fp8.

    {"length": int32 [], "layers": ({"k": {"codes": [B, S, heads, D], ...}, "v": {...}}, ...)}

Of stacked layers the entries are stacked, too: `layers` is one `{"k": ..., "v": ...}` with a leading axis. An entry `pad` int32 [B] beside
`length` says how many slots in front of each text are empty, where texts of different lengths are padded.
Entries are quantized when they are written and decoded when attention reads them. Formats per token have one scale for every token and
head, made when the token is written; static formats take theirs from the leaves `k_scale`, `v_scale` (and `k_zero`, `v_zero`) of the
attention module, which are one number, one per head or one per channel.
Sources: SGLang's and vLLM's `kv_cache_dtype` (x ~ codes scale); SGLang's int8 cache (midpoints); msModelSlim's C8 (zero points).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qfunc._codes import code as element_code
from qfunc._codes import usable
from qfunc._numerics import divide

from .config import ModelConfig


@dataclass(frozen=True)
class Format:
    """How entries are stored: the element `code`, None for floating point; one scale `token`-wise, or `static`."""

    code: str | None
    per: str = "static"


FORMATS: dict[str, Format] = {
    "float": Format(None),
    "int8": Format("int8"), "int8_token": Format("int8", "token"),
    "fp8_e4m3": Format("fp8_e4m3"), "fp8_e4m3_token": Format("fp8_e4m3", "token"),
    "fp8_e5m2": Format("fp8_e5m2"), "fp8_e5m2_token": Format("fp8_e5m2", "token"),
}
"""Names that `ModelConfig.cache` takes."""


def init_cache(config: ModelConfig, batch: int, length: int, pad=None) -> dict:
    """An empty cache for `batch` texts of at most `length` tokens, padding included; `pad` int [B] as above, or None.

    Raises: ValueError for an unknown format.
    """
    if config.cache not in FORMATS:
        raise ValueError(f"cache: expected one of {', '.join(FORMATS)}, found {config.cache!r}")
    form, dtype = FORMATS[config.cache], jnp.dtype(config.dtype)
    plain = Format(None)
    latent = config.latent
    if latent is not None:
        shapes = {"k": (1, latent.kv_rank, form), "v": (1, latent.rope, plain)}
    else:
        shapes = {name: (config.num_key_value_heads, config.head_dim, form) for name in ("k", "v")}
    def layer(lead=()):
        return {name: _empty((*lead, batch, length, heads, size), own, dtype) for name, (heads, size, own) in shapes.items()}
    count = config.num_hidden_layers
    layers = layer((count,)) if config.scan else tuple(layer() for _ in range(count))
    return {"length": jnp.zeros((), jnp.int32), "layers": layers, **({} if pad is None else {"pad": jnp.asarray(pad, jnp.int32)})}


def _empty(shape, form: Format, dtype) -> dict:
    entry = {"codes": jnp.zeros(shape, dtype if form.code is None else element_code(form.code).dtype)}
    if form.per == "token":
        entry["scale"] = jnp.ones((*shape[:-1], 1), jnp.float32)
        if form.code == "int8":
            entry["middle"] = jnp.zeros((*shape[:-1], 1), jnp.float32)
    return entry


def capacity(cache: Mapping) -> int:
    """How many tokens a cache has room for."""
    layers = cache["layers"]
    return (layers if isinstance(layers, Mapping) else layers[0])["k"]["codes"].shape[-3]


def batch_size(cache: Mapping) -> int:
    """How many texts a cache is made for."""
    layers = cache["layers"]
    return (layers if isinstance(layers, Mapping) else layers[0])["k"]["codes"].shape[-4]


def update(entry: Mapping, x, start, name: str, format: str, scales: Mapping):
    """Write new rows and give back all.

    Arguments: `entry`, one of a cache's, or None for a forward pass without one: the rows then only take the cache's rounding; `x`
    [B, T, heads, D], the rows of positions `start` on; `name`, `k` or `v`; `scales`, the attention module's leaves.
    Returns: (the new entry, the rows as attention sees them: [B, S, heads, D] in the dtype of `x`).
    """
    form = FORMATS[format]
    scale, zero = _static(scales, name, form, x.shape[-2:])
    new = _encode(x, form, scale, zero)
    if entry is not None:
        new = {part: jax.lax.dynamic_update_slice_in_dim(entry[part], rows.astype(entry[part].dtype), start, 1)
               for part, rows in new.items()}
    return new, _decode(new, form, scale, zero, x.dtype)


def _static(scales: Mapping, name: str, form: Format, shape):
    if form.code is None or form.per == "token":
        return None, None
    scale, zero = scales.get(f"{name}_scale", scales.get("kv_scale")), scales.get(f"{name}_zero")
    if scale is None and form.code == "int8":
        raise ValueError(f"an int8 cache of static scales needs the leaf {name}_scale beside k_proj, found none; "
                         "int8_token makes its scales from the data")
    # An fp8 cache without scales stores the numbers themselves, as the engines do.
    scale = jnp.ones((), jnp.float32) if scale is None else scale.astype(jnp.float32)
    zero = None if zero is None else _per_channel(zero.astype(jnp.float32), shape, f"{name}_zero")
    return _per_channel(scale, shape, f"{name}_scale"), zero


def _per_channel(value, shape, name: str):
    heads, size = shape
    shapes = {1: (1, 1), heads: (heads, 1), heads * size: (heads, size)}
    if value.size not in shapes:
        raise ValueError(f"{name}: expected 1, {heads} or {heads * size} numbers, found {value.size}")
    return value.reshape(shapes[value.size])


def _encode(x, form: Format, scale, zero) -> dict:
    if form.code is None:
        return {"codes": x}
    x, element = x.astype(jnp.float32), element_code(form.code)
    if form.per == "token" and form.code == "int8":
        low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
        middle, scale = (low + high) / 2, usable(divide(high - low, 255))
        codes = jnp.clip(jnp.round(divide(x - middle, scale)), -128, 127).astype(jnp.int8)
        return {"codes": codes, "scale": scale, "middle": middle}
    if form.per == "token":
        scale = usable(divide(jnp.abs(x).max(-1, keepdims=True), element.highest))
        return {"codes": element.encode(divide(x, scale), "rne"), "scale": scale}
    y = divide(x, jnp.broadcast_to(scale, x.shape))
    if not element.integer:
        return {"codes": element.encode(y, "rne")}
    y = jnp.round(y) + (0 if zero is None else zero)
    return {"codes": jnp.clip(y, element.lowest, element.highest).astype(jnp.int8)}


def _decode(entry: Mapping, form: Format, scale, zero, dtype):
    if form.code is None:
        return entry["codes"].astype(dtype)
    values = entry["codes"].astype(jnp.float32)
    if form.per == "token":
        return (values * entry["scale"] + entry.get("middle", 0)).astype(dtype)
    return ((values if zero is None else values - zero) * scale).astype(dtype)

"""Tensor parallel on NPUs: each rank holds its slice of the parameters and runs the same function; torch.distributed adds partial sums.

    local = rank_params(params, config, rank, size)                     # numpy and JAX arrays, on the host
    placed = place(local, device=f"npu:{rank}", soc="A2")
    apply = to_torch(decoder.apply, collective=Collective(rank, size))  # of the default process group, `hccl` on NPUs
    logits, cache = apply(placed, ids, None, rank_config(config, size))
    logits = Collective(rank, size).gather(logits)                      # where the output layer is split

| leaf | layers split along outputs (q, k, v, gate, up) | layers split along inputs (o, down) |
|---|---|---|
| codes | rows | columns; below 8 bits they are packed again, so that any whole group can be cut |
| scale and zero per channel or tensor | rows | on every rank |
| scale and zero per group, MX scales | rows | groups; a rank holds whole ones |
| block scales | rows of blocks; a block that holds several ranks' rows is repeated | columns of blocks |
| scale2; input_scale, input_zero | rows where it has them; on every rank | on every rank (scale2 of `mxfp4_dual`: its spans) |
| smooth; order of inputs (act-order) | on every rank | cut; refused, it crosses ranks |
| bias | cut | on every rank, added once, after the sum |

Every weight keeps its own activation scale: nothing takes that of the shard that was loaded last. The correction for an activation's
zero point, minus zero times the sum of the weights, is made at placement from the rank's own weights, so partial sums add up to it; a
`quant_bias` that holds the correction for all inputs must instead go to one rank alone (SGLang and vLLM Ascend pass None on the others).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from qfunc import _pack
from qfunc._codes import CODES
from qfunc._paths import leaf_path
from qfunc._qtensor import CODECS, QTensor
from qfunc._scales import DUAL_SPAN
from qfunc._spec import bits_of
from qfunc.layers.config import ModelConfig
from qfunc.layers.linear import ROTATIONS
from qfunc.layers.parallel import _check_model, _kind

AXIS = "tp"


@dataclass(frozen=True)
class Collective:
    """One rank of a tensor parallel group: what `psum`, `pmax`, `all_gather` and `axis_index` over the model axis become.

    Fields: `rank`, `size`; `group`, a process group of torch.distributed, None for the default one; `axis`, the axis's name in JAX.
    """

    rank: int
    size: int
    group: Any = None
    axis: str = AXIS

    def sum(self, x):
        """The sum of every rank's tensor, on every rank; x is left as it is."""
        return self._reduced(x, "SUM")

    def max(self, x):
        """The elementwise largest of every rank's tensor."""
        return self._reduced(x, "MAX")

    def _reduced(self, x, name: str):
        import torch.distributed as dist
        out = x.clone()
        dist.all_reduce(out, getattr(dist.ReduceOp, name), group=self.group)
        return out

    def gather(self, x, dim: int = -1):
        """Every rank's tensor side by side along `dim`."""
        import torch
        import torch.distributed as dist
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim)


def rank_config(config: ModelConfig, size: int) -> ModelConfig:
    """The configuration of one rank: its share of the heads, sums over the axis `tp`. Raises: ValueError where heads do not divide."""
    _check_model(config, size, AXIS)
    heads = config.num_attention_heads // size
    shared = heads if config.latent is not None else config.num_key_value_heads // size
    return config.replace(num_attention_heads=heads, num_key_value_heads=shared, axis=AXIS)


def rank_params(params: Mapping, config: ModelConfig, rank: int, size: int) -> dict:
    """The parameters of rank `rank` of `size`: slices, as the table above says.

    Returns: the same tree, packed weights canonical. Raises: ValueError naming every leaf that cannot be cut and why.
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank: expected 0 to {size - 1}, found {rank}")
    _check_model(config, size, AXIS)
    refused: list[str] = []

    def one(keys, leaf):
        path = leaf_path(keys)
        try:
            return _cut(_kind(keys, AXIS), path, leaf, rank, size)
        except ValueError as error:
            refused.append(f"{path}: {error}")
            return leaf

    out = jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    if refused:
        raise ValueError(f"cannot be cut for {size} ranks:\n  " + "\n  ".join(refused))
    return out


def _cut(kind: str, path: str, leaf, rank: int, size: int):
    name = path.rpartition("/")[2]
    if name in ROTATIONS and kind != "whole":
        raise ValueError("an online rotation mixes the inputs of all ranks")
    if kind == "whole" or size == 1:
        return leaf
    if kind == "heads":
        return _slice(leaf, leaf.ndim - 1, rank, size) if leaf.size > 1 else leaf
    if isinstance(leaf, QTensor):
        if kind == "column" and path.startswith("lm_head/") and leaf.matrix_shape[-1] % size:
            return leaf
        return (_columns if kind == "column" else _rows)(leaf.canonical, rank, size)
    if name == "kernel":
        if path.startswith("lm_head/") and leaf.shape[-1] % size:
            return leaf
        return _slice(leaf, leaf.ndim - (1 if kind == "column" else 2), rank, size)
    return _slice(leaf, leaf.ndim - 1, rank, size) if kind == "column" and name == "bias" else leaf


def _share(total: int, rank: int, size: int, what: str) -> tuple[int, int]:
    if total % size:
        raise ValueError(f"{total} {what} do not divide by {size}")
    return rank * (total // size), (rank + 1) * (total // size)


def _slice(leaf, axis: int, rank: int, size: int):
    first, last = _share(leaf.shape[axis], rank, size, "elements")
    return leaf[(slice(None),) * axis + (slice(first, last),)]


def _columns(q: QTensor, rank: int, size: int) -> QTensor:
    """The outputs of one rank."""
    weight, (first, last) = q.scheme.weight, _share(q.matrix_shape[-1], rank, size, "outputs")
    if weight.scale_rule == "double":
        raise ValueError("its scales are quantized in blocks that cross outputs")
    block = weight.granularity.out
    rows = np.arange(first, last)
    if block and first % block and block % (last - first):
        raise ValueError(f"blocks of {block} outputs would be cut at {first}")
    out = {"codes": q.codes[..., first:last, :]}
    for name in ("scale", "zero", "scale2"):
        leaf = getattr(q, name)
        if leaf is not None and leaf.shape[-2] > 1 or leaf is not None and block:
            out[name] = leaf[..., np.unique(rows // block) if block else rows, :] if leaf.shape[-2] > 1 else leaf
    return q.replace(**out)


def _rows(q: QTensor, rank: int, size: int) -> QTensor:
    """The inputs of one rank."""
    weight, activation, columns = q.scheme.weight, q.scheme.activation, q.matrix_shape[-2]
    first, last = _share(columns, rank, size, "inputs")
    if q.perm is not None:
        raise ValueError("its inputs have an order of their own (act-order), which crosses ranks")
    if weight.scale_rule == "double":
        raise ValueError("its scales are quantized in blocks that cross outputs")
    dual = "mx_dual" in (weight.scale_rule, activation.scale_rule if activation is not None else None)
    units = {"spans of {} inputs": DUAL_SPAN if dual else 1,
             "groups of {} inputs": weight.granularity.size if weight.granularity.kind in ("group", "block") else 1,
             "blocks of {} inputs": CODECS.blocks[weight.code][0] if weight.code in CODECS.blocks else 1,
             "activations in groups of {}": activation.granularity.size
             if activation is not None and activation.granularity.kind == "group" else 1}
    for what, unit in units.items():
        if (last - first) % unit:
            raise ValueError(f"{what.format(unit)} would be cut: {columns} inputs over {size} ranks are {last - first} each")
    codes, pad = _code_columns(q, first, last)
    out: dict[str, Any] = {"codes": codes, "pad": pad}
    group = weight.granularity.size if weight.granularity.kind in ("group", "block") else 0
    for name in ("scale", "zero"):
        leaf = getattr(q, name)
        if leaf is not None and group:
            out[name] = leaf[..., first // group:-(-last // group)]
    if q.scale2 is not None and q.scale2.shape[-1] > 1:
        out["scale2"] = q.scale2[..., first // DUAL_SPAN:-(-last // DUAL_SPAN)]
    if q.smooth is not None:
        out["smooth"] = q.smooth[..., first:last]
    return q.replace(**out)


def _code_columns(q: QTensor, first: int, last: int):
    """(codes of the inputs first to last, padding)."""
    name = q.scheme.weight.code
    if name in CODECS.blocks:
        elements, width = CODECS.blocks[name]
        return q.codes[..., first // elements * width:last // elements * width], 0
    element = CODES[name]
    if not element.packed:
        return q.codes[..., first:last], 0
    bits, share = bits_of(name), last - first
    pad = -share % _pack.BLOCK
    if first % _pack.BLOCK == 0 and not pad:
        per = 16 * bits
        return q.codes[..., first // _pack.BLOCK * per:last // _pack.BLOCK * per], 0
    codes = _pack.unpack(np.asarray(q.codes), bits, q.matrix_shape[-2])[..., first:last]
    return _pack.pack(codes, bits, element.offset), pad

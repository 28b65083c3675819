"""GPTQ weights in Marlin's layout (AutoGPTQ's `is_marlin_format`, `checkpoint_format: marlin`): 4 bits, symmetric.

`B` int32 [K / 16, 2 N]: tiles of 16 x 16, laid out for the fragments of a tensor core; `s` float16 [K / g, N], permuted within 64 columns
(32 where one group spans all inputs). The permutations are those of `marlin/__init__.py` of IST-DASLab/marlin; unpacking inverts them.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from qfunc._spec import CHANNEL, WeightSpec, group

from ._family import Family, Source
from ._naming import named
from ._plan import Layer, Parts, value
from ._repack import AWQ_ORDER, by_rows


@cache
def tile_order() -> np.ndarray:
    """Which element of four 16 x 16 tiles stands at each of 1024 places."""
    order = []
    for i in range(32):
        column, row = i // 4, 2 * (i % 4)
        first = [16 * r + column + 8 * half for half in (0, 1) for r in (row, row + 1, row + 8, row + 9)]
        order += [place + 256 * tile for tile in range(4) for place in first]
    return np.array(order).reshape(-1, 8)[:, AWQ_ORDER].ravel()


def scale_order(grouped: bool) -> np.ndarray:
    """The permutation of scale columns."""
    if grouped:
        return np.array([i + 8 * j for i in range(8) for j in range(8)])
    return np.array([2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)])


def codes(words: np.ndarray, ins: int, outs: int) -> np.ndarray:
    """Marlin's words uint32 [K / 16, 2 N] to codes uint8 [K, N]."""
    nibbles = ((words[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15).astype(np.uint8).reshape(-1, 1024)
    tiles = np.empty_like(nibbles)
    tiles[:, tile_order()] = nibbles
    return tiles.reshape(ins // 16, outs // 16, 16, 16).transpose(0, 2, 1, 3).reshape(ins, outs)


def settings(source: Source) -> int | None:
    if source.quant.integer("bits", low=1, high=8, default=4) != 4:
        raise source.quant.fail("bits", "4")
    if source.quant.boolean("desc_act"):
        raise source.quant.fail("desc_act", "false")
    return source.quant.group_size("group_size", default=128)


def layer(config: int | None, parts: Parts) -> Layer | None:
    if "B" not in parts:
        return None
    weight = parts.take("B", "I32", ndim=2)
    ins, outs = weight.shape[0] * 16, weight.shape[1] // 2
    if ins % 128 or outs % 256:
        raise parts.fail("B", "inputs by 128 and outputs by 256", f"{ins} x {outs}")
    size = min(config or ins, ins)
    groups = -(-ins // size)
    scales = parts.take("s", ("F16", "BF16"), (groups, outs))
    parts.drop("workspace")
    extras = parts.bias(outs)
    parts.done()

    def build() -> dict[str, np.ndarray]:
        matrix = codes(weight.read().view(np.uint32), ins, outs)
        order = scale_order(groups > 1)
        array = value(parts, "s", scales).reshape(-1, len(order))
        plain = np.empty_like(array)
        plain[:, order] = array
        return {"codes": by_rows(matrix.T, np.ascontiguousarray, 4, ins, 8), "scale": np.ascontiguousarray(plain.reshape(groups, outs).T)}
    grain = CHANNEL if groups == 1 else group(size)
    return Layer(parts.module, named(WeightSpec("int4", grain, scale_dtype="float16")), (ins, outs), build, extras, parts.all)


FIELDS = {"quant_method": "read", "bits": "read: 4", "group_size": "read", "desc_act": "read: false", "is_marlin_format": "read",
          "checkpoint_format": "read", "sym": "always true"}
FAMILY = Family("marlin", settings, layer, frozenset({"B"}), fields=FIELDS)

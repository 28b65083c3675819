"""GPT-OSS checkpoints (`quant_method: mxfp4`): the experts of a layer in one tensor, nibbles in blocks of 32 under exponents.

`<proj>_blocks` uint8 [E, N, K / 32, 16], `<proj>_scales` uint8 [E, N, K / 32], `<proj>_bias` [E, N]; element 2 k of a block is the low
nibble of byte k. The rows of `gate_up_proj` alternate gate and up; they stay as they are. Activations are not quantized.
Source: transformers, `integrations/mxfp4.py`; openai/gpt-oss, `gpt_oss/torch/weights.py`.
"""

from __future__ import annotations

import numpy as np

from qfunc._spec import WeightSpec

from . import _common as common
from ._family import Family, Source
from ._naming import named
from ._plan import Layer, Parts
from ._repack import nibble_rows
from .safetensors import FLOATS


def settings(source: Source) -> None:
    source.quant.strings("modules_to_not_convert")


def split(name: str) -> tuple[str, str]:
    for part in ("blocks", "scales", "bias"):
        if name.endswith(f"_proj_{part}"):
            return name.removesuffix(f"_{part}"), part
    return tuple(name.rpartition(".")[::2])


def layer(config: None, parts: Parts) -> Layer | None:
    if "blocks" not in parts:
        return None
    blocks = parts.take("blocks", "U8", ndim=4)
    experts, outs, groups, width = blocks.shape
    if width != 16:
        raise parts.fail("blocks", "blocks of 16 bytes", list(blocks.shape))
    scales = parts.take("scales", common.E8M0, (experts, outs, groups))
    extras = {"bias": parts.take("bias", tuple(FLOATS), (experts, outs)).read} if "bias" in parts else {}
    parts.done()
    ins = groups * 32

    def build() -> dict[str, np.ndarray]:
        exponents = scales.read().view(np.uint8)
        if (exponents == 255).any():
            raise parts.fail("scales", "exponents below 255", "255, which is NaN")
        rows = nibble_rows(blocks.read().reshape(experts * outs, -1), ins)
        return {"codes": rows.reshape(experts, outs, -1), "scale": exponents}
    scheme = named(WeightSpec("fp4_e2m1", common.MX, scale_dtype="e8m0", scale_rule="mx_floor"))
    return Layer(parts.module, scheme, (experts, ins, outs), build, extras, parts.all)


FIELDS = {"quant_method": "read", "modules_to_not_convert": "checked: the tensors tell", "dequantize": "a choice at load"}
FAMILY = Family("mxfp4", settings, layer, frozenset({"blocks"}), split, FIELDS)

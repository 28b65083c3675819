"""MXFP8 checkpoints with `quant_method: mxfp8`: `weight` e4m3 [N, K], `weight_scale_inv` uint8 exponents [N, K / 32].

Source: SGLang, `quantization/fp8.py` (`use_mxfp8`).
"""

from __future__ import annotations

from . import _common as common
from ._family import Family, Source
from ._plan import Layer, Parts


def settings(source: Source) -> None:
    source.quant.choice("activation_scheme", ("dynamic",), "dynamic")
    if source.quant.get("weight_block_size") not in (None, [1, 32]):
        raise source.quant.fail("weight_block_size", "[1, 32]")


def layer(config: None, parts: Parts) -> Layer | None:
    if parts.tensors.get("weight") is None or parts.tensors["weight"].dtype not in common.FP8:
        return None
    name = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
    return common.mx_layer(parts, "weight", name, common.mx_input("fp8_e4m3", "mx_floor"), rule="mx_floor")


FIELDS = {"quant_method": "read", "activation_scheme": "read: dynamic", "weight_block_size": "read: [1, 32]",
          "modules_to_not_convert": "not needed: the tensors tell", "ignored_layers": "not needed: the tensors tell"}
FAMILY = Family("mxfp8", settings, layer, frozenset({"weight_scale_inv", "weight_scale"}), fields=FIELDS)

"""Every field inside the sections of a configuration: what it is read for, or why it is not needed.

`Family.fields` tells it of the top level. A field that is in neither table is a note of the checkpoint, so nothing that a producer adds
goes unseen. `docs/formats.md` is made from both (`docs/format_fields.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

CALIBRATED, TENSORS = "how it was calibrated", "the tensors tell"

_TENSOR = {
    "observer": CALIBRATED, "observer_kwargs": CALIBRATED, "zp_dtype": TENSORS,
    "actorder": "read: group or true needs `weight_g_idx`, which tells the order",
}
_CT_WEIGHTS = {
    "num_bits": "read", "type": "read: int or float", "symmetric": "read", "strategy": "read, or implied by group_size",
    "group_size": "read", "block_structure": "read", "dynamic": "not needed: weights are static", "scale_dtype": TENSORS, **_TENSOR,
}
_CT_INPUTS = {**_CT_WEIGHTS, "dynamic": "read", "scale_dtype": "read: uint8 means powers of two", "block_structure": "not needed"}
_QUARK_TENSOR = {
    "dtype": "read", "qscheme": "read", "group_size": "read", "block_size": "read", "is_dynamic": "read", "symmetric": "read",
    "scale_format": "read: e8m0", "scale_calculation_mode": "read", "ch_axis": "always the outputs", "observer_cls": CALIBRATED,
    "round_method": CALIBRATED, "scale_type": TENSORS, "zero_point_type": TENSORS, "is_scale_quant": TENSORS,
    "mx_element_dtype": "repeats dtype", "enable_buffer_reuse": CALIBRATED, "max_input_numel": CALIBRATED, "qat_spec": CALIBRATED,
}
_QUARK_LAYER = {
    "weight": "read; a list is a weight of two levels", "input_tensors": "read", "output_tensors": "the scales of the cache tell",
    "bias": "not needed: biases are float", "target_device": "a choice at run time",
}
SECTIONS: dict[str, dict[str, dict[str, str]]] = {
    "compressed-tensors": {
        "config_groups/*": {"targets": "read", "weights": "read", "input_activations": "read", "output_activations": "must be null",
                            "format": "read"},
        "config_groups/*/weights": _CT_WEIGHTS,
        "config_groups/*/input_activations": _CT_INPUTS,
        "kv_cache_scheme": {"type": "read", "num_bits": "read: 8", "strategy": "read: tensor, attn_head or channel",
                            "symmetric": "read: must not be false", "dynamic": "the scales tell", "group_size": "not needed",
                            "block_structure": "not needed", "scale_dtype": TENSORS, **_TENSOR},
        "sparsity_config": {"format": "read: dense, sparse-24-bitmask or sparse-bitmask", "registry_requires_subclass": TENSORS,
                            "sparsity_structure": TENSORS, "global_sparsity": "not needed", "ignore": TENSORS, "targets": TENSORS},
        "transform_config": {"config_groups": "read"},
        "transform_config/config_groups/*": {
            "type": "not needed: in the weights", "apply": "read: location must be weight_input or weight_output",
            "randomize": "not needed: in the weights", "requires_grad": "read: must not be true",
            "head_dim": "not needed: in the weights", "precision": "not needed: in the weights"},
        "transform_config/config_groups/*/apply": {
            "targets": "not needed: in the weights", "location": "read", "inverse": "not needed: in the weights",
            "ignore": "not needed: in the weights"},
    },
    "bitsandbytes": {
        "weight.quant_state.bitsandbytes__*": {
            "quant_type": "read", "shape": "read", "blocksize": "read", "dtype": "read: the logical dtype",
            "nested_blocksize": "read: 256", "nested_offset": "read", "nested_dtype": TENSORS},
    },
    "torchao": {
        "__metadata__/*": {"_type": "read", "_data": "read"},
        "__metadata__/*/_data": {
            "block_size": "read", "act_quant_kwargs": "read: granularity, mapping_type, scaling_mode, elem_dtype", "granularity": "read",
            "mapping_type": "read", "scaling_mode": "read", "elem_dtype": "read", "target_dtype": "read",
            "activation_quantization": "read", "is_swizzled_scales": "read", "orig_dtype": TENSORS,
            "kernel_preference": "a choice of kernels", "mm_config": "a choice of kernels"},
    },
    "gptq": {
        "dynamic/*": {"bits": "read", "group_size": "read", "sym": "read", "desc_act": "read", "damp_percent": CALIBRATED,
                      "mse": CALIBRATED, "static_groups": CALIBRATED, "act_group_aware": CALIBRATED},
    },
    "auto-round": {
        "extra_config/*": {**{name: "read" for name in ("bits", "group_size", "sym", "act_bits", "act_data_type", "act_group_size",
                                                        "act_dynamic", "act_sym")},
                           "data_type": "read where act_data_type is absent", "scale_dtype": TENSORS, "iters": CALIBRATED},
    },
    "modelopt": {
        "quantized_layers/*": {"quant_algo": "read", "group_size": "read", "awq_block_size": TENSORS},
        "kv_cache_scheme": {"dynamic": "the scales tell", "num_bits": "the scales tell", "type": "the scales tell"},
    },
    "modelslim": {
        "metadata": {"quarot": "read"},
        "metadata/quarot": {"heads_rotation": "read", "kronecker_rotation": "read", "max_tp_size": "the matrices tell"},
        "metadata/quarot/*": {"layers": "read: each must have its matrices"},
        "optional": {"quarot": "read"}, "optional/quarot": {"rotation_map": "checked: names of files"},
        "optional/quarot/rotation_map": {"global_rotation": "checked: a file in the folder, for drafts and tools"},
    },
    "quark": {
        "global_quant_config": _QUARK_LAYER, "layer_quant_config/*": _QUARK_LAYER, "layer_type_quant_config/*": _QUARK_LAYER,
        **{f"{where}/{part}": _QUARK_TENSOR for where in ("global_quant_config", "layer_quant_config/*", "layer_type_quant_config/*")
           for part in ("weight", "input_tensors")},
        "export": {"pack_method": "read: reorder or order", "weight_format": "read: real_quantized",
                   "kv_cache_group": "read: whether there is one",
                   "min_kv_scale": CALIBRATED, "weight_merge_groups": "not needed: nothing is merged"},
    },
}


def unknown(name: str, fields: dict[str, str], data: dict) -> Iterator[str]:
    """The paths of the fields of a configuration that no table knows and that are set."""
    sections = SECTIONS.get(name, {})
    yield from _unknown(data, fields, sections, ())


def _unknown(data: dict, fields: dict[str, str], sections: dict[str, dict[str, str]], path: tuple[str, ...]) -> Iterator[str]:
    for key, value in data.items():
        here = (*path, key)
        if key not in fields and value not in (None, [], {}, False) and not (not path and isinstance(value, str) and "." in key):
            yield "/".join(here)
            continue
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                yield from _section(inner, sections, here)


def _section(data: dict, sections: dict[str, dict[str, str]], path: tuple[str, ...]) -> Iterator[str]:
    """A section of a known shape, or one whose entries are (`config_groups`, `dynamic`)."""
    known = next((fields for pattern, fields in sections.items() if _matches(pattern, path)), None)
    if known:
        yield from _unknown(data, known, sections, path)
    elif any(len(pattern.split("/")) > len(path) and _matches("/".join(pattern.split("/")[: len(path)]), path) for pattern in sections):
        for key, value in data.items():
            if isinstance(value, dict):
                yield from _section(value, sections, (*path, key))


def _matches(pattern: str, path: tuple[str, ...]) -> bool:
    parts = pattern.split("/")
    return len(parts) == len(path) and all(part in ("*", key) for key, part in zip(path, parts, strict=True))

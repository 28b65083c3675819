"""Which family a checkpoint belongs to, told by its files: the table of readers."""

from __future__ import annotations

import importlib
from pathlib import Path

from ._family import Config, Family
from ._refuse import folder_json, refuse

# quant_method in lower case, to the module of its reader.
METHODS = {
    "awq": "awq", "awq_marlin": "awq", "gptq": "gptq", "gptq_marlin": "gptq", "marlin": "marlin",
    "compressed-tensors": "compressed_tensors",
    "compressed_tensors": "compressed_tensors", "fp8": "fp8", "fbgemm_fp8": "fp8", "blockwise_int8": "fp8", "mxfp8": "mxfp8",
    "mxfp4": "mxfp4",
    "modelopt": "modelopt", "modelopt_fp8": "modelopt", "modelopt_fp4": "modelopt", "modelopt_mixed": "modelopt", "quark": "quark",
    "bitsandbytes": "bitsandbytes", "torchao": "torchao", "auto-round": "auto_round", "intel/auto-round": "auto_round",
    "modelslim": "modelslim",
}


def family(name: str) -> Family:
    """The reader in a module of this package."""
    return importlib.import_module(f".{name}", __package__).FAMILY


def quantization(folder: Path, config: dict) -> tuple[Family | None, Config | None]:
    """The reader and its configuration, (None, None) for a float checkpoint.

    Looked at in this order: `quant_model_description*.json` (msModelSlim); `quantization_config` of config.json, at the top or in
    `text_config`, or `compression_config`; `hf_quant_config.json` (ModelOpt); `quantize_config.json`, `quant_config.json` (GPTQ, AWQ).
    """
    descriptions = sorted(folder.glob("quant_model_description*.json"))
    if len(descriptions) > 1:
        raise refuse(folder, "", "one quant_model_description*.json", ", ".join(p.name for p in descriptions))
    if descriptions:
        return family("modelslim"), Config(folder_json(folder, descriptions[0].name), descriptions[0])
    where = folder / "config.json"
    for key in ("quantization_config", "compression_config"):
        for holder in (config, config.get("text_config")):
            if isinstance(holder, dict) and holder.get(key) is not None:
                found = Config(holder[key], where, f"{key}.")
                return _by_method(found), found
    data = folder_json(folder, "hf_quant_config.json")
    if data is not None:
        found = Config(data, folder / "hf_quant_config.json")
        return family("modelopt"), found.section("quantization") or found
    for name in ("quantize_config.json", "quant_config.json"):
        data = folder_json(folder, name)
        if data is not None:
            found = Config({"quant_method": "awq" if "w_bit" in data or "zero_point" in data else "gptq", **data}, folder / name)
            return _by_method(found), found
    return None, None


def _by_method(config: Config) -> Family:
    method = config.get("quant_method")
    if method is None and isinstance(config.data.get("config_groups"), dict):
        method = "compressed-tensors"
    key = method.lower() if isinstance(method, str) else None
    if key not in METHODS:
        raise config.fail("quant_method", "one of " + ", ".join(METHODS), repr(method))
    if METHODS[key] == "gptq" and (config.data.get("is_marlin_format") is True or config.data.get("checkpoint_format") == "marlin"):
        return family("marlin")
    return family(METHODS[key])

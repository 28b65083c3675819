"""Scheme names for what checkpoints contain: the grammar of `qfunc.scheme`, run backwards."""

from __future__ import annotations

from qfunc._spec import CHANNEL, TENSOR, ActivationSpec, Granularity, Scheme, WeightSpec, bits_of, group

# What a bare name means, by base: the granularity that needs no suffix.
_BARE = {"fp8": TENSOR, "fp8_static": TENSOR, "nf4": group(64), "fp4_bnb": group(64), "nf4_dq": group(64), "fp4_bnb_dq": group(64)}


def named(weight: WeightSpec, activation: ActivationSpec | None = None) -> Scheme:
    """The scheme of two specs under the name that the table of schemes would give it.

    Two schemes of one name may still differ in what the name does not say (scale type, scale rule, rounding): compare the records.
    """
    base = _base(weight, activation)
    if weight.code.startswith("gguf:"):
        return Scheme(base, weight, activation)
    grain = weight.granularity
    suffix = ""
    if grain.kind == "group" and weight.scale_dtype not in ("e8m0", "fp8_e4m3") and grain != _BARE.get(base):
        suffix = f"_g{grain.size}"
    elif grain.kind == "tensor" and _BARE.get(base, CHANNEL) != TENSOR:
        suffix = "_tensor"
    if weight.zero == "int" or (activation is not None and activation.mode == "static" and activation.zero == "int"):
        suffix += "_asym"
    return Scheme(base + suffix + ("_actorder" if weight.actorder else ""), weight, activation)


def _base(weight: WeightSpec, activation: ActivationSpec | None) -> str:
    code = weight.code
    if "int" in code:
        return _integer(weight, activation)
    if weight.scale_rule == "mx_dual":
        return "mxfp4_dual"
    if weight.scale_dtype == "e8m0" and weight.granularity.kind == "group":
        stem = {"fp8_e4m3": "mxfp8", "fp8_e5m2": "mxfp8_e5m2", "fp6_e2m3": "mxfp6", "fp6_e3m2": "mxfp6_e3m2", "fp4_e2m1": "mxfp4"}[code]
        if activation is None:
            return f"{stem}_a16"
        return stem if activation.code == code or stem.startswith("mxfp6") else f"{stem}_a{bits_of(activation.code)}"
    if code == "fp4_e2m1":
        return "nvfp4_a16" if activation is None else "nvfp4_token" if activation.outer == "token" else "nvfp4"
    if code in ("nf4", "fp4_bnb"):
        return f"{code}_dq" if weight.scale_rule == "double" else code
    if code.startswith("gguf:"):
        return code
    return _float8(code, weight.granularity, activation)


def _integer(weight: WeightSpec, activation: ActivationSpec | None) -> str:
    bits = bits_of(weight.code)
    if activation is None:
        return f"w{bits}a16"
    if activation.outlier_threshold is not None:
        return "llm_int8"
    if weight.granularity.kind == "block":
        return f"w{bits}a{bits_of(activation.code)}_block"
    static = activation.mode == "static"
    if activation.code.startswith("fp8"):
        return f"w{bits}afp8_static" if static else f"w{bits}afp8"
    return f"w{bits}a{bits_of(activation.code)}_{'static' if static else 'dynamic'}"


def _float8(code: str, grain: Granularity, activation: ActivationSpec | None) -> str:
    stem = "fp8" if code == "fp8_e4m3" else code
    if activation is None:
        return f"{stem}_w8a16"
    if activation.mode == "static":
        return f"{stem}_static"
    if grain.kind == "block":
        return f"{stem}_block"
    return stem if grain.kind == "tensor" and activation.granularity.kind == "tensor" else f"{stem}_dynamic"

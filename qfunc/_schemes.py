"""The table of schemes: adding a format is adding a row.

A name is a base row and suffixes, in this order: `_g<N>` (groups of N along the contracted axis) or `_tensor` (one scale), `_asym`
(integer zero points: of the activation in `_static` schemes, else of the weight), `_actorder`. A bare name is symmetric and, for
integers and fp8 weights alone, has one scale per output channel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache

from ._paths import nearest
from ._spec import CHANNEL, TENSOR, ActivationSpec, Granularity, Scheme, WeightSpec, block, group

MX = group(32)
NV = group(16)


def _int_weight(bits: int, granularity: Granularity = CHANNEL, **fields) -> WeightSpec:
    # Two and three bits cannot spare the lowest code; from four bits on the symmetric range is the convention of the kernels.
    rule = "amax" if bits >= 4 else "amax_half"
    return WeightSpec(f"int{bits}", granularity, scale_rule=rule, **fields)


def _mx_weight(code: str) -> WeightSpec:
    return WeightSpec(code, MX, scale_dtype="e8m0", scale_rule="mx_rceil")


def _mx_input(code: str) -> ActivationSpec:
    return ActivationSpec(code, MX, scale_dtype="e8m0", scale_rule="mx_rceil")


def _nv_input(outer: str) -> ActivationSpec:
    return ActivationSpec("fp4_e2m1", NV, scale_dtype="fp8_e4m3", outer=outer)


INT8, INT4, FP8, E5M2 = (ActivationSpec(code) for code in ("int8", "int4", "fp8_e4m3", "fp8_e5m2"))
STATIC_INT8 = ActivationSpec("int8", TENSOR, mode="static")
STATIC_FP8 = ActivationSpec("fp8_e4m3", TENSOR, mode="static")
NVFP4 = WeightSpec("fp4_e2m1", NV, scale_dtype="fp8_e4m3", scale2_dtype="float32", scale_rule="two_level")
WIDTHS = range(2, 9)

_ROWS: dict[str, tuple[WeightSpec, ActivationSpec | None]] = {
    # integer weights; activations in floating point, int8, int4 or fp8
    **{f"w{b}a16": (_int_weight(b), None) for b in WIDTHS},
    **{f"w{b}a8_dynamic": (_int_weight(b), INT8) for b in WIDTHS},
    **{f"w{b}a8_static": (_int_weight(b), STATIC_INT8) for b in WIDTHS},
    **{f"w{b}a4_dynamic": (_int_weight(b), INT4) for b in WIDTHS},
    **{f"w{b}afp8": (_int_weight(b), FP8) for b in WIDTHS},
    **{f"w{b}afp8_static": (_int_weight(b), STATIC_FP8) for b in WIDTHS},
    "w8a8_block": (_int_weight(8, block(128, 128)), ActivationSpec("int8", group(128))),
    "llm_int8": (_int_weight(8), ActivationSpec("int8", outlier_threshold=6.0)),
    "int4wo": (WeightSpec("int4", zero="float", scale_dtype="bfloat16", scale_rule="minmax_float"), None),
    # fp8
    "fp8": (WeightSpec("fp8_e4m3", TENSOR), ActivationSpec("fp8_e4m3", TENSOR)),
    "fp8_static": (WeightSpec("fp8_e4m3", TENSOR), STATIC_FP8),
    "fp8_dynamic": (WeightSpec("fp8_e4m3"), FP8),
    "fp8_block": (WeightSpec("fp8_e4m3", block(128, 128)), ActivationSpec("fp8_e4m3", group(128))),
    "fp8_w8a16": (WeightSpec("fp8_e4m3"), None),
    "fp8_e5m2": (WeightSpec("fp8_e5m2", TENSOR), ActivationSpec("fp8_e5m2", TENSOR)),
    "fp8_e5m2_static": (WeightSpec("fp8_e5m2", TENSOR), ActivationSpec("fp8_e5m2", TENSOR, mode="static")),
    "fp8_e5m2_dynamic": (WeightSpec("fp8_e5m2"), E5M2),
    "fp8_e5m2_block": (WeightSpec("fp8_e5m2", block(128, 128)), ActivationSpec("fp8_e5m2", group(128))),
    "fp8_e5m2_w8a16": (WeightSpec("fp8_e5m2"), None),
    # OCP microscaling
    "mxfp8": (_mx_weight("fp8_e4m3"), _mx_input("fp8_e4m3")),
    "mxfp8_a16": (_mx_weight("fp8_e4m3"), None),
    "mxfp8_e5m2": (_mx_weight("fp8_e5m2"), _mx_input("fp8_e5m2")),
    "mxfp6": (_mx_weight("fp6_e2m3"), _mx_input("fp8_e4m3")),
    "mxfp6_a16": (_mx_weight("fp6_e2m3"), None),
    "mxfp6_a6": (_mx_weight("fp6_e2m3"), _mx_input("fp6_e2m3")),
    "mxfp6_e3m2": (_mx_weight("fp6_e3m2"), _mx_input("fp8_e4m3")),
    "mxfp6_e3m2_a16": (_mx_weight("fp6_e3m2"), None),
    "mxfp4": (_mx_weight("fp4_e2m1"), _mx_input("fp4_e2m1")),
    "mxfp4_a16": (_mx_weight("fp4_e2m1"), None),
    "mxfp4_a8": (_mx_weight("fp4_e2m1"), _mx_input("fp8_e4m3")),
    # Ascend's two-level fp4: powers of two for 32 elements under a float32 for 512
    "mxfp4_dual": (WeightSpec("fp4_e2m1", MX, scale_dtype="e8m0", scale2_dtype="float32", scale_rule="mx_dual"),
                   ActivationSpec("fp4_e2m1", MX, scale_dtype="e8m0", scale_rule="mx_dual")),
    # NVIDIA's two-level fp4
    "nvfp4": (NVFP4, _nv_input("tensor")),
    "nvfp4_token": (NVFP4, _nv_input("token")),
    "nvfp4_a16": (NVFP4, None),
    # bitsandbytes
    "nf4": (WeightSpec("nf4", group(64)), None),
    "nf4_dq": (WeightSpec("nf4", group(64), scale_dtype="uint8", scale2_dtype="float32", scale_rule="double"), None),
    "fp4_bnb": (WeightSpec("fp4_bnb", group(64)), None),
    "fp4_bnb_dq": (WeightSpec("fp4_bnb", group(64), scale_dtype="uint8", scale2_dtype="float32", scale_rule="double"), None),
}
# Base rows that mean nothing on their own.
_ONLY_GROUPED = {"int4wo"}

ALIASES: dict[str, str] = {
    # SGLang's --quantization and --torchao-config names, checkpoint producers' type strings, presets of compressed-tensors
    "w8a8_int8": "w8a8_dynamic", "int8": "w8a8_dynamic", "int8dq": "w8a8_dynamic", "auto-round-int8": "w8a8_dynamic",
    "w8a8": "w8a8_static", "smoothquant-o3": "w8a8_static", "blockwise_int8": "w8a8_block", "int8wo": "w8a16",
    "awq": "w4a16_g128_asym", "awq_marlin": "w4a16_g128_asym", "gptq": "w4a16_g128", "gptq_marlin": "w4a16_g128",
    "w4a8": "w4a8_dynamic", "qoq": "w4a8_dynamic", "quark_int4fp8_moe": "w4afp8", "w4a4": "w4a4_dynamic",
    "modelopt": "fp8", "modelopt_fp8": "fp8", "fp8dq-per_tensor": "fp8", "w8a8_fp8": "fp8_dynamic", "fp8dq-per_row": "fp8_dynamic",
    "wfp8afp8_dynamic": "fp8_dynamic", "fp8wo": "fp8_w8a16", "fbgemm_fp8": "fp8_dynamic",
    "w8a8_mxfp8": "mxfp8", "mxfp8a16": "mxfp8_a16", "mxfp6a16": "mxfp6_a16", "mxfp6a8": "mxfp6",
    "w4a4_mxfp4": "mxfp4", "w4a4_mxfp4_dualscale": "mxfp4_dual",
    "quark_mxfp4": "mxfp4", "mxfp4a16": "mxfp4_a16", "w4a8_mxfp": "mxfp4_a8", "mxfp_w4a8": "mxfp4_a8",
    "modelopt_fp4": "nvfp4", "petit_nvfp4": "nvfp4_a16", "nvfp4a16": "nvfp4_a16", "nvfp4_online": "nvfp4_token",
    "bitsandbytes": "nf4",
    **{f"int4wo-{n}": f"int4wo_g{n}" for n in (32, 64, 128, 256)},
    # In upper case these are presets of compressed-tensors, which have groups of 128.
    **{f"W{b}A16{asym}": f"w{b}a16_g128{asym.lower()}" for b in range(2, 8) for asym in ("", "_ASYM")}, "W4AFP8": "w4afp8_g128",
}
"""Other people's names for rows of the table."""

_SUFFIX = re.compile(r"(?P<base>.+?)(?:_g(?P<group>\d+)|(?P<tensor>_tensor))?(?P<asym>_asym)?(?P<actorder>_actorder)?")


def _asymmetric(row: Scheme) -> Scheme:
    if row.activation is not None and row.activation.mode == "static":
        if row.activation.code != "int8":
            raise ValueError("only int8 activations take a zero point")
        return row.replace(activation_zero="int")
    code = row.weight.code
    if not code.startswith("int") or row.weight.zero is not None:
        raise ValueError("only symmetric integer weights take a zero point")
    return row.replace(weight_code="u" + code, weight_zero="int", weight_scale_rule="minmax")


def _regrouped(row: Scheme, granularity: Granularity) -> Scheme:
    if row.weight.granularity not in (CHANNEL, TENSOR, group(64)) or row.weight.scale_dtype in ("e8m0", "fp8_e4m3"):
        raise ValueError(f"its weight scales are {row.weight.granularity} by definition")
    return row.replace(weight_granularity=granularity)


def _reordered(row: Scheme) -> Scheme:
    if row.activation is not None or row.weight.granularity.kind != "group" or "int" not in row.weight.code:
        raise ValueError("_actorder is for weight-only integer groups")
    return row.replace(weight_actorder=True)


@cache
def scheme(name: str) -> Scheme:
    """The scheme of a name or alias.

    Names are case-insensitive, apart from compressed-tensors' `W2A16` to `W7A16`, whose groups are of 128; `W8A16`, `W8A8`, `W4A8` and
    `W4A4` are ModelSlim's. `Scheme` objects pass through.
    Raises ValueError for an unknown or impossible name, naming the nearest ones.
    """
    if isinstance(name, Scheme):
        return name
    if not isinstance(name, str):
        raise TypeError(f"a scheme is a name or a qfunc.Scheme, found {type(name).__name__}")
    canonical = ALIASES.get(name) or ALIASES.get(name.lower()) or name.lower()
    if canonical.startswith("gguf:"):
        return _ggml_scheme(canonical)
    match = _SUFFIX.fullmatch(canonical)
    base = match["base"] if match else canonical
    if match is None or base not in _ROWS:
        raise ValueError(f"no scheme {name!r}; the nearest are {', '.join(nearest(canonical, _known()))}")
    row = Scheme(canonical, *_ROWS[base])
    try:
        if match["group"]:
            row = _regrouped(row, group(int(match["group"])))
        if match["tensor"]:
            row = _regrouped(row, TENSOR)
        if match["asym"]:
            row = _asymmetric(row)
        if match["actorder"]:
            row = _reordered(row)
        if base in _ONLY_GROUPED and not match["group"]:
            raise ValueError("it needs a group size, such as _g128")
    except ValueError as error:
        raise ValueError(f"no scheme {name!r}: {error}; the nearest are {', '.join(nearest(canonical, _known()))}") from None
    return row


def _ggml_scheme(name: str) -> Scheme:
    from ._ggml import block_type
    record = block_type(name.removeprefix("gguf:"))
    return Scheme(name, WeightSpec(name, group(record.elements), scale_dtype="float16", scale_rule="block"))


_VARIANTS = (
    *(f"w{b}a16_g{n}" for b in WIDTHS for n in (32, 64, 128)), "w4a16_asym", "w8a16_asym",
    *(f"w{b}a16_g128_asym" for b in WIDTHS), "w4a16_g32_asym", "w4a16_g128_actorder", "w4a16_g128_asym_actorder",
    "w8a8_static_asym", "w8a8_dynamic_tensor", "w4a8_dynamic_g128", "w4a8_dynamic_g256", "w4a8_dynamic_g128_asym", "w4a4_dynamic_g128",
    "w4afp8_g128", "fp8_dynamic_g128", "fp8_w8a16_g128", "fp8_w8a16_tensor", "int4wo_g32", "int4wo_g64", "int4wo_g128", "int4wo_g256",
)


@cache
def _listed() -> tuple[str, ...]:
    return tuple(dict.fromkeys([*(row for row in _ROWS if row not in _ONLY_GROUPED), *_VARIANTS]))


def _known() -> list[str]:
    return [*_listed(), *ALIASES]


class Schemes(Mapping):
    """The table of schemes, name to `Scheme`.

    Iterates over the rows; any name that `qfunc.scheme` understands (other group sizes, aliases) can be looked up as well.
    """

    def __getitem__(self, name: str) -> Scheme:
        try:
            return scheme(name)
        except (ValueError, TypeError) as error:
            raise KeyError(str(error)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(_listed())

    def __len__(self) -> int:
        return len(_listed())

    @property
    def aliases(self) -> dict[str, str]:
        """Other people's names, each with the name of its row."""
        return dict(ALIASES)

    def __repr__(self) -> str:
        return f"<{len(self)} schemes: {', '.join(self)}>"


schemes = Schemes()

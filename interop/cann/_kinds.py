"""Which operator a scheme runs on, and the alignment that the operator asks of a matrix: decided from static facts, before anything moves.

Integer sums are exact on every kind but `a16` and `float`, whose activations stay in floating point. Where no operator has the scheme's
scales, `codes16` puts the activation's integers into a 16-bit float, where they are exact, and scales the result per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from qfunc._codes import CODES
from qfunc._spec import ActivationSpec, Scheme, WeightSpec

LAST_AXIS = 65535
"""The longest last axis of a matmul's operands (op-plugin's operator pages)."""
GROUPS = 1024
"""The most experts of one grouped matmul."""
MX_PAIR, DUAL_BLOCK, MIXED_GROUP = 64, 512, 256


@dataclass(frozen=True)
class Facts:
    """What the choice looks at: weight and activation specs, whether the weight is a stack of experts, inputs K and outputs N."""

    weight: WeightSpec
    activation: ActivationSpec | None
    experts: bool
    columns: int
    rows: int

    @property
    def group(self) -> int:
        """The weight's group along K; 0 where one scale serves a whole channel."""
        grain = self.weight.granularity
        return grain.size if grain.kind == "group" and grain.size < self.columns else 0

    @property
    def bits(self) -> int:
        return CODES[self.weight.code].bits

    @property
    def narrow(self) -> bool:
        """True where every code fits in an int4."""
        return self.bits <= 4


def _integer_weight(f: Facts) -> bool:
    w = f.weight
    return w.code in CODES and CODES[w.code].integer and w.zero != "float" and w.granularity.kind in ("tensor", "channel", "group") and (
        w.scale_dtype in ("float32", "float16", "bfloat16"))


def _plain_rows(a: ActivationSpec | None, code: str) -> bool:
    """Activations in `code` with one float32 scale per token or tensor, and nothing beside them."""
    return a is not None and a.code == code and a.granularity.kind in ("token", "tensor") and a.outer is None and (
        a.outlier_threshold is None and a.scale_dtype == "float32")


def _mx(f: Facts, weight: str, activation: str) -> bool:
    return _mx_like(f, weight, activation) and "mx_dual" not in (f.weight.scale_rule, f.activation.scale_rule)


def _mx_like(f: Facts, weight: str, activation: str) -> bool:
    w, a = f.weight, f.activation
    return a is not None and (w.code, w.scale_dtype, a.code, a.scale_dtype) == (weight, "e8m0", activation, "e8m0") and (
        w.granularity.kind == a.granularity.kind == "group" and w.granularity.size == a.granularity.size == 32)


def _mx_dual(f: Facts) -> bool:
    """Both sides with a float32 scale over 512 inputs on top."""
    return _mx_like(f, "fp4_e2m1", "fp4_e2m1") and f.weight.scale_rule == f.activation.scale_rule == "mx_dual"


def _w8a8(f: Facts) -> bool:
    w, a = f.weight, f.activation
    if not (_integer_weight(f) and w.zero is None and not f.group and _plain_rows(a, "int8") and a.mode == "dynamic"):
        return False
    # A stack has one scale per row and no zero point of x; four bits have an operator of their own where they can.
    return not (f.experts and (a.zero is not None or a.granularity.kind == "tensor")) and not _w4a8(f)


def _w8a8_static(f: Facts) -> bool:
    w = f.weight
    return _integer_weight(f) and w.zero is None and not f.group and _plain_rows(f.activation, "int8") and f.activation.mode == "static"


def _symmetric_rows(f: Facts, code: str) -> bool:
    a = f.activation
    # A scale per tensor is each expert's own, which no row of a stack has.
    return _plain_rows(a, code) and a.zero is None and a.mode == "dynamic" and not (f.experts and a.granularity.kind == "tensor")


def _w4a8(f: Facts) -> bool:
    """int8 times int4; a matrix of one scale per channel whose K is not a multiple of 256 is widened to int8 instead."""
    if not (_integer_weight(f) and f.weight.zero is None and f.narrow and _symmetric_rows(f, "int8")):
        return False
    # The dense operator has one scale for every 256 inputs; a coarser one is repeated.
    return f.experts or f.columns % MIXED_GROUP == 0 and (not f.group or f.group % MIXED_GROUP == 0)


def _w4a4(f: Facts) -> bool:
    return _integer_weight(f) and f.weight.zero is None and f.narrow and not f.group and _symmetric_rows(f, "int4")


def _codes16(f: Facts) -> bool:
    a = f.activation
    return _integer_weight(f) and (_plain_rows(a, "int8") or _plain_rows(a, "int4")) and not (f.experts and a.granularity.kind == "tensor")


def _fp8(f: Facts) -> bool:
    w = f.weight
    return w.code == "fp8_e4m3" and w.granularity.kind in ("tensor", "channel") and w.scale_dtype == "float32" and (
        _plain_rows(f.activation, "fp8_e4m3")) and not (f.experts and f.activation.granularity.kind == "tensor")


def _block(f: Facts, code: str) -> bool:
    """Blocks of 128 x 128 against groups of 128, as DeepSeek has them."""
    w, a = f.weight, f.activation
    return w.code == code and w.zero is None and w.scale_dtype == "float32" and str(w.granularity) == "block(128, 128)" and (
        a is not None and a.code == code and str(a.granularity) == "group(128)" and a.zero is None and a.outer is None
        and a.scale_dtype == "float32" and a.outlier_threshold is None)


KINDS = (
    ("w8a8_static", _w8a8_static),
    ("w8a8", _w8a8),
    ("w4a4", _w4a4),
    ("w4a8", _w4a8),
    ("a16", lambda f: f.activation is None and _integer_weight(f)),
    ("codes16", _codes16),
    ("fp8", _fp8),
    ("w8a8_block", lambda f: _block(f, "int8")),
    ("fp8_block", lambda f: _block(f, "fp8_e4m3")),
    ("mxfp8", lambda f: _mx(f, "fp8_e4m3", "fp8_e4m3")),
    ("mxfp4_a8", lambda f: _mx(f, "fp4_e2m1", "fp8_e4m3")),
    ("mxfp4_dual", _mx_dual),
    ("mxfp4", lambda f: _mx(f, "fp4_e2m1", "fp4_e2m1")),
    ("float", lambda f: f.activation is None),
)
"""Kinds of `_soc.ROWS` with the schemes that they serve; the first that fits is taken."""


def kind_of(scheme: Scheme, experts: bool, columns: int, rows: int, dual: bool = False) -> str | None:
    """The kind of a scheme on a matrix (columns = in, rows = out), None where no operator computes it.

    `dual` asks for the dual-level operator where the scheme is MXFP4.
    """
    facts = Facts(scheme.weight, scheme.activation, experts, columns, rows)
    kind = next((name for name, fits in KINDS if fits(facts)), None)
    return "mxfp4_dual" if dual and kind == "mxfp4" else kind


def _divides(what: str, value: int, by: int) -> str | None:
    return None if value % by == 0 else f"{what} % {by} == 0, found {what} = {value}"


def _packed(f: Facts) -> list:
    return [_divides("N", f.rows, 8)] if f.narrow else []


def _weight_only(f: Facts) -> list:
    out = _packed(f)
    if f.group and f.experts:
        out.append(_divides("K", f.columns, f.group))
    elif f.group:
        if f.group % 32:
            out.append(f"groups of a multiple of 32 inputs, found {f.group}")
        out.append(_divides("K", f.columns, f.group))
    if f.experts and not f.narrow and f.group:
        out.append(_divides("N", f.rows, 8))            # two int4 planes
    return out


def _mixed(f: Facts) -> list:
    out = [_divides("N", f.rows, 8)]
    if f.experts and f.group:
        out.append(_divides("K", f.columns, f.group))
    return out


def _int4(f: Facts) -> list:
    out = [_divides("K", f.columns, 8)]
    # int4 times int4 in groups exists only for FRACTAL_NZ, whose tiles are 16 x 32 bytes.
    return [*out, _divides("K", f.columns, 16), _divides("N", f.rows, 64)] if f.experts else out


def _paired(f: Facts) -> list:
    return [_divides("K", f.columns, MX_PAIR)]


def _block32(f: Facts) -> list:
    return [_divides("K", f.columns, MX_PAIR if f.experts else 32)]


ALIGNMENT = {
    "w8a8_static": lambda f: [], "w8a8": lambda f: [], "w4a4": _int4, "w4a8": _mixed, "a16": _weight_only, "codes16": _weight_only,
    "fp8": lambda f: [], "w8a8_block": lambda f: [], "fp8_block": lambda f: [], "mxfp8": _block32, "mxfp4_a8": _paired, "mxfp4": _paired,
    "mxfp4_dual": lambda f: [_divides("K", f.columns, DUAL_BLOCK)], "float": lambda f: [],
}


def misalignment(kind: str, scheme: Scheme, experts: bool, columns: int, rows: int, count: int = 1) -> str | None:
    """The alignment rule of the operator that a matrix breaks, None where it breaks none."""
    facts = Facts(scheme.weight, scheme.activation, experts, columns, rows)
    broken = [rule for rule in ALIGNMENT[kind](facts) if rule]
    if kind != "float":
        broken += [f"last axes up to {LAST_AXIS}, found {name} = {size}" for name, size in (("K", columns), ("N", rows))
                   if size > LAST_AXIS]
    if experts and count > GROUPS:
        broken.append(f"up to {GROUPS} experts, found {count}")
    return "; ".join(broken) or None

"""What a quantization scheme is: three frozen records, hashable, comparable and free of arrays.

A `Scheme` says how a weight matrix (in, out) and the activation that meets it are quantized. Everything in which producers of
checkpoints differ (scale rule, rounding, zero point, scale type) is a field here, so that no difference is an accident of code.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

KINDS = ("tensor", "channel", "token", "group", "block")
ROUNDINGS = ("rne", "rha", "trunc")


@dataclass(frozen=True)
class Granularity:
    """The cell that shares one scale.

    - `tensor`: the whole matrix. `channel`: one output channel of a weight. `token`: one row of an activation.
    - `group`: `size` consecutive elements along the contracted axis, of one channel or token.
    - `block`: `out` output channels by `size` contracted elements (partial blocks at the edges are allowed).
    """

    kind: str
    size: int = 0
    out: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"granularity {self.kind!r}: expected one of {', '.join(KINDS)}")
        if self.kind in ("group", "block") and self.size < 1:
            raise ValueError(f"granularity {self.kind}: expected a positive size, found {self.size}")
        if self.kind == "block" and self.out < 1:
            raise ValueError(f"granularity block: expected a positive number of output channels, found {self.out}")

    def __str__(self) -> str:
        return {"group": f"group({self.size})", "block": f"block({self.out}, {self.size})"}.get(self.kind, self.kind)


TENSOR, CHANNEL, TOKEN = Granularity("tensor"), Granularity("channel"), Granularity("token")


def group(size: int) -> Granularity:
    """One scale for every `size` consecutive elements along the contracted axis."""
    return Granularity("group", size)


def block(out: int, size: int) -> Granularity:
    """One scale for every tile of `out` output channels by `size` contracted elements, in the order of `weight_block_size`."""
    return Granularity("block", size, out)


@dataclass(frozen=True)
class WeightSpec:
    """How the weight is stored.

    Fields:
        code: element type: `int2`..`int8`, `uint2`..`uint8`, `fp8_e4m3`, `fp8_e5m2`, `fp6_e2m3`, `fp6_e3m2`, `fp4_e2m1`, `nf4`,
            `fp4_bnb`, `gguf:<type>`.
        granularity: the cell of one scale.
        zero: None (w = q s), `"int"` (w = (q - z) s) or `"float"` (w = q s + z).
        scale_dtype: type of the stored scale: `float32`, `float16`, `bfloat16`, `fp8_e4m3`, `e8m0`, or `uint8` (double quantization).
        scale2_dtype: type of the outer scale of two-level formats (w = q scale scale2), or None.
        scale_rule: the rule from a cell's extremes to its scale; the names are those of `qfunc._scales.RULES`.
        rounding: `rne` (half to even), `rha` (half away from zero) or `trunc` (toward zero).
        actorder: the input channels are stored in an order of their own (GPTQ act-order), kept in the leaf `perm`.
    """

    code: str
    granularity: Granularity = CHANNEL
    zero: str | None = None
    scale_dtype: str = "float32"
    scale2_dtype: str | None = None
    scale_rule: str = "amax"
    rounding: str = "rne"
    actorder: bool = False

    def __post_init__(self):
        if self.zero not in (None, "int", "float"):
            raise ValueError(f"zero: expected None, 'int' or 'float', found {self.zero!r}")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding: expected one of {', '.join(ROUNDINGS)}, found {self.rounding!r}")


@dataclass(frozen=True)
class ActivationSpec:
    """How the activation is quantized in front of the matmul.

    Fields:
        code: `int4`, `int8`, `fp8_e4m3`, `fp8_e5m2`, `fp4_e2m1`, `fp6_e2m3`, `fp6_e3m2`.
        granularity: `token`, `tensor` or `group(n)`.
        mode: `dynamic` (scales from the data; a calibrated `input_scale` of the weight, where there is one and the scale is per tensor,
            takes precedence) or `static` (always the calibrated `input_scale`).
        zero: None or `"int"` (asymmetric, x = (q - z) s).
        clip: fraction of amax that is mapped to the largest code (1 keeps everything).
        scale_dtype: `float32`, `e8m0` (MX) or `fp8_e4m3` (NVFP4 blocks under an outer scale).
        outer: None, `"tensor"` or `"token"`: the cell of the outer float32 scale of two-level formats.
        scale_rule, rounding: as in `WeightSpec`.
        outlier_threshold: LLM.int8's threshold on |x|: columns that reach it are multiplied in floating point; None switches it off.
        bound: |x| is clipped to it before anything else (fbgemm's `activation_scale_ub`); None clips nothing.
    """

    code: str
    granularity: Granularity = TOKEN
    mode: str = "dynamic"
    zero: str | None = None
    clip: float = 1.0
    scale_dtype: str = "float32"
    outer: str | None = None
    scale_rule: str = "amax"
    rounding: str = "rne"
    outlier_threshold: float | None = None
    bound: float | None = None

    def __post_init__(self):
        if self.mode not in ("dynamic", "static"):
            raise ValueError(f"mode: expected 'dynamic' or 'static', found {self.mode!r}")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding: expected one of {', '.join(ROUNDINGS)}, found {self.rounding!r}")
        if not 0 < self.clip <= 1:
            raise ValueError(f"clip: expected a fraction in (0, 1], found {self.clip}")
        if self.mode == "static" and self.granularity.kind != "tensor":
            raise ValueError(f"static activations have one scale per tensor, found {self.granularity}")


@dataclass(frozen=True)
class Scheme:
    """One row of the table: a name, a weight format and, where activations are quantized too, an activation format."""

    name: str
    weight: WeightSpec
    activation: ActivationSpec | None = None

    def replace(self, **changes) -> Scheme:
        """A copy with other fields; `weight_<field>` and `activation_<field>` reach into the two specs."""
        own = {k: v for k, v in changes.items() if k in ("name", "weight", "activation")}
        for part in ("weight", "activation"):
            inner = {k.removeprefix(part + "_"): v for k, v in changes.items() if k.startswith(part + "_")}
            if inner:
                own[part] = dataclasses.replace(own.get(part, getattr(self, part)), **inner)
        return dataclasses.replace(self, **own)

    def to_json(self) -> dict:
        """A dict of JSON types; `Scheme.from_json` gives the same scheme back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> Scheme:
        """The inverse of `to_json`."""
        def spec(kind, fields):
            return kind(**{**fields, "granularity": Granularity(**fields["granularity"])})
        activation = data.get("activation")
        return cls(data["name"], spec(WeightSpec, data["weight"]), spec(ActivationSpec, activation) if activation else None)

    @property
    def weight_only(self) -> bool:
        """True where activations stay in floating point."""
        return self.activation is None

    def __repr__(self) -> str:
        return f"Scheme({self.name!r})"


def bits_of(code: str) -> int:
    """Bits of one element code: 4 for `int4`, `nf4`, `fp4_e2m1`; 6 for `fp6_e2m3`; 8 for `fp8_e4m3`."""
    match = re.match(r"(?:u?int|fp|nf)(\d)", code)
    if not match:
        raise ValueError(f"code {code!r} has no fixed number of bits")
    return int(match.group(1))

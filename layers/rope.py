"""Rotary position embeddings: default, linear, llama3 and YaRN frequencies, and those that a file divides one by one.

Sources: Su et al., "RoFormer", 2021; Peng et al., "YaRN", 2023; the `rope_type` table of transformers, whose parameter names these are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import jax.numpy as jnp
import numpy as np

from ._typed import is_number

REQUIRED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "factors": ("factors",),
}
"""`rope_type` to what its entry must have: without it, the numbers would be those of no scaling, or of another one."""
POSITIVE = frozenset({"factor", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"})
"""Fields of an entry by which, or by whose logarithm, something is divided."""
IGNORED = frozenset({"rope_type", "type", "finetuned", "mrope_section", "mrope_interleaved"})
"""Fields of an entry that change no number of a text: how it came about, and which part of a head turns with an image's rows."""


@dataclass(frozen=True)
class Rope:
    """Parameters of a rotary embedding, under the names of a Hugging Face `rope_parameters` (or `rope_scaling`) entry.

    `kind` is `rope_type`; `original_max_position_embeddings` is the length that the model was first trained for; `factors` are divisors of
    the frequencies, one each (kind `factors`, of GGUF's `rope_freqs.weight`).
    """

    kind: str = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    partial_rotary_factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    factors: tuple[float, ...] | None = None

    def __post_init__(self):
        if self.kind not in FREQUENCIES:
            raise ValueError(f"rope_type {self.kind!r}: expected one of {', '.join(FREQUENCIES)}")
        if self.factors is not None and self.kind != "factors":
            raise ValueError(f"rope_type {self.kind!r}: expected no factors of single frequencies beside it, found {len(self.factors)}")

    @classmethod
    def from_json(cls, found: Mapping, max_positions: int, theta: float | None = None) -> Rope:
        """From an entry of `config.json`; `max_positions` stands in for an absent original length, `theta` for an absent base."""
        if not isinstance(found, Mapping) or not isinstance(found.get("rope_type", found.get("type")), str | None):
            raise ValueError(f"rope_parameters: expected an object whose rope_type is a name, found {found!r:.80}")
        known = {f.name for f in fields(cls)} - {"kind"}
        values = {name: value for name, value in found.items() if name not in IGNORED and value is not None}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise ValueError(f"rope_parameters: expected {', '.join(sorted(known | IGNORED))}, found {unknown[0]!r}")
        _check_types(values)
        kind = found.get("rope_type", found.get("type")) or "default"
        # Without both of its numbers YaRN's factor would be 1.
        needed = REQUIRED.get(kind, ("factor",) if "original_max_position_embeddings" not in values and kind == "yarn" else ())
        absent = [name for name in needed if name not in values]
        if absent:
            raise ValueError(f"rope_type {kind!r}: expected {', '.join(absent)} beside it, found {', '.join(sorted(values)) or 'nothing'}")
        if "factors" in values:
            values["factors"] = tuple(map(float, values["factors"]))
        values.setdefault("rope_theta", theta if theta is not None else 10000.0)
        values.setdefault("original_max_position_embeddings", max_positions)
        if kind == "yarn" and "factor" not in values:
            values["factor"] = max_positions / values["original_max_position_embeddings"]
        return cls(kind, **values)

    @property
    def magnitude(self) -> float:
        """YaRN's factor on cosine and sine; 1 for the other kinds."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor)

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Angle per position of each rotated pair, float32 [rotated dimensions / 2]."""
        dim = int(head_dim * self.partial_rotary_factor)
        plain = 1.0 / self.rope_theta ** (np.arange(0, dim, 2) / dim)
        return FREQUENCIES[self.kind](self, plain, dim).astype(np.float32)


def _check_types(values: Mapping) -> None:
    for name, value in values.items():
        if name == "factors":
            good, expected = isinstance(value, list | tuple) and all(_positive(v) for v in value), "a list of positive numbers"
        elif name == "truncate":
            good, expected = isinstance(value, bool), "true or false"
        elif name in POSITIVE:
            good, expected = _positive(value), "a positive number"
        else:
            good, expected = is_number(value), "a number"
        if not good:
            raise ValueError(f"rope_parameters: {name}: expected {expected}, found {value!r:.80}")


def _positive(value) -> bool:
    return is_number(value) and value > 0


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 mscale ln(factor) + 1, and 1 for factors up to 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(rope: Rope, plain: np.ndarray, dim: int) -> np.ndarray:
    length, wave = rope.original_max_position_embeddings, 2 * np.pi / plain
    smooth = (length / wave - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * plain / rope.factor + smooth * plain
    out = np.where(wave > length / rope.low_freq_factor, plain / rope.factor, plain)
    middle = (wave >= length / rope.high_freq_factor) & (wave <= length / rope.low_freq_factor)
    return np.where(middle, between, out)


def _yarn(rope: Rope, plain: np.ndarray, dim: int) -> np.ndarray:
    def turns(count: float) -> float:
        return dim * math.log(rope.original_max_position_embeddings / (count * 2 * math.pi)) / (2 * math.log(rope.rope_theta))
    low, high = turns(rope.beta_fast), turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


FREQUENCIES: dict[str, Callable] = {
    "default": lambda rope, plain, dim: plain,
    "linear": lambda rope, plain, dim: plain / rope.factor,
    "llama3": _llama3,
    "yarn": _yarn,
    "factors": lambda rope, plain, dim: plain / np.asarray(rope.factors),
}
"""`rope_type` to (rope, plain frequencies, rotated dimensions) -> frequencies."""


def rotations(rope: Rope, head_dim: int, positions):
    """Cosine and sine of each position's angles.

    Arguments: `positions` int [..., T]. Returns: two float32 arrays [..., T, rotated dimensions / 2].
    """
    angles = positions.astype(jnp.float32)[..., None] * rope.frequencies(head_dim)
    return jnp.cos(angles) * np.float32(rope.magnitude), jnp.sin(angles) * np.float32(rope.magnitude)


def rotate(x, cos, sin, interleaved: bool = False):
    """Rotate the first dimensions of each head, in float32.

    Arguments: `x` [..., T, heads, D]; `cos`, `sin` [..., T, r] with 2r <= D, the other dimensions pass through; `interleaved`: pairs are
    neighbours (0, 1), (2, 3), ... instead of halves (0, r), (1, r + 1), ... The result lies in halves either way, which changes no
    product of a query and a key that were both rotated so.
    Returns: the shape and dtype of `x`.
    """
    r = cos.shape[-1]
    head, rest = x[..., :2 * r].astype(jnp.float32), x[..., 2 * r:]
    a, b = (head[..., 0::2], head[..., 1::2]) if interleaved else (head[..., :r], head[..., r:])
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([(a * cos - b * sin).astype(x.dtype), (b * cos + a * sin).astype(x.dtype), rest], axis=-1)

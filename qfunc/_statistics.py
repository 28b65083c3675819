"""What calibration remembers of the activations in front of a weight."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Statistics:
    """Statistics of the rows x[..., K] that a weight contracted, per input channel.

    Leading axes are those of the weight that see rows of their own: layers of a stack, experts. A weight whose leading axes are
    missing here shares the statistics among them.

    Fields:
        count: int32 [...], rows seen. Where it is 0 (an expert without tokens) the others are what changes nothing in a merge.
        min, max: float32 [..., K].
        abs_sum, sq_sum: float32 [..., K], sums of |x| and of x^2 over rows.

    Two of them merge by `a + b` or `merge`, those of devices by `merge_across(axis_name)` inside `shard_map`.
    """

    count: Any
    min: Any
    max: Any
    abs_sum: Any
    sq_sum: Any

    @property
    def amax(self):
        """Largest |x| per channel, float32 [..., K]; 0 where no row was seen."""
        return jnp.maximum(jnp.maximum(-self.min, self.max), 0)

    @property
    def mean_abs(self):
        """Mean |x| per channel, float32 [..., K]; 0 where no row was seen."""
        return self.abs_sum / jnp.maximum(self.count, 1)[..., None].astype(jnp.float32)

    @property
    def mean_square(self):
        """Mean x^2 per channel, float32 [..., K]; 0 where no row was seen."""
        return self.sq_sum / jnp.maximum(self.count, 1)[..., None].astype(jnp.float32)

    def reduce(self, axis: int) -> Statistics:
        """Merge along one leading axis."""
        return Statistics(self.count.sum(axis, dtype=jnp.int32), self.min.min(axis), self.max.max(axis), self.abs_sum.sum(axis),
                          self.sq_sum.sum(axis))

    def merge_across(self, axis_name) -> Statistics:
        """Merge over the devices of a mesh axis: psum of counts and sums, pmin and pmax of the extremes. Inside `shard_map`."""
        count, abs_sum, sq_sum = lax.psum((self.count, self.abs_sum, self.sq_sum), axis_name)
        return Statistics(count, lax.pmin(self.min, axis_name), lax.pmax(self.max, axis_name), abs_sum, sq_sum)

    def __add__(self, other: Statistics) -> Statistics:
        if not isinstance(other, Statistics):
            return NotImplemented
        if jnp.shape(self.max) != jnp.shape(other.max):
            raise ValueError(f"statistics of {jnp.shape(self.max)} and {jnp.shape(other.max)} channels do not merge")
        return Statistics(self.count + other.count, jnp.minimum(self.min, other.min), jnp.maximum(self.max, other.max),
                          self.abs_sum + other.abs_sum, self.sq_sum + other.sq_sum)

    def __repr__(self) -> str:
        if not isinstance(self.count, (jax.Array, np.ndarray)) or isinstance(self.count, jax.core.Tracer):
            return f"Statistics({getattr(self.max, 'shape', '?')})"
        return f"Statistics({jnp.shape(self.max)}, {int(np.sum(self.count))} rows, amax {float(np.max(self.amax, initial=0)):.4g})"


def empty(leading: tuple[int, ...], channels: int) -> Statistics:
    """The statistics of no rows."""
    shape = (*leading, channels)
    zeros, top = jnp.zeros(shape, jnp.float32), jnp.full(shape, jnp.inf, jnp.float32)
    return Statistics(jnp.zeros(leading, jnp.int32), top, -top, zeros, zeros)


def statistics_of(x, leading: int = 0) -> Statistics:
    """Statistics of raw activations x [..., K], float; the first `leading` axes are kept apart, the others are rows.

    Raises ValueError where x is concrete and not finite, or has no rows.
    """
    x = jnp.asarray(x)
    if x.ndim <= leading or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"activations: expected a float array [..., K] with {leading} leading axes, found {x.dtype} {x.shape}")
    if 0 in x.shape[leading:-1]:
        raise ValueError(f"activations: there are no rows in {x.shape}")
    found = _of_rows(x.reshape(*x.shape[:leading], -1, x.shape[-1]))
    refuse(found, "activations")
    return found


def _of_rows(x) -> Statistics:
    """Statistics of x [..., rows, K]."""
    x = x.astype(jnp.float32)
    count = jnp.full(x.shape[:-2], x.shape[-2], jnp.int32)
    # With an initial value, no rows are no error but leave the extremes at infinity.
    return Statistics(count, x.min(-2, initial=jnp.inf), x.max(-2, initial=-jnp.inf), jnp.abs(x).sum(-2), (x * x).sum(-2))


def of_rows(x, leading: tuple[int, ...]) -> Statistics:
    """Statistics of x [*leading, ..., K], traceable, without checks."""
    return _of_rows(x.reshape(*leading, -1, x.shape[-1]))


def of_groups(x, group_sizes) -> Statistics:
    """Statistics [E, K] of rows x [T, K] sorted by group, as `lax.ragged_dot` takes them; rows beyond the groups do not count."""
    x = x.astype(jnp.float32)
    groups = group_sizes.shape[0]
    ends, index = jnp.cumsum(group_sizes.astype(jnp.int32)), jnp.arange(x.shape[0], dtype=jnp.int32)
    owner = jnp.searchsorted(ends, index, side="right").astype(jnp.int32)

    def reduced(function, values):
        return function(values, owner, num_segments=groups, indices_are_sorted=True)

    return Statistics(reduced(jax.ops.segment_sum, jnp.ones_like(owner)), reduced(jax.ops.segment_min, x), reduced(jax.ops.segment_max, x),
                      reduced(jax.ops.segment_sum, jnp.abs(x)), reduced(jax.ops.segment_sum, x * x))


def as_statistics(value, path: str = "activations") -> Statistics:
    """What a caller gave as the calibration of one weight: a `Statistics`, or raw activations [..., K].

    Experts that saw no row get the statistics of all rows, so that their scales are those of their neighbours.

    Raises ValueError, naming `path`, where it is not finite, and TypeError where it is neither.
    """
    if not isinstance(value, Statistics):
        if not isinstance(value, (jax.Array, np.ndarray)):
            raise TypeError(f"calibration of {path}: expected Statistics or an array [..., K], found {type(value).__name__}")
        try:
            return statistics_of(value)
        except ValueError as error:
            raise ValueError(f"calibration of {path}: {error}") from None
    refuse(value, path)
    return _filled(value)


def _filled(found: Statistics) -> Statistics:
    every = found
    for _ in range(jnp.ndim(found.count)):
        every = every.reduce(0)
    seen = jnp.asarray(found.count) > 0

    def fill(part, whole):
        return jnp.where(seen if jnp.ndim(part) == seen.ndim else seen[..., None], part, whole)

    return jax.tree.map(fill, found, every)


def spread_over(found: Statistics, batch: tuple[int, ...], path: str) -> Statistics:
    """The statistics with an axis, of size 1 where slices share them, for each leading axis of a weight.

    Raises ValueError, naming `path`, where the axes that they have are none of the weight's, or could be several.
    """
    lead = tuple(jnp.shape(found.count))
    places = [axes for axes in itertools.combinations(range(len(batch)), len(lead))
              if all(size in (1, batch[axis]) for size, axis in zip(lead, axes, strict=True))]
    if len(places) != 1 and (not places or set(lead) - {1}):
        raise ValueError(f"calibration of {path}: expected statistics of the leading axes {batch} of the weight, found {lead}"
                         + (", which could be several of them; give every axis, of size 1 where slices share" if places else ""))
    absent = [axis for axis in range(len(batch)) if axis not in places[0]]
    return jax.tree.map(lambda part: jnp.expand_dims(part, absent), found)


def seen(found: Statistics) -> bool:
    """False where it is known that they are of no row at all."""
    return isinstance(found.count, jax.core.Tracer) or bool(np.any(np.asarray(found.count) > 0))


def merge(first, second):
    """Merge two `Statistics`, or two mappings from path to `Statistics` (the union of their paths).

    Raises ValueError, naming the path, where the channels differ.
    """
    if isinstance(first, Statistics):
        return first + second
    if not isinstance(first, Mapping) or not isinstance(second, Mapping):
        raise TypeError(f"merge: expected two statistics or two mappings, found {type(first).__name__} and {type(second).__name__}")
    merged = dict(first)
    for path, found in second.items():
        try:
            merged[path] = merged[path] + found if path in merged else found
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return merged


def merge_across(statistics, axis_name):
    """`Statistics.merge_across` of every entry of a mapping (or of one `Statistics`)."""
    return jax.tree.map(lambda s: s.merge_across(axis_name), statistics, is_leaf=lambda s: isinstance(s, Statistics))


def refuse(statistics: Statistics, path: str) -> None:
    """Raise ValueError where statistics are concrete and came from activations that are not finite."""
    parts = (statistics.count, statistics.min, statistics.max, statistics.sq_sum)
    if any(isinstance(part, jax.core.Tracer) for part in parts):
        return
    count, low, high, square = (np.asarray(part) for part in parts)
    seen = np.broadcast_to((count > 0)[..., None], low.shape)
    bad = seen & ~(np.isfinite(low) & np.isfinite(high) & ~np.isnan(square))
    if bad.any():
        raise ValueError(f"{path}: the activations hold NaN or infinity, in {bad.sum()} of {bad.size} channels (first at {_first(bad)})")


def _first(bad) -> str:
    return "[" + ", ".join(str(int(i)) for i in np.argwhere(bad)[0]) + "]"

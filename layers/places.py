"""Where tokens stand: their slots in the cache, their positions in their texts, and the padding in front of short texts."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from .attention import causal_mask


class Places(NamedTuple):
    """Of T tokens of B texts.

    Fields: `slots` int [T], where their keys and values lie, the same in all texts; `positions` int [T] or [B, T], counted from each
    text's first token, for the rotary embedding; `pad` int [B], how many slots in front of each text are empty, or None for none.
    """

    slots: Any
    positions: Any
    pad: Any = None

    @classmethod
    def of(cls, tokens: int, start, pad=None) -> Places:
        """The next `tokens` slots from `start` on. Positions in the padding are 0: what is computed there is seen by no one."""
        slots = start + jnp.arange(tokens)
        return cls(slots, slots if pad is None else jnp.maximum(slots - pad[:, None], 0), pad)

    def mask(self, keys: int, window: int | None = None):
        """Which of the keys in slots 0 to `keys` each token may see: bool [T, keys], or [B, 1, T, keys] with padding."""
        seen = causal_mask(self.slots, keys, window)
        return seen if self.pad is None else seen & (jnp.arange(keys) >= self.pad[:, None, None, None])

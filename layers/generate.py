"""Sampling and the decoding loop: jitted once per shape, the cache donated from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from .cache import init_cache
from .config import ModelConfig

ROUND = 64
"""Caches are made in multiples of so many tokens, so that prompts of similar length share a compiled program."""


def sample(logits, keys, temperature, top_p):
    """One token id per row.

    Arguments: `logits` [B, vocab]; `keys`, PRNG keys [B]; `temperature` > 0; `top_p` in (0, 1]: only the most likely tokens are drawn
    from whose probability mass before them is less than that.
    Returns: int32 [B]; what a row draws does not depend on the rows beside it.
    """
    logits = logits.astype(jnp.float32) / temperature
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    mass = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)
    before = mass - jax.nn.softmax(ranked, axis=-1)
    drawn = jax.vmap(jax.random.categorical)(keys, jnp.where(before < top_p, ranked, -jnp.inf))
    return jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)


def largest(logits):
    """The first index of the largest of each row, int32 [B], of `logits` [B, vocab] without NaN.

    Two reductions of numbers, which XLA vectorizes on a CPU, where `argmax`, its reduction of pairs, is a loop.
    """
    count = logits.shape[-1]
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.where(logits == logits.max(-1, keepdims=True), index, count - 1).min(-1)


def _next(logits, keys, index, temperature, top_p, greedy: bool):
    """The token of step `index` of each row."""
    if greedy:
        return largest(logits)
    return sample(logits, jax.vmap(lambda key: jax.random.fold_in(key, index))(keys), temperature, top_p)


def row_keys(seed: int | Sequence[int], rows: int):
    """PRNG keys [rows]: of one seed, row i has its i-th key, of which the first is that of `[seed]`; of several, each row its own.

    Raises: ValueError where there are several and not one per row.
    """
    several = isinstance(seed, Sequence | np.ndarray | jax.Array) and np.ndim(seed) > 0
    if several and (isinstance(seed, str) or len(seed) != rows):
        raise ValueError(f"seed: expected one number or {rows} of them, found {seed!r}")
    for one in seed if several else [seed]:
        # Larger ones would lose their upper bits, and be others' seeds.
        if isinstance(one, str | bool) or not hasattr(one, "__index__") or not 0 <= int(one) < 2**32:
            raise ValueError(f"seed: expected integers from 0 to 2**32 - 1, found {one!r}")
    if several:
        return jax.vmap(lambda s: jax.random.fold_in(jax.random.key(s), 0))(jnp.asarray(seed, jnp.uint32))
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(int(seed))))(jnp.arange(rows))


def padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray | None]:
    """Prompts of different lengths as (ids int32 [B, T], how many ids in front of each are padding int32 [B]); None where all are alike.

    Padding stands in front, so that all rows go on in the same slot; its ids are 0 and seen by no one.
    """
    lengths = [len(row) for row in rows]
    ids = np.zeros((len(rows), max(lengths, default=0)), np.int32)
    for target, row in zip(ids, rows, strict=True):
        target[ids.shape[1] - len(row):] = row
    pad = ids.shape[1] - np.asarray(lengths, np.int32)
    return ids, pad if pad.any() else None


def unpadded(ids, mask) -> list[np.ndarray]:
    """The rows of ids [B, T] without what `mask` [B, T] (true or 1: a token) calls padding, on either side.

    Raises: ValueError where the shapes differ, a row has no token, or padding stands between tokens.
    """
    ids, mask = np.asarray(ids), np.asarray(mask, bool)
    if ids.ndim != 2:
        raise ValueError(f"mask: expected it beside ids [batch, tokens], found ids {ids.shape}")
    if ids.shape != mask.shape:
        raise ValueError(f"mask: expected the shape of the ids {ids.shape}, found {mask.shape}")
    first, last = mask.argmax(1), mask.shape[1] - mask[:, ::-1].argmax(1)
    if not mask.any(1).all() or (mask.sum(1) != last - first).any():
        raise ValueError("mask: expected one run of tokens in each row, padding in front of it or behind it")
    return [row[a:b] for row, a, b in zip(ids, first, last, strict=True)]


@partial(jax.jit, static_argnames=("apply", "config", "greedy"), donate_argnames=("cache",))
def prefill(params, ids, cache, keys, temperature, top_p, *, apply: Callable, config: ModelConfig, greedy: bool):
    """(first new token int32 [B], cache) of prompts [B, T]."""
    logits, cache = apply(params, ids, cache, config, last=True)
    return _next(logits[:, -1], keys, 0, temperature, top_p, greedy), cache


@partial(jax.jit, static_argnames=("apply", "config", "greedy", "steps"), donate_argnames=("cache",))
def decode(params, token, cache, done, index, keys, temperature, top_p, *, apply: Callable, config: ModelConfig, greedy: bool, steps: int):
    """Up to `steps` further tokens; the loop ends early when every row has ended.

    Arguments: `token` int32 [B], the last token; `done` bool [B]; `index`, how many tokens were drawn before.
    Returns: (tokens int32 [B, steps], last token, cache, done); a row that has ended repeats its last token.
    """
    ends = jnp.asarray(config.eos or (-1,), jnp.int32)

    def going(state):
        return (state[0] < steps) & ~jnp.all(state[3])

    def step(state):
        i, token, cache, done, out = state
        logits, cache = apply(params, token[:, None], cache, config)
        new = _next(logits[:, -1], keys, index + i, temperature, top_p, greedy)
        new = jnp.where(done, token, new)
        out = jax.lax.dynamic_update_slice(out, new[:, None], (0, i))
        return i + 1, new, cache, done | jnp.isin(new, ends), out

    out = jnp.broadcast_to(token[:, None], (token.shape[0], steps))
    _, token, cache, done, out = jax.lax.while_loop(going, step, (jnp.int32(0), token, cache, done, out))
    return out, token, cache, done


def generate(apply: Callable, params, ids, config: ModelConfig, *, max_new_tokens: int, temperature: float, top_p: float,
             seed: int | Sequence[int], chunk: int, pad=None) -> Iterator[np.ndarray]:
    """New tokens in pieces, int32 [B, up to chunk].

    Arguments: `apply` as `qfunc.layers.decoder.apply`; `ids` int [B, T], of which the first `pad` [B] of each row are padding (None: no
    padding); `temperature` 0 takes the most likely token; `seed` as in `row_keys`. Ends when every row has met one of `config.eos`,
    which is part of the result.
    """
    ids = np.asarray(ids)
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(f"ids: expected [batch, tokens] with at least one token, found {ids.shape}")
    if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1 or not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError("generate: expected an integer max_new_tokens >= 1, a finite temperature >= 0 and 0 < top_p <= 1, found "
                         f"{max_new_tokens!r}, {temperature!r} and {top_p!r}")
    length = -(-(ids.shape[1] + max_new_tokens) // ROUND) * ROUND
    cache = init_cache(config, ids.shape[0], length, pad)
    # Below float32's normal numbers a device may divide by zero; the limit is the most likely token.
    options = {"apply": apply, "config": config, "greedy": temperature < np.finfo(np.float32).tiny}
    keys, draw = row_keys(seed, ids.shape[0]), (jnp.float32(temperature or 1), jnp.float32(top_p))
    token, cache = prefill(params, jnp.asarray(ids, jnp.int32), cache, keys, *draw, **options)
    done = jnp.isin(token, jnp.asarray(config.eos or (-1,), jnp.int32))
    yield np.asarray(token)[:, None]
    count = 1
    while count < max_new_tokens and not bool(done.all()):
        steps = min(chunk, max_new_tokens - count)
        out, token, cache, done = decode(params, token, cache, done, jnp.int32(count), keys, *draw, **options, steps=steps)
        found = np.asarray(out)
        if bool(done.all()) and config.eos:
            # The loop ended early: cut what it did not write, which repeats the end.
            ended = np.isin(found, config.eos)
            found = found[:, :int(np.where(ended.any(1), ended.argmax(1) + 1, 0).max())]
        yield found
        count += steps

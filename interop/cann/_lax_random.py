"""Torch rules of JAX's threefry random numbers: the same bits, so that sampling draws the same tokens.

A typed key is its two uint32 words. 32-bit sums wrap, so everything is computed on int32 of the same bits.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011; jax/_src/prng.py for how counters are laid out.
"""

from __future__ import annotations

import math

import jax
import torch

from ._build import UnknownPrimitive, rule
from ._lax_elementwise import every
from ._program import device

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


def _rotated(x, by: int):
    return (x << by) | ((x >> (32 - by)) & ((1 << by) - 1))


def threefry(key, first, second):
    """Two int32 blocks of the counters (first, second) under the words key[0], key[1]: Threefry-2x32 with 20 rounds."""
    words = [key[0], key[1], key[0] ^ key[1] ^ PARITY]
    x, y = first + words[0], second + words[1]
    for step in range(5):
        for by in ROTATIONS[step % 2]:
            x = x + y
            y = _rotated(y, by) ^ x
        x, y = x + words[(step + 1) % 3], y + words[(step + 2) % 3] + (step + 1)
    return x, y


def _words(key):
    return key.view(torch.int32).unbind(-1)


def _fry(eqn, v) -> None:
    if "fry" not in str(v.aval.dtype):
        raise UnknownPrimitive(eqn, "only keys of the threefry generator are known")


@rule("threefry2x32")
def _blocks(eqn, scope):
    def run(a, b, x, y):
        found = threefry((a.view(torch.int32), b.view(torch.int32)), x.view(torch.int32), y.view(torch.int32))
        return [block.view(torch.uint32) for block in found]
    return every(eqn, run)


@rule("random_wrap", "random_unwrap")
def _wrap(eqn, scope):
    return every(eqn, lambda x: x)


@rule("random_seed")
def _seed(eqn, scope):
    _fry(eqn, eqn.outvars[0])

    def run(seed):
        low = seed.to(torch.int32) if seed.dtype != torch.uint32 else seed.view(torch.int32)
        return torch.stack([torch.zeros_like(low), low], -1).view(torch.uint32)
    return every(eqn, run)


@rule("random_fold_in")
def _fold_in(eqn, scope):
    _fry(eqn, eqn.invars[0])

    def run(key, data):
        data = data.view(torch.int32)
        found = threefry(_words(key), torch.zeros_like(data), data)          # the key of the seed `data` is (0, data)
        return torch.stack(torch.broadcast_tensors(*found), -1).view(torch.uint32)
    return every(eqn, run)


def _partitionable(eqn) -> None:
    if not jax.config.jax_threefry_partitionable:
        raise UnknownPrimitive(eqn, "random numbers are laid out for jax_threefry_partitionable, which is switched off")


def _stream(key, shape):
    """Two int32 blocks [*keys, *shape]: every key counts from 0."""
    count = torch.arange(math.prod(shape), dtype=torch.int64, device=device())
    words = [word.unsqueeze(-1) for word in _words(key)]
    return [block.reshape(*key.shape[:-1], *shape) for block in threefry(words, (count >> 32).to(torch.int32), count.to(torch.int32))]


@rule("random_split")
def _split(eqn, scope):
    _fry(eqn, eqn.invars[0])
    _partitionable(eqn)
    shape = tuple(eqn.params["shape"])

    def run(key):
        return torch.stack(_stream(key, shape), -1).view(torch.uint32)
    return every(eqn, run)


@rule("random_bits")
def _bits(eqn, scope):
    _fry(eqn, eqn.invars[0])
    _partitionable(eqn)
    width, shape = eqn.params["bit_width"], tuple(eqn.params["shape"])
    kinds = {8: (torch.int8, torch.uint8), 16: (torch.int16, torch.uint16), 32: (torch.int32, torch.uint32)}
    if width not in kinds:
        raise UnknownPrimitive(eqn)
    signed, unsigned = kinds[width]

    def run(key):
        first, second = _stream(key, shape)
        return (first ^ second).to(signed).view(unsigned)
    return every(eqn, run)

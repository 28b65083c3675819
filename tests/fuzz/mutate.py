"""Damage checkpoints on purpose: one seeded mutation of a folder of files at a time.

`mutate(rng, source, target)` copies a checkpoint and breaks something: bytes, lengths, headers, configurations,
numbers that mean something.
The same seed gives the same damage.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path

ODD = (None, True, False, 0, -1, 1, 2, 3, 7, 16, 128, 2**31, 2**63, -(2**63), 10**30, 0.5, float("1e308"), "", "int4", "float",
       "re:(a+)+$", "*",
       "../../etc/passwd", [], [0], [0, 0], [-1, 2**40], [[1]], {}, {"a": {}}, {"_type": "Tensor"}, "x" * 5000)
WORDS = (0, 1, 2, 7, 31, 32, 255, 256, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)


def mutate(rng: random.Random, source: Path, target: Path) -> str:
    """Copy `source` to `target` and damage it; returns what was done."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("reference.npz", "optional"))
    files = sorted(p for p in target.rglob("*") if p.is_file())
    notes = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(files)
        kinds = JSON_KINDS if path.suffix == ".json" else TENSOR_KINDS if path.suffix == ".safetensors" else GGUF_KINDS
        kind = rng.choice(kinds)
        notes.append(f"{kind.__name__} {path.name}")
        if path.exists():
            kind(rng, path)
    return "; ".join(notes)


def flip(rng: random.Random, path: Path) -> None:
    """A few bytes, most of them near the start, where headers are."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 2, 8, 64))):
        if data:
            data[rng.randrange(min(len(data), rng.choice((16, 400, 4000, len(data)))))] = rng.randrange(256)
    path.write_bytes(data)


def cut(rng: random.Random, path: Path) -> None:
    """A file that ends too early."""
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data) + 1)])


def grow(rng: random.Random, path: Path) -> None:
    """A file that goes on after its end."""
    path.write_bytes(path.read_bytes() + bytes(rng.randrange(256) for _ in range(rng.choice((1, 8, 1000)))))


def remove(rng: random.Random, path: Path) -> None:
    """A file that is not there."""
    path.unlink()


def _nodes(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from _nodes(child, (*path, key))


def _change(rng: random.Random, data, values=ODD):
    """Replace, remove, rename or copy one node of a JSON document."""
    paths = [p for p in _nodes(data) if p]
    if not paths:
        return data
    path = rng.choice(paths)
    node = data
    for key in path[:-1]:
        node = node[key]
    action, key = rng.randrange(5), path[-1]
    if action == 0:
        del node[key]
    elif action == 1 and isinstance(node, dict):
        node[rng.choice(("x", "weight", key + "x", "", "a.b.c"))] = node.pop(key)
    elif action == 2 and isinstance(node[key], int) and not isinstance(node[key], bool):
        node[key] += rng.choice((-1, 1, -8, 8, 64, -128, 2**20))
    elif action == 3 and isinstance(node[key], str):
        node[key] = rng.choice(("I8", "U8", "I32", "F16", "BF16", "F32", "F8_E4M3", "F8_E8M0", "I64", "F4", "BOOL", "W8A8",
                                "FLOAT", "W4A8_DYNAMIC",
                                "pack-quantized", "int-quantized", "group", "tensor", "token", node[key][:-1], node[key] * 2))
    else:
        node[key] = rng.choice(values)
    return data


def edit(rng: random.Random, path: Path) -> None:
    """A configuration with other values in it."""
    try:
        text = json.dumps(_change(rng, json.loads(path.read_bytes())))
    except (ValueError, RecursionError):
        return
    if rng.random() < 0.05:
        text = text.replace("{", '{"bits": 4, "bits": 4, ', 1)
    if rng.random() < 0.02:
        text = "[" * 100_000
    path.write_text(text)


def header(rng: random.Random, path: Path) -> None:
    """A safetensors header with other dtypes, shapes, offsets, names."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    try:
        text = json.dumps(_change(rng, json.loads(data[8: 8 + length]), WORDS + ODD)).encode()
    except (ValueError, RecursionError):
        return
    declared = len(text) if rng.random() < 0.9 else rng.choice(WORDS)
    path.write_bytes(struct.pack("<Q", declared) + text + data[8 + length:])


def numbers(rng: random.Random, path: Path) -> None:
    """Values of one tensor: NaN, infinity, zeros, extremes."""
    data = bytearray(path.read_bytes())
    try:
        length = struct.unpack("<Q", data[:8])[0]
        entries = [e for k, e in json.loads(data[8: 8 + length]).items() if k != "__metadata__"]
        begin, end = rng.choice(entries)["data_offsets"]
        begin, end = begin + 8 + length, end + 8 + length
        pattern = rng.choice((b"\xff", b"\x00", b"\x80", b"\x7f\xc0", b"\x00\x00\x80\x7f", b"\x00\x7c", b"\xff\xff\xff\x7f", b"\x01"))
        size = end - begin if rng.random() < 0.5 else min(8, end - begin)
        at = begin if size == end - begin else rng.randrange(begin, end - size + 1)
        data[at: at + size] = (pattern * (size // len(pattern) + 1))[:size]
    except (ValueError, KeyError, TypeError, struct.error, IndexError, OverflowError, MemoryError):
        return
    path.write_bytes(data)


def words(rng: random.Random, path: Path) -> None:
    """Counts and lengths of a GGUF header."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 4))):
        size = rng.choice((4, 8))
        at = rng.choice((8, 16, rng.randrange(max(1, min(len(data), 1500)))))
        if at + size <= len(data):
            data[at: at + size] = (rng.choice(WORDS) % 2 ** (8 * size)).to_bytes(size, "little")
    path.write_bytes(data)


JSON_KINDS = (edit, edit, edit, edit, edit, flip, cut, remove)
TENSOR_KINDS = (header, header, header, numbers, numbers, flip, cut, grow, remove)
GGUF_KINDS = (words, words, words, flip, flip, cut, grow)

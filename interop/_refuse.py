"""One way to refuse a checkpoint: the message names the file, the part of it, what was expected and what was found."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import reprlib
import stat
from pathlib import Path, PurePosixPath

from qfunc._errors import CheckpointError

JSON_LIMIT = 48 * 2**20
"""Bytes of JSON that are parsed at most: the header of half a million tensors. (The safetensors format itself allows 100 MB.)"""


MOST_KEYS = 2**21
"""Keys of a JSON document: those of half a million tensors' entries. Each costs a microsecond and more, however few bytes it has."""
DENSE = 2**20
"""Bytes of JSON above which its density is looked at."""


def refuse(where, part, expected, found) -> CheckpointError:
    """The error to raise: `<file>: <part>: expected <expected>, found <found>`, long findings cut."""
    text = f"{found}"
    text = text if len(text) <= 300 else text[:300] + "..."
    part = str(part) if len(str(part)) <= 200 else str(part)[:200] + "..."
    return CheckpointError(f"{where}: {part}: expected {expected}, found {text}" if part else f"{where}: expected {expected}, found {text}")


def unique_pairs(where):
    """An `object_pairs_hook` for json that refuses duplicate keys."""
    def build(pairs):
        out = dict(pairs)
        if len(out) != len(pairs):
            seen: set = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise refuse(where, f"key {twice!r}", "one entry", "a duplicate")
        return out
    return build


@contextlib.contextmanager
def uncollected():
    """Without the garbage collector, which would look again and again at hundreds of thousands of new objects that have no cycles."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def parse_json(data: bytes, where):
    """JSON that came from a stranger: size, nesting, duplicate keys and number lengths are bounded."""
    if len(data) > JSON_LIMIT:
        raise refuse(where, "JSON", f"at most {JSON_LIMIT} bytes", len(data))
    if len(data) > DENSE and (data.count(b":") > MOST_KEYS or data.count(b",") > 2 * MOST_KEYS):
        raise refuse(where, "JSON", f"at most {MOST_KEYS} keys", "more")
    if len(data) > DENSE and data.count(b"[") + data.count(b"{") > len(data) // 12:
        # A megabyte of brackets becomes thirty of Python objects; a tensor's entry has three in 52 bytes or more.
        raise refuse(where, "JSON", "at most one bracket in 12 bytes", "more: objects without content")
    with uncollected():
        try:
            return json.loads(data, object_pairs_hook=unique_pairs(where))
        except CheckpointError:
            raise
        except (ValueError, RecursionError) as error:
            raise refuse(where, "JSON", "a valid document", f"{type(error).__name__}: {error}") from None


def read_json(path: Path) -> dict:
    """The object in a JSON file; CheckpointError where it is not a regular file, too large or not an object."""
    size = regular_size(path)
    if size > JSON_LIMIT:
        raise refuse(path, "JSON", f"at most {JSON_LIMIT} bytes", size)
    value = parse_json(path.read_bytes(), path)
    if not isinstance(value, dict):
        raise refuse(path, "JSON", "an object", type(value).__name__)
    return value


def folder_json(folder: Path, name: str) -> dict | None:
    """The object in a JSON file of a checkpoint folder, None where there is no such file."""
    return read_json(inside(folder, name, folder)) if (folder / name).exists() else None


def regular_size(path: Path) -> int:
    """The size of a regular file: a pipe or a device would block or never end."""
    try:
        info = os.stat(path)
    except OSError as error:
        raise refuse(path, "", "a readable file", error.strerror) from None
    if not stat.S_ISREG(info.st_mode):
        raise refuse(path, "", "a regular file", "a directory, pipe or device")
    return info.st_size


def inside(folder: Path, name: str, where) -> Path:
    """The file `name` of a checkpoint folder.

    Refused: absolute names, `..`, and symbolic links that leave the folder, except into the `blobs` of a hub cache, whose snapshots
    consist of such links.
    """
    pure = PurePosixPath(name) if isinstance(name, str) else None
    if pure is None or not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name or "\0" in name:
        raise refuse(where, f"file name {name!r}", "a name inside the checkpoint's folder", "one that leaves it")
    path = folder / pure
    whole = folder.absolute()
    roots = [whole.resolve()]
    # A pipeline's transformers are folders inside of a snapshot.
    snapshots = next((parent for parent in whole.parents if parent.name == "snapshots"), None)
    if snapshots is not None:
        roots.append((snapshots.parent / "blobs").resolve())
    try:
        real = path.resolve()
    except (OSError, RuntimeError):
        raise refuse(where, f"file name {name!r}", "a file", "a loop of symbolic links") from None
    if not any(real.is_relative_to(root) for root in roots):
        raise refuse(where, f"file name {name!r}", "a file inside the checkpoint's folder", f"a link to {real}")
    return path


def short(value) -> str:
    """The repr of something from a file, however large it is."""
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200


def integer(value, where, part, low: int = 0, high: int = 2**63 - 1) -> int:
    """A JSON integer in [low, high] (bool is not one)."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise refuse(where, part, f"an integer from {low} to {high}", short(value))
    return value

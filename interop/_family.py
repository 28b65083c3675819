"""The shape of a reader: one `Family` per quantization method, and a configuration that remembers what was read of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._match import RegexError, find
from ._plan import Layer, Parts
from ._refuse import integer, refuse, short
from .safetensors import Files

REQUIRED = object()


class Config:
    """A JSON object of a configuration file, with checks that name the file and the field, and a list of what was read."""

    def __init__(self, data: dict, where, prefix: str = ""):
        if not isinstance(data, dict):
            raise refuse(where, prefix or "configuration", "an object", short(data))
        self.data, self.where, self.prefix = data, where, prefix
        self.read: set[str] = set()

    def fail(self, key: str, expected: str, found=None):
        """The error for a field."""
        return refuse(self.where, f"{self.prefix}{key}", expected, short(self.data.get(key)) if found is None else found)

    def get(self, key: str, default=None):
        """A field as it is."""
        self.read.add(key)
        return self.data.get(key, default)

    def __contains__(self, key: str) -> bool:
        return self.data.get(key) is not None

    def first(self, *keys: str, default=None):
        """The first of several spellings that is present."""
        values = [self.get(key) for key in keys]
        return next((v for v in values if v is not None), default)

    def choice(self, key: str, allowed: Iterable, default=None):
        """A field that is one of `allowed` (strings are compared in lower case)."""
        found = self.get(key, default)
        found = default if found is None else found
        allowed = list(allowed)
        lower = found.lower() if isinstance(found, str) else found
        if isinstance(found, dict | list) or not any(lower == a and isinstance(lower, bool) == isinstance(a, bool) for a in allowed):
            raise self.fail(key, "one of " + ", ".join(map(repr, allowed)), short(found))
        return lower

    def boolean(self, key: str, default: bool = False) -> bool:
        """True or false; null is the default."""
        found = self.get(key)
        found = default if found is None else found
        if not isinstance(found, bool):
            raise self.fail(key, "true or false", short(found))
        return found

    def integer(self, *keys: str, low: int = 0, high: int = 2**31, default=REQUIRED) -> int:
        """An integer in [low, high] under the first of several spellings; without a default it must be there."""
        found = self.first(*keys, default=None if default is REQUIRED else default)
        return integer(found, self.where, self.prefix + keys[0], low, high)

    def group_size(self, *keys: str, default: int | None = None) -> int | None:
        """A group size: positive, or None where -1 or null says that a whole row shares one scale."""
        found = self.first(*keys, default=default)
        if found is None or found == -1:
            return None
        return integer(found, self.where, self.prefix + keys[0], 1, 2**24)

    def strings(self, *keys: str) -> list[str]:
        """A list of strings; null is the empty list."""
        found = self.first(*keys, default=[])
        if not isinstance(found, list) or not all(isinstance(x, str) for x in found):
            raise self.fail(keys[0], "a list of strings", short(found))
        return found

    def section(self, key: str) -> Config | None:
        """A nested object, or None."""
        found = self.get(key)
        return None if found is None else Config(found, self.where, f"{self.prefix}{key}.")

    def sections(self, key: str) -> dict[str, dict]:
        """An object of objects; null is the empty one."""
        found = self.get(key)
        if found is None:
            return {}
        if not isinstance(found, dict) or not all(isinstance(v, dict) for v in found.values()):
            raise self.fail(key, "an object of objects", short(found))
        return found

    def find(self, entries: Iterable[str], name: str, dialect: str) -> str | None:
        """`_match.find`, its complaints about patterns named by file."""
        try:
            return find(entries, name, dialect)
        except RegexError as error:
            raise refuse(self.where, f"{self.prefix.rstrip('.')} layer list", "patterns that can be matched", error) from None


@dataclass
class Source:
    """What a family reads: `path` of the folder, `config` (config.json), `quant` (its own section), `files`, and `notes` for oddities.

    `aliases`: where tensors are read under other names than the files', the file's name of each.
    """

    path: Path
    config: dict
    quant: Config
    files: Files
    notes: list[str] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A quantization method.

    Fields:
        name: as `Checkpoint.format` gives it.
        settings: Source -> whatever `layer` wants; raises CheckpointError for configurations that are not understood.
        layer: (settings, Parts) -> Layer, or None where the module is not quantized.
        marks: parameter names that only quantized modules have: such a module must give a Layer.
        split: tensor name -> (module, parameter).
        fields: every field of the configuration that is known: what it is read for, or why it is not needed.
        kv_code: settings -> element type of the key/value cache that the checkpoint asks for, or None.
    """

    name: str
    settings: Callable[[Source], Any]
    layer: Callable[[Any, Parts], Layer | None]
    marks: frozenset[str]
    split: Callable[[str], tuple[str, str]] = lambda name: tuple(name.rpartition(".")[::2])
    fields: dict[str, str] = field(default_factory=dict)
    kv_code: Callable[[Any], str | None] = lambda settings: None



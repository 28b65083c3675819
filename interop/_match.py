"""One matcher for the six dialects in which checkpoints say which layers a setting is for.

| dialect | fields | an entry matches a module when |
|---|---|---|
| `contains` | `ignored_layers`, `modules_to_not_convert`, ... (fp8, awq,
    ...) | it is a run of whole dotted components; `*` is one of them |
| `star` | `exclude_modules`, `ignore` of ModelOpt | it equals the name, `*` standing for any characters |
| `target` | `targets`, `ignore` of compressed-tensors | it is the name, its class, or `re:` and a regex that matches its start |
| `glob` | `exclude`, `layer_quant_config` of Quark | fnmatch on the name |
| `signed` | `dynamic` of GPTQModel | the regex behind `+:` (override) or `-:` (skip) matches its start |
| `extra` | `extra_config` of auto-round | it is the name, or a regex that matches all of it |

In all of them a leading `model.` or `language_model.` may be absent on either side, as exporters and loaders rename.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from functools import lru_cache

from ._regex import RegexError as RegexError
from ._regex import matches

PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")


@lru_cache(maxsize=2**17)
def spellings(name: str) -> tuple[str, ...]:
    """A module name and what it is called without its outermost prefixes, and with `model.` in front."""
    bare = next((name.removeprefix(p) for p in PREFIXES if name.startswith(p)), name)
    return tuple(dict.fromkeys((name, bare, f"model.{bare}")))


@lru_cache(maxsize=4096)
def _component(entry: str) -> re.Pattern:
    body = r"[^.]+".join(re.escape(part) for part in entry.strip(".").split("*"))
    return re.compile(rf"(?:.*\.)?{body}(?:\..*)?")


def contains(entry: str, name: str) -> bool:
    """Whole dotted components: `mlp.gate` is in `model.layers.0.mlp.gate`, not in `model.layers.0.mlp.gate_proj`."""
    return _component(entry).fullmatch(name) is not None


def star(entry: str, name: str) -> bool:
    """`*` stands for any characters; the entry must span the whole name."""
    return fnmatch.fnmatchcase(name, entry.replace("[", "[[]").replace("?", "[?]"))


def target(entry: str, name: str, kind: str = "Linear") -> bool:
    """The name itself, its class, or `re:` and a regular expression."""
    if entry.startswith("re:"):
        return matches(entry[3:], name)
    return entry == name or entry == kind


def signed(entry: str, name: str) -> bool:
    """The regular expression behind the sign; without a sign it is an override."""
    return matches(entry[2:] if entry[:2] in ("+:", "-:") else entry, name)


def extra(entry: str, name: str) -> bool:
    """An exact name, or a regular expression over all of it."""
    return entry == name or (any(c in entry for c in r"*+?^$()[]{}|\\") and matches(entry, name, full=True))


DIALECTS: dict[str, Callable[[str, str], bool]] = {
    "contains": contains, "star": star, "target": target, "glob": lambda entry, name: fnmatch.fnmatchcase(name, entry),
    "signed": signed, "extra": extra,
}


def find(entries: Iterable[str], name: str, dialect: str) -> str | None:
    """The first entry that names the module, or None."""
    test = DIALECTS[dialect]
    names = spellings(name)
    return next((entry for entry in entries if any(test(entry, n) for n in names)), None)


FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"), "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
}


def find_fused(entries: Iterable[str], name: str, dialect: str) -> bool:
    """Whether a module is named, a fused one by all of its parts; ValueError where only some of them are."""
    entries = list(entries)
    parent, _, last = name.rpartition(".")
    if find(entries, name, dialect) is not None or last not in FUSED:
        return find(entries, name, dialect) is not None
    named = {part: find(entries, f"{parent}.{part}" if parent else part, dialect) is not None for part in FUSED[last]}
    if len(set(named.values())) > 1:
        raise ValueError(f"{name} is one layer, but only {', '.join(p for p, yes in named.items() if yes)} of it is named")
    return all(named.values())

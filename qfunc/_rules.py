"""Rules: an ordered mapping from patterns of paths to schemes; the first match wins, and a rule without effect is an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ._paths import nearest
from ._schemes import scheme
from ._spec import Scheme

DEFAULT_FLOAT = ("embed*", "wte", "wpe", "*norm*", "ln_*", "lm_head", "router", "gate")
"""Path segments that stay in floating point under `*` alone: embeddings, norms, the output layer, routers of experts."""


@dataclass(frozen=True)
class Rule:
    """A scheme for the leaves of a pattern, with what their names cannot tell.

    Arguments:
        scheme: name, Scheme, or None (leave in floating point).
        axes: (contracted axes, output axes) of the leaf, where the table of orientations does not know it: `axes=((0,), (1, 2))`.
        batch: how many leading axes are batch axes; the two that follow are (in, out).
    """

    scheme: str | Scheme | None
    axes: tuple | None = None
    batch: int | None = None


@dataclass(frozen=True)
class Match:
    """What the rules say of one leaf: the pattern that won, its Rule, and the parsed scheme (None: floating point, and why)."""

    pattern: str
    rule: Rule
    scheme: Scheme | None
    reason: str = ""


def normalise(rules) -> dict[str, Rule]:
    """Whatever `quantize` takes as a mapping from pattern to `Rule`; every scheme name is parsed, so that typing errors come first."""
    if isinstance(rules, (list, tuple, set)):
        raise TypeError(f"rules: expected a scheme or a mapping from patterns to schemes, found {type(rules).__name__}")
    if not isinstance(rules, Mapping):
        rules = {"*": rules}
    if not rules:
        raise ValueError("no rules: expected a scheme or a mapping from patterns to schemes")
    out = {}
    for pattern, value in rules.items():
        if not isinstance(pattern, str):
            raise TypeError(f"a rule's pattern is a string, found {pattern!r}")
        rule = value if isinstance(value, Rule) else Rule(value)
        if rule.scheme is not None:
            scheme(rule.scheme)
        out[pattern] = rule
    return out


def default_reason(path: str) -> str:
    """Why a leaf stays in floating point under `*` alone; empty where it does not."""
    for segment in path.split("/"):
        for pattern in DEFAULT_FLOAT:
            if fnmatchcase(segment, pattern):
                return f"{segment!r} is left in floating point unless a rule names it"
    return ""


def match(rules: Mapping[str, Rule], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Match]:
    """The rule of every leaf, by path; leaves that no pattern matches are absent.

    Raises ValueError for a pattern that wins no leaf: it matches nothing (nearest paths named) or earlier rules take all it matches.
    """
    won: dict[str, Match] = {}
    matched: dict[str, list[str]] = {pattern: [] for pattern in rules}
    for path, shape in shapes.items():
        for pattern, rule in rules.items():
            if not fnmatchcase(path, pattern):
                continue
            matched[pattern].append(path)
            if path in won:
                continue
            reason = "fewer than two axes" if len(shape) < 2 else default_reason(path) if pattern == "*" else ""
            parsed = scheme(rule.scheme) if rule.scheme is not None and not reason else None
            won[path] = Match(pattern, rule, parsed, reason or ("a rule says so" if rule.scheme is None else ""))
    for pattern in rules:
        if pattern != "*" and not any(m.pattern == pattern for m in won.values()):
            raise ValueError(_idle(pattern, matched[pattern], won, shapes))
    return won


def _idle(pattern: str, matched: list[str], won: Mapping[str, Match], shapes) -> str:
    if not matched:
        return f"rule {pattern!r} matches nothing; the nearest paths are {', '.join(map(repr, nearest(pattern, shapes)))}"
    takers = list(dict.fromkeys(won[path].pattern for path in matched))
    return f"rule {pattern!r} wins nothing, it is shadowed by {', '.join(map(repr, takers))} before it"

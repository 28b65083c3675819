"""Regular expressions out of configuration files, matched in bounded time.

Checkpoints select layers by regular expressions, and a stranger's pattern such as `(a+)+$` keeps a backtracking matcher busy for ever.
Patterns without that danger go to `re`; the others are matched by sets of positions with memory, which is polynomial whatever the
pattern. Only membership is decided: no groups are returned, back references are refused.
"""

from __future__ import annotations

import functools
import re
from re import _constants as C  # the parse tree of `re`; its node names have been stable since Python 3.5
from re import _parser

PATTERN_LIMIT, NAME_LIMIT = 2000, 1000
SAFE_REPEATS = 3
"""Unbounded repeats, none inside another, that `re` may get: the time is then cubic in a short name at worst."""


class RegexError(ValueError):
    """The pattern is no regular expression that can be matched in bounded time."""


@functools.lru_cache(maxsize=4096)
def compiled(pattern: str):
    """`compiled(p)(name, full)` says whether p matches the name from its start, or all of it."""
    if len(pattern) > PATTERN_LIMIT:
        raise RegexError(f"pattern of {len(pattern)} characters, at most {PATTERN_LIMIT} are read")
    try:
        tree = _parser.parse(pattern)
        repeats, nested = _repeats(tree, False)
        if repeats <= SAFE_REPEATS and not nested:
            plain = re.compile(pattern)
            return lambda name, full: (plain.fullmatch(name) if full else plain.match(name)) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise RegexError(f"pattern {pattern!r}: {error}") from None
    if tree.state.flags & ~re.UNICODE:
        raise RegexError(f"pattern {pattern!r}: flags are not read in a pattern with nested repeats")
    return lambda name, full: _Matcher(name).accepts(tree, full)


def matches(pattern: str, name: str, full: bool = False) -> bool:
    """Whether `pattern` matches `name` from its start, or all of it."""
    if len(name) > NAME_LIMIT:
        raise RegexError(f"name of {len(name)} characters, at most {NAME_LIMIT} are matched")
    return compiled(pattern)(name, full)


def _children(op, value):
    if op in (C.MAX_REPEAT, C.MIN_REPEAT, C.POSSESSIVE_REPEAT):
        return [value[2]]
    if op is C.SUBPATTERN:
        return [value[3]]
    if op is C.BRANCH:
        return value[1]
    if op in (C.ASSERT, C.ASSERT_NOT):
        return [value[1]]
    return [value] if op is C.ATOMIC_GROUP else []


def _repeats(tree, inside: bool) -> tuple[int, bool]:
    """How many repeats a tree has, and whether something that can match in two ways stands inside one."""
    count, nested = 0, False
    for op, value in tree:
        repeat = op in (C.MAX_REPEAT, C.MIN_REPEAT, C.POSSESSIVE_REPEAT)
        many = repeat and value[1] > 1
        count, nested = count + many, nested or (inside and (repeat or op is C.BRANCH))
        for child in _children(op, value):
            below, deep = _repeats(child, inside or many)
            count, nested = count + below, nested or deep
    return count, nested


class _Matcher:
    """Which positions of one name a node can end at, from each position it can start at."""

    def __init__(self, name: str):
        self.name = name
        self.known: dict[tuple[int, int], frozenset[int]] = {}

    def accepts(self, tree, full: bool) -> bool:
        ends = self.sequence(tree, frozenset((0,)))
        return len(self.name) in ends if full else bool(ends)

    def sequence(self, tree, starts: frozenset[int]) -> frozenset[int]:
        for node in tree:
            starts = frozenset().union(*(self.node(node, at) for at in starts)) if starts else starts
        return starts

    def node(self, node, at: int) -> frozenset[int]:
        key = id(node), at
        if key not in self.known:
            self.known[key] = frozenset(self.ends(*node, at))
        return self.known[key]

    def ends(self, op, value, at: int):
        if op in (C.MAX_REPEAT, C.MIN_REPEAT):
            return self.repeat(*value, at)
        if op is C.SUBPATTERN:
            return self.sequence(value[3], frozenset((at,)))
        if op is C.BRANCH:
            return frozenset().union(*(self.sequence(branch, frozenset((at,))) for branch in value[1]))
        if op in (C.ASSERT, C.ASSERT_NOT):
            direction, tree = value
            if direction < 0:
                raise RegexError("look-behind is not read in a pattern with nested repeats")
            return {at} if bool(self.sequence(tree, frozenset((at,)))) == (op is C.ASSERT) else ()
        if op is C.AT:
            return {at} if self.anchor(value, at) else ()
        return {at + 1} if at < len(self.name) and self.character(op, value, self.name[at]) else ()

    def repeat(self, low: int, high: int, tree, at: int) -> set[int]:
        """All ends after low..high rounds. More rounds than characters add nothing new, as positions repeat."""
        low, high = min(low, len(self.name) + 1), min(high, len(self.name) + 1)
        if len(tree) == 1 and tree[0][0] in _SINGLE:
            end = at
            while end < len(self.name) and end - at < high and self.character(*tree[0], self.name[end]):
                end += 1
            return set(range(at + low, end + 1))
        now, out = frozenset((at,)), set()
        for count in range(high + 1):
            if count >= low:
                if now <= out:
                    break
                out |= now
            now = self.sequence(tree, now)
            if not now:
                break
        return out

    def anchor(self, where, at: int) -> bool:
        if where in (C.AT_BEGINNING, C.AT_BEGINNING_STRING):
            return at == 0
        if where in (C.AT_END, C.AT_END_STRING):
            return at == len(self.name)
        inside = [0 <= i < len(self.name) and (self.name[i].isalnum() or self.name[i] == "_") for i in (at - 1, at)]
        return (inside[0] != inside[1]) == (where is C.AT_BOUNDARY)

    def character(self, op, value, char: str) -> bool:
        if op is C.LITERAL:
            return ord(char) == value
        if op is C.NOT_LITERAL:
            return ord(char) != value
        if op is C.ANY:
            return char != "\n"
        if op is C.IN:
            negate = value[0][0] is C.NEGATE
            return any(self.character(*item, char) for item in value[negate:]) != negate
        if op is C.RANGE:
            return value[0] <= ord(char) <= value[1]
        if op is C.CATEGORY:
            return _CATEGORIES[value](char)
        raise RegexError(f"{op} is not read in a pattern with nested repeats")


_SINGLE = (C.LITERAL, C.NOT_LITERAL, C.ANY, C.IN)
_CATEGORIES = {
    C.CATEGORY_DIGIT: str.isdigit, C.CATEGORY_NOT_DIGIT: lambda c: not c.isdigit(),
    C.CATEGORY_SPACE: str.isspace, C.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    C.CATEGORY_WORD: lambda c: c.isalnum() or c == "_", C.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}

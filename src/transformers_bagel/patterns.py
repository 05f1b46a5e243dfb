# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Regular expressions from anybody's files, compared with the names of layers in a bounded number of steps.

Python's own engine tries one way after the other, and some patterns have more ways than anybody can wait for. This one takes
all ways at once: a part of a pattern leads from a set of places in a name to the set of places behind it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable


LONGEST_PATTERN = 50_000
DEEPEST_GROUP = 40
# For all patterns of an adapter together, about three seconds. Those in use take a tenth.
MOST_STEPS = 5_000_000

_CHARACTER = r"(?:\\[^a-zA-Z0-9]|[^\\()\[\]{}|*+?^$.])"
_TOKEN = re.compile(
    r"(?P<repeat>(?:[*+?]|\{\d+(?:,\d*)?\}|\{,\d+\})\??)"
    r"|(?P<open>\(\?[:=!]|\((?!\?))|(?P<close>\))|(?P<either>\|)|(?P<start>\^)|(?P<end>\$)"
    r"|(?P<kind>\[\^?\]?(?:\\.|[^\]\\])*\]|\\[dDwWsS]|\.)"
    rf"|(?P<word>{_CHARACTER}+(?![*+?{{])|{_CHARACTER})"
)


class Names:
    """
    Names that patterns are compared with.

    Raises:
        ValueError: when a pattern is longer or deeper than any in use, or has parts that no name needs, such as flags,
            references and looks back; and when all patterns together take too many steps.
    """

    def __init__(self, names: Iterable[str]):
        self.names = list(names)
        self.steps = 0

    def whole(self, pattern: str) -> list[str]:
        """Those that a pattern matches as a whole."""
        return self._matched(pattern, lambda name: {0})

    def ends(self, pattern: str) -> list[str]:
        """Those of which it matches the last parts, or all."""
        return self._matched(pattern, lambda name: {0} | {i + 1 for i, letter in enumerate(name) if letter == "."})

    def _matched(self, pattern: str, starts: Callable[[str], set[int]]) -> list[str]:
        leads = _parsed(pattern)
        return [name for name in self.names if len(name) in leads(_Walk(self, name), starts(name))]


class _Walk:
    """A name, and the count of steps through it."""

    def __init__(self, names: Names, text: str):
        self.names, self.text = names, text

    def take(self, steps: int) -> None:
        self.names.steps += steps
        if self.names.steps > MOST_STEPS:
            raise ValueError("it takes too long to compare with the names of layers")


# From the places that have been reached to those behind a part of the pattern.
_Part = Callable[[_Walk, set[int]], set[int]]


def _parsed(pattern: str) -> _Part:
    if len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"it is longer than {LONGEST_PATTERN} letters")
    # Groups that are open; each has alternatives, and these have parts.
    groups: list[list[list[_Part]]] = [[[]]]
    openings: list[str] = []
    place, before = 0, ""
    while place < len(pattern):
        found = _TOKEN.match(pattern, place)
        if found is None or len(groups) > DEEPEST_GROUP:
            raise ValueError(f"nothing is known of what begins with {pattern[place : place + 20]!r}")
        kind, token, place = found.lastgroup or "", found.group(), found.end()
        parts = groups[-1][-1]
        if kind == "open":
            groups.append([[]])
            openings.append(token)
        elif kind == "close" and len(groups) > 1:
            group, opening = _either(groups.pop()), openings.pop()
            groups[-1][-1].append(_ahead(group, opening == "(?=") if opening in ("(?=", "(?!") else group)
        elif kind == "either":
            groups[-1].append([])
        elif kind == "repeat" and parts and before != "repeat":
            parts[-1] = _repeated(parts[-1], token)
        elif kind in ("close", "repeat"):
            raise ValueError(f"{token!r} stands where there is nothing to {kind}")
        else:
            parts.append(_simple(kind, token))
        before = kind
    if len(groups) > 1:
        raise ValueError("a group is not closed")
    return _either(groups[0])


def _simple(kind: str, token: str) -> _Part:
    if kind == "start":
        return lambda walk, places: places & {0}
    if kind == "end":
        return lambda walk, places: places & {len(walk.text)}
    if kind == "word":
        word = re.sub(r"\\(.)", r"\1", token)

        def leads(walk: _Walk, places: set[int]) -> set[int]:
            walk.take(len(places))
            return {place + len(word) for place in places if walk.text.startswith(word, place)}

        return leads
    try:
        # Of one letter, which there is one way to match.
        letter = re.compile(token)
    except re.error as error:
        raise ValueError(str(error)) from error

    def leads_one_on(walk: _Walk, places: set[int]) -> set[int]:
        walk.take(len(places))
        return {place + 1 for place in places if place < len(walk.text) and letter.match(walk.text[place])}

    return leads_one_on


def _either(alternatives: list[list[_Part]]) -> _Part:
    def leads(walk: _Walk, places: set[int]) -> set[int]:
        reached: set[int] = set()
        for parts in alternatives:
            walk.take(1)
            behind = places
            for part in parts:
                behind = part(walk, behind) if behind else behind
            reached |= behind
        return reached

    return leads


def _ahead(part: _Part, is_wanted: bool) -> _Part:
    """Look whether a part follows, and stay."""

    def leads(walk: _Walk, places: set[int]) -> set[int]:
        walk.take(len(places))
        return {place for place in places if bool(part(walk, {place})) == is_wanted}

    return leads


def _repeated(part: _Part, token: str) -> _Part:
    token = token if token in ("?", "*", "+") else token.removesuffix("?")
    bounds = {"*": "{0,}", "+": "{1,}", "?": "{0,1}"}.get(token, token)[1:-1]
    low, comma, high = bounds.partition(",")
    least = int(low or 0)
    most = int(high) if high else None if comma else least

    def leads(walk: _Walk, places: set[int]) -> set[int]:
        # More rounds than letters change nothing.
        for _ in range(min(least, len(walk.text) + 1)):
            walk.take(1)
            places = part(walk, places)
        reached, new, rounds = set(places), places, least
        while new and (most is None or rounds < most):
            walk.take(1)
            new = part(walk, new) - reached
            reached |= new
            rounds += 1
        return reached

    return leads

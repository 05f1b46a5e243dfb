# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Words of an answer as they come: cut off before what stops them, thoughts apart from the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


_OPENING, _CLOSING = "<think>", "</think>"


class Stops:
    """
    Cuts a text off before the first of some words.

    Args:
        words (`Sequence[str]`)

    Attributes:
        has_stopped (`bool`): Whether one of them was found.
    """

    def __init__(self, words: Sequence[str]):
        self.words = words
        self.has_stopped = False
        self._held = ""

    def put(self, text: str) -> str:
        """More of the text; returns what is sure to stay of it."""
        if self.has_stopped:
            return ""
        self._held += text
        places = [place for word in self.words if (place := self._held.find(word)) >= 0]
        if places:
            self.has_stopped = True
            return self._taken(min(places))
        return self._taken(len(self._held) - max((_overlap(self._held, word) for word in self.words), default=0))

    def end(self) -> str:
        """What was held back, at the end of the text."""
        return "" if self.has_stopped else self._taken(len(self._held))

    def _taken(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken


class Thoughts:
    """Tells the thoughts of a text, between `<think>` and `</think>`, from its other words, as transformers' parsing does."""

    def __init__(self) -> None:
        self._held = ""
        self._is_thinking = False
        self._drops_space = False

    def put(self, text: str) -> Iterator[tuple[bool, str]]:
        """More of the text; yields what is sure of it, and whether it is a thought."""
        self._held += text
        while True:
            if self._drops_space:
                self._held = self._held.lstrip()
            self._drops_space = self._drops_space and not self._held
            tag = _CLOSING if self._is_thinking else _OPENING
            before, found, behind = self._held.partition(tag)
            if not found:
                break
            yield from self._piece(before if self._is_thinking else before.rstrip())
            self._held = behind
            self._drops_space = self._is_thinking
            self._is_thinking = not self._is_thinking
        sure = len(self._held) - _overlap(self._held, tag)
        if not self._is_thinking:
            # Before a thought, space is nobody's word.
            sure = len(self._held[:sure].rstrip())
        yield from self._piece(self._held[:sure])
        self._held = self._held[sure:]

    def end(self) -> Iterator[tuple[bool, str]]:
        """What was held back, at the end of the text."""
        yield from self._piece(self._held)
        self._held, self._is_thinking, self._drops_space = "", False, False

    def _piece(self, text: str) -> Iterator[tuple[bool, str]]:
        if text:
            yield self._is_thinking, text


def _overlap(text: str, word: str) -> int:
    """How many of the last letters of a text could be the first of a word."""
    return next((count for count in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:count])), 0)

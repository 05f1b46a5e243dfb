# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Conversations that are kept in case they go on: what was said in them is not read again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from diffusers_bagel import BagelSession
from diffusers_bagel.recalling import Turn, kept_bytes


def keys_of(turns: Iterable[Turn]) -> list[bytes]:
    """A key of the conversation behind each turn, which two have in common if all was said and answered alike so far."""
    keys, key = [], b""
    for turn in turns:
        digest = hashlib.sha256(key)
        for parts in (turn.given, turn.answer):
            digest.update(f"{len(parts)}:".encode())
            for part in parts:
                digest.update(_digest(part))
        key = digest.digest()
        keys.append(key)
    return keys


def _digest(part: dict[str, Any]) -> bytes:
    if part["type"] == "text":
        return hashlib.sha256(b"text" + part["text"].encode()).digest()
    image = part["image"]
    return hashlib.sha256(f"image {image.mode} {image.size}".encode() + image.tobytes()).digest()


@dataclass(frozen=True)
class CacheStats:
    """What a cache holds, and how often it helped.

    Attributes:
        sessions, bytes (`int`): That are kept.
        hits, misses (`int`): Conversations of more than one turn that were found, and that were not.
        evictions (`int`): Sessions that had to make room.
    """

    sessions: int = 0
    bytes: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0


class SessionCache:
    """
    Sessions by what was said in them, those that were used last, within a bound of their memory. Of any thread.

    Args:
        max_bytes (`int`): Of all sessions; what several of them share is counted for each.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._sessions: OrderedDict[bytes, tuple[BagelSession, int]] = OrderedDict()
        self._lock = Lock()
        self._bytes = self._hits = self._misses = self._evictions = 0

    def find(self, keys: Sequence[bytes]) -> tuple[BagelSession | None, int]:
        """
        A session in which most of a conversation was said.

        Args:
            keys (`Sequence[bytes]`): Of the conversation behind each of its turns, see [`keys_of`].

        Returns:
            `tuple[BagelSession | None, int]`: A fork of the session, and how many of the turns it has.
        """
        with self._lock:
            for count in range(len(keys), 0, -1):
                if keys[count - 1] in self._sessions:
                    self._hits += 1
                    self._sessions.move_to_end(keys[count - 1])
                    return self._sessions[keys[count - 1]][0].fork(), count
            self._misses += bool(keys)
        return None, 0

    def keep(self, key: bytes, session: BagelSession, earlier: bytes | None = None) -> None:
        """
        Keep a session, which nobody else may use from now on.

        Args:
            key (`bytes`): Of all that was said in it.
            session ([`BagelSession`])
            earlier (`bytes`, *optional*): Key of the conversation that it went on from, which is now the first to make room.
        """
        size = kept_bytes(session)
        if size > self.max_bytes:
            return
        with self._lock:
            self._drop(key)
            if earlier is not None and earlier in self._sessions:
                self._sessions.move_to_end(earlier, last=False)
            while self._sessions and self._bytes + size > self.max_bytes:
                self._drop(next(iter(self._sessions)))
                self._evictions += 1
            self._sessions[key] = (session, size)
            self._bytes += size

    def _drop(self, key: bytes) -> None:
        _, size = self._sessions.pop(key, (None, 0))
        self._bytes -= size

    def stats(self) -> CacheStats:
        """What is kept, and how often it helped."""
        with self._lock:
            return CacheStats(len(self._sessions), self._bytes, self._hits, self._misses, self._evictions)

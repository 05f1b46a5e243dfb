# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Streamers of transformers for an answer of several texts, each of which is a `generate` of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from transformers.generation import BaseStreamer


Result = TypeVar("Result")


@cache
def _writers(process: int) -> ThreadPoolExecutor:
    """Threads that write while words are given out. They are kept: in a new one a first forward takes half as long again."""
    return ThreadPoolExecutor(thread_name_prefix="bagel-writer")


def in_writer(write: Callable[[], Result], device_type: str) -> Future[Result]:
    """Write in another thread, under this one's autocast. The grad mode, which is also a thread's own, `generate` sets."""
    is_enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)

    def run() -> Result:
        with torch.autocast(device_type, dtype, enabled=is_enabled):
            return write()

    return _writers(os.getpid()).submit(run)


class AnswerStreamer(BaseStreamer):
    """
    Hands the tokens of every text to one streamer: behind one prompt, that of the first, and as one text.

    Args:
        streamer (`BaseStreamer`): Is ended by whoever knows that the answer is whole, see [`ended`].
    """

    def __init__(self, streamer: Any):
        self.streamer = streamer
        self._had_prompt = self._is_in_text = False

    def put(self, value: torch.Tensor) -> None:
        is_later_prompt = self._had_prompt and not self._is_in_text
        self._had_prompt = self._is_in_text = True
        if not is_later_prompt:
            self.streamer.put(value)

    def end(self) -> None:
        self._is_in_text = False


class Streamers(BaseStreamer):
    """Several streamers of the same text."""

    def __init__(self, *streamers: BaseStreamer):
        self.streamers = streamers

    def put(self, value: torch.Tensor) -> None:
        for streamer in self.streamers:
            streamer.put(value)

    def end(self) -> None:
        for streamer in self.streamers:
            streamer.end()


def is_streamer(value: Any) -> bool:
    """Whether `generate` can hand its tokens to it."""
    return all(callable(getattr(value, name, None)) for name in ("put", "end"))


@contextmanager
def ended(streamer: Any) -> Iterator[None]:
    """End a streamer, if there is one, behind the block however that ends: another thread may wait for its words."""
    try:
        yield
    finally:
        if is_streamer(streamer):
            streamer.end()

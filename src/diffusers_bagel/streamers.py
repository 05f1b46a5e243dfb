# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Streamers of transformers for an answer of several texts, each with a prompt and an end of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TextStreamer
from transformers.generation import BaseStreamer


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


class Words(TextStreamer):
    """Keeps the words of a text until they are taken."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._words = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._words += text

    def taken(self) -> str:
        """What is new since the last call."""
        words, self._words = self._words, ""
        return words


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

# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Answers where a GPU is lent for the time of a call, to another process, as on the Hub's ZeroGPU."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from diffusers_bagel import BagelSession, SessionEvent


class GpuCalls:
    """
    What the page needs of an [`Engine`], by one call for each answer.

    Args:
        pipe ([`BagelPipeline`]): The pipeline.
        gpu (`Callable`):
            Decorates a generator that needs the GPU, such as `spaces.GPU`. What goes into it and comes out of it is pickled, so
            sessions go by the way of the disk.
    """

    def __init__(self, pipe: Any, gpu: Callable[[Callable], Callable]):
        self.pipe = pipe
        self._call = gpu(self._stream)

    def submit(
        self, session: BagelSession, content: Sequence[Any], output: str = "auto", **settings: Any
    ) -> CalledAnswer:
        """Say something to a session. The arguments are those of [`BagelSession.stream`], and so are the errors, later."""
        return CalledAnswer(self._events(session, content, output, settings))

    def _events(
        self, session: BagelSession, content: Sequence[Any], output: str, settings: dict[str, Any]
    ) -> Iterator[SessionEvent]:
        with tempfile.TemporaryDirectory(prefix="bagel-session-") as folder:
            session.save_pretrained(folder)
            try:
                yield from self._call(folder, content, output, settings)
            finally:
                session.load_pretrained(folder)

    def _stream(
        self, folder: str, content: Sequence[Any], output: str, settings: dict[str, Any]
    ) -> Iterator[SessionEvent]:
        """In the process that has the GPU."""
        session = BagelSession.from_pretrained(Path(folder), self.pipe)
        try:
            yield from session.stream(content, output, **settings)
        finally:
            session.save_pretrained(folder)


class CalledAnswer:
    """An answer in the making."""

    def __init__(self, events: Iterator[SessionEvent]):
        self._events = events
        self._is_cancelled = False

    async def __aiter__(self) -> AsyncIterator[SessionEvent]:
        """
        The events as they come.

        Raises:
            Exception: the error by which the answer ended.
        """
        try:
            while (event := await asyncio.to_thread(next, self._events, None)) is not None:
                yield event
                if self._is_cancelled:
                    break
        finally:
            await asyncio.to_thread(self._events.close)  # type: ignore[attr-defined]

    def cancel(self) -> None:
        """End the answer behind its next event. What was whole of it stays in the session."""
        self._is_cancelled = True

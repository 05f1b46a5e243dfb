# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Answers of an engine, as whoever asked sees them: in any thread, or in an event loop."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import suppress
from threading import Condition
from traceback import walk_stack, walk_tb

from diffusers_bagel import BagelReply, SessionEvent


# As many as OpenAI's `partial_images` may ask for, of which none is lost.
MAX_PREVIEWS = 3


class EngineFull(RuntimeError):
    """
    As many answers wait as may.

    Attributes:
        retry_after (`float`): Seconds after which a place should be free, from how long answers took.
    """

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} answers wait, and no more may. Ask again in {retry_after:.1f} seconds.")
        self.retry_after = retry_after


class EngineClosed(RuntimeError):
    """The engine takes nothing new, or was closed before an answer was whole."""


class Outbox:
    """What an engine has for whoever asked. Any thread may call any method.

    Attributes:
        is_cancelled (`bool`): Whether nobody wants more.
        has_ended (`bool`): Whether no more comes.
        pictures (`int`): Whole ones that came.
    """

    def __init__(self) -> None:
        self.is_cancelled = False
        self.has_ended = False
        self.pictures = 0
        self._events: deque[SessionEvent] = deque()
        self._reply: BagelReply | None = None
        self._error: BaseException | None = None
        self._changed = Condition()
        self._listener: Callable[[], object] | None = None

    def put(self, event: SessionEvent) -> None:
        """Hand out an event. Of previews that nobody takes, the latest are kept."""
        with self._changed:
            previews = [old for old in self._events if old.type == "preview"] if event.type == "preview" else []
            if len(previews) >= MAX_PREVIEWS:
                self._events.remove(previews[0])
            self._events.append(event)
            self._reply = event.reply
            self.pictures += event.type == "image"
        self._tell()

    def end(self, error: BaseException | None = None) -> None:
        """No more comes."""
        if error is not None:
            _let_go(error)
        with self._changed:
            self._error = error
            self.has_ended = True
        self._tell()

    def cancel(self) -> None:
        """No more is wanted."""
        self.is_cancelled = True

    def listen(self, listener: Callable[[], object] | None) -> None:
        """Call somebody, in the engine's thread, whenever something came."""
        self._listener = listener

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()
        # Read once: whoever listened may leave at any moment.
        if (listener := self._listener) is not None:
            try:
                listener()
            except RuntimeError:  # The event loop of whoever listened is closed.
                self.cancel()

    def take(self) -> SessionEvent | None:
        """The next event, or `None` if there is none yet."""
        with self._changed:
            return self._events.popleft() if self._events else None

    def wait(self, timeout: float | None = None) -> None:
        """Wait until there is an event, or no more comes."""
        with self._changed:
            self._changed.wait_for(lambda: self._events or self.has_ended, timeout)

    def result(self, timeout: float | None) -> BagelReply:
        """See [`EngineAnswer.result`]."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.has_ended, timeout):
                raise TimeoutError(f"There is no whole answer after {timeout} seconds. It is still being made.")
        self.check()
        assert self._reply is not None
        return self._reply

    def check(self) -> None:
        """Raise the error by which the answer ended, if it did."""
        if self._error is not None:
            raise self._error


class EngineAnswer:
    """
    An answer in the making. Its events are there once, for one consumer.

    Whoever leaves an iteration before its end, or drops the answer, is taken to want no more of it.
    """

    def __init__(self, outbox: Outbox):
        self._outbox = outbox
        weakref.finalize(self, outbox.cancel).atexit = False

    def __iter__(self) -> Iterator[SessionEvent]:
        """
        The events as they come, as those of [`BagelSession.stream`].

        Raises:
            Exception: the error by which the answer ended; `TimeoutError` if its time was over.
        """
        outbox = self._outbox
        try:
            while True:
                while (event := outbox.take()) is not None:
                    yield event
                if outbox.has_ended:
                    break
                outbox.wait()
        finally:
            outbox.cancel()
        outbox.check()

    async def __aiter__(self) -> AsyncGenerator[SessionEvent, None]:
        """The same in an event loop, which no thread waits for."""
        outbox, loop, came = self._outbox, asyncio.get_running_loop(), asyncio.Event()
        outbox.listen(lambda: loop.call_soon_threadsafe(came.set))
        try:
            while True:
                came.clear()
                has_ended = outbox.has_ended
                while (event := outbox.take()) is not None:
                    yield event
                if has_ended:
                    break
                if not outbox.has_ended:
                    await came.wait()
        finally:
            outbox.listen(None)
            outbox.cancel()
        outbox.check()

    def result(self, timeout: float | None = None) -> BagelReply:
        """
        The whole answer; of one that was cancelled, what was whole of it.

        Args:
            timeout (`float`, *optional*): Seconds to wait at most. The answer goes on behind them.

        Raises:
            Exception: the error by which the answer ended; `TimeoutError` also if it has not ended yet.
        """
        return self._outbox.result(timeout)

    def cancel(self) -> None:
        """End the answer within one token or step, from any thread. What was whole of it stays in the session."""
        self._outbox.cancel()


def _let_go(error: BaseException | None) -> None:
    """Leave an error the lines where it was raised, and nothing that was computed there: whoever waits may keep it for long."""
    seen: set[int] = set()
    # Chains of errors may be circles.
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for frame, _ in walk_tb(error.__traceback__):
            # A frame keeps those that it was called from.
            for each, _ in walk_stack(frame):
                # What still runs cannot be cleared.
                with suppress(RuntimeError):
                    each.clear()
        error = error.__cause__ or error.__context__

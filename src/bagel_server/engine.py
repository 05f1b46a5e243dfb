# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""One thread that does all forwards of a pipeline for many sessions."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Condition, Thread
from typing import Any

import torch

from diffusers_bagel import BagelSession, SessionEvent

from .answers import EngineAnswer, EngineClosed, EngineFull, Outbox


@dataclass(frozen=True)
class EngineStats:
    """
    What an engine does and has done.

    Attributes:
        running, waiting (`int`): Answers at the moment.
        answers, errors, cancelled (`int`): Answers that ended: all, by an error, because nobody wanted more.
        tokens, steps, pictures, forwards (`int`): That were made for them.
    """

    running: int = 0
    waiting: int = 0
    answers: int = 0
    tokens: int = 0
    steps: int = 0
    pictures: int = 0
    forwards: int = 0
    errors: int = 0
    cancelled: int = 0


@dataclass
class _Task:
    steps: Iterator[SessionEvent]
    outbox: Outbox
    deadline: float
    session: BagelSession


class Engine:
    """
    Answers of many sessions of one pipeline.

    Args:
        pipe ([`BagelPipeline`]): The pipeline.
        max_running (`int`, *optional*, defaults to 32): Most answers that are made at a time.
        max_waiting (`int`, *optional*, defaults to 64): Most answers that wait for that.
    """

    def __init__(self, pipe: Any, max_running: int = 32, max_waiting: int = 64):
        self.pipe, self.max_running, self.max_waiting = pipe, max_running, max_waiting
        self._waiting: deque[_Task] = deque()
        self._running: list[_Task] = []
        self._changed = Condition()
        self._is_closed = self._is_over = False
        self._seconds = 1.0
        self._totals = {"answers": 0, "tokens": 0, "steps": 0, "pictures": 0, "errors": 0, "cancelled": 0}
        self._thread = Thread(target=self._run, name="bagel-engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        session: BagelSession,
        content: str | Sequence[Any],
        output: str = "auto",
        timeout: float | None = None,
        **settings: Any,
    ) -> EngineAnswer:
        """
        Say something to a session, from any thread. The arguments are those of [`BagelSession.stream`].

        Raises:
            TypeError, ValueError: for arguments that cannot work, before anything is said.
            RuntimeError: if the session is answering.
            EngineFull: if as many answers wait as may.
            EngineClosed: behind [`close`].
        """
        outbox = Outbox()
        with self._changed:
            if self._is_closed:
                raise EngineClosed("The engine is closed, and takes nothing new.")
            if len(self._waiting) >= self.max_waiting:
                raise EngineFull(len(self._waiting), self._seconds)
            if any(task.session is session for task in (*self._waiting, *self._running)):
                raise RuntimeError("The session is answering. Take its answer to the end, or go on with a `fork()`.")
            steps = session._steps(session._heard(content, output, True, settings))
            deadline = float("inf") if timeout is None else time.monotonic() + timeout
            self._waiting.append(_Task(_events(steps), outbox, deadline, session))
            self._changed.notify_all()
        return EngineAnswer(outbox)

    def close(self, timeout: float | None = None) -> None:
        """
        Take nothing new, finish what runs and waits, then end.

        Args:
            timeout (`float`, *optional*): Seconds, after which what is left ends with an [`EngineClosed`].
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(timeout)
        self._is_over = True
        self._thread.join()

    def stats(self) -> EngineStats:
        """What is done, and was done so far."""
        with self._changed:
            return EngineStats(running=len(self._running), waiting=len(self._waiting), **self._totals)

    @torch.no_grad()
    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if not self._waiting:
                    return
                task = self._waiting.popleft()
                self._running.append(task)
            began, error = time.monotonic(), None
            try:
                for event in task.steps:
                    self._totals["pictures"] += event.type == "image"
                    task.outbox.put(event)
                    self._check(task)
            except Exception as caught:
                error = caught
            finally:
                task.steps.close()  # type: ignore[attr-defined]
                self.pipe.maybe_free_model_hooks()
            with self._changed:
                self._running.remove(task)
                self._totals["answers"] += 1
                self._totals["errors"] += error is not None
                self._totals["cancelled"] += task.outbox.is_cancelled
                self._seconds = time.monotonic() - began
            task.outbox.end(error)

    def _check(self, task: _Task) -> None:
        if self._is_over:
            raise EngineClosed("The engine was closed before the answer was whole.")
        if time.monotonic() > task.deadline:
            raise TimeoutError("The time for the answer is over.")
        if task.outbox.is_cancelled:
            task.session.interrupt()


def _events(steps: Any) -> Iterator[SessionEvent]:
    from diffusers_bagel.work import at_once

    return at_once(steps)

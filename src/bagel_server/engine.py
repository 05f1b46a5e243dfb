# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Answers of many sessions, made by one thread."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Condition, Thread
from typing import Any

import torch

from diffusers_bagel import BagelSession
from diffusers_bagel.inputs import check_number, check_whole_number
from transformers_bagel.errors import shown

from .answers import EngineAnswer, EngineClosed, EngineFull
from .rounds import Job, Rounds


@dataclass(frozen=True)
class EngineStats:
    """
    What an engine does and has done.

    Attributes:
        running, waiting (`int`): Answers at the moment.
        answers, errors, cancelled (`int`): Answers that ended: all of them, by an error, because nobody wanted more.
        tokens, steps (`int`): Tokens that were written, and steps of pictures.
        pictures (`int`): Whole ones, of answers that ended.
        forwards (`int`): Of the transformer.
    """

    running: int
    waiting: int
    answers: int
    errors: int
    cancelled: int
    pictures: int
    tokens: int
    steps: int
    forwards: int


class Engine:
    """
    Makes the answers of many sessions of one pipeline, in a thread of its own, each as its session would alone.

    Args:
        pipe ([`BagelPipeline`]): The pipeline, which stays on its device as long as the engine runs.
        max_running (`int`, *optional*, defaults to 32): Most answers that are made at a time.
        max_waiting (`int`, *optional*, defaults to 64): Most answers that wait for that, first come, first served.

    Example:

    ```python
    >>> with Engine(pipe) as engine:
    ...     answers = [engine.submit(BagelSession(pipe), prompt, output="image") for prompt in prompts]
    ...     images = [answer.result().images[0] for answer in answers]
    ```
    """

    def __init__(self, pipe: Any, max_running: int = 32, max_waiting: int = 64):
        check_whole_number("max_running", max_running, 1)
        check_whole_number("max_waiting", max_waiting, 0)
        if pipe._split_group is not None:
            raise ValueError(
                "`pipe` splits its contexts between processes, which would all have to be asked the same at a time. Call "
                "`disable_context_split()`."
            )
        self.pipe, self.max_running, self.max_waiting = pipe, max_running, max_waiting
        # To find it, the pipeline goes through all modules: as much work as all else that begins an answer.
        self._device = pipe._execution_device
        self._rounds = Rounds(pipe)
        self._waiting: deque[Job] = deque()
        self._durations: deque[float] = deque(maxlen=32)
        self._answers = self._errors = self._cancelled = self._pictures = 0
        self._changed = Condition()
        self._is_closed = self._is_over = False
        self._thread = Thread(target=self._run, name="bagel-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self,
        session: BagelSession,
        content: str | Sequence[Any],
        output: str = "auto",
        timeout: float | None = None,
        **settings: Any,
    ) -> EngineAnswer:
        """
        Say something to a session, from any thread. What needs no model, as the decoding of image files, is done in this one.

        Args:
            session ([`BagelSession`]): Of the engine's pipeline.
            content, output, settings: As of [`BagelSession.stream`].
            timeout (`float`, *optional*): Seconds after which the answer ends with a `TimeoutError`, waiting included.

        Returns:
            [`EngineAnswer`]: which is cancelled when it is dropped.

        Raises:
            TypeError, ValueError: for arguments that cannot work, before anything is said.
            RuntimeError: if the session is answering.
            EngineFull: if as many answers wait as may.
            EngineClosed: behind [`close`].
        """
        if not isinstance(session, BagelSession):
            raise TypeError(f"`session` must be a `BagelSession`, got {shown(session)}.")
        if session.pipe is not self.pipe:
            raise ValueError("`session` is of another pipeline than the engine's. Make it with `engine.pipe`.")
        if timeout is not None:
            check_number("timeout", timeout, 0)
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        with self._changed:
            self._check_room()
        steps = session._steps(content, output, settings, streams=True, shows_bar=False, device=self._device)
        job = Job(steps, deadline)
        with self._changed:
            try:
                self._check_room()
            except (EngineClosed, EngineFull):
                job.steps.close()
                raise
            self._waiting.append(job)
            self._changed.notify_all()
        return EngineAnswer(job.outbox)

    def _check_room(self) -> None:
        if self._is_closed:
            raise EngineClosed("The engine is closed, and takes nothing new.")
        waiting = len(self._rounds.jobs) + len(self._waiting) - self.max_running
        if waiting >= self.max_waiting:
            raise EngineFull(waiting, self._seconds_to_a_place())

    def _seconds_to_a_place(self) -> float:
        """How soon one of those that run will end, as long as those before took."""
        if self._durations:
            return statistics.fmean(self._durations) / self.max_running
        began = min((job.began_at for job in self._rounds.jobs), default=time.monotonic())
        return max(time.monotonic() - began, 1.0)

    def close(self, timeout: float | None = None) -> None:
        """
        Take nothing new, finish what runs and waits, and end the thread.

        Args:
            timeout (`float`, *optional*): Seconds, after which what is left ends with an [`EngineClosed`].
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(timeout)
        self._is_over = True
        self._thread.join()

    @property
    def is_closed(self) -> bool:
        """Whether nothing new is taken."""
        return self._is_closed

    def stats(self) -> EngineStats:
        """What is done, and was done so far."""
        with self._changed:
            rounds = self._rounds
            return EngineStats(
                len(rounds.jobs),
                len(self._waiting),
                self._answers,
                self._errors,
                self._cancelled,
                self._pictures,
                rounds.tokens,
                rounds.steps,
                rounds.forwards,
            )

    def _run(self) -> None:
        try:
            self._make_answers()
        finally:
            # However it came to its end, nobody may wait for what no longer comes.
            with self._changed:
                self._is_closed = True
                left = [*self._rounds.jobs, *self._waiting]
            for job in left:
                job.outbox.end(EngineClosed("The engine has ended by an error."))

    @torch.no_grad()
    def _make_answers(self) -> None:
        with self._rounds.counted():
            while self._has_work():
                try:
                    self._begin()
                    self._rounds.go(self._is_needed)
                except BaseException as error:  # Of no single answer, or one that ends threads. The engine goes on.
                    for job in self._rounds.jobs:
                        job.break_off(RuntimeError(f"What was done for several answers broke off: {error!r}."))
                self._end()
                if not self._rounds.jobs:
                    self.pipe.maybe_free_model_hooks()

    def _has_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._rounds.jobs or self._is_closed)
            return bool(self._waiting or self._rounds.jobs)

    def _is_needed(self) -> bool:
        """Whether an answer is to begin or to end, between two tokens."""
        has_room = self._waiting and len(self._rounds.jobs) < self.max_running
        now = time.monotonic()
        return bool(self._is_over or has_room or any(job.is_over(now) for job in self._rounds.jobs))

    def _begin(self) -> None:
        """Begin answers while there is room."""
        begun = []
        with self._changed:
            while self._waiting and len(self._rounds.jobs) < self.max_running:
                begun.append(self._waiting.popleft())
                self._rounds.jobs.append(begun[-1])
        for job in begun:
            job.begin()

    def _end(self) -> None:
        """Break off what is no longer wanted, and let go of what has ended."""
        now = time.monotonic()
        with self._changed:
            jobs = [*self._rounds.jobs, *self._waiting]
        for job in jobs:
            if self._is_over:
                job.break_off(EngineClosed("The engine was closed before the answer was whole."))
            elif job.is_over(now):
                job.give_up()
        ended = [job for job in jobs if job.has_ended]
        with self._changed:
            for job in ended:
                if job in self._rounds.jobs:
                    self._rounds.jobs.remove(job)
                    self._durations.append(time.monotonic() - job.began_at)
                else:
                    self._waiting.remove(job)
                self._answers += 1
                self._pictures += job.outbox.pictures
                self._errors += job.error is not None
                self._cancelled += job.was_cancelled
        for job in ended:
            job.outbox.end(job.error)

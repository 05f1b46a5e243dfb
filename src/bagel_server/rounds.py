# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""In what order answers get the model, and which of them share its forwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch

from diffusers_bagel import BagelReply, BagelSession, SessionEvent
from diffusers_bagel.answering import Answer, Interrupted
from diffusers_bagel.streamers import ended
from diffusers_bagel.work import Decoding, Drawing, Encoding, Reading, Running, Work, Writing, results

from .answers import Outbox


class Job(Running):
    """
    An answer that somebody waits for.

    Args:
        session ([`BagelSession`])
        answer (`Answer`): What it has heard.
        deadline (`float`): When its time is over.
        streamer (`BaseStreamer`, *optional*): Is ended with it.

    Attributes:
        outbox (`Outbox`): Gets its events.
        began_at (`float`): When its making began.
        pictures (`int`): That are whole.
    """

    def __init__(self, session: BagelSession, answer: Answer, deadline: float, streamer: Any):
        self.outbox = Outbox()
        super().__init__(_steps(session, answer, streamer), self._put)
        self.deadline, self.began_at = deadline, 0.0
        self.pictures = 0
        self.has_ended = False
        next(self.steps)

    def _put(self, event: SessionEvent) -> None:
        self.pictures += event.type == "image"
        self.outbox.put(event)

    def begin(self) -> None:
        """Go on to the first piece of work."""
        self.began_at = time.monotonic()
        self.go_on()

    def go_on(self, result: Any = None) -> None:
        super().go_on(result)
        self.has_ended = self.work is None

    def is_over(self, now: float) -> bool:
        """Whether it is to end now: nobody wants it, or its time is over."""
        return self.outbox.is_cancelled or now > self.deadline

    def give_up(self) -> None:
        """End it, since it is over."""
        cancelled = self.outbox.is_cancelled
        self.break_off(Interrupted() if cancelled else TimeoutError("The time for the answer is over."))

    def break_off(self, error: Exception) -> None:
        """End it by an error."""
        if not self.has_ended:
            self.go_on(error)

    def refuse(self) -> None:
        """End it before it has begun."""
        self.break_off(Interrupted())


def _steps(session: BagelSession, answer: Answer, streamer: Any) -> Generator[Any, Any, None]:
    """What an answer does, once its turn has come. It waits for that at the first `yield`."""
    with ended(streamer):
        try:
            yield
        except Interrupted:
            session._leave()
            yield SessionEvent("done", reply=BagelReply([]))
            return
        except BaseException:
            session._leave()
            raise
        yield from session._steps(answer)


class Rounds:
    """
    What is done for the answers that run, piece by piece.

    In each round every kind of work has its turn: an image is encoded, a group of texts or an image is read, a picture or
    some are decoded, pictures take a step, and texts get a token, or as many as fit into the time that the step took.

    Args:
        pipe ([`BagelPipeline`]): Of all sessions.

    Attributes:
        jobs (`list[Job]`): The answers that run, in the order in which they came.
        tokens, steps, forwards (`int`): See [`EngineStats`].
    """

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.jobs: list[Job] = []
        self.tokens = self.steps = self.forwards = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the forwards of this thread."""
        thread = get_ident()

        def count(*_: object) -> None:
            self.forwards += get_ident() == thread

        hook = self.pipe.transformer.register_forward_pre_hook(count)
        try:
            yield
        finally:
            hook.remove()

    def go(self, is_needed: Callable[[], bool]) -> None:
        """
        One round.

        Args:
            is_needed (`Callable[[], bool]`): Whether it is to end as soon as each kind of work had its turn.
        """
        for kind in (Encoding, Reading, Decoding):
            self._do(self._first_group(kind))
        start = time.monotonic()
        drawn = self._first_group(Drawing)
        self._do(drawn)
        writing = self._groups(Writing)
        if drawn and writing:
            # What was launched is not yet done.
            _synchronize(drawn[0][1].step.latents.device)
        until = 2 * time.monotonic() - start
        while writing:
            for group in writing:
                self._do(group)
            writing = self._groups(Writing)
            others = [job for job in self.jobs if not isinstance(job.work, (Writing, Drawing))]
            if others or is_needed() or time.monotonic() >= until:
                return

    def _first_group(self, kind: type[Work]) -> list[tuple[Job, Any]]:
        """Of the work of a kind, what was asked for by who came first, and what fits in with that."""
        group: list[tuple[Job, Any]] = []
        size = 0
        for job, work in self._asked_for(kind):
            if not group or (group[0][1].goes_with(work) and size + work.size <= group[0][1].room):
                group.append((job, work))
                size += work.size
        return group

    def _groups(self, kind: type[Work]) -> list[list[tuple[Job, Any]]]:
        """All work of a kind, by what goes together."""
        groups: list[list[tuple[Job, Any]]] = []
        for job, work in self._asked_for(kind):
            group = next((group for group in groups if group[0][1].goes_with(work)), None)
            if group is None:
                groups.append([(job, work)])
            else:
                group.append((job, work))
        return groups

    def _asked_for(self, kind: type[Work]) -> list[tuple[Job, Any]]:
        return [(job, job.work) for job in self.jobs if isinstance(job.work, kind)]

    def _do(self, group: list[tuple[Job, Any]]) -> None:
        """Do the work of a group together, and let its answers go on."""
        if not group:
            return
        found = results([work for _, work in group])
        for (job, work), result in zip(group, found, strict=True):
            is_done = not isinstance(result, Exception)
            self.tokens += is_done and (isinstance(work, Writing) or (isinstance(work, Reading) and work.begins_text))
            self.steps += is_done and isinstance(work, Drawing)
            job.go_on(result)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""In what order answers get the model, and which of them share its forwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch

from diffusers_bagel.answering import Interrupted, Steps
from diffusers_bagel.work import Decoding, Drawing, Encoding, Reading, Running, Writing, groups, results

from .answers import Outbox


class Job(Running):
    """
    An answer that somebody waits for.

    Args:
        steps (`Generator`): What it does.
        deadline (`float`): When its time is over.

    Attributes:
        outbox (`Outbox`): Gets its events.
        began_at (`float`): When its making began.
        has_ended (`bool`)
        was_cancelled (`bool`): Whether that is because nobody wanted more.
    """

    def __init__(self, steps: Steps[None], deadline: float):
        self.outbox = Outbox()
        super().__init__(steps, self.outbox.put)
        self.deadline, self.began_at = deadline, 0.0
        self.has_ended = self.was_cancelled = False

    def begin(self) -> None:
        """Go on to the first piece of work."""
        self.began_at = time.monotonic()
        self.go_on()

    def go_on(self, result: Any = None) -> None:
        super().go_on(result)
        self.has_ended = self.work is None

    def is_over(self, now: float) -> bool:
        """Whether it is to end now: nobody wants it, or its time is over."""
        return not self.has_ended and (self.outbox.is_cancelled or now > self.deadline)

    def give_up(self) -> None:
        """End it, since it is over."""
        self.was_cancelled = self.outbox.is_cancelled
        self.break_off(Interrupted() if self.was_cancelled else TimeoutError("The time for the answer is over."))

    def break_off(self, error: Exception) -> None:
        """End it by an error."""
        if not self.has_ended:
            self.go_on(error)


class Rounds:
    """
    What is done for the answers that run, piece by piece.

    In each round every kind of work has its turn: some images are encoded, some are read, or texts, some pictures are decoded,
    some take a step, and all texts get a token, or as many as fit into the time that the step took.

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
            self._do(groups(self.jobs, kind)[:1])
        start = time.monotonic()
        drawn = groups(self.jobs, Drawing)[:1]
        self._do(drawn)
        writing = groups(self.jobs, Writing)
        if drawn and writing:
            # What was launched is not yet done.
            _synchronize(drawn[0][0][1].step.latents.device)
        until = 2 * time.monotonic() - start
        while writing:
            self._do(writing)
            writing = groups(self.jobs, Writing)
            others = [job for job in self.jobs if not isinstance(job.work, (Writing, Drawing))]
            if others or is_needed() or time.monotonic() >= until:
                return

    def _do(self, asked: list[list[tuple[Job, Any]]]) -> None:
        """Do the work of each group together, and let its answers go on."""
        for group in asked:
            found = results([work for _, work in group])
            for (job, work), result in zip(group, found, strict=True):
                is_done = not isinstance(result, Exception)
                self.tokens += is_done and (
                    isinstance(work, Writing) or (isinstance(work, Reading) and work.begins_text)
                )
                self.steps += is_done and isinstance(work, Drawing)
                job.go_on(result)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

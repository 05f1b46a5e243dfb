# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What answers ask the model for. Several pieces of one kind, of several sessions, can be done together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from transformers_bagel.segments import EncodedSegment

from .contexts import BagelContext, ContextReader, TextSettings, Written
from .denoising import Denoiser, DenoisingLoop
from .guidance import BagelGuidance
from .writing import write_together


class Work(ABC):
    """Something that an answer needs the model for."""

    @abstractmethod
    def goes_with(self, other: Any) -> bool:
        """Whether it can be done together with another of its kind."""

    @staticmethod
    @abstractmethod
    def together(works: Sequence[Any]) -> list[Any]:
        """Do several of one kind, of which each goes with the first. A result of each."""


@dataclass(frozen=True, eq=False)
class Reading(Work):
    """
    More segments for a context. Gives the context that has read them, and the scores of the token behind, if there were any.

    Attributes:
        reader (`ContextReader`)
        context (`BagelContext`)
        segments (`Sequence[EncodedSegment]`)
    """

    reader: ContextReader
    context: BagelContext
    segments: Sequence[EncodedSegment]

    def goes_with(self, other: Reading) -> bool:
        return self.reader.attention_kwargs == other.reader.attention_kwargs

    @staticmethod
    def together(works: Sequence[Reading]) -> list[tuple[BagelContext, torch.Tensor | None]]:
        read, scores = works[0].reader.read_with_scores(
            [work.context for work in works], [work.segments for work in works]
        )
        if len(works) > 1:
            # None keeps the keys and values of the others.
            read = [context.copied() for context in read]
        return list(zip(read, scores, strict=True))


@dataclass(frozen=True, eq=False)
class Writing(Work):
    """
    A text behind a context. Gives what was written.

    Attributes:
        reader (`ContextReader`)
        context (`BagelContext`)
        settings (`TextSettings`)
    """

    reader: ContextReader
    context: BagelContext
    settings: TextSettings

    def goes_with(self, other: Writing) -> bool:
        same_limits = self.settings.temperature_only == other.settings.temperature_only
        return same_limits and self.reader.attention_kwargs == other.reader.attention_kwargs

    @staticmethod
    def together(works: Sequence[Writing]) -> list[Written | Exception]:
        reader = works[0].reader
        if len(works) == 1:
            return [reader.write_on(works[0].context, works[0].settings)]
        return write_together(reader, [work.context for work in works], [work.settings for work in works])


@dataclass(frozen=True, eq=False)
class Drawing(Work):
    """
    A picture. Gives its latents `(1, tokens, latent_dim)`.

    Attributes:
        pipe ([`BagelPipeline`])
        contexts (`dict[str, BagelContext]`): What it is drawn from, and what guidance compares it with.
        grid (`tuple[int, int]`): Rows and columns of its tokens.
        guidance (`BagelGuidance`)
        noise (`torch.Tensor` of shape `(1, tokens, latent_dim)`)
        settings (`dict`): Of the pipeline's `__call__`.
        is_interrupted (`Callable[[], bool]`): Whether it is no longer wanted.
    """

    pipe: Any
    contexts: dict[str, BagelContext]
    grid: tuple[int, int]
    guidance: BagelGuidance
    noise: torch.Tensor
    settings: dict[str, Any]
    is_interrupted: Callable[[], bool]

    def goes_with(self, other: Drawing) -> bool:
        """Whether both have the same sigmas, and the same scale."""
        names = ("num_inference_steps", "sigmas", "timestep_shift", "attention_kwargs")
        are_equal = (self.settings.get(name) == other.settings.get(name) for name in names)
        return self.guidance.text_scale == other.guidance.text_scale and all(are_equal)

    @staticmethod
    def loop(works: Sequence[Drawing]) -> DenoisingLoop:
        """The steps of several, which end when none of them is wanted any longer."""
        pipe, settings, scale = works[0].pipe, works[0].settings, works[0].guidance.text_scale
        call = pipe._new_call(scale, settings.get("attention_kwargs"), settings.get("timestep_shift"))
        grids = [work.grid for work in works]
        denoiser = Denoiser(
            pipe.transformer,
            [work.contexts for work in works],
            grids,
            [work.guidance for work in works],
            pipe._taylorseer,
            pipe._split_group,
            call.attention_kwargs,
        )
        noise = torch.nn.utils.rnn.pad_sequence([work.noise[0] for work in works], batch_first=True)
        loop = pipe._prepare_loop(
            call, denoiser, noise, settings.get("num_inference_steps", 49), settings.get("sigmas")
        )
        stops = loop.is_interrupted
        loop.is_interrupted = lambda: stops() or all(work.is_interrupted() for work in works)
        return loop

    def steps(self, loop: DenoisingLoop) -> Iterator[int]:
        """The steps of a loop, under the pipeline's progress bar."""
        with self.pipe.progress_bar(total=len(loop.levels)) as progress_bar:
            for step, _ in loop:
                if loop.is_whole_step(step):
                    progress_bar.update()
                yield step

    @staticmethod
    def together(works: Sequence[Drawing]) -> list[torch.Tensor]:
        loop = Drawing.loop(works)
        for _ in works[0].steps(loop):
            pass
        return [loop.latents[place, : work.noise.shape[1]][None] for place, work in enumerate(works)]


def at_once(steps: Generator[Any, Any, None]) -> Iterator[Any]:
    """The events of one answer, of which each piece of work is done as soon as it is asked for."""
    result = None
    try:
        while True:
            step = steps.send(result)
            if isinstance(step, Work):
                (result,) = type(step).together([step])
            else:
                result = None
                yield step
    except StopIteration:
        return
    finally:
        steps.close()

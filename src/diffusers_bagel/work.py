# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What answers ask the model for, in small pieces. Those of one kind, of several sessions, can be done together."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from transformers_bagel.segments import EncodedSegment

from .contexts import MAX_PREFILL_TOKENS, BagelContext, ContextReader
from .denoising import DenoisingStep, step_limit, velocities
from .denoising_layers import DenoisingLayers
from .writing import Text, write_together


# Most latent tokens of pictures that the VAE encodes or decodes at a time, as many as a picture of 1024 px has: what it needs beside is large.
MAX_VAE_TOKENS = 4096


class Work(ABC):
    """Something that an answer needs the model for."""

    @property
    def size(self) -> int:
        """How much it is, in tokens."""
        return 1

    @property
    def room(self) -> float:
        """How much is done at a time; a larger piece is done alone."""
        return math.inf

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
        begins_text (`bool`): Whether the token behind is the first of a text.
    """

    reader: ContextReader
    context: BagelContext
    segments: Sequence[EncodedSegment]
    begins_text: bool = False

    @property
    def size(self) -> int:
        return self.context.length - self.context.held + sum(map(len, self.segments))

    @property
    def room(self) -> int:
        return MAX_PREFILL_TOKENS

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
    The next token of a text. Gives its scores `(1, vocabulary)`.

    Attributes:
        text (`Text`): Whose last token is yet to be read.
    """

    text: Text

    def goes_with(self, other: Writing) -> bool:
        return self.text.reader.attention_kwargs == other.text.reader.attention_kwargs

    @staticmethod
    def together(works: Sequence[Writing]) -> list[torch.Tensor]:
        return write_together([work.text for work in works])


@dataclass(frozen=True, eq=False)
class Drawing(Work):
    """
    A step of a picture. Gives its velocity.

    Attributes:
        step (`DenoisingStep`): Whatever its noise level is.
    """

    step: DenoisingStep

    @property
    def size(self) -> int:
        return self.step.num_tokens

    @property
    def room(self) -> int:
        return step_limit(self.step.latents.device)

    def goes_with(self, other: Drawing) -> bool:
        mine, theirs = (work.step.denoiser for work in (self, other))
        return (
            mine.adapters.scale == theirs.adapters.scale
            and mine.adapters.attention_kwargs == theirs.adapters.attention_kwargs
            and mine.caching == theirs.caching
            and not isinstance(mine.caching, DenoisingLayers)
        )

    @staticmethod
    def together(works: Sequence[Drawing]) -> list[torch.Tensor]:
        return velocities([work.step for work in works])


@dataclass(frozen=True, eq=False)
class Encoding(Work):
    """
    What the VAE makes of an image. Gives its latents `(tokens, latent_dim)`.

    Attributes:
        pipe ([`BagelPipeline`])
        pixels (`torch.Tensor` of shape `(3, height, width)`)
        generator (`torch.Generator`, *optional*), mode (`str`): Of the sample.
    """

    pipe: Any
    pixels: torch.Tensor
    generator: torch.Generator | None
    mode: str

    @property
    def size(self) -> int:
        return self.pixels[0].numel() // self.pipe.vae_scale_factor**2

    @property
    def room(self) -> int:
        return MAX_VAE_TOKENS

    def goes_with(self, other: Encoding) -> bool:
        return self.pixels.shape == other.pixels.shape

    @staticmethod
    def together(works: Sequence[Encoding]) -> list[torch.Tensor]:
        names = ("pixels", "generator", "mode")
        return works[0].pipe.encode_images(*([getattr(work, name) for work in works] for name in names))


@dataclass(frozen=True, eq=False)
class Decoding(Work):
    """
    The picture of some latents. Gives its values `(height, width, 3)`.

    Attributes:
        pipe ([`BagelPipeline`])
        latents (`torch.Tensor` of shape `(1, tokens, latent_dim)`)
        grid (`tuple[int, int]`): Rows and columns of its tokens.
    """

    pipe: Any
    latents: torch.Tensor
    grid: tuple[int, int]

    @property
    def size(self) -> int:
        return self.latents.shape[1]

    @property
    def room(self) -> int:
        return MAX_VAE_TOKENS

    def goes_with(self, other: Decoding) -> bool:
        return self.grid == other.grid

    @staticmethod
    def together(works: Sequence[Decoding]) -> list[np.ndarray]:
        return list(works[0].pipe.decode_latents(torch.cat([work.latents for work in works]), works[0].grid, "np"))


# What answers that need it wait for longest comes last, so that all of them come to it.
KINDS = (Encoding, Reading, Writing, Drawing, Decoding)


def results(works: Sequence[Any]) -> list[Any]:
    """Of works that go together, in each place the result, or the error by which it ended."""
    try:
        return type(works[0]).together(works)
    except Exception as error:
        if len(works) == 1:
            return [error]
    # One by one, so that the error is of the one whose it is, and so that less memory is needed.
    return [results([work])[0] for work in works]


class Running:
    """
    An answer in the making.

    Args:
        steps (`Generator`): What it does.
        hand_out (`Callable[[SessionEvent], Any]`): Is given its events.

    Attributes:
        work (`Work`, *optional*): What it waits for; `None` when it has ended.
        error (`Exception`, *optional*): By which it has ended.
    """

    def __init__(self, steps: Generator[Any, Any, None], hand_out: Callable[[Any], Any]):
        self.steps, self.hand_out = steps, hand_out
        self.work: Work | None = None
        self.error: Exception | None = None

    def go_on(self, result: Any = None) -> None:
        """Go on with what was waited for, or with the error that it ended in, up to the next piece of work."""
        self.work = None
        try:
            step = self.steps.throw(result) if isinstance(result, Exception) else self.steps.send(result)
            while not isinstance(step, Work):
                self.hand_out(step)
                step = next(self.steps)
            self.work = step
        except StopIteration:
            pass
        except Exception as error:
            self.error = error


Owner = TypeVar("Owner", bound=Running)


def groups(answers: Iterable[Owner], kind: type[Work]) -> list[list[tuple[Owner, Any]]]:
    """
    What answers wait for of one kind, by what is done together: what the first of them asks for, and what goes with that and
    fits in; then the others in the same way.
    """
    found: list[list[tuple[Owner, Any]]] = []
    sizes: list[int] = []
    for answer in answers:
        work: Any = answer.work
        if not isinstance(work, kind):
            continue
        for place, ((_, first), *_) in enumerate(found):
            if first.goes_with(work) and sizes[place] + work.size <= first.room:
                break
        else:
            place = len(found)
            found.append([])
            sizes.append(0)
        found[place].append((answer, work))
        sizes[place] += work.size
    return found


def at_once(steps: Generator[Any, Any, None]) -> Iterator[Any]:
    """The events of one answer, of which each piece of work is done as soon as it is asked for."""
    result = None
    try:
        while True:
            step = steps.throw(result) if isinstance(result, Exception) else steps.send(result)
            result = None
            if isinstance(step, Work):
                (result,) = results([step])
            else:
                yield step
    except StopIteration:
        return
    finally:
        steps.close()

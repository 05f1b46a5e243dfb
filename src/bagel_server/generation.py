# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Answers to requests, whatever the interface: what is asked becomes a session's turn, and its events become pieces."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fastapi import Request
from PIL import Image

from diffusers_bagel import BagelSession, SessionEvent
from diffusers_bagel.answering import AnswerSettings
from diffusers_bagel.recalling import Turn, count_tokens, is_as_recalled, tokens_of_turn
from transformers_bagel.threads import run_in_own_thread

from .answers import EngineAnswer
from .engine import Engine
from .errors import ApiError, as_api_error
from .images import image_bytes
from .metrics import Metrics
from .requests import DEFAULT_STEPS, generator_of, preview_every
from .session_cache import SessionCache, keys_of
from .settings import ServerSettings
from .words import Stops, Thoughts


@dataclass(frozen=True)
class Asked:
    """
    What a request asks for.

    Attributes:
        turns (`Sequence[Turn]`): What was said, the last of them unanswered.
        output (`str`): See [`BagelSession.stream`].
        settings (`dict`): Of the session.
        choices (`int`): How many answers.
        seed (`int`, *optional*): Of the first answer; the others follow.
        stops (`Sequence[str]`): Before which a text is cut off.
        partial_images (`int`): How often a stream shows what a picture will be like.
        output_format (`str`), compression (`int`): Of pictures, see [`image_bytes`].
        names (`Mapping[str, str]`): What the request calls arguments of the session.
        is_conversation (`bool`): Whether a later request may go on from it.
    """

    turns: Sequence[Turn]
    output: str
    settings: Mapping[str, Any]
    choices: int = 1
    seed: int | None = None
    stops: Sequence[str] = ()
    output_format: str = "png"
    compression: int = 100
    names: Mapping[str, str] = field(default_factory=dict)
    partial_images: int = 0
    is_conversation: bool = True


@dataclass(frozen=True)
class Piece:
    """
    A piece of an answer as it comes.

    Attributes:
        type (`str`): `"thought"` or `"text"`, new words; `"image"`, a picture; `"preview"`, what it will be like; `"progress"`,
            a step of it; `"end"`, nothing more.
        text (`str`): New words.
        image (`Image`, *optional*), content (`bytes`): A picture, and its file.
        part (`int`): Which text or picture of the answer it is a piece of.
        index (`int`): Which picture of the answer it is.
        step, steps (`int`, *optional*): How far it is.
    """

    type: Literal["thought", "text", "image", "preview", "progress", "end"]
    text: str = ""
    image: Image.Image | None = None
    content: bytes = b""
    part: int = 0
    index: int = 0
    step: int | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of an answer.

    Attributes:
        prompt, prompt_images (`int`): That were said before it, and those of them that are of images.
        cached (`int`): Of these, those that were in the session cache.
        text, thoughts (`int`): That were written, and those of them that are thoughts.
        image (`int`): Of pictures.
    """

    prompt: int = 0
    prompt_images: int = 0
    cached: int = 0
    text: int = 0
    thoughts: int = 0
    image: int = 0


class Choice:
    """
    One of the answers to a request, in the making.

    Attributes:
        index (`int`)
        seed (`int`)
        finish_reason (`str`): `"stop"`, or `"length"` if its last text was cut off; when it has ended.
        usage ([`Usage`]): When it has ended.
        content (`list[dict]`): Its parts as the model wrote them; when it has ended.
    """

    def __init__(self, index: int, seed: int, answer: EngineAnswer, session: BagelSession):
        self.index, self.seed, self.answer, self.session = index, seed, answer, session
        self.finish_reason = "stop"
        self.usage = Usage()
        self.content: list[dict[str, Any]] = []


class Generation:
    """
    Makes the answers of an engine into those of requests.

    Args:
        engine ([`Engine`])
        settings ([`ServerSettings`])
        metrics ([`Metrics`])
    """

    def __init__(self, engine: Engine, settings: ServerSettings, metrics: Metrics, cache: SessionCache):
        self.engine, self.settings, self.metrics, self.cache = engine, settings, metrics, cache

    async def read(self, asked_by: Callable[..., Asked], *body: Any) -> Asked:
        """
        What a request asks for, its images read, in another thread than the event loop's.

        Raises:
            ApiError: naming the field that is wrong.
        """
        # A thread for each request: none waits because others fetch their images from a slow place.
        return await run_in_own_thread(asked_by, *body, self.settings)

    @asynccontextmanager
    async def answers(self, request: Request, asked: Asked) -> AsyncIterator[Answers]:
        """
        The answers to a request. They are cancelled when the block is left, and when the client is gone.

        Raises:
            ApiError: if they cannot be begun.
        """
        answers = await self.begin(asked)
        try:
            async with gone_cancels(request, answers):
                yield answers
        finally:
            answers.cancel()

    async def begin(self, asked: Asked) -> Answers:
        """
        Begin the answers to a request, in another thread than the event loop's.

        Raises:
            ApiError: if they cannot be begun.
        """
        try:
            return await run_in_own_thread(self._begin, asked)
        except Exception as error:
            raise as_api_error(error, asked.names) from error

    def _begin(self, asked: Asked) -> Answers:
        *earlier, last = asked.turns
        keys = keys_of(earlier)
        session, known = self.cache.find(keys)
        if session is None:
            session = BagelSession(self.engine.pipe, self.settings.protocol)
        cached = count_tokens(session, asked.output)
        most = min(session.protocol.max_images or self.settings.max_drawn, self.settings.max_drawn)
        own = {"sanitize_control_tokens": not self.settings.raw_tokens}
        if missing := earlier[known:]:
            session.recall([message for turn in missing for message in _messages(turn)], **own)
        self._check_length(session, last, asked.names.get("content", "messages"))
        settings = self._within_limits(session, asked)
        if asked.stops:
            settings["stop_strings"] = list(asked.stops)
        seed = secrets.randbits(53) if asked.seed is None else asked.seed
        answers = Answers(self, asked, keys, cached, seed)
        try:
            for index in range(asked.choices):
                fork = session.fork()
                answer = self.engine.submit(
                    fork,
                    [dict(part) for part in last.given],
                    asked.output,
                    self.settings.timeout,
                    generator=generator_of(seed, index),
                    **own,
                    # Drawn, latents would depend on whether the conversation was cached.
                    vae_sample_mode="argmax",
                    **({"max_images": most} | settings),
                )
                answers.choices.append(Choice(index, seed + index, answer, fork))
        except Exception:
            answers.cancel()
            raise
        return answers

    def _within_limits(self, session: BagelSession, asked: Asked) -> dict[str, Any]:
        """What a request chose; what it leaves to a preset, the protocol or the session is at most what the server makes."""
        _, defaults = session._with_defaults(asked.output, dict(asked.settings))
        defaults = dict(session.protocol.settings) | defaults
        limits = {
            "max_new_tokens": (AnswerSettings.max_new_tokens, self.settings.max_new_tokens),
            "num_inference_steps": (DEFAULT_STEPS, self.settings.max_steps),
        }
        most = {name: most for name, (usual, most) in limits.items() if defaults.get(name, usual) > most}
        chosen = dict(asked.settings) | most
        if asked.partial_images:
            steps = (defaults | most).get("num_inference_steps", DEFAULT_STEPS)
            chosen["preview_every"] = preview_every(steps, asked.partial_images)
        return chosen

    def _check_length(self, session: BagelSession, last: Turn, param: str) -> None:
        """Refuse a conversation that is longer than the server reads."""
        processor = session.pipe.processor
        length = count_tokens(session, "text")
        for part in last.given:
            if part["type"] == "text":
                length += len(processor.tokenizer(part["text"], add_special_tokens=False)["input_ids"])
            else:
                length += processor.image_processor.get_number_of_image_patches(
                    part["image"].height, part["image"].width
                )
        if length > self.settings.max_context_tokens:
            raise ApiError(
                f"The conversation has {length} tokens, and at most {self.settings.max_context_tokens} are read.",
                param,
                code="context_length_exceeded",
            )


class Answers:
    """
    The answers to one request.

    Attributes:
        choices (`list[Choice]`)
        seed (`int`): Of the first.
        created (`int`): Seconds since 1970.
    """

    def __init__(self, generation: Generation, asked: Asked, keys: Sequence[bytes], cached: int, seed: int):
        self.generation, self.asked, self.keys, self.cached, self.seed = generation, asked, keys, cached, seed
        self.choices: list[Choice] = []
        self._is_cancelled = False
        self.created = int(time.time())
        self._began = time.monotonic()

    def cancel(self) -> None:
        """End what is not whole."""
        self._is_cancelled = True
        for choice in self.choices:
            choice.answer.cancel()

    @property
    def usage(self) -> Usage:
        """Of all answers, to a prompt that counts once."""
        each = [choice.usage for choice in self.choices]
        totals = {name: sum(getattr(usage, name) for usage in each) for name in ("text", "thoughts", "image")}
        return replace(each[0], **totals)

    async def pieces(self) -> AsyncGenerator[tuple[Choice, Piece], None]:
        """
        The pieces of all answers as they come.

        Raises:
            ApiError: the error by which an answer ended.
        """
        # Whoever reads slowly is waited for, so that previews are left out before they are files.
        came: asyncio.Queue[tuple[Choice, Piece | Exception | None]] = asyncio.Queue(1)

        async def take(choice: Choice) -> None:
            try:
                async with aclosing(self._pieces(choice)) as pieces:
                    async for piece in pieces:
                        await came.put((choice, piece))
                await came.put((choice, Piece("end")))
                await came.put((choice, None))
            except Exception as error:
                await came.put((choice, error))

        tasks = [asyncio.create_task(take(choice)) for choice in self.choices]
        try:
            for _ in tasks:
                while (piece := (await came.get())) and piece[1] is not None:
                    choice, content = piece
                    if isinstance(content, Exception):
                        raise as_api_error(content, self.asked.names, has_begun=True) from content
                    assert content is not None
                    yield choice, content
        finally:
            self.cancel()
            for task in tasks:
                task.cancel()

    async def whole(self) -> dict[int, list[Piece]]:
        """
        All pieces of each answer, but for those that only say how far it is.

        Raises:
            ApiError: the error by which an answer ended.
        """
        found: dict[int, list[Piece]] = {choice.index: [] for choice in self.choices}
        async with aclosing(self.pieces()) as pieces:
            async for choice, piece in pieces:
                if piece.type not in ("preview", "progress"):
                    found[choice.index].append(piece)
        return found

    async def _pieces(self, choice: Choice) -> AsyncGenerator[Piece, None]:
        stops, thoughts = Stops(self.asked.stops), Thoughts()
        counts = {"text": 0, "image": 0}
        thought, part = "", 0
        is_first = True
        async with aclosing(choice.answer.__aiter__()) as events:
            async for event in events:
                if is_first:
                    self.generation.metrics.first_piece.observe(time.monotonic() - self._began)
                    is_first = False
                if event.type == "text":
                    words = stops.put(event.text or "")
                    found = list(thoughts.put(words))
                    if event.is_whole:
                        found += [*thoughts.put(stops.end()), *thoughts.end()]
                        choice.finish_reason = "length" if event.is_cut and not stops.has_stopped else "stop"
                        counts["text"] += event.tokens or 0
                        stops = Stops(self.asked.stops)
                    for is_thought, text in found:
                        thought += text * is_thought
                        yield Piece("thought" if is_thought else "text", text, part=part)
                elif event.type == "done":
                    choice.content = event.reply.content
                else:
                    yield replace(await self._picture(event), part=part, index=counts["image"])
                    if event.type == "image":
                        counts["image"] += 1
                        choice.finish_reason = "stop"
                part += event.is_whole
        if self._is_cancelled:
            raise ApiError("The client has gone.", status=499, code="cancelled")
        self._count(choice, counts["text"], thought)
        if self.asked.is_conversation:
            await run_in_own_thread(self._keep, choice)

    async def _picture(self, event: SessionEvent) -> Piece:
        asked, content = self.asked, b""
        if event.image is not None:
            content = await asyncio.to_thread(image_bytes, event.image, asked.output_format, asked.compression)
        steps = getattr(event, "steps", None)
        return Piece(event.type, "", event.image, content, step=event.step, steps=steps)  # type: ignore[arg-type]

    def _count(self, choice: Choice, text_tokens: int, thought: str) -> None:
        """Count what an answer took."""
        session, asked = choice.session, self.asked
        tokenizer = session.pipe.processor.tokenizer
        tokens = tokens_of_turn(session, asked.output)
        thoughts = len(tokenizer(thought, add_special_tokens=False)["input_ids"]) if thought else 0
        cached = min(self.cached, tokens.prompt)
        choice.usage = Usage(tokens.prompt, tokens.prompt_images, cached, text_tokens, thoughts, tokens.drawn)
        self.generation.metrics.count(choice.usage)

    def _keep(self, choice: Choice) -> None:
        """Keep the conversation with its answer, for who goes on with it."""
        session, asked = choice.session, self.asked
        turn = Turn(asked.turns[-1].given, tuple(choice.content))
        if turn.answer and is_as_recalled(session, turn, not self.generation.settings.raw_tokens):
            earlier = self.keys[-1] if self.keys else None
            self.generation.cache.keep(keys_of([*asked.turns[:-1], turn])[-1], session, earlier)


def _messages(turn: Turn) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(turn.given)}, {"role": "assistant", "content": list(turn.answer)}]


@asynccontextmanager
async def gone_cancels(request: Request, answers: Answers) -> AsyncIterator[None]:
    """Cancel answers whose client leaves within the block."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        answers.cancel()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()

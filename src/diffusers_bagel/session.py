# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Conversations that go on: what was said is read once, and answered in texts and pictures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessorList

from transformers_bagel.errors import shown
from transformers_bagel.segments import check_conversation

from .answering import CONTEXTS, Answer, AnswerSettings, Interrupted, SessionEvent
from .contexts import BagelContext, ContextReader, ReadContexts
from .conversation import Conversation
from .inputs import check_flag, check_guidance, check_whole_number
from .protocols import PROTOCOLS, InterleaveProtocol


OUTPUTS = ("auto", "text", "image", "interleaved")
# Of the pipeline's `__call__`, for each picture.
_DRAWING = (
    *("height", "width", "num_inference_steps", "sigmas", "guidance_scale", "image_guidance_scale", "cfg_interval"),
    *("cfg_renorm_type", "cfg_renorm_min", "vae_sample_mode", "attention_kwargs"),
)


@dataclass(frozen=True)
class BagelReply:
    """
    An answer.

    Attributes:
        content (`list[dict]`): Texts and pictures in order, as the parts of a message.
    """

    content: list[dict[str, Any]]

    @property
    def text(self) -> str:
        """All words."""
        return "".join(part["text"] for part in self.content if part["type"] == "text")

    @property
    def images(self) -> list[Image.Image]:
        """All pictures."""
        return [part["image"] for part in self.content if part["type"] == "image"]


class BagelSession:
    """
    A conversation with a pipeline, which it remembers.

    Args:
        pipe ([`BagelPipeline`]): The pipeline.
        protocol (`str` or [`InterleaveProtocol`], *optional*):
            How the model answers in texts and pictures in turn, or its name in [`PROTOCOLS`].

    Attributes:
        messages (`list[dict]`): What was said, as chat messages.

    Example:

    ```python
    >>> session = BagelSession(pipe)
    >>> picture = session.send("a red circle", output="image").images[0]
    >>> session.send("now make it blue", output="image").images[0].save("blue.png")
    >>> session.send("how many circles are there?", output="text").text
    ```
    """

    def __init__(self, pipe: Any, protocol: str | InterleaveProtocol | None = None):
        if isinstance(protocol, str) and protocol not in PROTOCOLS:
            raise ValueError(f"`protocol` must be one of {', '.join(PROTOCOLS)}, got {shown(protocol)}.")
        if not pipe.transformer.config.visual_und:
            raise ValueError(
                "`pipe`: a session reads its own pictures, and the transformer was loaded without `visual_und=True`."
            )
        self.pipe = pipe
        self.protocol = PROTOCOLS[protocol or "plain"] if protocol is None or isinstance(protocol, str) else protocol
        self.messages: list[dict[str, Any]] = []
        self._said = Conversation()
        self._read = ReadContexts()
        self._turns: list[tuple[int, Conversation]] = []
        self._interrupted_at, self._began_at = -1.0, 0.0

    def fork(self) -> BagelSession:
        """A session that goes on by itself from here. Nothing is copied until it does."""
        other = BagelSession(self.pipe, self.protocol)
        other.messages = [message | {"content": list(message["content"])} for message in self.messages]
        other._said, other._turns = self._said, list(self._turns)
        other._read = self._read.fork()
        return other

    def back(self, turns: int = 1) -> None:
        """
        Forget the last turns, each something that the user said and its answer.

        Raises:
            ValueError: if there were not as many.
        """
        check_whole_number("turns", turns, 1, len(self._turns))
        count, self._said = self._turns[-turns]
        del self.messages[count:], self._turns[-turns:]
        self._read.forget_all_but(self._said.segment_lists())

    def interrupt(self) -> None:
        """End the answer that is being made, from another thread or between two events: its last whole part stays."""
        self._interrupted_at = time.monotonic()

    def _is_interrupted(self) -> bool:
        return self._interrupted_at >= self._began_at

    @property
    def contexts(self) -> dict[str, BagelContext]:
        """What the next picture would be drawn from: `full`, and what guidance compares it with."""
        reader = self._reader(None)
        track = self._said.drawn_from
        return {name: self._read.context(reader, track.segments_of(name)) for name in CONTEXTS}

    def send(self, content: str | Sequence[Any], output: str = "auto", **settings: Any) -> BagelReply:
        """Say something and get the whole answer. The arguments are those of [`stream`]."""
        *_, last = self._answered(content, output, streams=False, **settings)
        return last.reply

    def stream(self, content: str | Sequence[Any], output: str = "auto", **settings: Any) -> Iterator[SessionEvent]:
        """
        Say something, and get the answer as it comes.

        Args:
            content (`str` or `Sequence`): A text, or texts, images and parts of messages.
            output (`str`, *optional*, defaults to `"auto"`):
                `"text"` or `"image"` for one of them, `"interleaved"` for both in turn, as the protocol says; with `"auto"`
                the model also decides what it begins with.
            think (`bool`, *optional*): Whether a system segment asks for thoughts first.
            max_images (`int`, *optional*): After how many pictures an answer ends.
            max_new_tokens (`int`, *optional*): Of each text.
            do_sample, temperature: Of texts.
            logits_processor (`Sequence[Callable]`, *optional*):
                Changes the scores from which tokens are chosen, also those that decide what comes next.
            generator (`torch.Generator`, *optional*): Makes the answer deterministic.
            latents (`Sequence[torch.Tensor]`, *optional*): Packed float32 noise of each picture, in order.
            preview_every (`int`, *optional*): After how many steps a preview of a picture is given out.
            settings: Of drawing, see [`BagelPipeline.__call__`].

        Yields:
            [`SessionEvent`]: words as they come, previews, pictures, and at the end the [`BagelReply`].

        Raises:
            TypeError, ValueError: for arguments that cannot work, before anything is said.
        """
        return self._answered(content, output, streams=True, **settings)

    @torch.no_grad()
    def _answered(self, content: Any, output: str, streams: bool, **settings: Any) -> Iterator[SessionEvent]:
        if output not in OUTPUTS:
            raise ValueError(f"`output` must be one of {', '.join(OUTPUTS)}, got {shown(output)}.")
        message = {"role": "user", "content": _parts(content)}
        check_conversation([message], "content")
        answer = Answer(self, self._settings(settings, streams))
        self._began_at = time.monotonic()
        answer.hear(message, output)
        self._check_length(answer.said, 0 if output == "image" else answer.settings.max_new_tokens)
        self._turns.append((len(self.messages), self._said))
        self.messages.append(message)
        self._said = answer.said
        try:
            yield from answer.events(output)
        except Interrupted:
            pass
        finally:
            self.pipe.maybe_free_model_hooks()
        yield SessionEvent("done", reply=BagelReply(answer.content))

    def _settings(self, given: dict[str, Any], streams: bool) -> AnswerSettings:
        """Settings of an answer: the caller's, else the protocol's, else those of every session."""
        chosen = {"max_images": self.protocol.max_images} | dict(self.protocol.settings)
        chosen |= {name: value for name, value in given.items() if value is not None}
        drawing = {name: chosen.pop(name) for name in _DRAWING if name in chosen}
        if unknown := chosen.keys() - AnswerSettings.__dataclass_fields__.keys() | chosen.keys() & {
            "streams",
            "drawing",
        }:
            raise TypeError(f"{', '.join(sorted(unknown))}: no setting of a session. Known are those of `stream`.")
        for name in ("think", "do_sample"):
            check_flag(name, chosen.get(name, False))
        for name in ("max_new_tokens", "max_images", "preview_every"):
            if chosen.get(name) is not None:
                check_whole_number(name, chosen[name], 1)
        guidance = ("guidance_scale", "image_guidance_scale", "cfg_interval", "cfg_renorm_type", "cfg_renorm_min")
        defaults = {"guidance_scale": 4.0, "cfg_renorm_min": 0.0}
        check_guidance(*(drawing.get(name, defaults.get(name)) for name in guidance))
        self.pipe.check_inputs(
            "",
            None,
            None,
            *(drawing.get(name) for name in ("height", "width")),
            drawing.get("num_inference_steps", 49),
            drawing.get("sigmas"),
            attention_kwargs=drawing.get("attention_kwargs"),
            vae_sample_mode=drawing.get("vae_sample_mode", "sample"),
            temperature=chosen.get("temperature", 0.3),
        )
        if chosen.get("latents") is not None:
            chosen["latents"] = list(chosen["latents"])
        chosen["logits_processor"] = LogitsProcessorList(chosen.get("logits_processor") or [])
        return AnswerSettings(**chosen, streams=streams, drawing=drawing)

    def _check_length(self, said: Conversation, max_new_tokens: int) -> None:
        limit = self.pipe.transformer.config.text_config.max_position_embeddings
        used = sum(segment.num_positions for segment in said.drawn_from.full)
        if used + max_new_tokens + 1 > limit:
            raise ValueError(
                f"The conversation would take {used} rope positions and `max_new_tokens` {max_new_tokens}, but the model "
                f"knows {limit}. Ask for fewer tokens, or go `back()`."
            )

    def _remember(self, part: dict[str, Any], said: Conversation) -> None:
        """A whole part of an answer."""
        if self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": []})
        self.messages[-1]["content"].append(part)
        self._said = said

    def _reader(self, attention_kwargs: dict[str, Any] | None) -> ContextReader:
        pipe = self.pipe
        return ContextReader(pipe.transformer, pipe.processor, pipe._execution_device, attention_kwargs)


def _parts(content: Any) -> list[Any]:
    """The parts of a message, from texts, images and parts."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        content = [content]
    parts = []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        elif not isinstance(part, dict):
            part = {"type": "image", "image": part}
        parts.append(part)
    return parts

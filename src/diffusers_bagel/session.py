# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Conversations that go on: what was said is read once, and answered in texts and pictures."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessorList, StoppingCriteriaList

from transformers_bagel.errors import shown
from transformers_bagel.responses import message_of
from transformers_bagel.segments import check_conversation

from .answering import CONTEXTS, Answer, AnswerSettings, Interrupted, SessionEvent, Steps
from .contexts import BagelContext, ContextReader
from .conversation import Conversation
from .few_steps import FewSteps
from .inputs import check_flag, check_guidance, check_guidance_tolerance, check_whole_number, with_residual_dtype
from .presets import find_preset, merged
from .protocols import PROTOCOLS, InterleaveProtocol, protocol_of
from .read_contexts import ReadContexts
from .recalling import recall, turns_of
from .saved_sessions import read_description, restored, save_session, saved_protocol
from .stopping import StopAt
from .streamers import AnswerStreamer, ended, is_streamer
from .work import at_once


OUTPUTS = ("auto", "text", "image", "interleaved")
# Of the pipeline's `__call__`, for each picture.
_DRAWING = (
    *("height", "width", "num_inference_steps", "sigmas", "guidance_scale", "image_guidance_scale", "cfg_interval"),
    *("cfg_renorm_type", "cfg_renorm_min", "vae_sample_mode", "attention_kwargs", "timestep_shift", "size_like"),
    *("plan_in_no_image", "empty_no_text", "residual_dtype", "guidance_tolerance"),
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
        """All words but the thoughts."""
        return message_of([part for part in self.content if part["type"] == "text"])["content"]

    @property
    def thinking(self) -> str:
        """What stands between `<think>` and `</think>`."""
        return self.message.get("reasoning_content", "")

    @property
    def message(self) -> dict[str, Any]:
        """What [`BagelProcessor.parse_response`] makes of an answer, with the pictures in it."""
        return message_of(self.content)

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
            How the model answers in texts and pictures in turn, or its name in [`PROTOCOLS`]. By default that of the
            fine-tune which the pipeline's model is named after, with a warning that says so, else `"plain"`.

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
        if not isinstance(protocol, (str, InterleaveProtocol, type(None))):
            raise TypeError(f"`protocol` must be a name or an `InterleaveProtocol`, got {shown(protocol)}.")
        config = pipe.transformer.config
        if not config.visual_und:
            raise ValueError(
                "`pipe`: a session sees its own pictures, and the transformer was loaded without `visual_und=True`. Load it "
                "with that."
            )
        if config.visual_gen and pipe.vae is None:
            raise ValueError("`pipe`: a session draws, and the pipeline has no `vae`. Load it with one.")
        self.pipe = pipe
        if protocol is None:
            protocol = protocol_of(pipe) if config.visual_gen else "plain"
        self.protocol = PROTOCOLS[protocol] if isinstance(protocol, str) else protocol
        if self.protocol.name != "plain" and not config.visual_gen:
            raise ValueError(
                f"`protocol`: '{self.protocol.name}' draws, and the transformer was loaded without `visual_gen=True`."
            )
        self.messages: list[dict[str, Any]] = []
        self._said = Conversation()
        self._read = ReadContexts()
        self._device: torch.device | None = None
        self._turns: list[tuple[int, Conversation]] = []
        self._interrupted_at, self._began_at = -1.0, 0.0
        self._is_answering = False
        # What was said is in several places, which a thread that forks or saves must not see in between.
        self._changing = threading.Lock()

    def fork(self) -> BagelSession:
        """A session that goes on by itself from here. Nothing is copied until it does."""
        other = BagelSession(self.pipe, self.protocol)
        with self._changing:
            other.messages = [message | {"content": list(message["content"])} for message in self.messages]
            other._said, other._turns = self._said, list(self._turns)
            other._read, other._device = self._read.fork(), self._device
        return other

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """
        Save what was said, whole or not at all; while an answer is being made, what is whole of it.

        The folder gets the messages, protocol and turns as JSON, each picture as PNG as the model saw it (RGB, upright,
        transparency on white), and its latents, if it has some yet. A session that is there is replaced.

        Raises:
            OSError: if the folder is a file, or cannot be written to; it then holds what it held.
        """
        save_session(self.fork(), folder)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, pipe: Any, protocol: str | InterleaveProtocol | None = None
    ) -> BagelSession:
        """
        A session that was saved, which goes on as if it had not been. What was said is read again when it is needed.

        Args:
            folder (`str` or `os.PathLike`): See [`save_pretrained`].
            pipe ([`BagelPipeline`]): The pipeline, with the model that the session had.
            protocol (`str` or [`InterleaveProtocol`], *optional*):
                Another protocol from now on. One of your own with functions is in no file, and must be passed.

        Raises:
            OSError, ValueError: naming the file, if one is missing or broken, or does not fit the pipeline.
        """
        session = cls(pipe, saved_protocol(*read_description(folder)) if protocol is None else protocol)
        session.load_pretrained(folder)
        return session

    def load_pretrained(self, folder: str | os.PathLike) -> None:
        """
        Go on as a session that was saved, in the place of this one, with this one's protocol.

        Raises:
            OSError, ValueError: See [`from_pretrained`].
        """
        self._check_idle()
        saved = restored(*read_description(folder), self.pipe)
        with self._changing:
            self.messages, self._said, self._turns = saved
        self._read.forget_all_but(self._said.segment_lists())

    def back(self, turns: int = 1) -> None:
        """
        Forget the last turns, each something that the user said and its answer.

        Raises:
            ValueError: if there were not as many.
        """
        self._check_idle()
        if not self._turns:
            raise ValueError("`turns`: there is none to forget, since nothing was said yet.")
        check_whole_number("turns", turns, 1, len(self._turns))
        with self._changing:
            count, self._said = self._turns[-turns]
            del self.messages[count:], self._turns[-turns:]
        self._read.forget_all_but(self._said.segment_lists())

    def recall(self, messages: Sequence[dict[str, Any]], sanitize_control_tokens: bool = False) -> None:
        """
        Take over messages of a conversation that was led elsewhere, behind what was said here.

        The next answer is what it would be if they had been said and answered here. No model is asked before that.

        Args:
            messages (`Sequence[dict]`):
                Of users and of the assistant. What others than the assistant say before an answer is one turn. Thoughts are
                within the texts of an answer, between `<think>` and `</think>`.
            sanitize_control_tokens (`bool`, *optional*, defaults to `False`):
                Whether special tokens in what was said are words like others.

        Raises:
            TypeError, ValueError: if they are no messages, or if the protocol does not take them.
        """
        self._check_idle()
        recall(self, turns_of(messages), sanitize_control_tokens)

    def interrupt(self) -> None:
        """End the answer that is being made, from another thread or between two events: its last whole part stays."""
        self._interrupted_at = time.monotonic()

    def _is_interrupted(self) -> bool:
        return self._interrupted_at >= self._began_at

    @property
    @torch.no_grad()
    def contexts(self) -> dict[str, BagelContext]:
        """
        What the next picture would be drawn from: `full`, and what guidance compares it with.

        Of images that the VAE has yet to encode, its mode.
        """
        reader = self._reader(None)
        answer = Answer(self, self._settings({"vae_sample_mode": "argmax"}))
        for _ in at_once(answer.look()):
            pass
        track = answer.said.drawn_from
        # Of images that were encoded for an earlier look alone, nobody else will go on from there.
        self._read.forget_all_but(self._said.segment_lists())
        return {name: self._read.context(reader, track.segments_of(name)) for name in CONTEXTS}

    def send(self, content: str | Sequence[Any], output: str = "auto", **settings: Any) -> BagelReply:
        """Say something and get the whole answer. The arguments are those of [`stream`]."""
        *_, last = self._answered(content, output, settings, streams=False)
        return last.reply

    def stream(self, content: str | Sequence[Any], output: str = "auto", **settings: Any) -> Iterator[SessionEvent]:
        """
        Say something, and get the answer as it comes.

        Args:
            content (`str` or `Sequence`): A text, or texts, images and parts of messages.
            output (`str`, *optional*, defaults to `"auto"`):
                `"text"` or `"image"` for one of them, `"interleaved"` for both in turn, as the protocol says; with `"auto"`
                the model also decides what it begins with, or a preset does.
            think (`bool`, *optional*): Whether a system segment asks for thoughts first.
            max_images (`int`, *optional*): After how many pictures an answer ends.
            max_new_tokens (`int`, *optional*, defaults to 1024): Of each text.
            do_sample, temperature, temperature_only: Of texts, see [`BagelPipeline.__call__`].
            images_kwargs (`dict`, *optional*): Of the images of this turn, see [`BagelPipeline.__call__`].
            preset (`str` or [`Preset`], *optional*):
                Published settings, or their name in [`PRESETS`], for all that is not passed; they go before the protocol's.
            sanitize_control_tokens (`bool`, *optional*): Whether special tokens in what is said are words like others.
            logits_processor (`Sequence[Callable]`, *optional*):
                Changes the scores from which tokens are chosen, also those that decide what comes next.
            stopping_criteria (`Sequence[Callable]`, *optional*): Cut a text off, as `max_new_tokens` does.
            stop_strings (`str` or `list[str]`, *optional*): The same behind these words.
            streamer (`BaseStreamer`, *optional*):
                Gets the tokens of all texts behind one prompt, and ends when the answer does, however it ends.
            generator (`torch.Generator`, *optional*): Makes the answer deterministic.
            latents (`Sequence[torch.Tensor]`, *optional*): Packed float32 noise of each picture, in order.
            preview_every (`int`, *optional*): After how many steps a preview of a picture is given out.
            progress (`bool`, *optional*): Whether each step of a picture is told.
            settings: Of drawing, see [`BagelPipeline.__call__`].

        Yields:
            [`SessionEvent`]: words as they come, progress, previews, pictures, and at the end the [`BagelReply`].

        Raises:
            TypeError, ValueError: for arguments that cannot work, before anything is said.
        """
        return self._answered(content, output, settings, streams=True)

    @torch.no_grad()
    def _answered(self, content: Any, output: str, settings: dict[str, Any], streams: bool) -> Iterator[SessionEvent]:
        steps = self._steps(content, output, settings, streams=streams)
        try:
            yield from at_once(steps)
        finally:
            self.pipe.maybe_free_model_hooks()

    def _steps(self, content: Any, output: str, settings: dict[str, Any], **how: Any) -> Steps[None]:
        """
        What an answer does. No model is asked before it goes on, and nothing else may be said before it ends or is closed.

        Args:
            content, output, settings: As of `stream`.
            how: Of [`AnswerSettings`], what no caller of `stream` chooses.

        Raises:
            TypeError, ValueError: for arguments that cannot work.
        """
        steps = self._answering(content, output, settings, how)
        # Whatever becomes of it from now on, it leaves the session by itself.
        next(steps)
        return steps

    def _answering(self, content: Any, output: str, settings: dict[str, Any], how: dict[str, Any]) -> Steps[None]:
        with ended(settings.get("streamer")):
            with self._changing:
                self._check_idle()
                self._is_answering = True
            try:
                answer = self._heard(content, output, settings, how)
                yield SessionEvent("heard")
                yield from answer.look()
                self._begin_turn(answer.message, answer.said)
                yield from answer.steps()
            except Interrupted:
                pass
            finally:
                self._read.forget_all_but(self._said.segment_lists())
                self._is_answering = False
            yield SessionEvent("done", reply=BagelReply(answer.content))

    def _heard(self, content: Any, output: str, settings: dict[str, Any], how: dict[str, Any]) -> Answer:
        """An answer to something, which is not yet said."""
        self._began_at = time.monotonic()
        if output not in OUTPUTS:
            raise ValueError(f"`output` must be one of {', '.join(OUTPUTS)}, got {shown(output)}.")
        given = settings
        output, settings = self._with_defaults(output, given)
        if (few_steps := self._few_steps(output, given)) is not None:
            few_steps.warn_of(given, self.pipe.scheduler)
        if output != "text" and not self.pipe.transformer.config.visual_gen:
            raise ValueError('`output` must be "text": the transformer was loaded without `visual_gen=True`.')
        message = {"role": "user", "content": _parts(content)}
        check_conversation([message], "content")
        if not (message["content"] or self._turns):
            raise ValueError(
                "`content` is empty, and nothing was said before. Pass a text, an image, or a list of them."
            )
        answer = Answer(self, replace(self._settings(settings), **how))
        answer.hear(message, output)
        return answer

    def _with_defaults(self, output: str, given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """What an answer is made of, and its settings: the caller's, else a few-step adapter's, else the preset's."""
        given, settings = dict(given), {}
        if (name := given.pop("preset", None)) is not None:
            preset = find_preset(name)
            output = preset.output if output == "auto" else output
            settings = preset.of_session(self.pipe.transformer.config)
        if (few_steps := self._few_steps(output, given)) is not None:
            settings = few_steps.over(settings, given, self.pipe.scheduler)
        return output, merged(settings, given)

    def _few_steps(self, output: str, given: dict[str, Any]) -> FewSteps | None:
        return None if output == "text" else self.pipe.few_steps_of(given.get("attention_kwargs"))

    def _settings(self, given: dict[str, Any]) -> AnswerSettings:
        """Settings of an answer: the caller's, else the protocol's, else those of every session."""
        chosen = {"max_images": self.protocol.max_images} | dict(self.protocol.settings)
        chosen |= {name: value for name, value in given.items() if value is not None}
        drawing = {name: chosen.pop(name) for name in _DRAWING if name in chosen}
        stop_strings = chosen.pop("stop_strings", None)
        known = AnswerSettings.__dataclass_fields__.keys() - {"streams", "shows_bar", "device", "drawing"}
        if unknown := chosen.keys() - known:
            raise TypeError(
                f"{', '.join(sorted(unknown))}: no setting of a session. Known are those of `stream`; what else `generate` "
                "does is a `logits_processor` or one of `stopping_criteria`."
            )
        for name in ("think", "do_sample", "temperature_only", "sanitize_control_tokens", "progress"):
            check_flag(name, chosen.get(name, False))
        for name in ("plan_in_no_image", "empty_no_text"):
            check_flag(name, drawing.get(name, False))
        for name in ("max_new_tokens", "max_images", "preview_every"):
            if chosen.get(name) is not None:
                check_whole_number(name, chosen[name], 1)
        guidance = ("guidance_scale", "image_guidance_scale", "cfg_interval", "cfg_renorm_type", "cfg_renorm_min")
        defaults = {"guidance_scale": 4.0, "cfg_renorm_min": 0.0}
        check_guidance(*(drawing.get(name, defaults.get(name)) for name in guidance))
        check_guidance_tolerance(drawing.get("guidance_tolerance"), self.pipe._caching is not None)
        self.pipe.check_inputs(
            "",
            None,
            None,
            *(drawing.get(name) for name in ("height", "width")),
            drawing.get("num_inference_steps", 49),
            drawing.get("sigmas"),
            attention_kwargs=drawing.get("attention_kwargs"),
            vae_sample_mode=drawing.get("vae_sample_mode", "sample"),
            output_type="latent" if self.pipe.vae is None else "pil",
            temperature=chosen.get("temperature", 0.3),
            timestep_shift=drawing.get("timestep_shift"),
            images_kwargs=chosen.get("images_kwargs"),
            size_like=drawing.get("size_like", "last"),
        )
        if not isinstance(chosen.get("generator"), (torch.Generator, type(None))):
            raise TypeError(f"`generator` must be a `torch.Generator`, got {shown(chosen['generator'])}.")
        if told := with_residual_dtype(drawing.get("attention_kwargs"), drawing.pop("residual_dtype", None)):
            drawing["attention_kwargs"] = told
        if drawing.get("sigmas") is not None:
            drawing["sigmas"] = [float(sigma) for sigma in drawing["sigmas"]]
        if chosen.get("latents") is not None:
            if isinstance(chosen["latents"], torch.Tensor) and chosen["latents"].ndim == 2:
                chosen["latents"] = [chosen["latents"]]
            is_iterable = isinstance(chosen["latents"], (list, tuple, torch.Tensor))
            chosen["latents"] = list(chosen["latents"]) if is_iterable else [None]
            if not all(isinstance(noise, torch.Tensor) for noise in chosen["latents"]):
                raise TypeError(f"`latents` must hold a tensor for each picture, got {shown(given['latents'])}.")
        chosen["logits_processor"] = LogitsProcessorList(_functions("logits_processor", chosen))
        chosen["stopping_criteria"] = StoppingCriteriaList(_functions("stopping_criteria", chosen))
        if stop_strings is not None:
            chosen["stopping_criteria"].append(_stop_at(stop_strings, self.pipe.processor.tokenizer))
        if (streamer := chosen.get("streamer")) is not None:
            if not is_streamer(streamer):
                raise TypeError(
                    f"`streamer` must have methods `put` and `end`, as a `TextStreamer`, got {shown(streamer)}."
                )
            chosen["streamer"] = AnswerStreamer(streamer)
        return AnswerSettings(**chosen, drawing=drawing)

    def _check_idle(self) -> None:
        if self._is_answering:
            raise RuntimeError(
                "The session is answering. Take its answer to the end, or close the iterator, or go on with a `fork()`."
            )

    def _begin_turn(self, message: dict[str, Any], said: Conversation) -> None:
        """What the user said."""
        with self._changing:
            self._turns.append((len(self.messages), self._said))
            self.messages.append(message)
            self._said = said

    def _remember(self, part: dict[str, Any], said: Conversation) -> None:
        """A whole part of an answer."""
        with self._changing:
            if self.messages[-1]["role"] != "assistant":
                self.messages.append({"role": "assistant", "content": []})
            self.messages[-1]["content"].append(part)
            self._said = said

    def _reader(self, attention_kwargs: dict[str, Any] | None, device: torch.device | None = None) -> ContextReader:
        pipe = self.pipe
        if device is not None:
            self._device = device
        elif self._device is None or self._read.is_empty:
            # Contexts stay where they were read. To find the device, the pipeline goes through all modules.
            self._device = pipe._execution_device
        return ContextReader(pipe.transformer, pipe.processor, self._device, attention_kwargs)


def _functions(name: str, given: dict[str, Any]) -> list[Callable]:
    """A list of functions of ids and scores."""
    functions = given.get(name) or []
    if not isinstance(functions, (list, tuple)) or not all(map(callable, functions)):
        raise TypeError(f"`{name}` must be a list of functions of ids and scores, got {shown(functions)}.")
    return list(functions)


def _stop_at(strings: Any, tokenizer: Any) -> StopAt:
    """What cuts off a text behind one of these words."""
    strings = [strings] if isinstance(strings, str) else strings
    if not (
        isinstance(strings, (list, tuple)) and strings and all(isinstance(item, str) and item for item in strings)
    ):
        raise TypeError(f"`stop_strings` must be a text or a list of texts, got {shown(strings)}.")
    return StopAt(strings, tokenizer)


def _parts(content: Any) -> list[Any]:
    """The parts of a message, from texts, images and parts."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if content is None or isinstance(content, (bytes, int, float)):
        raise TypeError(f"`content` must be a text, an image, or a list of them, got {shown(content)}.")
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

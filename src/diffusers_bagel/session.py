# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Conversations that go on: what was said once is read once, and answered in texts and pictures."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessorList

from transformers_bagel.segments import END, START, VISION_START, EncodedSegment, Segment, check_conversation, image_of

from .contexts import BagelContext, ContextReader, ReadContexts, TextSettings, Written
from .denoising import Denoiser
from .guidance import EDITING, TEXT_TO_IMAGE, BagelGuidance
from .inputs import draw_seed
from .protocols import ENCODERS, PROTOCOLS, InterleaveProtocol, Track, Update


OUTPUTS = ("auto", "text", "image", "interleaved")
NAMES = ("full", "no_text", "no_image")


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
        return "".join(part["text"] for part in self.content if part["type"] == "text")

    @property
    def images(self) -> list[Image.Image]:
        return [part["image"] for part in self.content if part["type"] == "image"]


@dataclass(frozen=True)
class SessionEvent:
    """
    Something that happened while a session answered.

    Attributes:
        type (`str`): `"text"`, `"preview"`, `"image"` or `"done"`.
        text (`str`, *optional*): New words.
        image (`PIL.Image.Image`, *optional*): A picture, or what it will be like.
        step (`int`, *optional*): Of a preview.
        reply (`BagelReply`, *optional*): The whole answer, when it is done.
    """

    type: str
    text: str | None = None
    image: Image.Image | None = None
    step: int | None = None
    reply: BagelReply | None = None


@dataclass(frozen=True)
class Conversation:
    """
    All that was said, in the layout that texts are written from, and in that which pictures are drawn from.

    Attributes:
        writing, drawing (`Track`): With images that are seen only, and with those that are latents, too.
        pictures (`Track`): What was given, and all that was drawn, without what was written: of a closing picture.
        given, last (`tuple[int, int]`, *optional*): Rows and columns of the last image that was given, and of any.
    """

    writing: Track = Track()
    drawing: Track = Track()
    pictures: Track = Track()
    given: tuple[int, int] | None = None
    last: tuple[int, int] | None = None


class BagelSession:
    """
    A conversation with a pipeline, which remembers it.

    Args:
        pipe ([`BagelPipeline`]): The pipeline.
        protocol (`str` or [`InterleaveProtocol`], *optional*): How the model answers in texts and pictures in turn, or its
            name in [`PROTOCOLS`].

    Attributes:
        messages (`list[dict]`): What was said, as chat messages.
    """

    def __init__(self, pipe: Any, protocol: str | InterleaveProtocol | None = None):
        if isinstance(protocol, str):
            if protocol not in PROTOCOLS:
                raise ValueError(f"`protocol` {protocol!r} is unknown; known are {', '.join(PROTOCOLS)}.")
            protocol = PROTOCOLS[protocol]
        self.pipe = pipe
        self.protocol = protocol or PROTOCOLS["plain"]
        self.messages: list[dict[str, Any]] = []
        self._said = Conversation()
        self._read = ReadContexts()

    def fork(self) -> BagelSession:
        """A session that goes on by itself from here. Nothing is copied until it does."""
        other = BagelSession(self.pipe, self.protocol)
        other.messages = list(self.messages)
        other._said = self._said
        other._read = self._read.fork()
        return other

    @property
    def contexts(self) -> dict[str, BagelContext]:
        """What a picture would be drawn from: `full`, and what guidance compares it with."""
        reader = self._reader(None)
        return {name: self._read.context(reader, self._said.drawing.segments_of(name)) for name in NAMES}

    def send(self, content: str | Sequence[Any], output: str = "auto", **settings: Any) -> BagelReply:
        """The whole answer, see [`stream`]."""
        for event in self.stream(content, output, **settings):
            if event.reply is not None:
                return event.reply
        raise RuntimeError("The answer has no end.")

    @torch.no_grad()
    def stream(
        self,
        content: str | Sequence[Any],
        output: str = "auto",
        think: bool | None = None,
        max_images: int | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float = 0.3,
        logits_processor: Sequence[Callable] | None = None,
        generator: torch.Generator | None = None,
        latents: Sequence[torch.Tensor] | None = None,
        **settings: Any,
    ) -> Iterator[SessionEvent]:
        """
        Say something, and get the answer as it comes.
        """
        if output not in OUTPUTS:
            raise ValueError(f"`output` must be one of {', '.join(OUTPUTS)}, got {output!r}.")
        answer = _Answer(
            self,
            _settled(
                self.protocol,
                settings
                | {"think": think, "max_images": max_images, "max_new_tokens": max_new_tokens, "do_sample": do_sample},
            ),
            temperature,
            logits_processor,
            generator,
            latents,
        )
        answer.hear(content)
        yield from answer.events(output)

    def _reader(self, attention_kwargs: dict[str, Any] | None) -> ContextReader:
        pipe = self.pipe
        return ContextReader(pipe.transformer, pipe.processor, pipe._execution_device, attention_kwargs)


def _settled(protocol: InterleaveProtocol, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of an answer: the caller's, else the protocol's, else those of every session."""
    given = {name: value for name, value in settings.items() if value is not None}
    default = {"think": False, "max_images": protocol.max_images, "max_new_tokens": 1023, "do_sample": False}
    return default | dict(protocol.settings) | given


class _Answer:
    """One answer in the making."""

    def __init__(
        self,
        session: BagelSession,
        settings: dict[str, Any],
        temperature: float,
        logits_processor: Sequence[Callable] | None,
        generator: torch.Generator | None,
        latents: Sequence[torch.Tensor] | None,
    ):
        self.session = session
        self.pipe = session.pipe
        self.protocol = session.protocol
        self.said = session._said
        self.settings = settings
        self.temperature = temperature
        self.logits_processor = LogitsProcessorList(logits_processor or [])
        self.generator = generator
        self.latents = None if latents is None else list(latents)
        self.reader = session._reader(settings.get("attention_kwargs"))
        self.content: list[dict[str, Any]] = []

    def hear(self, content: str | Sequence[Any]) -> None:
        """What the user says, behind the protocol's own words."""
        message = {"role": "user", "content": _parts(content)}
        check_conversation([message], "content")
        protocol, think = self.protocol, self.settings["think"]
        if not self.said.drawing.full:
            opening = protocol.think_prompt if think and protocol.think_prompt else protocol.system_prompt
            if opening is not None:
                self._say(opening, Update("keep", "read"))
        for part in message["content"]:
            if part["type"] == "text":
                self._say(part["text"], protocol.given_text)
            else:
                self._show(image_of(part), protocol.given_image, ENCODERS, is_given=True)
        self.session.messages.append(message)
        self.session._said = self.said

    def events(self, output: str) -> Iterator[SessionEvent]:
        self.sees_latents = output != "text" and "vae" in self.protocol.text_sees
        if output == "text":
            yield from self._write()
        elif output == "image":
            yield from self._draw("")
        else:
            yield from self._in_turn()
        yield SessionEvent("done", reply=BagelReply(self.content))

    def _in_turn(self) -> Iterator[SessionEvent]:
        """Texts and pictures, until the protocol says that it is enough."""
        protocol = self.protocol
        for texts in itertools.count(1):
            text, next_token = yield from self._write()
            images = sum(part["type"] == "image" for part in self.content)
            if protocol.stops(text):
                if protocol.closing_picture:
                    yield from self._draw(text, closing=True)
                return
            draws = protocol.asks_for_picture(text)
            if protocol.trigger == "token":
                draws = next_token == self._id(VISION_START)
                if next_token == self.pipe.processor.tokenizer.pad_token_id:
                    return
            if texts == protocol.max_texts or texts + images == protocol.max_items:
                return
            if not draws:
                if protocol.goes_on or protocol.trigger == "token":
                    continue
                return
            yield from self._draw(text)
            if images + 1 == self.settings["max_images"] or texts + images + 1 == protocol.max_items:
                return

    def _id(self, token: str) -> int:
        return self.pipe.processor.tokenizer.convert_tokens_to_ids(token)

    def _say(self, text: str, update: Update, untagged: str | None = None, is_written: bool = False) -> None:
        """Add a text to what was said."""
        segments = tuple(self.reader.encode_text(text))
        without = None if untagged is None else self.reader.encode_text(untagged)
        names = ("writing", "drawing") if is_written else ("writing", "drawing", "pictures")
        grown = {name: getattr(self.said, name).grown(segments, update, without) for name in names}
        self.said = replace(self.said, **grown)

    def _show(self, image: Any, update: Update, encoders: tuple[str, ...], is_given: bool = False) -> None:
        """Add an image to what was said."""
        encoded = self._encoded(image, resizes=is_given or self.protocol.resizes_drawn)
        grid = encoded["vae"].grid
        drawn_from = tuple(encoded[name] for name in encoders)
        self.said = replace(
            self.said,
            writing=self.said.writing.grown((encoded["vit"],), update),
            drawing=self.said.drawing.grown(drawn_from, update),
            pictures=self.said.pictures.grown(drawn_from, update),
            last=grid,
            given=grid if is_given else self.said.given,
        )

    def _encoded(self, image: Any, resizes: bool) -> dict[str, EncodedSegment]:
        """An image for both encoders, the VAE's latents included."""
        encode = self.pipe.processor.encode_segments
        vae, vit = encode([Segment("vae_image", image), Segment("vit_image", image)])
        mode = self.settings.get("vae_sample_mode", "sample")
        vae = replace(vae, latents=self.pipe.encode_image(vae.pixels, self.generator, mode))
        if not resizes:
            own_size = {"shortest_edge": min(image.size), "longest_edge": max(image.size)}
            (vit,) = encode([Segment("vit_image", image)], vae_size=own_size)
        return {"vae": vae, "vit": vit}

    def _write(self) -> Iterator[SessionEvent]:
        """A text; returns it, and the token that the model predicts behind it."""
        protocol, read = self.protocol, self.session._read
        track = "drawing" if self.sees_latents else "writing"
        context = read.context(self.reader, getattr(self.said, track).full)
        settings = self._text_settings()
        written = self.reader.write_on(context, settings)
        text, is_cut = self._text_of(written)
        if protocol.clean is not None:
            text = protocol.clean(text)
        decides = protocol.trigger == "token"
        is_idle = not (decides or protocol.stops(text) or protocol.asks_for_picture(text))
        next_token = None
        if protocol.keeps_idle_texts or not is_idle:
            self._say(
                text,
                protocol.written,
                protocol.untagged(text) if protocol.written.no_text == "untagged" else None,
                is_written=True,
            )
            segment = getattr(self.said, track).full[-1]
            start = segment.token_ids[:1].tolist()
            if start + written.tokens == segment.token_ids.tolist():
                context, scores = self.reader.end(context, segment, written)
                read.keep(context)
            elif decides and not is_cut:
                context, scores = self.reader.read_to_the_end(context, [segment])
                read.keep(context)
            if decides and not is_cut:
                ids = torch.cat([item.token_ids for item in context.segments])[None].to(scores.device)
                next_token = settings.choose(ids, scores)
        given_out = protocol.clean_last(text) if protocol.clean_last and protocol.stops(text) else text
        self._finish({"type": "text", "text": given_out})
        yield SessionEvent("text", text=given_out)
        return text, next_token

    def _text_settings(self) -> TextSettings:
        settings = self.settings
        seed = draw_seed(self.generator) if settings["do_sample"] else None
        return TextSettings(
            settings["max_new_tokens"], settings["do_sample"], self.temperature, seed, self.logits_processor
        )

    def _text_of(self, written: Written) -> tuple[str, bool]:
        """What was written as a text, and whether it was cut off before its end."""
        tokenizer = self.pipe.processor.tokenizer
        is_cut = not written.tokens or written.tokens[-1] != self._id(END)
        tokens = written.tokens if is_cut else written.tokens[:-1]
        if is_cut:
            tokens = tokens[: len(tokens) - self.protocol.drops_cut_tokens]
        return tokenizer.decode(tokens).split(START)[0], is_cut

    def _draw(self, text: str, closing: bool = False) -> Iterator[SessionEvent]:
        """A picture, which is read back."""
        pipe, protocol, settings = self.pipe, self.protocol, self.settings
        track = self.said.pictures if closing else self.said.drawing
        guidance = self._guidance(track)
        contexts = self._contexts(track, guidance)
        grid = self._grid()
        call = pipe._new_call(guidance.text_scale, settings.get("attention_kwargs"))
        denoiser = Denoiser(
            pipe.transformer,
            [contexts],
            [grid],
            [guidance],
            pipe._taylorseer,
            pipe._split_group,
            call.attention_kwargs,
        )
        del contexts
        given = None if self.latents is None else self.latents.pop(0).unsqueeze(0)
        noise = pipe.prepare_latents([grid], [self.generator], given)
        loop = pipe._prepare_loop(
            call, denoiser, noise, settings.get("num_inference_steps", 49), settings.get("sigmas")
        )
        for _ in loop:
            pass
        values = pipe.decode_latents(loop.latents, grid, "np")
        finish = protocol.finish or (lambda values, text: pipe.image_processor.numpy_to_pil(values[None])[0])
        image = finish(values[0], text)
        self._show(image, protocol.drawn, protocol.drawn_as)
        if protocol.reflection is not None:
            self._reflect(protocol.reflection)
        self._finish({"type": "image", "image": image})
        yield SessionEvent("image", image=image)
        if protocol.reflection is not None:
            self._finish({"type": "text", "text": protocol.reflection})
            yield SessionEvent("text", text=protocol.reflection)

    def _guidance(self, track: Track) -> BagelGuidance:
        preset = EDITING if any(segment.grid for segment in track.full) else TEXT_TO_IMAGE
        names = {"text_scale": "guidance_scale", "image_scale": "image_guidance_scale", "interval": "cfg_interval"}
        names |= {"renorm_type": "cfg_renorm_type", "renorm_min": "cfg_renorm_min"}
        return preset.with_changes(**{name: self.settings.get(given) for name, given in names.items()})

    def _contexts(self, track: Track, guidance: BagelGuidance) -> dict[str, BagelContext]:
        """What a picture is drawn from, and what guidance compares; equal ones are the same object."""
        names = [
            name
            for name, is_needed in zip(
                NAMES,
                (True, guidance.text_scale > 1, guidance.text_scale > 1 and guidance.image_scale > 1),
                strict=True,
            )
            if is_needed
        ]
        made: dict[tuple[int, ...], BagelContext] = {}
        contexts = {}
        for name in names:
            segments = track.segments_of(name)
            key = tuple(map(id, segments))
            if key not in made:
                made[key] = self.session._read.context(self.reader, segments)
            contexts[name] = made[key]
        return contexts

    def _grid(self) -> tuple[int, int]:
        stride = self.pipe.vae_scale_factor
        height, width = self.protocol.default_size
        grid = (self.said.given if self.protocol.size == "given" else self.said.last) or (
            height // stride,
            width // stride,
        )
        rows, columns = (self.settings.get(name) for name in ("height", "width"))
        return rows // stride if rows else grid[0], columns // stride if columns else grid[1]

    def _reflect(self, text: str) -> None:
        """What is said behind a picture goes where the picture went."""
        self._say(text, Update("after", "read"))

    def _finish(self, part: dict[str, Any]) -> None:
        """A part of the answer is whole: the session remembers it, whatever comes."""
        self.content.append(part)
        messages = self.session.messages
        if messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": []})
        messages[-1]["content"].append(part)
        self.session._said = self.said


def _parts(content: str | Sequence[Any]) -> list[Any]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else part
        if isinstance(part, dict)
        else {"type": "image", "image": part}
        for part in content
    ]

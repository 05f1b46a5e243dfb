# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""An answer of a session in the making: texts and pictures in turn, each of which is read back."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import LogitsProcessorList, StoppingCriteriaList, TextIteratorStreamer

from transformers_bagel.segments import END, START, THINK_PROMPTS, VISION_START, EncodedSegment, Segment, content_parts

from .contexts import BagelContext, TextSettings, Written
from .conversation import Conversation, Track, Update
from .denoising import Denoiser
from .guidance import EDITING, TEXT_TO_IMAGE, BagelGuidance
from .protocols import ENCODERS, InterleaveProtocol
from .randomness import draw_seed, seeded


if TYPE_CHECKING:
    from .session import BagelSession


class Interrupted(Exception):
    """An answer that somebody ended."""


CONTEXTS = ("full", "no_text", "no_image")
_GUIDANCE = {
    "guidance_scale": "text_scale",
    "image_guidance_scale": "image_scale",
    "cfg_interval": "interval",
    "cfg_renorm_type": "renorm_type",
    "cfg_renorm_min": "renorm_min",
}
# Of a plan: a picture is compared with what stands before the last text of the user, and with all texts but the plan.
_PLAN = Update("keep", "read later")


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
    reply: Any = None


@dataclass
class AnswerSettings:
    """
    How a session answers, see [`BagelSession.stream`].

    Attributes:
        think, max_images, max_new_tokens, do_sample, temperature, logits_processor, generator, latents, preview_every:
            As there.
        streams (`bool`): Whether words are given out as they come.
        drawing (`dict`): Settings of the pipeline's `__call__`.
    """

    think: bool = False
    max_images: int | None = None
    max_new_tokens: int = 1023
    do_sample: bool = False
    temperature: float = 0.3
    logits_processor: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    generator: torch.Generator | None = None
    latents: list[torch.Tensor] | None = None
    preview_every: int | None = None
    streams: bool = False
    drawing: dict[str, Any] = field(default_factory=dict)


class Answer:
    """
    One answer.

    Args:
        session ([`BagelSession`]): Remembers each part when it is whole.
        settings ([`AnswerSettings`])
    """

    def __init__(self, session: BagelSession, settings: AnswerSettings):
        self.session = session
        self.pipe = session.pipe
        self.protocol: InterleaveProtocol = session.protocol
        self.settings = settings
        self.said: Conversation = session._said
        self.reader = session._reader(settings.drawing.get("attention_kwargs"))
        self.content: list[dict[str, Any]] = []
        self._is_left = False

    def hear(self, message: dict[str, Any], output: str) -> None:
        """What the user says, behind the words that the protocol, or thinking, puts before it."""
        protocol = self.protocol
        is_first = not self.said.drawn_from.full
        self.said = self.said.at_next_turn()
        opening = protocol.system_prompt if is_first else None
        if self.settings.think:
            own = None if protocol.think_prompt is None and protocol.system_prompt else THINK_PROMPTS
            opening = protocol.think_prompt or (
                opening if own is None else own["image" if output == "image" else "text"]
            )
        if opening is not None:
            self._say(opening, Update("keep", "read"))
        for part in content_parts(message):
            if part["type"] == "text":
                self._say(part["text"], protocol.given_text)
            else:
                self._show(part["image"], is_given=True)

    def events(self, output: str) -> Iterator[SessionEvent]:
        if output == "text":
            yield from self._write(self.said.seen)
        elif output == "image":
            if self.settings.think:
                yield from self._write(self.said.drawn_from, _PLAN)
            yield from self._draw("")
        else:
            yield from self._in_turn(output)

    def _in_turn(self, output: str) -> Iterator[SessionEvent]:
        """Texts and pictures, until the protocol says that it is enough."""
        protocol, images, texts = self.protocol, 0, 0
        draws = output == "auto" and protocol.begins_with == "token" and self._next_token() == self._id(VISION_START)
        text = ""
        while True:
            if draws:
                yield from self._draw(text)
                images += 1
                if images == self.settings.max_images or texts + images == protocol.max_items:
                    return
            track = self.said.drawn_from if "vae" in protocol.text_sees else self.said.seen
            text, next_token = yield from self._write(track, self.protocol.written)
            texts += 1
            if protocol.stops(text) and protocol.closing_picture:
                yield from self._draw(text, self.said.pictures)
            if protocol.stops(text) or texts == protocol.max_texts or texts + images == protocol.max_items:
                return
            draws = protocol.asks_for_picture(text)
            goes_on = protocol.goes_on
            if protocol.trigger == "token":
                draws = next_token == self._id(VISION_START)
                is_end = next_token == self.pipe.processor.tokenizer.pad_token_id
                goes_on = not is_end and (protocol.goes_on or next_token == self._id(START))
            if not (draws or goes_on):
                return

    def _say(self, text: str, update: Update, untagged: str | None = None, is_written: bool = False) -> EncodedSegment:
        """Add a text to what was said."""
        (segment,) = self.reader.encode_text(text)
        without = None if untagged is None else self.reader.encode_text(untagged)[0]
        self.said = self.said.with_text(segment, update, without, is_written)
        return segment

    def _show(self, image: Any, is_given: bool = False) -> None:
        """Add an image to what was said: one of the user's, or a picture that was drawn."""
        protocol, encode = self.protocol, self.pipe._encode_segments
        vae, vit = encode([Segment("vae_image", image), Segment("vit_image", image)])
        mode = self.settings.drawing.get("vae_sample_mode", "sample")
        vae = replace(vae, latents=self.pipe.encode_image(vae.pixels, self.settings.generator, mode))
        if not (is_given or protocol.resizes_drawn):
            own_size = {"shortest_edge": min(image.size), "longest_edge": max(image.size)}
            (vit,) = encode([Segment("vit_image", image)], vae_size=own_size)
        update, encoders = (protocol.given_image, ENCODERS) if is_given else (protocol.drawn, protocol.drawn_as)
        self.said = self.said.with_image(vae, vit, update, encoders, is_given)

    def _finish(self, **part: Any) -> None:
        """A part of the answer is whole: the session remembers it, whatever comes."""
        self.content.append(part)
        self.session._remember(part, self.said)

    def _check_interrupted(self) -> None:
        if self.session._is_interrupted():
            raise Interrupted

    def _id(self, token: str) -> int:
        return self.pipe.processor.tokenizer.convert_tokens_to_ids(token)

    def _write(
        self, track: Track, update: Update | None = None
    ) -> Generator[SessionEvent, None, tuple[str, int | None]]:
        """
        A text, and the token that the model predicts behind it, if it is one that decides what comes next.

        Args:
            track (`Track`): What it is written behind.
            update (`Update`, *optional*): What it does to the contexts of guidance, if it is a part of an answer of several.
        """
        protocol, read = self.protocol, self.session._read
        self.session._check_length(self.said, self.settings.max_new_tokens)
        context = read.context(self.reader, track.full)
        seed = draw_seed(self.settings.generator) if self.settings.do_sample else None
        written = yield from self._written(context, self._text_settings(seed))
        self._check_interrupted()
        text, is_cut = self._text_of(written)
        in_turn = update is protocol.written
        decides = in_turn and protocol.trigger == "token" and not is_cut
        is_idle = (
            in_turn and protocol.trigger != "token" and not (protocol.stops(text) or protocol.asks_for_picture(text))
        )
        next_token = None
        if protocol.keeps_idle_texts or not is_idle:
            is_untagged = protocol.written.no_text == "untagged"
            segment = self._say(
                text, update or protocol.written, protocol.untagged(text) if is_untagged else None, is_written=True
            )
            if [self._id(START), *written.tokens] == segment.token_ids.tolist():
                # The tokens are those that the text has: they need not be read again.
                context, scores = self.reader.end(context, segment, written)
                read.keep(context)
            elif decides:
                context, scores = self.reader.read_to_the_end(context, [segment])
                read.keep(context)
            if decides:
                next_token = self._chosen(context, scores)
        shown = protocol.clean_last(text) if protocol.clean_last and protocol.stops(text) else text
        self._finish(type="text", text=shown)
        if not self.settings.streams:
            yield SessionEvent("text", text=shown)
        return text, next_token

    def _written(self, context: BagelContext, settings: TextSettings) -> Generator[SessionEvent, None, Written]:
        """What is written behind a context, given out word by word if that is wanted."""
        if not self.settings.streams:
            return self.reader.write_on(context, settings)
        streamer = TextIteratorStreamer(self.pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        results: list[Written] = []
        errors: list[BaseException] = []

        def write() -> None:
            try:
                results.append(self.reader.write_on(context, replace(settings, streamer=streamer)))
            except BaseException as error:  # Raised below, in the thread of the caller.
                errors.append(error)
            finally:
                streamer.end()

        thread = threading.Thread(target=write)
        thread.start()
        try:
            for words in streamer:
                if words:
                    yield SessionEvent("text", text=words)
        finally:
            # Whoever stops listening ends the writing, too.
            self._is_left = thread.is_alive()
            thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def _text_settings(self, seed: int | None) -> TextSettings:
        own = self.settings
        stopping = StoppingCriteriaList(
            [lambda ids, scores: torch.full(ids.shape[:1], self._is_left or self.session._is_interrupted())]
        )
        return TextSettings(own.max_new_tokens, own.do_sample, own.temperature, seed, own.logits_processor, stopping)

    def _text_of(self, written: Written) -> tuple[str, bool]:
        """What was written as a text, and whether it was cut off before its end."""
        is_cut = not written.tokens or written.tokens[-1] != self._id(END)
        tokens = written.tokens if is_cut else written.tokens[:-1]
        if is_cut and self.protocol.drops_cut_tokens:
            tokens = tokens[: -self.protocol.drops_cut_tokens]
        text = self.pipe.processor.tokenizer.decode(tokens).split(START)[0]
        return (text if self.protocol.clean is None else self.protocol.clean(text)), is_cut

    def _next_token(self) -> int:
        """The token that the model predicts behind what was said."""
        *before, last = self.said.drawn_from.full
        context = self.session._read.context(self.reader, before)
        context, scores = self.reader.read_to_the_end(context, [last])
        self.session._read.keep(context)
        return self._chosen(context, scores)

    def _chosen(self, context: BagelContext, scores: torch.Tensor) -> int:
        seed = draw_seed(self.settings.generator) if self.settings.do_sample else None
        with seeded(seed, scores.device):
            return self._text_settings(None).choose(context.token_ids, scores)

    def _draw(self, text: str, track: Track | None = None) -> Iterator[SessionEvent]:
        """A picture that a text asked for, drawn from a track, which is read back."""
        pipe, protocol, settings = self.pipe, self.protocol, self.settings.drawing
        track = self.said.drawn_from if track is None else track
        guidance = self._guidance(track)
        grid = self._grid()
        noise = self._noise(grid)
        call = pipe._new_call(guidance.text_scale, settings.get("attention_kwargs"))
        denoiser = Denoiser(
            pipe.transformer,
            [self._contexts(track, guidance)],
            [grid],
            [guidance],
            pipe._taylorseer,
            pipe._split_group,
            call.attention_kwargs,
        )
        loop = pipe._prepare_loop(
            call, denoiser, noise, settings.get("num_inference_steps", 49), settings.get("sigmas")
        )
        stops = loop.is_interrupted
        loop.is_interrupted = lambda: stops() or self.session._is_interrupted()
        for step, _ in loop:
            every = self.settings.preview_every
            if every is not None and (step + 1) % every == 0 and step + 1 < len(loop):
                yield SessionEvent("preview", image=self._picture(loop.clean_latents, grid, text), step=step)
        self._check_interrupted()
        image = self._picture(loop.latents, grid, text)
        self._check_interrupted()
        self._show(image)
        if protocol.reflection is not None:
            self._say(protocol.reflection, Update("after", "read"))
        self._finish(type="image", image=image)
        yield SessionEvent("image", image=image)
        if protocol.reflection is not None:
            self._finish(type="text", text=protocol.reflection)
            yield SessionEvent("text", text=protocol.reflection)

    def _picture(self, latents: torch.Tensor, grid: tuple[int, int], text: str) -> Image.Image:
        values = self.pipe.decode_latents(latents, grid, "np")
        if self.protocol.finish is None:
            return self.pipe.image_processor.numpy_to_pil(values)[0]
        return self.protocol.finish(values[0], text)

    def _guidance(self, track: Track) -> BagelGuidance:
        preset = EDITING if any(segment.grid for segment in track.full) else TEXT_TO_IMAGE
        return preset.with_changes(**{ours: self.settings.drawing.get(name) for name, ours in _GUIDANCE.items()})

    def _contexts(self, track: Track, guidance: BagelGuidance) -> dict[str, BagelContext]:
        """What a picture is drawn from, and what guidance compares it with; equal ones are the same object."""
        needed = {"full": True, "no_text": guidance.text_scale > 1}
        needed["no_image"] = needed["no_text"] and guidance.image_scale > 1
        read: dict[tuple[int, ...], BagelContext] = {}
        contexts = {}
        for name in (name for name in CONTEXTS if needed[name]):
            segments = track.segments_of(name)
            key = tuple(map(id, segments))
            if key not in read:
                read[key] = self.session._read.context(self.reader, segments)
            contexts[name] = read[key]
        return contexts

    def _grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of a picture: as asked for, else as the protocol says."""
        stride = self.pipe.vae_scale_factor
        like = self.said.given if self.protocol.size == "given" else self.said.last
        height, width = self.protocol.default_size or (self.pipe.default_sample_size,) * 2
        rows, columns = like or (height // stride, width // stride)
        height, width = (self.settings.drawing.get(name) for name in ("height", "width"))
        return height // stride if height else rows, width // stride if width else columns

    def _noise(self, grid: tuple[int, int]) -> torch.Tensor:
        given = self.settings.latents
        if given is None:
            return self.pipe.prepare_latents([grid], [self.settings.generator])
        if not given:
            drawn = sum(part["type"] == "image" for part in self.content)
            raise ValueError(f"`latents` holds noise for {drawn} pictures, and one more is due. Pass noise for each.")
        noise = given.pop(0)
        if tuple(noise.shape) != (grid[0] * grid[1], self.pipe.latent_dim):
            raise ValueError(
                f"`latents` of a picture must be of shape {(grid[0] * grid[1], self.pipe.latent_dim)}, got {tuple(noise.shape)}."
            )
        return self.pipe.prepare_latents([grid], [None], noise[None])

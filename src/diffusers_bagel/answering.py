# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""An answer of a session in the making: texts and pictures in turn, each of which is read back."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from PIL import Image
from transformers import LogitsProcessorList, StoppingCriteriaList

from transformers_bagel.latents import VAE_SAMPLE_MODES
from transformers_bagel.segments import (
    END,
    END_OF_TEXT,
    START,
    THINK_PROMPTS,
    VISION_START,
    EncodedSegment,
    Segment,
    content_parts,
    read_image,
)

from .contexts import BagelContext, TextSettings, Written
from .conversation import Conversation, SaidImage, SaidText, Track, Update
from .denoising import Denoiser, DenoisingLoop
from .guidance import EDITING, TEXT_TO_IMAGE, BagelGuidance
from .inputs import check_latents
from .protocols import ENCODERS, InterleaveProtocol
from .randomness import draw_seed
from .streamers import AnswerStreamer, Streamers, Words
from .work import Decoding, Drawing, Encoding, Reading, Work, Writing
from .writing import Text


if TYPE_CHECKING:
    from .session import BagelSession


class Interrupted(Exception):
    """An answer that somebody ended."""


class ContextLengthError(ValueError):
    """A conversation that leaves no positions for its answer."""


Result = TypeVar("Result")
CONTEXTS = ("full", "no_text", "no_image")
_GUIDANCE = {
    "guidance_scale": "text_scale",
    "image_guidance_scale": "image_scale",
    "cfg_interval": "interval",
    "cfg_renorm_type": "renorm_type",
    "cfg_renorm_min": "renorm_min",
    "guidance_tolerance": "tolerance",
}
# Of a plan: a picture is compared with what stands before the last text of the user, and with all texts but the plan, or with it.
PLAN = Update("keep", "read later")
PLAN_IN_NO_IMAGE = Update("keep", "read")
REFLECTION = Update("after", "read")


@dataclass(frozen=True)
class SessionEvent:
    """
    Something that happened while a session answered.

    Attributes:
        type (`str`): `"text"`, `"progress"`, `"preview"`, `"image"` or `"done"`.
        text (`str`, *optional*): New words.
        image (`PIL.Image.Image`, *optional*): A picture, or what it will be like.
        step (`int`, *optional*): Of progress or a preview, which step of the picture is done, the first being 0.
        steps (`int`, *optional*): Of progress, how many the picture takes.
        reply (`BagelReply`, *optional*): The whole answer, when it is done.
        is_whole (`bool`): Whether a text ends here, maybe without another word, or a picture is no preview.
        is_cut (`bool`): Whether a text that ends was cut off before its end.
        tokens (`int`, *optional*): Of a text that ends, how many were written.
    """

    type: str
    text: str | None = None
    image: Image.Image | None = None
    step: int | None = None
    steps: int | None = None
    reply: Any = None
    is_whole: bool = False
    is_cut: bool = False
    tokens: int | None = None


# What an answer does: it gives out events, asks for work, of which it is sent the result, and returns something.
Steps: TypeAlias = Generator["SessionEvent | Work", Any, Result]


@dataclass
class AnswerSettings:
    """
    How a session answers, see [`BagelSession.stream`].

    Attributes:
        think, max_images, max_new_tokens, do_sample, temperature, temperature_only, sanitize_control_tokens: As there.
        logits_processor, stopping_criteria, generator, latents, preview_every, progress, images_kwargs: As there.
        streamer ([`AnswerStreamer`], *optional*): For the tokens of all texts.
        streams (`bool`): Whether words are given out as they come.
        shows_bar (`bool`): Whether the pipeline's progress bar is shown.
        device (`torch.device`, *optional*): Where the pipeline computes, if somebody has found that out.
        drawing (`dict`): Settings of the pipeline's `__call__`.
    """

    think: bool = False
    max_images: int | None = None
    max_new_tokens: int = 1024
    do_sample: bool = False
    temperature: float = 0.3
    temperature_only: bool = False
    sanitize_control_tokens: bool = False
    logits_processor: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    stopping_criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    streamer: AnswerStreamer | None = None
    generator: torch.Generator | None = None
    latents: list[torch.Tensor] | None = None
    preview_every: int | None = None
    progress: bool = False
    images_kwargs: dict[str, Any] = field(default_factory=dict)
    streams: bool = False
    shows_bar: bool = True
    device: torch.device | None = None
    drawing: dict[str, Any] = field(default_factory=dict)


def encode_image(
    pipe: Any, image: Any, is_resized: bool, images_kwargs: dict[str, Any]
) -> tuple[EncodedSegment, EncodedSegment]:
    """
    An image as the VAE gets it, its latents left out, and as the ViT sees it.

    Args:
        pipe ([`BagelPipeline`])
        image (`Any`): As a message holds it. What it is now is kept, whatever becomes of its file or array.
        is_resized (`bool`): Whether the ViT sees it as the VAE does, resized, if the settings do not say otherwise.
        images_kwargs (`dict`): Settings of the image processor other than its own.
    """
    image = read_image(image)
    vae, vit = pipe._encode_segments([Segment("vae_image", image), Segment("vit_image", image)], **images_kwargs)
    if not is_resized:
        own = images_kwargs | {"resize_before_vit": False}
        (vit,) = pipe._encode_segments([Segment("vit_image", image)], **own)
    return vae, vit


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
        self.reader = session._reader(settings.drawing.get("attention_kwargs"), settings.device)
        self.message: dict[str, Any] = {}
        self.output = "auto"
        self.content: list[dict[str, Any]] = []

    def hear(self, message: dict[str, Any], output: str) -> None:
        """
        What the user says, behind the words that the protocol, or thinking, puts before it. No model is asked.

        Raises:
            ValueError: if the protocol takes no image, or if the first part of the answer cannot be made.
        """
        self.output = output
        self.listen(message, output == "image")
        if output == "image":
            self._check_noise(self._grid())
        if output != "image" or self.settings.think:
            self._check_positions_of_text()
        else:
            self._check_positions_of_picture()

    def listen(self, message: dict[str, Any], draws: bool) -> None:
        """What the user says, whatever is made of it; `draws` says for what thinking is asked, if it is.

        Raises:
            ValueError: if the protocol takes no image.
        """
        protocol = self.protocol
        if not protocol.takes_images and any(part["type"] == "image" for part in content_parts(message)):
            raise ValueError(
                f"`content` holds an image, and the protocol '{protocol.name}' begins with a text alone. Leave it out, or "
                "choose another `protocol`."
            )
        self.message = message
        self.said = self.said.at_next_turn()
        opening = protocol.system_prompt
        if self.settings.think:
            own = None if protocol.think_prompt is None and protocol.system_prompt else THINK_PROMPTS
            opening = protocol.think_prompt or (opening if own is None else own["image" if draws else "text"])
        # Once said, it holds.
        said = [segment.segment.content for segment in self.said.drawn_from.full if segment.grid is None]
        if opening is not None and opening not in said:
            self._say(opening, Update("keep", "read"))
        for part in content_parts(message):
            if part["type"] == "text":
                self._say(part["text"], protocol.given_text, is_given=True)
            else:
                self.said = self.said.with_image(self._shown_as(part["image"], is_given=True))

    def look(self) -> Steps[None]:
        """What the VAE makes of images that it has yet to see: the user's, pictures that were drawn, those of recalled turns."""
        said = Conversation()
        for turn in self.said.turns:
            said = said.at_next_turn()
            for item in turn:
                if isinstance(item, SaidText):
                    said = said.with_text(item)
                else:
                    said = said.with_image(item if item.vae.latents is not None else (yield from self._encoded(item)))
        self.said = said

    def steps(self) -> Steps[None]:
        """What is done for a text, a picture, or both in turn."""
        if self.output == "text":
            yield from self._write(self.said.seen)
        elif self.output == "image":
            if self.settings.think:
                is_in_no_image = self.settings.drawing.get("plan_in_no_image", False)
                yield from self._write(self.said.drawn_from, PLAN_IN_NO_IMAGE if is_in_no_image else PLAN)
            yield from self._draw("")
        else:
            yield from self._in_turn()

    def _in_turn(self) -> Steps[None]:
        """Texts and pictures, until the protocol says that it is enough."""
        protocol, images, texts = self.protocol, 0, 0
        draws = self.output == "auto" and protocol.begins_with == "token"
        if draws:
            draws = (yield from self._next_token()) == self._id(VISION_START)
        text = ""
        while True:
            if draws:
                yield from self._draw(text)
                images += 1
                if images == self.settings.max_images or texts + images == protocol.max_items:
                    return
                text = ""
                yield from self.look()
                next_token = (yield from self._next_token()) if protocol.after_image == "token" else None
                if next_token == self._id(END_OF_TEXT):
                    return
                if next_token == self._id(VISION_START):
                    continue
            text, next_token = yield from self._write(self._shown, self.protocol.written)
            texts += 1
            if protocol.stops(text) and protocol.closing_picture:
                yield from self._draw(text, self.said.pictures)
            if protocol.stops(text) or texts == protocol.max_texts or texts + images == protocol.max_items:
                return
            draws = protocol.asks_for_picture(text)
            goes_on = protocol.goes_on
            if protocol.trigger == "token":
                draws = next_token == self._id(VISION_START)
                is_end = next_token == self._id(END_OF_TEXT)
                goes_on = not is_end and (protocol.goes_on or next_token == self._id(START))
            if not (draws or goes_on):
                return

    def _say(
        self,
        text: str,
        update: Update,
        untagged: str | None = None,
        is_written: bool = False,
        is_given: bool = False,
    ) -> EncodedSegment:
        """Add a text to what was said: one of the protocol's, one that was written, or one of the user's."""
        (segment,) = self.reader.encode_text(text, is_given and self.settings.sanitize_control_tokens)
        without = None if untagged is None else self.reader.encode_text(untagged)[0]
        self.said = self.said.with_text(SaidText(segment, update, without, is_written))
        return segment

    def _shown_as(self, image: Any, is_given: bool = False) -> SaidImage:
        """An image as a part of what was said, of the user's or a picture that was drawn; the VAE is yet to see it."""
        protocol = self.protocol
        is_resized = is_given or protocol.resizes_drawn
        images_kwargs = self.settings.images_kwargs
        vae, vit = encode_image(self.pipe, image, is_resized, images_kwargs)
        update, encoders = (protocol.given_image, ENCODERS) if is_given else (protocol.drawn, protocol.drawn_as)
        return SaidImage(vae, vit, update, encoders, is_given, is_resized, images_kwargs)

    def _encoded(self, image: SaidImage) -> Steps[SaidImage]:
        """The same with what the VAE makes of it."""
        # Without what draws, latents are never read.
        if self.pipe.vae is None:
            return image
        mode = image.vae_sample_mode or self._sample_mode
        latents = yield Encoding(self.pipe, image.vae.pixels, self.settings.generator, mode)
        return replace(image, vae=replace(image.vae, latents=latents))

    def _read_back(self, image: Image.Image) -> Steps[SaidImage]:
        """A picture that was drawn, as a part of what was said."""
        shown = self._shown_as(image)
        if VAE_SAMPLE_MODES[self._sample_mode] == "sample":
            # Drawn now: the generator's next numbers are those of what comes.
            return (yield from self._encoded(shown))
        # It may be the last that is said, which nobody reads.
        return replace(shown, vae_sample_mode=self._sample_mode)

    @property
    def _sample_mode(self) -> str:
        return self.settings.drawing.get("vae_sample_mode", "sample")

    def _finish(self, **part: Any) -> None:
        """A part of the answer is whole: the session remembers it, whatever comes."""
        self.content.append(part)
        self.session._remember(part, self.said)

    def _check_interrupted(self) -> None:
        if self.session._is_interrupted():
            raise Interrupted

    def _id(self, token: str) -> int:
        return self.pipe.processor.tokenizer.convert_tokens_to_ids(token)

    def _context(self, segments: Sequence[EncodedSegment], but_texts: bool = False) -> Steps[BagelContext]:
        """The context of some segments, of which the model reads what it has not yet, but for texts at the end if so wanted."""
        read = self.session._read
        context = read.nearest(segments)
        missing = segments[len(context.segments) :]
        last = [segment.grid is None for segment in missing]
        count = last[::-1].index(False) if False in last else len(missing)
        now, later = (missing[: len(missing) - count], missing[len(missing) - count :]) if but_texts else (missing, ())
        if now or (context.held < context.length and not but_texts):
            context, _ = yield Reading(self.reader, context, now)
            read.keep(context)
        return context.grown(later, context.own_cache)

    def _write(self, track: Track, update: Update | None = None) -> Steps[tuple[str, int | None]]:
        """
        A text, and the token that the model predicts behind it, if it is one that decides what comes next.

        Args:
            track (`Track`): What it is written behind.
            update (`Update`, *optional*): What it does to the contexts of guidance, if it is a part of an answer of several.
        """
        protocol, read = self.protocol, self.session._read
        self._check_positions_of_text()
        # The last texts are read in the same forward as the token that starts the answer.
        context = yield from self._context(track.full, but_texts=True)
        seed = draw_seed(self.settings.generator) if self.settings.do_sample else None
        opened, scores = yield Reading(self.reader, context, [self.reader.opening], begins_text=True)
        context = opened.first(len(context.segments))
        read.keep(context)
        written = yield from self._written(opened, scores, self._text_settings(seed))
        context = context.grown([], written.cache)
        read.keep(context)
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
            context = context.with_written(segment, written)
            read.keep(context)
            if decides:
                next_token = yield from self._predicted(context, [])
        shown = protocol.clean_last(text) if protocol.clean_last and protocol.stops(text) else text
        self._finish(type="text", text=shown)
        words = "" if self.settings.streams else shown
        yield SessionEvent("text", text=words, is_whole=True, is_cut=is_cut, tokens=len(written.tokens))
        return text, next_token

    def _written(self, context: BagelContext, scores: torch.Tensor, settings: TextSettings) -> Steps[Written]:
        """What is written behind a context, from the scores of the first token on, and given out word by word if so wanted."""
        words = Words(self.pipe.processor.tokenizer)
        if self.settings.streams:
            settings = replace(settings, streamer=Streamers(*filter(None, (words, settings.streamer))))
        text = Text(self.reader, context, settings)
        while True:
            text.take(scores)
            if new := words.taken():
                yield SessionEvent("text", text=new)
            self._check_interrupted()
            if text.has_ended:
                return text.written
            scores = yield Writing(text)

    def _text_settings(self, seed: int | None) -> TextSettings:
        own = self.settings
        names = (
            *("max_new_tokens", "do_sample", "temperature", "temperature_only"),
            *("logits_processor", "stopping_criteria", "streamer"),
        )
        return TextSettings(seed=seed, **{name: getattr(own, name) for name in names})

    def _text_of(self, written: Written) -> tuple[str, bool]:
        """What was written as a text, and whether it was cut off before its end."""
        is_cut = not written.tokens or written.tokens[-1] != self._id(END)
        tokens = written.tokens if is_cut else written.tokens[:-1]
        if is_cut and self.protocol.drops_cut_tokens:
            tokens = tokens[: -self.protocol.drops_cut_tokens]
        text = self.pipe.processor.tokenizer.decode(tokens).split(START)[0]
        return (text if self.protocol.clean is None else self.protocol.clean(text)), is_cut

    @property
    def _shown(self) -> Track:
        """What texts, and what comes next, are predicted from."""
        return self.said.drawn_from if "vae" in self.protocol.text_sees else self.said.seen

    def _next_token(self) -> Steps[int]:
        """The token that the model predicts behind what was said."""
        segments = self._shown.full
        context = self.session._read.nearest(segments[:-1])
        return (yield from self._predicted(context, segments[len(context.segments) :]))

    def _predicted(self, context: BagelContext, segments: Sequence[EncodedSegment]) -> Steps[int]:
        """The token that the model predicts behind a context and more segments, of which something is yet to be read."""
        context, scores = yield Reading(self.reader, context, segments)
        self.session._read.keep(context)
        seed = draw_seed(self.settings.generator) if self.settings.do_sample else None
        return self._text_settings(seed).choose(context.token_ids, scores)

    def _draw(self, text: str, track: Track | None = None) -> Steps[None]:
        """A picture that a text asked for, drawn from a track, which is read back."""
        protocol = self.protocol
        track = self.said.drawn_from if track is None else track
        self._check_positions_of_picture()
        guidance = self._guidance(track)
        contexts = yield from self._contexts(track, guidance)
        grid = self._grid()
        latents = yield from self._drawn(self._loop(contexts, guidance, grid), grid, text)
        image = yield from self._picture(latents, grid, text)
        self._check_interrupted()
        self.said = self.said.with_image((yield from self._read_back(image)))
        if protocol.reflection is not None:
            self._say(protocol.reflection, REFLECTION)
        self._finish(type="image", image=image)
        yield SessionEvent("image", image=image, is_whole=True)
        if protocol.reflection is not None:
            self._finish(type="text", text=protocol.reflection)
            yield SessionEvent("text", text=protocol.reflection, is_whole=True)

    def _loop(
        self, contexts: dict[str, BagelContext], guidance: BagelGuidance, grid: tuple[int, int]
    ) -> DenoisingLoop:
        """The steps of a picture."""
        pipe, drawing = self.pipe, self.settings.drawing
        call = pipe._new_call(guidance.text_scale, drawing.get("attention_kwargs"), drawing.get("timestep_shift"))
        denoiser = Denoiser(
            pipe.transformer,
            [contexts],
            [grid],
            [guidance],
            pipe._caching,
            pipe._split_group,
            drawing.get("attention_kwargs"),
        )
        return pipe._prepare_loop(
            call, denoiser, self._noise(grid), drawing.get("num_inference_steps", 49), drawing.get("sigmas")
        )

    def _drawn(self, loop: DenoisingLoop, grid: tuple[int, int], text: str) -> Steps[torch.Tensor]:
        """Latents of a picture; what it will be like, and how far it is, is given out as wanted."""
        every, count = self.settings.preview_every, len(loop)
        bar: Any = self.pipe.progress_bar(total=len(loop.levels)) if self.settings.shows_bar else nullcontext()
        with bar:
            for step in range(count):
                if loop.is_interrupted():
                    break
                loop.take(step, (yield Drawing(loop.ask(step))))
                loop.check(step)
                if self.settings.shows_bar and loop.is_whole_step(step):
                    bar.update()
                if self.settings.progress:
                    yield SessionEvent("progress", step=step, steps=count)
                if every is not None and (step + 1) % every == 0 and step + 1 < count:
                    image = yield from self._picture(loop.clean_latents, grid, text)
                    yield SessionEvent("preview", image=image, step=step)
                self._check_interrupted()
        loop.check()
        return loop.latents

    def _picture(self, latents: torch.Tensor, grid: tuple[int, int], text: str) -> Steps[Image.Image]:
        values = yield Decoding(self.pipe, latents, grid)
        if self.protocol.finish is None:
            return self.pipe.image_processor.numpy_to_pil(values)[0]
        return self.protocol.finish(values, text)

    def _guidance(self, track: Track) -> BagelGuidance:
        preset = EDITING if any(segment.grid for segment in track.full) else TEXT_TO_IMAGE
        return preset.with_changes(**{ours: self.settings.drawing.get(name) for name, ours in _GUIDANCE.items()})

    def _contexts(self, track: Track, guidance: BagelGuidance) -> Steps[dict[str, BagelContext]]:
        """What a picture is drawn from, and what guidance compares it with; equal ones are the same object."""
        needed = ["full"]
        if guidance.text_scale > 1:
            # The full context is read last, as the next turn goes on from it.
            needed = ["no_image", "full", "no_text"] if guidance.image_scale > 1 else ["full", "no_text"]
        read: dict[tuple[int, ...], BagelContext] = {}
        segments = {name: track.segments_of(name) for name in needed}
        if self.settings.drawing.get("empty_no_text") and "no_text" in segments:
            segments["no_text"] = ()
        keys = {name: tuple(map(id, own)) for name, own in segments.items()}
        for name, key in keys.items():
            if key not in read:
                read[key] = yield from self._context(segments[name])
        return {name: read[keys[name]] for name in CONTEXTS if name in keys}

    def _grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of a picture: as asked for, else as the protocol says."""
        stride = self.pipe.vae_scale_factor
        like = self.said.given if self.protocol.size == "given" else self.said.last
        if self.settings.drawing.get("size_like") == "first":
            images = [said for turn in self.said.turns for said in turn if isinstance(said, SaidImage)]
            like = images[0].vae.grid if images else None
        height, width = self.protocol.default_size or (self.pipe.default_sample_size,) * 2
        rows, columns = like or (height // stride, width // stride)
        height, width = (self.settings.drawing.get(name) for name in ("height", "width"))
        return height // stride if height else rows, width // stride if width else columns

    def _noise(self, grid: tuple[int, int]) -> torch.Tensor:
        self._check_noise(grid)
        given = self.settings.latents
        if given is None:
            return self.pipe.prepare_latents([grid], [self.settings.generator], device=self.reader.device)
        return self.pipe.prepare_latents([grid], [None], given.pop(0)[None], self.reader.device)

    def _check_noise(self, grid: tuple[int, int]) -> None:
        """Refuse to draw one more picture, if the caller passed other noise, or too little."""
        given = self.settings.latents
        if given:
            check_latents(given[0][None], [grid], self.pipe.latent_dim)
        elif given is not None:
            drawn = sum(part["type"] == "image" for part in self.content)
            raise ValueError(f"`latents` holds noise for {drawn} pictures, and one more is due. Pass noise for each.")

    def _check_positions_of_text(self) -> None:
        # Beside its tokens, those that begin and end it.
        tokens = self.settings.max_new_tokens
        self._check_positions(f"A text of `max_new_tokens` {tokens}", tokens + 2)

    def _check_positions_of_picture(self) -> None:
        self._check_positions("A picture", len(self.protocol.drawn_as))

    def _check_positions(self, part: str, needed: int) -> None:
        """Refuse to make a part of an answer that would lead behind the positions that the model knows."""
        limit = self.pipe.transformer.config.text_config.max_position_embeddings
        used = sum(segment.num_positions for segment in self.said.drawn_from.full)
        if used + needed > limit:
            raise ContextLengthError(
                f"{part} takes {needed} rope positions, but the model knows {limit}, of which the conversation takes {used}: "
                f"{max(limit - used, 0)} are left. Say less, ask for less, or go `back()`."
            )

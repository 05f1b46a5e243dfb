# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What happens when somebody uses the page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import gradio as gr

from diffusers_bagel import PRESETS

from . import views
from .choices import NO_PRESET, Choices, new_seed
from .talk import Talk, Turn


SEND = "Send"
PLACEHOLDER = "Say what to draw or to change, or ask"
PRESET_INFO = "Published settings, by what they were published for"
# A phone that sleeps has closed the page, and may wake up.
SECONDS_OF_ABSENCE = 3600
MOST_AWAKE = 16
Updates = dict[Any, Any]


@dataclass
class Parts:
    """What of the page is read, or changes."""

    said: gr.HTML
    answer: gr.HTML
    progress: gr.HTML
    composer: gr.MultimodalTextbox
    gallery: gr.Gallery
    edit: gr.Button
    new: gr.Button
    output: gr.Radio
    think: gr.Checkbox
    preset: gr.Dropdown
    seed: gr.Number
    is_new_seed: gr.Checkbox
    steps: gr.Slider
    guidance_scale: gr.Slider
    image_guidance_scale: gr.Slider
    size: gr.Dropdown
    max_new_tokens: gr.Slider
    temperature: gr.Slider

    def all(self) -> Any:
        """As a set, by which handlers get a dict."""
        return {getattr(self, field.name) for field in fields(self)}

    def choices(self, values: Updates) -> Choices:
        """What was chosen, with the seed that is due."""
        chosen = {field.name: values[getattr(self, field.name)] for field in fields(Choices)}
        return Choices(**chosen | {"seed": new_seed() if values[self.is_new_seed] else int(chosen["seed"])})


class Events:
    """
    What happens when somebody uses the page.

    Args:
        engine ([`Engine`]): Makes the answers.
        parts ([`Parts`]): Of the page.
        folder (`Path`): In which conversations keep their pictures.
    """

    def __init__(self, engine: Any, parts: Parts, folder: Path):
        self.engine, self.parts, self.folder = engine, parts, folder
        self._talks: dict[str, Talk] = {}
        self._spoke: list[Talk] = []

    def attach(self, page: gr.Blocks) -> None:
        """Let the parts of the page do what they are for."""
        parts, everything = self.parts, self.parts.all()
        settings: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        # Any number at a time: the engine is what counts them.
        answering = settings | {"concurrency_limit": None}
        parts.composer.submit(self.send, everything, everything, **answering)
        parts.composer.stop(self.stop, None, None, queue=False, **settings)
        for shown in (parts.said, parts.answer):
            shown.click(self.act, everything, everything, trigger_mode="multiple", **answering)
        parts.gallery.select(self.choose, None, parts.edit, queue=False, **settings)
        parts.edit.click(self.edit_chosen, everything, everything, queue=False, **settings)
        parts.preset.input(self.take_preset, parts.preset, everything, queue=False, **settings)
        parts.new.click(self.begin_anew, None, everything, queue=False, **settings)
        page.unload(self.leave)

    async def send(self, values: Updates, request: gr.Request) -> AsyncIterator[Updates]:
        """Answer what was typed and shown."""
        message = values[self.parts.composer] or {"text": "", "files": []}
        text, files = message["text"].strip(), message["files"]
        if text or files:
            turn = Turn(text, [*map(Path, files)], self.parts.choices(values))
            async for updates in self._answered(self._talk(request), turn):
                yield updates

    async def act(self, event: gr.EventData, values: Updates, request: gr.Request) -> AsyncIterator[Updates]:
        """What a button of the conversation is for."""
        parts, talk, value = self.parts, self._talk(request), str(event.value)
        if event.act == "edit":
            yield self._to_edit(talk, value, values)
        elif event.act == "seed":
            yield {parts.seed: int(value), parts.is_new_seed: False}
        elif event.act == "example":
            example = views.EXAMPLES[int(value)]
            values |= {parts.output: example.output, parts.think: example.think}
            yield {parts.output: example.output, parts.think: example.think}
            async for updates in self._answered(talk, Turn(example.text, list(example.shown), parts.choices(values))):
                yield updates
        elif event.act == "again":
            self._check_idle(talk)
            said = await talk.again(self.engine.pipe)
            async for updates in self._answered(talk, Turn(said.text, said.shown, parts.choices(values))):
                yield updates

    def stop(self, request: gr.Request) -> None:
        """End the answer."""
        self._talk(request).stop()

    def choose(self, event: gr.SelectData, request: gr.Request) -> Any:
        """A picture of the gallery."""
        self._talk(request).chosen = event.index
        return gr.Button(visible=True)

    def edit_chosen(self, values: Updates, request: gr.Request) -> Updates:
        """Change the picture that was chosen in the gallery."""
        talk = self._talk(request)
        return self._to_edit(talk, talk.pictures[talk.chosen].file.name, values)

    def take_preset(self, name: str) -> Updates:
        """Show the settings of a preset."""
        chosen = Choices.of_preset(name, self.engine.pipe.few_steps)
        shown = {field.name for field in fields(Choices)} - {"seed", "size", "preset"}
        info = PRESET_INFO if name == NO_PRESET else PRESETS[name].description
        return {getattr(self.parts, field): getattr(chosen, field) for field in shown} | {
            self.parts.preset: gr.Dropdown(info=info)
        }

    async def begin_anew(self, request: gr.Request) -> Updates:
        """Forget what was said."""
        talk = self._talk(request)
        self._check_idle(talk)
        await talk.clear()
        return {self.parts.said: views.conversation([])}

    async def leave(self, request: gr.Request) -> None:
        """A browser is gone, maybe for a while."""
        talk = self._talk(request)
        await talk.leave()
        asyncio.get_running_loop().call_later(SECONDS_OF_ABSENCE, self._forget, str(request.session_hash))

    def _forget(self, name: str) -> None:
        if name in self._talks and self._talks[name].is_left:
            self._talks.pop(name).close()

    def _talk(self, request: gr.Request) -> Talk:
        return self._talks.setdefault(str(request.session_hash), Talk(self.folder))

    def _check_idle(self, talk: Talk) -> None:
        if talk.is_answering:
            raise gr.Error("Stop the answer first.", print_exception=False)

    async def _let_rest(self, talk: Talk) -> None:
        """Only those that spoke last stay in the memory: keys and values of a long conversation take gigabytes."""
        self._spoke = [*(each for each in self._spoke if each is not talk), talk]
        if len(self._spoke) > MOST_AWAKE:
            await self._spoke.pop(0).rest()

    def _to_edit(self, talk: Talk, name: str, values: Updates) -> Updates:
        """The message with a picture in it, and a picture as its answer."""
        message = values[self.parts.composer] or {"text": "", "files": []}
        files = [str(picture.file) for picture in talk.pictures if picture.file.name == name]
        composer = {"text": message["text"], "files": files}
        return {
            self.parts.composer: gr.MultimodalTextbox(composer, placeholder="Say what is to change", autofocus=True),
            self.parts.output: "Picture",
        }

    async def _answered(self, talk: Talk, turn: Turn) -> AsyncIterator[Updates]:
        """The page while a turn is answered, and behind it."""
        parts = self.parts
        self._check_idle(talk)
        yield {
            parts.said: views.conversation([*talk.turns, turn], is_answering=True),
            parts.progress: views.progress(turn, 0),
            parts.composer: gr.MultimodalTextbox(None, submit_btn=False, stop_btn="Stop", placeholder=PLACEHOLDER),
            parts.seed: turn.choices.seed,
        }
        async for _ in talk.say(self.engine, turn):
            yield {parts.answer: views.answer(turn), parts.progress: views.progress(turn, time.monotonic())}
        unsaid: dict[str, Any] = {}
        if not turn.is_remembered:
            # What was not taken can be said once more.
            unsaid["value"] = {"text": turn.text, "files": [*map(str, turn.shown)]}
        yield {
            parts.said: views.conversation(talk.turns),
            parts.answer: "",
            parts.progress: "",
            parts.composer: gr.MultimodalTextbox(submit_btn=SEND, stop_btn=False, **unsaid),
            parts.gallery: [(str(picture.file), picture.prompt) for picture in talk.pictures],
        }
        await self._let_rest(talk)

# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Clients of a server of bagel-shapes, who know what is right: each draws, edits, asks and talks in an order of its own."""

from __future__ import annotations

import asyncio
import base64
import io
import random
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from PIL import Image


sys.path.append(str(Path(__file__).parents[1] / "examples" / "shapes"))

import language  # noqa: E402
from judge import PROMPTS, is_edited, seen, unseen_scene  # noqa: E402
from reader import read  # noqa: E402
from world import Scene, render  # noqa: E402

from diffusers_bagel import BagelPipeline, BagelSession  # noqa: E402


# As bagel-shapes is evaluated.
DRAWING = {"num_inference_steps": 25, "guidance_scale": 3.0}
EDITING = DRAWING | {"image_guidance_scale": 1.5}
WRITING = {"output": "text", "max_tokens": 64}
# A text of some length, from words alone.
PLAN = WRITING | {"think": True}
# Longest time in which a server that is full must find a place for somebody.
PATIENCE = 120.0


@dataclass(frozen=True)
class Asked:
    """
    What a server was asked for and has answered.

    Attributes:
        kind (`str`): `"drawing"`, `"edit"`, `"question"`, or a turn of a conversation.
        earlier (`list[dict]`): Messages before it, as a session takes them.
        content (`list`): What was said: texts and images.
        output (`str`), settings (`dict`), seed (`int`): Of the answer.
        answer (`Image` or `str`)
        is_right (`bool`): Whether it is what was asked for.
    """

    kind: str
    earlier: list[dict[str, Any]]
    content: list[Any]
    output: str
    settings: dict[str, Any]
    seed: int
    answer: Image.Image | str
    is_right: bool


def is_answered_by_itself(pipe: BagelPipeline, asked: Asked) -> bool:
    """Whether the pipeline gives the same to the same, alone and without a server: the same scene, or the same words."""
    generator = torch.Generator().manual_seed(asked.seed)
    *pictures, words = asked.content
    if asked.output == "image" and not asked.earlier:
        images = {"image": pictures} if pictures else {}
        drawn = pipe(words, generator=generator, vae_sample_mode="argmax", **images, **asked.settings).images[0]
        return same(drawn, asked.answer)
    session = BagelSession(pipe)
    if asked.earlier:
        session.recall(asked.earlier)
    settings = {name: value for name, value in asked.settings.items() if name not in WRITING}
    reply = session.send(
        asked.content,
        asked.output,
        generator=generator,
        max_new_tokens=WRITING["max_tokens"],
        vae_sample_mode="argmax",
        **settings,
    )
    return same(reply.images[0] if asked.output == "image" else reply.text, asked.answer)


def same(ours: Image.Image | str, theirs: Image.Image | str) -> bool:
    if isinstance(ours, str) or isinstance(theirs, str):
        return ours == theirs
    return seen(read(ours)) == seen(read(theirs))


def drawing_of(prompt: str, seed: int) -> dict[str, Any]:
    return DRAWING | {"prompt": prompt, "seed": seed}


def image_of(content: str) -> Image.Image:
    """What stands in an answer as base64, or as a data URL."""
    return Image.open(io.BytesIO(base64.b64decode(content.rpartition(",")[2]))).convert("RGB")


def png_of(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def sent(*parts: str | Image.Image) -> dict[str, Any]:
    """A message of a user, as a request holds it."""
    content: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            url = "data:image/png;base64," + base64.b64encode(png_of(part)).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": "user", "content": content}


def said(role: str, *parts: str | Image.Image) -> dict[str, Any]:
    """A message as a session takes it."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return {"role": role, "content": content}


class Talker:
    """
    A client that asks for one thing after the other.

    Args:
        http (`httpx.AsyncClient`)
        index (`int`): Of the client, from which all that it says follows.
        deadline (`float`): `time.monotonic()` behind which it begins nothing new.
        done (`list[Asked]`): Gets what was answered.
        lost (`list[str]`): Gets what was not, and why.

    Attributes:
        waits (`int`): How often a full server told it to come again.
    """

    def __init__(self, http: httpx.AsyncClient, index: int, deadline: float, done: list[Asked], lost: list[str]):
        self.http, self.deadline, self.done, self.lost = http, deadline, done, lost
        self.generator = random.Random(f"client {index}")
        self.waits = 0

    async def talk(self) -> None:
        """Until the time is over."""
        kinds: list[Callable[[], Awaitable[None]]] = [self.draw, self.edit, self.ask, self.ask_in_words, self.converse]
        while time.monotonic() < self.deadline:
            kind = self.generator.choice(kinds)
            try:
                await kind()
            except (httpx.HTTPError, KeyError, ValueError, OSError) as error:
                self.lost.append(f"{kind.__name__}: {type(error).__name__}: {str(error)[:300]}")

    async def post(self, path: str, **content: Any) -> dict[str, Any]:
        """Ask, and again when a full server says so."""
        patience = time.monotonic() + PATIENCE
        while True:
            answer = await self.http.post(path, **content)
            if answer.status_code != 429 or time.monotonic() > patience:
                break
            self.waits += 1
            await asyncio.sleep(float(answer.headers["retry-after"]))
        if answer.status_code != 200:
            raise ValueError(f"{answer.status_code}: {answer.text[:200]}")
        return answer.json()

    def scene(self) -> tuple[Scene, language.Prompt]:
        scene = unseen_scene(self.generator)
        prompt = PROMPTS["draw_full"](self.generator, scene)
        assert prompt is not None
        return scene, prompt

    def seed(self) -> int:
        return self.generator.randrange(2**31)

    async def draw(self) -> None:
        _, prompt = self.scene()
        seed = self.seed()
        made = await self.post("images/generations", json=drawing_of(prompt.text, seed))
        picture = image_of(made["data"][0]["b64_json"])
        is_right = language.grants(read(picture), prompt.wish)
        self.done.append(Asked("drawing", [], [prompt.text], "image", DRAWING, seed, picture, is_right))

    async def edit(self) -> None:
        scene, _ = self.scene()
        words, target = self.change(scene)
        seed, shown = self.seed(), render(scene)
        fields = {name: str(value) for name, value in (EDITING | {"prompt": words, "seed": seed}).items()}
        files = {"image": ("picture.png", png_of(shown), "image/png")}
        made = await self.post("images/edits", data=fields, files=files)
        picture = image_of(made["data"][0]["b64_json"])
        self.done.append(
            Asked("edit", [], [shown, words], "image", EDITING, seed, picture, is_edited(picture, target))
        )

    async def ask(self) -> None:
        scene, _ = self.scene()
        words, right = self.question(scene)
        shown = render(scene)
        answer = await self.chat([sent(shown, words)], WRITING)
        self.done.append(
            Asked("question", [], [shown, words], "text", {}, 0, answer["content"], answer["content"] == right)
        )

    async def ask_in_words(self) -> None:
        words, right = language.words_question(self.generator, self.scene()[0])
        answer = await self.chat([sent(words)], WRITING)
        self.done.append(
            Asked("question in words", [], [words], "text", {}, 0, answer["content"], answer["content"] == right)
        )

    async def converse(self) -> None:
        """A drawing, a change of it, and a question about what it is then, each sent with all that was said before."""
        scene, prompt = self.scene()
        messages, earlier = [sent(prompt.text)], [said("user", prompt.text)]
        changed, target = self.change(scene)
        question, right = self.question(target)
        for words, settings in ((prompt.text, DRAWING), (changed, EDITING)):
            if words is changed:
                messages.append(sent(changed))
            seed = self.seed()
            answer = await self.chat(messages, settings | {"output": "image", "seed": seed})
            picture = image_of(answer["images"][0]["image_url"]["url"])
            is_right = is_edited(picture, target) if words is changed else language.grants(read(picture), prompt.wish)
            before = [] if words is not changed else earlier[:-1]
            self.done.append(Asked("turn that draws", before, [words], "image", settings, seed, picture, is_right))
            messages.append(answer)
            earlier = [*before, said("user", words), said("assistant", picture), said("user", changed)]
        answer = await self.chat([*messages, sent(question)], WRITING)
        is_right = answer["content"] == right
        self.done.append(Asked("turn in words", earlier[:-1], [question], "text", {}, 0, answer["content"], is_right))

    async def chat(self, messages: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
        return (await self.post("chat/completions", json=settings | {"messages": messages}))["choices"][0]["message"]

    def change(self, scene: Scene) -> tuple[str, Scene]:
        while (edited := language.edit(self.generator, scene, self.generator.choice(language.EDITS))) is None:
            pass
        return edited

    def question(self, scene: Scene) -> tuple[str, str]:
        while (asked := language.question(self.generator, scene, self.generator.choice(language.QUESTIONS))) is None:
            pass
        return asked

# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Test cases of every task, and what is right."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import language
import PIL.Image
from language import Prompt, Wish
from reader import read
from world import OBJECT_COUNTS, Scene, random_scene


@dataclass(frozen=True)
class DrawCase:
    """A prompt, and what the picture must show."""

    prompt: str
    wish: Wish
    scene: Scene


@dataclass(frozen=True)
class EditCase:
    """A picture, an instruction, and the picture it makes."""

    kind: str
    scene: Scene
    instruction: str
    target: Scene


@dataclass(frozen=True)
class AskCase:
    """A picture, a question, and its answer."""

    kind: str
    scene: Scene
    question: str
    answer: str


@dataclass(frozen=True)
class DecideCase:
    """A request, an image that comes with it, and of what kinds the parts of its answer are."""

    request: str
    scene: Scene | None
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class StepsCase:
    """A request, and what each of the pictures must show."""

    request: str
    wishes: tuple[Wish, ...]


PROMPTS: dict[str, Callable[[random.Random, Scene], Prompt | None]] = {
    "draw_full": language.full_prompt,
    "draw": language.ordinary_prompt,
    "relation": language.relation_prompt,
    "riddle": language.riddle_prompt,
}


def unseen_scene(generator: random.Random, num_things: int | None = None) -> Scene:
    """A held-out scene; one, two and three objects are as frequent as the world has them."""
    count = num_things or generator.choices(list(OBJECT_COUNTS), list(OBJECT_COUNTS.values()))[0]
    return random_scene(generator, held_out=True, num_things=count)


def draw_cases(task: str, count: int, seed: int = 0, num_things: int | None = None) -> list[DrawCase]:
    """Prompts for held-out scenes."""
    generator = random.Random(f"{task} {seed}")
    cases: list[DrawCase] = []
    while len(cases) < count:
        scene = unseen_scene(generator, num_things)
        made = PROMPTS[task](generator, scene)
        if made is not None:
            cases.append(DrawCase(made.text, made.wish, scene))
    return cases


def edit_cases(count: int, seed: int = 0) -> list[EditCase]:
    """Edits of held-out scenes, of all kinds alike."""
    generator = random.Random(f"edit {seed}")
    cases: list[EditCase] = []
    while len(cases) < count:
        kind = language.EDITS[len(cases) % len(language.EDITS)]
        scene = unseen_scene(generator)
        edited = language.edit(generator, scene, kind)
        if edited is not None:
            cases.append(EditCase(kind, scene, *edited))
    return cases


def ask_cases(count: int, seed: int = 0) -> list[AskCase]:
    """Questions about held-out scenes, of all kinds alike."""
    generator = random.Random(f"ask {seed}")
    cases: list[AskCase] = []
    while len(cases) < count:
        kind = language.QUESTIONS[len(cases) % len(language.QUESTIONS)]
        scene = unseen_scene(generator)
        asked = language.question(generator, scene, kind)
        if asked is not None:
            cases.append(AskCase(kind, scene, *asked))
    return cases


def riddle_cases(count: int, seed: int = 0) -> list[AskCase]:
    """Questions about held-out scenes that paraphrase a colour."""
    generator = random.Random(f"riddle {seed}")
    scenes = [unseen_scene(generator) for _ in range(count)]
    return [AskCase("riddle", scene, *language.riddle_question(generator, scene)) for scene in scenes]


def decide_cases(count: int, seed: int = 0) -> list[DecideCase]:
    """Requests of all kinds alike: to draw, to draw and tell, to show the steps, to edit, to answer about a picture or words."""
    generator = random.Random(f"decide {seed}")
    cases: list[DecideCase] = []
    while len(cases) < count:
        kind = ("draw", "tell", "steps", "edit", "ask", "words")[len(cases) % 6]
        scene = unseen_scene(generator)
        prompt = (
            language.full_prompt(generator, scene)
            if generator.random() < 0.5
            else language.ordinary_prompt(generator, scene)
        )
        asked = language.question(generator, scene, generator.choice(language.QUESTIONS))
        edited = language.edit(generator, scene, generator.choice(language.EDITS))
        if asked is None or edited is None or (kind == "steps" and len(scene.things) == 1):
            continue
        request, shown, kinds = {
            "draw": (prompt.text, None, ("image",)),
            "tell": (generator.choice(language.TELL).format(prompt.text, asked[0]), None, ("image", "text")),
            "steps": (
                generator.choice(language.STEPS).format(prompt.text),
                None,
                ("text", "image") * len(scene.things),
            ),
            "edit": (edited[0], scene, ("image",)),
            "ask": (asked[0], scene, ("text",)),
            "words": (language.words_question(generator, scene)[0], None, ("text",)),
        }[kind]
        cases.append(DecideCase(request, shown, kinds))
    return cases


def steps_cases(count: int, seed: int = 0) -> list[StepsCase]:
    """Held-out scenes of two or three objects, step by step; every other prompt leaves places open."""
    generator = random.Random(f"steps {seed}")
    cases = []
    for index in range(count):
        scene = unseen_scene(generator, generator.choice((2, 2, 3)))
        prompt = (language.full_prompt, language.ordinary_prompt)[index % 2](generator, scene)
        wishes = tuple(
            replace(prompt.wish, things=prompt.wish.things[:end]) for end in range(1, len(scene.things) + 1)
        )
        cases.append(StepsCase(generator.choice(language.STEPS).format(prompt.text), wishes))
    return cases


def are_steps(pictures: Sequence[PIL.Image.Image], case: StepsCase) -> bool:
    """Whether each picture shows what it must, and everything that the one before it showed."""
    scenes = [read(picture) for picture in pictures]
    grow = all(set(seen(before)[1]) < set(seen(after)[1]) for before, after in pairwise(scenes))
    return len(scenes) == len(case.wishes) and grow and all(map(language.grants, scenes, case.wishes))


def is_drawn(picture: PIL.Image.Image, case: DrawCase) -> bool:
    """Whether a picture shows what the prompt asks for, and no other object."""
    return language.grants(read(picture), case.wish)


def is_edited(picture: PIL.Image.Image, target: Scene) -> bool:
    """Whether the change is made, and every other object is where and what it was."""
    return seen(read(picture)) == seen(target)


def seen(scene: Scene) -> tuple:
    """What the judge compares: the background, and of each object its cell, colour, shape and size."""
    return scene.background, tuple((thing.cell, *thing.pair, thing.size) for thing in scene.things)


def described_share(text: str, scene: Scene) -> float:
    """Share of a picture's objects that a description has right; of the described ones, if these are more."""
    described = language.parse_layout(text)
    if described is None:
        return 0.0
    right = set(seen(scene)[1]) & set(seen(described)[1])
    return len(right) / max(len(scene.things), len(described.things))

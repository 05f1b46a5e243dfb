# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Conversations about the world: what the model is trained on."""

from __future__ import annotations

import random
from typing import Any

import language
from world import Scene, is_held_out, random_scene, render

from transformers_bagel.segments import GENERATION_THINK_PROMPT, UNDERSTANDING_THINK_PROMPT


# Questions about one picture, in one conversation.
QUESTIONS_PER_PICTURE = 10
# What is hardest to learn comes twice.
ASKED = (*language.QUESTIONS, "relation")
EDITED = (*language.EDITS, "recolour")


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(scene: Scene) -> dict[str, Any]:
    return {"type": "image", "image": render(scene)}


def conversation(*turns: tuple[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Messages of `(role, parts)`."""
    return [{"role": role, "content": parts} for role, parts in turns]


def draw(generator: random.Random) -> list[dict[str, Any]]:
    """A picture from a prompt, of which half say everything."""
    scene = random_scene(generator, held_out=False)
    return conversation(("user", [text(_prompt(generator, scene, full=0.5).text)]), ("assistant", [image(scene)]))


def think_and_draw(generator: random.Random) -> list[dict[str, Any]]:
    """A plan from a prompt, a quarter of them riddles, and the picture. Now and then the prompt and the plan are left
    out, which is what guidance compares with.
    """
    scene = random_scene(generator, held_out=False)
    system = ("system", [text(GENERATION_THINK_PROMPT)])
    if generator.random() < 0.1:
        return conversation(system, ("assistant", [image(scene)]))
    prompt = _planned_prompt(generator, scene)
    turns = [text(language.plan(prompt)), image(scene)]
    return conversation(system, ("user", [text(prompt.text)]), ("assistant", turns))


def plan(generator: random.Random) -> list[dict[str, Any]]:
    """A plan alone."""
    prompt = _planned_prompt(generator, random_scene(generator, held_out=False))
    return conversation(
        ("system", [text(GENERATION_THINK_PROMPT)]),
        ("user", [text(prompt.text)]),
        ("assistant", [text(language.plan(prompt))]),
    )


def edit(generator: random.Random) -> list[dict[str, Any]]:
    """A picture, an instruction, and the picture that it makes."""
    while True:
        scene = random_scene(generator, held_out=False)
        edited = language.edit(generator, scene, generator.choice(EDITED))
        # What comes out must not be a test picture either.
        if edited is not None and not is_held_out(edited[1]):
            return conversation(("user", [image(scene), text(edited[0])]), ("assistant", [image(edited[1])]))


def ask(generator: random.Random) -> list[dict[str, Any]]:
    """Questions about a picture and their answers."""
    scene = random_scene(generator, held_out=False)
    turns: list[tuple[str, list[dict[str, Any]]]] = []
    while len(turns) < 2 * QUESTIONS_PER_PICTURE:
        asked = language.question(generator, scene, generator.choice(ASKED))
        if asked is not None:
            turns += [("user", [text(asked[0])]), ("assistant", [text(asked[1])])]
    turns[0] = ("user", [image(scene), *turns[0][1]])
    return conversation(*turns)


def describe(generator: random.Random) -> list[dict[str, Any]]:
    """A description of a picture."""
    scene = random_scene(generator, held_out=False)
    return conversation(
        ("user", [image(scene), text(generator.choice(language.DESCRIBE))]),
        ("assistant", [text(language.layout(scene))]),
    )


def think_and_answer(generator: random.Random) -> list[dict[str, Any]]:
    """A question about a picture, half of them riddles: what is seen, and the answer."""
    while True:
        scene = random_scene(generator, held_out=False)
        if generator.random() < 0.5:
            asked: tuple[str, str] | None = language.riddle_question(generator, scene)
        else:
            asked = language.question(generator, scene, generator.choice(ASKED))
        if asked is not None:
            return conversation(
                ("system", [text(UNDERSTANDING_THINK_PROMPT)]),
                ("user", [image(scene), text(asked[0])]),
                ("assistant", [text(language.thought_answer(scene, asked[1]))]),
            )


def _prompt(generator: random.Random, scene: Scene, full: float) -> language.Prompt:
    """A prompt without riddles. What does not say everything says of two objects, four times in ten, how they stand to each
    other.
    """
    if generator.random() < full:
        return language.full_prompt(generator, scene)
    related = language.relation_prompt(generator, scene) if generator.random() < 0.4 else None
    return related or language.ordinary_prompt(generator, scene)


def _planned_prompt(generator: random.Random, scene: Scene) -> language.Prompt:
    riddle = language.riddle_prompt(generator, scene)
    if riddle is not None and generator.random() < 0.6:
        return riddle
    return _prompt(generator, scene, full=0.1)


MAKERS = {
    "draw": draw,
    "think_and_draw": think_and_draw,
    "plan": plan,
    "edit": edit,
    "ask": ask,
    "describe": describe,
    "think_and_answer": think_and_answer,
}
# Shares of the samples of each stage. What is understood comes first, since pictures cost many times more.
UNDERSTANDING = {"ask": 0.5, "describe": 0.2, "think_and_answer": 0.1, "plan": 0.2}
JOINT = {
    "draw": 0.2,
    "think_and_draw": 0.12,
    "plan": 0.13,
    "edit": 0.31,
    "ask": 0.15,
    "describe": 0.02,
    "think_and_answer": 0.07,
}


def sample(seed: int, shares: dict[str, float], index: int) -> list[dict[str, Any]]:
    """Messages of one sample of a dataset."""
    generator = random.Random(f"{seed} {index}")
    task = generator.choices(list(shares), list(shares.values()))[0]
    return MAKERS[task](generator)

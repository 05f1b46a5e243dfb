# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Conversations about the world: what the model is trained on."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import language
from world import Scene, is_held_out, random_scene, render

from transformers_bagel.segments import GENERATION_THINK_PROMPT, UNDERSTANDING_THINK_PROMPT


# Questions about one picture, in one conversation.
QUESTIONS_PER_PICTURE = 10
THOUGHTS_PER_PICTURE = 3
# What is hardest to learn comes twice. Riddles come without a thought too.
ASKED = (*language.QUESTIONS, "relation", "riddle")
# Before the last stage: no riddles, and an answer that names both places and not the relation.
FIRST_ASKED = tuple("bare_relation" if kind == "relation" else kind for kind in ASKED if kind != "riddle")
EDITED = (*language.EDITS, "recolour")
# Of a conversation, each `(role, parts)`.
Turns = list[tuple[str, list[dict[str, Any]]]]


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
        # Nobody asked for anything, so that nothing is to be decided.
        return conversation((system[0], [system[1][0] | {"next_action": False}]), ("assistant", [image(scene)]))
    prompt = _planned_prompt(generator, scene)
    turns = [text(language.plan(prompt)), image(scene)]
    return conversation(system, ("user", [text(prompt.text)]), ("assistant", turns))


def plan(generator: random.Random) -> list[dict[str, Any]]:
    """A plan alone. A picture would follow it, and not the end."""
    prompt = _planned_prompt(generator, random_scene(generator, held_out=False))
    return conversation(
        ("system", [text(GENERATION_THINK_PROMPT)]),
        ("user", [text(prompt.text)]),
        ("assistant", [text(language.plan(prompt)) | {"next_action": False}]),
    )


def edit(generator: random.Random) -> list[dict[str, Any]]:
    """A picture, an instruction, and the picture that it makes."""
    while True:
        scene = random_scene(generator, held_out=False)
        edited = language.edit(generator, scene, generator.choice(EDITED))
        # What comes out must not be a test picture either.
        if edited is not None and not is_held_out(edited[1]):
            return conversation(("user", [image(scene), text(edited[0])]), ("assistant", [image(edited[1])]))


def ask(generator: random.Random, kinds: Sequence[str] = ASKED) -> list[dict[str, Any]]:
    """Questions about a picture and their answers."""
    scene = random_scene(generator, held_out=False)
    turns: Turns = []
    while len(turns) < 2 * QUESTIONS_PER_PICTURE:
        asked = language.question(generator, scene, generator.choice(kinds))
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


def think_and_answer(generator: random.Random, kinds: Sequence[str] = ASKED) -> list[dict[str, Any]]:
    """A question about a picture, half of them riddles: what is seen, and the answer."""
    while True:
        scene = random_scene(generator, held_out=False)
        if generator.random() < 0.5:
            asked: tuple[str, str] | None = language.riddle_question(generator, scene)
        else:
            asked = language.question(generator, scene, generator.choice(kinds))
        if asked is not None:
            return conversation(
                ("system", [text(UNDERSTANDING_THINK_PROMPT)]),
                ("user", [image(scene), text(asked[0])]),
                ("assistant", [text(language.thought_answer(scene, asked[1]))]),
            )


def think_each_time(generator: random.Random) -> list[dict[str, Any]]:
    """Questions about one picture, and before each answer what is seen, in which it is looked up."""
    scene = random_scene(generator, held_out=False)
    turns: Turns = []
    while len(turns) < 2 * THOUGHTS_PER_PICTURE:
        asked = language.question(generator, scene, generator.choice(ASKED))
        if asked is not None:
            turns += [("user", [text(asked[0])]), ("assistant", [text(language.thought_answer(scene, asked[1]))])]
    turns[0] = ("user", [image(scene), *turns[0][1]])
    return conversation(("system", [text(UNDERSTANDING_THINK_PROMPT)]), *turns)


def tell(generator: random.Random) -> list[dict[str, Any]]:
    """A picture from a prompt, and in the same answer what was asked about it."""
    return _words_or_pictures(generator, conversation(*_told(generator)[1]))


def show_steps(generator: random.Random) -> list[dict[str, Any]]:
    """A picture an object at a time, and what is done before each."""
    # The words are soon learned.
    return _words_or_pictures(generator, conversation(*_steps(generator)[1]), words=0.35)


def just_answer(generator: random.Random) -> list[dict[str, Any]]:
    """Words about words, and no picture."""
    asked, answer = language.words_question(generator, random_scene(generator, held_out=False))
    return conversation(("user", [text(asked)]), ("assistant", [text(answer)]))


def go_on(generator: random.Random, begin: Callable[[random.Random], tuple[Scene, Turns]]) -> list[dict[str, Any]]:
    """A conversation about a picture, given or drawn: edits and questions, the last of which is about how it is by then."""
    scene, turns = begin(generator)
    given = [] if turns else [image(scene)]
    num_edits = generator.choice((0, 0, 1, 1, 2))
    while num_edits or len(turns) < 4:
        edited = language.edit(generator, scene, generator.choice(EDITED)) if num_edits else None
        asked = None if num_edits else language.question(generator, scene, generator.choice(ASKED))
        if edited is not None and not is_held_out(edited[1]):
            scene, num_edits = edited[1], num_edits - 1
            turns += [("user", [text(edited[0])]), ("assistant", [image(scene)])]
        elif asked is not None:
            turns += [("user", [text(asked[0])]), ("assistant", [text(asked[1])])]
    asked = None
    while asked is None:
        asked = language.question(generator, scene, generator.choice(ASKED))
    turns += [("user", [text(asked[0])]), ("assistant", [text(asked[1])])]
    turns[0] = ("user", [*given, *turns[0][1]])
    return _words_or_pictures(generator, conversation(*turns))


def go_further(generator: random.Random) -> list[dict[str, Any]]:
    """The same behind answers of pictures and words."""
    return go_on(generator, generator.choice((_given_or_drawn, _given_or_drawn, _told, _steps)))


def _given_or_drawn(generator: random.Random) -> tuple[Scene, Turns]:
    """A scene, and the turns in which it was drawn; none if its picture is to be given."""
    scene = random_scene(generator, held_out=False)
    if generator.random() < 0.3:
        return scene, []
    prompt = _prompt(generator, scene, full=0.8)
    return scene, [("user", [text(prompt.text)]), ("assistant", [image(scene)])]


def _told(generator: random.Random) -> tuple[Scene, Turns]:
    """A scene, and the turns in which it was drawn and a question about it answered."""
    while True:
        scene = random_scene(generator, held_out=False)
        asked = language.question(generator, scene, generator.choice(ASKED))
        if asked is not None:
            request = generator.choice(language.TELL).format(_prompt(generator, scene, full=0.5).text, asked[0])
            return scene, [("user", [text(request)]), ("assistant", [image(scene), text(asked[1])])]


def _steps(generator: random.Random) -> tuple[Scene, Turns]:
    """A scene, and the turns in which it was drawn in steps."""
    while True:
        scene = random_scene(generator, held_out=False, num_things=generator.choice((2, 2, 3)))
        prompt = _prompt(generator, scene, full=0.5)
        steps = language.steps(prompt.scene)
        if not any(is_held_out(so_far) for _, so_far in steps):
            answer = [part for words, so_far in steps for part in (text(words), image(so_far))]
            request = generator.choice(language.STEPS).format(prompt.text)
            return steps[-1][1], [("user", [text(request)]), ("assistant", answer)]


def _words_or_pictures(
    generator: random.Random, messages: list[dict[str, Any]], words: float = 0.5
) -> list[dict[str, Any]]:
    """What a session writes and draws it reads in two ways: a share of the samples learn the words, from images that are only
    seen, the others the pictures, from all that guidance may leave out.
    """
    answers = [part for message in messages if message["role"] == "assistant" for part in message["content"]]
    if generator.random() < words or all(part["type"] == "text" for part in answers):
        return in_words(messages)
    for message in messages:
        for part in message["content"]:
            if part["type"] == "text":
                part["loss"] = False
    return messages


def in_words(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation whose words are learned, and what comes when; its pictures are seen."""
    for message in messages:
        for part in message["content"]:
            if part["type"] == "image":
                part |= {"loss": False, "vae": False}
    return messages


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


MAKERS: dict[str, Callable[[random.Random], list[dict[str, Any]]]] = {
    "draw": draw,
    "think_and_draw": think_and_draw,
    "plan": plan,
    "edit": edit,
    "ask": partial(ask, kinds=FIRST_ASKED),
    "describe": describe,
    "think_and_answer": partial(think_and_answer, kinds=FIRST_ASKED),
    "reason": ask,
    "think_and_reason": think_and_answer,
    "think_each_time": think_each_time,
    "tell": tell,
    "show_steps": show_steps,
    "just_answer": just_answer,
    "go_on": partial(go_on, begin=_given_or_drawn),
    "go_further": go_further,
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
DECIDING = {
    "draw": 0.13,
    "think_and_draw": 0.1,
    "plan": 0.05,
    "edit": 0.22,
    "reason": 0.12,
    "describe": 0.03,
    "think_and_reason": 0.08,
    "tell": 0.05,
    "show_steps": 0.14,
    "just_answer": 0.02,
    "go_on": 0.06,
}
# What was learned least comes most, and of all else enough to keep it.
THINKING = {
    "think_each_time": 0.3,
    "draw": 0.16,
    "think_and_draw": 0.08,
    "edit": 0.13,
    "reason": 0.05,
    "describe": 0.02,
    "show_steps": 0.06,
    "go_further": 0.2,
}
# What lost a little by that gets it back.
REFINING = {
    "draw": 0.2,
    "think_and_draw": 0.08,
    "edit": 0.26,
    "reason": 0.1,
    "describe": 0.04,
    "think_each_time": 0.16,
    "show_steps": 0.08,
    "go_further": 0.08,
}


def sample(seed: int, shares: dict[str, float], index: int) -> list[dict[str, Any]]:
    """Messages of one sample of a dataset."""
    generator = random.Random(f"{seed} {index}")
    task = generator.choices(list(shares), list(shares.values()))[0]
    return MAKERS[task](generator)

# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Tasks of bagel-shapes for evaluation harnesses: questions of our own evaluation as files, and its judge."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image


SHAPES = Path(__file__).parents[1]
# The scripts of examples/shapes are no package. They come last, since harnesses use another `evaluate` than the one there.
sys.path.append(str(SHAPES))

from asking import BATCH_SIZE, DRAWING, EDITING, MAX_TOKENS, STEPS  # noqa: E402, F401
from judge import are_steps, ask_cases, draw_cases, edit_cases, is_drawn, is_edited, steps_cases  # noqa: E402
from world import Scene, render  # noqa: E402


@dataclass(frozen=True)
class ShapesTask:
    """
    What a harness asks, what is right, and what our own evaluation says of it.

    Attributes:
        cases (`Callable`): The first so many cases.
        question (`Callable`): Of a case, what is asked, and the scene of the picture that comes with it, if one does.
        is_right (`Callable`): Whether an answer to a case is right, by its text and its pictures.
        own (`Callable`): Of each case, whether an `Evaluation` finds the model's answer right.
        settings (`dict`): Of [`bagel_harnesses.answers.Answerer`].
    """

    cases: Callable[[int], Sequence[Any]]
    question: Callable[[Any], tuple[str, Scene | None]]
    is_right: Callable[[Any, str, list[Image.Image]], bool]
    own: Callable[[Any, Sequence[Any]], list[bool]]
    settings: dict[str, Any]


_DRAWN = {"output": "image", "num_inference_steps": STEPS, "max_think_tokens": MAX_TOKENS}
TASKS = {
    "ask": ShapesTask(
        ask_cases,
        lambda case: (case.question, case.scene),
        lambda case, text, pictures: text == case.answer,
        lambda evaluation, cases: evaluation.answered(cases),
        {"output": "text", "max_new_tokens": MAX_TOKENS},
    ),
    "think": ShapesTask(
        ask_cases,
        lambda case: (case.question, case.scene),
        lambda case, text, pictures: text == case.answer,
        lambda evaluation, cases: evaluation.answered(cases, think=True),
        {"output": "text", "think": True, "max_new_tokens": MAX_TOKENS},
    ),
    "draw": ShapesTask(
        functools.partial(draw_cases, "draw_full"),
        lambda case: (case.prompt, None),
        lambda case, text, pictures: is_drawn(pictures[0], case),
        lambda evaluation, cases: evaluation.drawn(cases),
        _DRAWN | DRAWING,
    ),
    "plan": ShapesTask(
        functools.partial(draw_cases, "draw"),
        lambda case: (case.prompt, None),
        lambda case, text, pictures: is_drawn(pictures[0], case),
        lambda evaluation, cases: evaluation.drawn(cases, think=True),
        _DRAWN | DRAWING | {"think": True},
    ),
    "edit": ShapesTask(
        edit_cases,
        lambda case: (case.instruction, case.scene),
        lambda case, text, pictures: is_edited(pictures[0], case.target),
        lambda evaluation, cases: evaluation.edited(cases),
        _DRAWN | EDITING,
    ),
    "steps": ShapesTask(
        steps_cases,
        lambda case: (case.request, None),
        lambda case, text, pictures: are_steps(pictures, case),
        lambda evaluation, cases: evaluation.showed_steps(cases),
        {"output": "auto", "num_inference_steps": STEPS, "max_new_tokens": MAX_TOKENS} | EDITING,
    ),
}


def write_items(folder: Path, task: str, count: int) -> None:
    """Write the questions of a task as `TASK.jsonl`, and their pictures beside it."""
    lines = []
    for index, case in enumerate(TASKS[task].cases(count)):
        question, scene = TASKS[task].question(case)
        images = []
        if scene is not None:
            images = [str(folder / f"{task}_{index}.png")]
            render(scene).save(images[0])
        lines.append({"task": task, "index": index, "of": count, "question": question, "images": images})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / f"{task}.jsonl").write_text(text, encoding="utf-8")


def is_right(item: dict[str, Any], answer: str) -> bool:
    """Whether what a model of a harness answered is right: words, the name of a picture's file, or a line of JSON with both."""
    task = TASKS[item["task"]]
    case = _cases(item["task"], item["of"])[item["index"]]
    if task.settings["output"] == "text":
        return task.is_right(case, answer.strip(), [])
    said: dict[str, Any] = {"text": "", "images": [answer]} if answer.endswith(".png") else json.loads(answer)
    return task.is_right(case, said["text"], [Image.open(file) for file in said["images"]])


@functools.cache
def _cases(task: str, count: int) -> Sequence[Any]:
    return TASKS[task].cases(count)

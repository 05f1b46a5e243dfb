"""What harnesses get is what the pipeline, `generate()` and sessions give."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from evaluate import answer
from judge import ask_cases, edit_cases
from world import render

from bagel_harnesses.answers import Answerer
from diffusers_bagel import BagelSession
from tests.harnesses.conftest import MODEL


STAR = "a large red star in the middle on a white background"
SQUARE = "a small blue square at the top on yellow"
FEW = {"num_inference_steps": 3}
ASKED = ask_cases(4)


@cache
def answerer(output: str = "text", **settings) -> Answerer:
    return Answerer(**MODEL, output=output, **settings)


def said(*parts) -> list[dict]:
    """A conversation of one message."""
    kinds = ["text" if isinstance(part, str) else "image" for part in parts]
    content = [{"type": kind, kind: part} for kind, part in zip(kinds, parts, strict=True)]
    return [{"role": "user", "content": content}]


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


QUESTIONS = [said(render(case.scene), case.question) for case in ASKED]


@pytest.mark.parametrize("think", [False, True])
def test_questions_are_answered_as_generate_does(shapes_pipe, think):
    model = answerer(think=think, max_new_tokens=64)
    ours = answer(shapes_pipe, [render(case.scene) for case in ASKED], [case.question for case in ASKED], think)
    assert [each.text for each in model.answer(QUESTIONS, range(4))] == ours
    assert not any("<think>" in words for words in ours)


def test_a_batch_answers_what_each_question_gets_alone():
    together = answerer().answer(QUESTIONS, range(4))
    assert together == [answerer().answer([question], [0])[0] for question in QUESTIONS]


def test_drawings_are_the_pipelines(shapes_pipe):
    drawn = answerer("image", **FEW).answer([said(STAR), said(SQUARE)], [5, 6])
    ours = shapes_pipe([STAR, SQUARE], generator=seeded(5, 6), **FEW).images
    assert [each.images for each in drawn] == [[picture] for picture in ours]


def test_edits_are_the_pipelines(shapes_pipe):
    (case,) = edit_cases(1)
    (edited,) = answerer("image", **FEW).answer([said(render(case.scene), case.instruction)], [7])
    ours = shapes_pipe(case.instruction, image=render(case.scene), generator=seeded(7)[0], **FEW).images
    assert edited.images == ours


def test_a_drawing_that_was_thought_of_comes_with_its_plan(shapes_pipe):
    (drawn,) = answerer("image", think=True, max_think_tokens=64, **FEW).answer([said(STAR)], [0])
    ours = shapes_pipe(STAR, think=True, max_think_tokens=64, generator=seeded(0)[0], **FEW)
    assert (drawn.text, drawn.images) == (ours.texts[0], ours.images)


@pytest.mark.parametrize("output", ["interleaved", "auto"])
def test_words_and_pictures_in_turn_are_a_sessions(shapes_pipe, output):
    request, settings = f"show the steps: {STAR} and a blue circle", FEW | {"max_new_tokens": 32, "max_images": 2}
    (shown,) = answerer(output, **settings).answer([said(request)], [3])
    reply = BagelSession(shapes_pipe).send(request, output, generator=seeded(3)[0], **settings)
    assert (shown.text, shown.images) == (reply.text, reply.images)
    assert [part["type"] for part in shown.content] == [part["type"] for part in reply.content]


def test_a_seed_follows_from_the_number_of_the_question_or_its_name():
    model = Answerer(**MODEL, seed=100)
    assert (model.seed_of(3), model.seed_of("3"), model.seed_of(np.int64(3))) == (103, 103, 103)
    assert model.seed_of("three") == model.seed_of("three") != model.seed_of("four")


def test_a_task_says_how_long_an_answer_is_and_where_it_ends():
    describe = said(render(ASKED[0].scene), "describe the picture")
    (whole,) = answerer().answer([describe], [0])
    (short,) = answerer().answer([describe], [0], {"max_new_tokens": 3, "temperature": 0, "top_p": 1.0})
    (ended,) = answerer().answer([describe], [0], {"until": [" on a", ""]})
    assert whole.text.startswith(short.text) and len(short.text.split()) <= 3
    assert ended.text == whole.text.partition(" on a")[0] != whole.text


def test_the_length_that_a_task_sets_is_that_of_the_answer_behind_the_thoughts():
    question, task = QUESTIONS[0], {"max_new_tokens": 1}
    (thought,) = answerer(think=True).answer([question], [0], task)
    (whole,) = answerer(think=True, max_new_tokens=64).answer([question], [0], task)
    assert thought == whole and thought.text


def test_what_the_user_sets_goes_before_what_a_task_sets():
    describe = said(render(ASKED[0].scene), "describe the picture")
    (whole,) = answerer(max_new_tokens=64).answer([describe], [0], {"max_new_tokens": 3})
    assert whole == answerer().answer([describe], [0])[0]


def test_a_task_of_pictures_may_set_what_the_pipeline_has_and_is_not_asked_how_texts_are_sampled(shapes_pipe):
    task = {"num_inference_steps": 2, "max_new_tokens": 8, "temperature": 0, "top_p": 1.0, "until": ["\n"]}
    (drawn,) = answerer("image").answer([said(STAR)], [1], task)
    assert drawn.images == shapes_pipe(STAR, generator=seeded(1)[0], num_inference_steps=2).images


def test_a_preset_of_answers_goes_before_what_a_task_sets(shapes_pipe):
    case = ASKED[0]
    content = [render(case.scene), "describe the picture"]
    (short,) = answerer(preset="vqa").answer([said(*content)], [0], {"max_new_tokens": 64, "temperature": 5.0})
    assert short.text == BagelSession(shapes_pipe).send(content, preset="vqa").text
    assert len(short.text) < len(answerer().answer([said(*content)], [0])[0].text)


def test_a_preset_of_drawings_is_the_pipelines(shapes_pipe):
    (drawn,) = answerer("image", preset="geneval", **FEW).answer([said(STAR)], [2], {"num_inference_steps": 1})
    assert drawn.images == shapes_pipe(STAR, preset="geneval", generator=seeded(2)[0], **FEW).images


def test_a_preset_that_thinks_does_so_unless_told_otherwise():
    (thought,) = answerer("image", preset="kris", max_think_tokens=32, **FEW).answer([said(STAR)], [2])
    (drawn,) = answerer("image", preset="kris", think=False, **FEW).answer([said(STAR)], [2])
    assert thought.text and not drawn.text


def test_a_sampled_answer_follows_from_its_seed_whatever_else_is_in_the_batch():
    describe, task = said(render(ASKED[0].scene), "describe the picture"), {"temperature": 5.0, "max_new_tokens": 8}
    first, second, third = answerer().answer([describe] * 3, [1, 2, 1], task)
    assert first == third != second
    assert answerer().answer([describe], [2], task) == [second]


@pytest.mark.parametrize(
    "task", [{"do_sample": False, "temperature": 5.0}, {"do_sample": True, "temperature": 0}, {"top_p": None}]
)
def test_an_answer_without_a_temperature_or_sampling_is_the_greedy_one(task):
    describe = said(render(ASKED[0].scene), "describe the picture")
    assert answerer().answer([describe], [1], task) == answerer().answer([describe], [0])


def test_a_user_who_has_texts_sampled_is_not_overruled_by_a_task_that_does_not():
    describe, task = said(render(ASKED[0].scene), "describe the picture"), {"do_sample": False, "temperature": 0}
    settings = {"temperature": 5.0, "max_new_tokens": 8}
    assert answerer(**settings).answer([describe], [1], task) == answerer().answer([describe], [1], settings)


def test_pictures_become_files_named_in_order(tmp_path):
    request, settings = f"show the steps: {STAR} and a blue circle", FEW | {"max_new_tokens": 32, "max_images": 2}
    (shown,) = answerer("interleaved", **settings).answer([said(request)], [3])
    saved = shown.saved(tmp_path / "new", "steps_7")
    assert saved["images"] == [str(tmp_path / "new" / f"steps_7_{number}.png") for number in range(2)]
    assert [part.get("path", part.get("text")) for part in saved["content"]] == [
        part["text"] if part["type"] == "text" else saved["images"][shown.images.index(part["image"])]
        for part in shown.content
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"output": "sound"}, "`output` must be one of text, image, interleaved, auto, got 'sound'"),
        ({"seed": -1}, "`seed` must be"),
        ({"dtype": "bf16"}, "`dtype` must be the name of one of torch, such as \"bfloat16\", got 'bf16'"),
        ({"guidance_scale": 3.0}, 'guidance_scale: no setting of answers by `output="text"`'),
        ({"output": "image", "max_new_tokens": 3}, 'max_new_tokens: no setting of answers by `output="image"`'),
        ({"preset": "gen-eval"}, "`preset` must be one of"),
        ({"preset": "geneval"}, "`preset` 'geneval' is not for answers by `output=\"text\"`"),
        ({"output": "auto", "prompt": "x"}, 'prompt: no setting of answers by `output="auto"`'),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(settings, words):
    with pytest.raises((TypeError, ValueError), match=words):
        Answerer("no/such-model", **settings)


def test_an_answer_in_turn_to_a_history_is_refused():
    with pytest.raises(ValueError, match='`output="auto"` answers one message, and a task gave 2'):
        answerer("auto", **FEW).answer([said("a") + said("b")], [0])

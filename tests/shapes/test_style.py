"""A LoRA trained for a minute: a new style on demand, and nothing else changed."""

from __future__ import annotations

import pytest
from evaluate import Evaluation, answer
from judge import ask_cases, edit_cases
from style import style_cases, train_style
from world import render

from diffusers_bagel import BagelPipeline
from tests.shapes.conftest import CHECKPOINT


NUM_CASES = 100
# What the other tasks may lose.
TOLERANCE = 0.03


def scores(pipe: BagelPipeline) -> dict[str, float]:
    evaluation = Evaluation(pipe, NUM_CASES, seed=7)
    return {
        "in ink": evaluation.draw(style_cases(NUM_CASES, seed=7)),
        "draw": evaluation.draw(evaluation.cases("draw_full")),
        "relation with plan": evaluation.draw(evaluation.cases("relation"), think=True),
        "edit": evaluation.edit(edit_cases(NUM_CASES, seed=7))["all"],
    }


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("style")
    train_style(CHECKPOINT, folder, steps=100, num_samples=1200)
    return folder


def test_a_style_is_learned_and_the_other_tasks_stay(adapter):
    pipe = BagelPipeline.from_pretrained(CHECKPOINT)
    questions = ask_cases(20)
    pictures, words = [render(case.scene) for case in questions], [case.question for case in questions]
    before, said = scores(pipe), answer(pipe, pictures, words)
    pipe.load_lora_weights(adapter)
    after = scores(pipe)
    assert before["in ink"] < 0.1 and after["in ink"] > 0.7, (before, after)
    for task in ("draw", "relation with plan", "edit"):
        assert after[task] >= before[task] - TOLERANCE, (before, after)
    # It sits on the drawing expert, which no text passes.
    assert answer(pipe, pictures, words) == said

"""A LoRA trained for a minute: a new style on demand, and nothing else changed."""

from __future__ import annotations

import pytest
from evaluate import Evaluation, answer
from judge import ask_cases, edit_cases
from style import style_cases
from world import render

from diffusers_bagel import BagelPipeline
from tests.processes import run_script
from tests.shapes.conftest import CHECKPOINT, SHAPES


NUM_CASES = 100
# What the other tasks may lose.
TOLERANCE = 0.03
# As right as with more.
STEPS = {"num_inference_steps": 10}


def scores(pipe: BagelPipeline) -> dict[str, float]:
    evaluation = Evaluation(pipe, NUM_CASES, seed=7)
    return {
        "in coal": evaluation.draw(style_cases(NUM_CASES, seed=7), **STEPS),
        "draw": evaluation.draw(evaluation.cases("draw_full"), **STEPS),
        "relation with plan": evaluation.draw(evaluation.cases("relation"), think=True, **STEPS),
        "edit": evaluation.edit(edit_cases(NUM_CASES, seed=7), **STEPS)["all"],
    }


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("style")
    run_script(SHAPES / "style.py", "--output_dir", str(folder), timeout=1800)
    return folder


@pytest.mark.slow
def test_a_style_is_learned_and_the_other_tasks_stay(adapter):
    pipe = BagelPipeline.from_pretrained(CHECKPOINT)
    questions = ask_cases(20)
    pictures, words = [render(case.scene) for case in questions], [case.question for case in questions]
    before, said = scores(pipe), answer(pipe, pictures, words)
    pipe.load_lora_weights(adapter)
    after = scores(pipe)
    assert before["in coal"] < 0.1 and after["in coal"] > 0.6, (before, after)
    for task in ("relation with plan", "edit"):
        assert after[task] >= before[task] - TOLERANCE, (before, after)
    # The same prompts less the words for the style are the nearest to it.
    assert after["draw"] >= before["draw"] - 2 * TOLERANCE, (before, after)
    # It sits on the drawing expert, which no text passes.
    assert answer(pipe, pictures, words) == said

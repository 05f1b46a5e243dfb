"""Scenes, their pictures, and the English about them."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import language
import numpy as np
import pytest
from evaluate import judge_error
from judge import (
    StepsCase,
    are_steps,
    ask_cases,
    decide_cases,
    described_share,
    draw_cases,
    edit_cases,
    is_edited,
    riddle_cases,
    seen,
)
from PIL import Image
from reader import read
from tasks import DECIDING, JOINT, MAKERS, UNDERSTANDING, sample
from world import CELLS, COLOURS, SHAPES, SIZES, UNSEEN_PAIRS, Scene, Thing, is_held_out, random_scene, render

from transformers_bagel.segments import sample_segments


SCENE = Scene(
    "white",
    (Thing(0, "red", "circle", "small"), Thing(4, "blue", "square", "large"), Thing(8, "red", "cross", "medium")),
)


def scenes(count: int, held_out: bool = False) -> list[Scene]:
    generator = random.Random(0)
    return [random_scene(generator, held_out) for _ in range(count)]


@pytest.mark.parametrize("held_out", [False, True])
def test_scenes_obey_the_rules_of_the_world(held_out):
    for scene in scenes(300, held_out):
        assert is_held_out(scene) == held_out
        assert 1 <= len(scene.things) <= 3
        assert len({thing.cell for thing in scene.things}) == len(set(scene.pairs)) == len(scene.things)
        assert scene.background not in {thing.colour for thing in scene.things}


def test_training_never_shows_an_unseen_pair():
    shown = {pair for scene in scenes(2000) for pair in scene.pairs}
    assert not shown & UNSEEN_PAIRS
    assert len(shown) == len(COLOURS) * len(SHAPES) - len(UNSEEN_PAIRS)


def test_a_picture_shows_each_object_in_its_cell():
    pixels = np.asarray(render(SCENE))
    assert pixels.shape == (64, 64, 3)
    for thing in SCENE.things:
        x, y = thing.centre
        assert tuple(pixels[y, x]) == COLOURS[thing.colour]
    assert tuple(pixels[0, 0]) == COLOURS["white"]


def test_the_judge_reads_true_pictures():
    assert judge_error(600, seed=5) < 0.005


@pytest.mark.parametrize("shape", SHAPES)
def test_the_judge_tells_what_a_shape_is_not(shape):
    """Shifted, blurred and faded pictures stay what they are; another shape is not taken for it."""
    scene = Scene("white", (Thing(4, "blue", shape, "medium"),))
    pixels = np.asarray(render(scene)).astype(float)
    for changed in (np.roll(pixels, 1, axis=1), pixels * 0.95 + 6, (pixels + np.roll(pixels, 1, axis=0)) / 2):
        assert seen(read(_picture(changed))) == seen(scene)
    for other in set(SHAPES) - {shape}:
        assert seen(read(render(Scene("white", (Thing(4, "blue", other, "medium"),))))) != seen(scene)


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def test_the_judge_wants_one_colour_an_object():
    """A recolouring that stopped halfway is none."""
    scene = Scene("white", (Thing(4, "red", "circle", "large"),))
    red, blue = (
        np.asarray(render(replace(scene, things=(replace(scene.things[0], colour=colour),))))
        for colour in ("red", "blue")
    )
    columns = np.arange(64)[None, :, None]
    assert [thing.colour for thing in read(_picture(np.where(columns < 33, red, blue))).things] == ["unknown"]
    assert [thing.colour for thing in read(_picture(np.where(columns < 25, blue, red))).things] == ["red"]


def test_the_judge_sees_ghosts_and_odd_colours():
    pixels = np.asarray(render(SCENE)).copy()
    pixels[50:54, 8:13] = (120, 120, 120)
    assert len(read(_picture(pixels)).things) == len(SCENE.things) + 1
    # In no colour's median: thirds of three strong colours, none of which is any nearer to it than the background.
    pixels = np.full((64, 64, 3), 250)
    for index, colour in enumerate(((250, 250, 0), (250, 0, 250), (0, 250, 250))):
        pixels[24:40, 24 + 5 * index : 29 + 5 * index] = colour
    assert [thing.colour for thing in read(_picture(pixels)).things] == ["unknown"]


def test_the_judge_does_not_read_what_is_not_there():
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3))
    assert all("unknown" in (thing.colour, thing.shape) for thing in read(_picture(noise)).things)
    assert read(_picture(np.full((64, 64, 3), 250.0))) == Scene("white", ())


def test_a_layout_is_read_as_it_was_written():
    for scene in scenes(200) + scenes(200, held_out=True):
        assert seen(language.parse_layout(language.layout(scene))) == seen(scene)


@pytest.mark.parametrize(
    "text",
    ["", "a red circle", "a small red circle at the top", "a small pink circle at the top on a white background"],
)
def test_what_is_no_layout_is_none(text):
    assert language.parse_layout(text) is None


def test_descriptions_are_scored_by_object():
    text = language.layout(SCENE)
    assert described_share(text, SCENE) == 1
    assert described_share(text.replace("blue", "green"), SCENE) == pytest.approx(2 / 3)
    assert described_share(language.layout(replace(SCENE, things=SCENE.things[:1])), SCENE) == pytest.approx(1 / 3)
    assert described_share("a b c", SCENE) == 0


@pytest.mark.parametrize("task", ["draw_full", "draw", "relation", "riddle"])
def test_a_prompt_is_granted_by_its_scene_and_not_by_others(task):
    cases = draw_cases(task, 100)
    for case, other in zip(cases, cases[1:] + cases[:1], strict=True):
        assert is_held_out(case.scene)
        assert language.grants(case.scene, case.wish)
        assert not language.grants(Scene(case.scene.background, ()), case.wish)
        assert language.grants(read(render(case.scene)), case.wish)
        if other.scene.pairs != case.scene.pairs:
            assert not language.grants(other.scene, case.wish)


def test_a_mirrored_scene_breaks_a_relation():
    for case in draw_cases("relation", 60):
        first, second = case.scene.things
        swapped = Scene(case.scene.background, (replace(first, cell=second.cell), replace(second, cell=first.cell)))
        assert not language.grants(swapped, case.wish)


def test_riddles_do_not_name_what_they_mean():
    for case in draw_cases("riddle", 100):
        (thing,) = case.scene.things
        assert not (thing.colour in case.prompt and thing.shape in case.prompt)


def test_riddles_of_the_test_are_about_every_unseen_pair():
    assert {case.scene.pairs[0] for case in draw_cases("riddle", 300)} == UNSEEN_PAIRS
    for case in riddle_cases(100):
        colours = [
            colour
            for colour, things in language.THINGS_OF_COLOUR.items()
            if any(f"of {thing}?" in case.question for thing in things)
        ]
        matching = [thing for thing in case.scene.things if thing.colour in colours]
        assert case.answer in ([thing.shape for thing in matching] + ["yes"] if matching else ["no"])


@pytest.mark.parametrize("kind", language.EDITS)
def test_an_edit_changes_one_thing(kind):
    cases = [case for case in edit_cases(100) if case.kind == kind]
    assert len(cases) == 20
    for case in cases:
        before, after = set(case.scene.things), set(case.target.things)
        changes = {"recolour": (1, 1), "move": (1, 1), "remove": (1, 0), "add": (0, 1), "background": (0, 0)}[kind]
        assert (len(before - after), len(after - before)) == changes
        assert (case.scene.background != case.target.background) == (kind == "background")
        assert is_edited(render(case.target), case.target)
        assert not is_edited(render(case.scene), case.target)


def test_answers_follow_from_the_scene():
    expected = {
        "count": {"how many things are there?": "three", "how many squares are there?": "one"},
        "exists": {"is there a red cross?": "yes", "is there a blue circle?": "no"},
        "bare_relation": {
            "is the red circle left of the blue square?": (
                "the red circle is at the top left and the blue square is in the middle so yes"
            ),
            "is the red cross above the blue square?": (
                "the red cross is at the bottom right and the blue square is in the middle so no"
            ),
        },
        "relation": {
            "is the red circle left of the blue square?": (
                "the red circle is at the top left and the blue square is in the middle so it is left of it and the answer is yes"
            ),
            "is the red cross above the blue square?": (
                "the red cross is at the bottom right and the blue square is in the middle so it is below it and the answer is no"
            ),
        },
        "position": {"where is the blue square?": "in the middle"},
        "background": {"what colour is the background?": "white"},
        "size": {"how big is the red cross?": "medium"},
        "colour": {"what colour is the thing at the top left?": "red", "what colour is the square?": "blue"},
        "shape": {"what is blue?": "square"},
    }
    generator = random.Random(0)
    for kind, answers in expected.items():
        asked = dict(language.question(generator, SCENE, kind) for _ in range(1500))
        assert answers.items() <= asked.items()
    # Two objects are red, so nothing asks for the red one.
    assert all(language.question(generator, SCENE, "shape")[0] != "what is red?" for _ in range(300))


def test_yes_and_no_are_as_frequent():
    answers = [case.answer.split()[-1] for case in ask_cases(800) if case.kind in ("exists", "relation")]
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


@pytest.mark.parametrize("task", MAKERS)
def test_the_collator_takes_the_samples_and_no_test_scene_is_in_them(task):
    generator = random.Random(0)
    for _ in range(50):
        for segment in sample_segments({"messages": MAKERS[task](generator)}):
            if segment.type != "text":
                assert not is_held_out(read(segment.content))
            else:
                assert not any(f"{colour} {shape}" in segment.content for colour, shape in UNSEEN_PAIRS)


def test_a_sample_follows_from_its_seed_and_number():
    for shares in (UNDERSTANDING, JOINT):
        assert sum(shares.values()) == pytest.approx(1)
        assert str(sample(1, shares, 7)).split("<PIL")[0] == str(sample(1, shares, 7)).split("<PIL")[0]
        assert len({str(sample(1, shares, index)) for index in range(20)}) == 20


def test_all_of_the_world_is_named():
    assert len(language.PLACES) == len(CELLS)
    assert language.THINGS_OF_COLOUR.keys() == COLOURS.keys()
    assert language.HINTS_OF_SHAPE.keys() == set(SHAPES)
    assert len(SIZES) == 3


@pytest.mark.parametrize("task", DECIDING)
def test_what_the_last_stage_learns_is_no_test_picture(task):
    """No picture of a training sample, drawn, seen or on the way to another, shows what is asked about in the tests."""
    for index in range(40):
        for message in MAKERS[task](random.Random(f"{task} {index}")):
            for part in message["content"]:
                if part["type"] == "image":
                    assert not is_held_out(read(part["image"]))


def test_steps_grow_to_the_whole():
    steps = language.steps(SCENE)
    assert steps[-1][1] == SCENE
    assert [len(scene.things) for _, scene in steps] == list(range(1, len(SCENE.things) + 1))
    wishes = tuple(
        replace(language.wish_for(SCENE), things=language.wish_for(SCENE).things[:count])
        for count in range(1, len(steps) + 1)
    )
    case = StepsCase("show the steps", wishes)
    pictures = [render(scene) for _, scene in steps]
    assert are_steps(pictures, case)
    assert not are_steps(pictures[:-1], case)
    assert not are_steps([*pictures[:-1], pictures[0]], case)
    moved = replace(steps[0][1].things[0], cell=(steps[0][1].things[0].cell + 1) % 9)
    assert not are_steps([render(Scene(SCENE.background, (moved,))), *pictures[1:]], case)


def test_a_relation_is_named_before_the_verdict():
    first, second = SCENE.things[:2]
    generator, answers = random.Random(0), {}
    for _ in range(300):
        asked, answer = language.question(generator, SCENE, "relation")
        answers[asked] = answer
    for asked, answer in answers.items():
        words = re.fullmatch(r"is the (\w+ \w+) (left of|right of|above|below) the (\w+ \w+)\?", asked)
        things = {f"{thing.colour} {thing.shape}": thing for thing in SCENE.things}
        holds = language.RELATIONS[words[2]](things[words[1]], things[words[3]])
        reason, verdict = re.search(r" so it is (.+) it and the answer is (yes|no)$", answer).groups()
        assert verdict == ("yes" if holds else "no")
        assert (reason == words[2]) is holds
        if not holds and not reason.startswith("neither"):
            assert language.RELATIONS[reason](things[words[1]], things[words[3]])


def test_requests_and_what_answers_them():
    cases = decide_cases(60)
    assert {case.kinds for case in cases} == {
        ("image",),
        ("image", "text"),
        ("text",),
        ("text", "image") * 2,
        ("text", "image") * 3,
    }
    assert all(is_held_out(case.scene) for case in cases if case.scene is not None)

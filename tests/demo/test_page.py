"""What the page shows and keeps, without a browser."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import gradio as gr
import PIL.Image
import pytest
from reader import read

from bagel_demo import create_page, views
from bagel_demo.choices import LIKE_THE_LAST, NO_PRESET, Choices, sizes
from bagel_demo.events import Events
from bagel_demo.talk import FORGOTTEN, STOPPED, Drawing, Picture, Talk, Turn, Words
from diffusers_bagel import PRESETS, SessionEvent
from diffusers_bagel.few_steps import FewSteps


CIRCLE = "a large red circle in the middle on a white background"


def said(text: str, **choices) -> Turn:
    return Turn(text, [], Choices(**{"steps": 12} | choices))


def shown(talk: Talk, engine, turn: Turn, after_each=lambda: None) -> Turn:
    async def listen() -> None:
        async for _ in talk.say(engine, turn):
            after_each()

    asyncio.run(listen())
    return turn


def things(picture: Picture) -> list[tuple[str, str]]:
    return [thing.pair for thing in read(PIL.Image.open(picture.file)).things]


def test_choices_are_settings_of_a_session():
    settings = Choices("Words", seed=5, steps=20, size="768 × 1024", temperature=0.5).settings()
    assert settings["output"] == "text"
    assert (settings["width"], settings["height"]) == (768, 1024)
    assert (settings["do_sample"], settings["temperature"]) == (True, 0.5)
    assert settings["generator"].initial_seed() == 5
    usual = Choices().settings()
    assert usual["width"] is usual["height"] is usual["preset"] is usual["image_guidance_scale"] is None
    assert not usual["do_sample"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_shown_as_it_is(name):
    chosen = Choices.of_preset(name)
    published = PRESETS[name].settings
    assert chosen.preset == name
    assert chosen.settings()["output"] == PRESETS[name].output
    assert chosen.steps == published.get("num_inference_steps", 49)
    assert chosen.settings()["do_sample"] == published["do_sample"]
    assert chosen.think == published["think"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_into_the_page(name, engine):
    """What its settings say passes the parts of the page that show them, and is what a session makes of the preset."""
    chosen = Choices.of_preset(name)
    blocks = create_page(engine).blocks.values()
    sliders = {block.label: block for block in blocks if isinstance(block, gr.Slider)}
    assert sliders["Tokens of a text, at most"].preprocess(chosen.max_new_tokens) == chosen.max_new_tokens
    assert sliders["Steps of a picture"].preprocess(chosen.steps) == chosen.steps
    config = engine.pipe.transformer.config
    assert chosen.max_new_tokens == PRESETS[name].of_session(config)["max_new_tokens"]


def test_no_preset_is_what_the_page_begins_with():
    assert Choices.of_preset(NO_PRESET) == Choices()


@pytest.mark.parametrize("name", [NO_PRESET, *PRESETS])
def test_a_model_of_few_steps_keeps_them_on_the_page(name):
    few_steps = FewSteps(3, [1.0, 0.6, 0.3], 1.0, 1.0, 3.0)
    chosen = Choices.of_preset(name, few_steps)
    assert (chosen.steps, chosen.guidance_scale, chosen.image_guidance_scale) == (3, 1.0, 1.0)
    assert chosen.max_new_tokens == Choices.of_preset(name).max_new_tokens


def test_the_page_begins_with_a_models_few_steps(engine, monkeypatch):
    monkeypatch.setattr(
        engine.pipe.transformer.config, "few_steps", FewSteps(3, [1.0, 0.6, 0.3], 1.0, 1.0, 3.0).merged()
    )
    sliders = {block.label: block for block in create_page(engine).blocks.values() if isinstance(block, gr.Slider)}
    assert (sliders["Steps of a picture"].value, sliders["Weight of the text"].value) == (3, 1.0)


def test_sizes_are_whole_numbers_of_tokens_and_named_once():
    assert sizes(1024, 16) == [LIKE_THE_LAST, "1024 × 1024", "1024 × 768", "768 × 1024", "1024 × 576", "576 × 1024"]
    assert sizes(64, 16) == [LIKE_THE_LAST, "64 × 64", "64 × 48", "48 × 64", "64 × 32", "32 × 64"]


@pytest.mark.parametrize(
    ("text", "thought", "words"),
    [
        ("", "", ""),
        ("yes", "", "yes"),
        ("<think>a red", "a red", ""),
        ("<think>a red one</think>", "a red one", ""),
        ("<think>a red one</think>\nit is red", "a red one", "it is red"),
    ],
)
def test_thoughts_and_words_are_told_apart_wherever_a_text_ends(text, thought, words):
    assert views.split_thought(text) == (thought, words)


def test_events_become_words_a_drawing_and_a_picture():
    turn, preview = said("steps", steps=8), PIL.Image.new("RGB", (64, 64))
    for event in (
        SessionEvent("text", text="first "),
        SessionEvent("text", text="this", is_whole=True),
        SessionEvent("text", text="then that", is_whole=True),
        SessionEvent("progress", step=2, steps=8),
        SessionEvent("preview", image=preview, step=3),
    ):
        turn.hear(event, now=1.0)
    assert turn.parts == [Words("first this", True), Words("then that", True), Drawing(1.0, 3, 8, preview)]
    picture = Picture(Path("one.png"), "steps", 0, (64, 64))
    turn.keep(picture)
    assert turn.parts[2:] == [picture]


def test_what_is_not_whole_is_dropped_in_the_end():
    turn = said("steps")
    picture = Picture(Path("one.png"), "steps", 0, (64, 64))
    turn.parts = [Words("whole", True), picture, Words("ha")]
    turn.end("Stopped.")
    assert turn.parts == [Words("whole", True), picture]
    assert "Stopped." in views.answer(turn)


def test_progress_tells_the_step_and_the_time_that_is_left():
    turn = said("a circle")
    assert "Reading" in views.progress(turn, 0.0)
    turn.parts = [Words("<think>a circle")]
    assert "Thinking" in views.progress(turn, 0.0)
    turn.parts = [Words("<think>a circle</think>it is")]
    assert "Writing" in views.progress(turn, 0.0)
    turn.parts = [Drawing(began=10.0, step=0, steps=50)]
    assert "Drawing: step 1 of 50<" in views.progress(turn, 10.0)
    turn.parts = [Drawing(began=10.0, step=10, steps=50)]
    assert 'value="11" max="50"' in views.progress(turn, 15.0)
    # Ten steps took five seconds, and 39 are left.
    assert "Drawing: step 11 of 50, 20 s left" in views.progress(turn, 15.0)
    assert "3 min left" in views.progress(turn, 60.0)


def test_nothing_that_is_said_or_answered_becomes_html_or_loads_anything():
    turn = said("<script>alert(1)</script>")
    picture = Picture(Path("/tmp/a b.png"), 'red" onerror="alert(1)', 3, (64, 64))
    words = "<img src=x onerror=alert(1)> ![a](http://example.com/a.png) [b](http://example.com) <http://example.com>"
    turn.parts = [Words(f"<think><b>bold</b></think>{words}", True), picture]
    html = views.conversation([turn])
    assert "<script" not in html and "<b>" not in html and "<img src=x" not in html
    assert 'onerror="' not in html
    assert 'href="http' not in html and 'src="http' not in html
    assert "file=/tmp/a%20b.png" in html


def test_markdown_of_an_answer_is_shown():
    turn = said("list")
    turn.parts = [Words("1. **red**\n2. blue", True)]
    assert "<li><strong>red</strong></li>" in "".join(views.answer(turn).splitlines())


def test_the_last_answer_can_be_run_again_once_it_is_there():
    turns = [said("one"), said("two")]
    assert views.conversation(turns).count('data-act="again"') == 1
    assert 'data-act="again"' not in views.conversation(turns, is_answering=True)


def test_a_picture_says_how_it_was_drawn(engine, tmp_path):
    turn = shown(Talk(tmp_path), engine, said(CIRCLE, seed=7))
    (picture,) = turn.parts
    with PIL.Image.open(picture.file) as image:
        assert image.info["prompt"] == CIRCLE
        assert image.info["model"] == "shapes/checkpoint"
        assert "transformers-bagel" in image.info["Software"]
        settings = json.loads(image.info["settings"])
    assert (settings["seed"], settings["steps"], settings["output"]) == (7, 12, "image")
    assert things(picture) == [("red", "circle")]
    # The same settings draw the same picture.
    again = shown(Talk(tmp_path), engine, said(CIRCLE, seed=settings["seed"]))
    assert PIL.Image.open(again.parts[0].file).tobytes() == PIL.Image.open(picture.file).tobytes()


def test_a_conversation_goes_on_behind_what_was_drawn(engine, tmp_path):
    talk = Talk(tmp_path)
    shown(talk, engine, said(CIRCLE))
    answer = shown(talk, engine, said("what colour is the circle?", output="Words"))
    assert [part.text for part in answer.parts] == ["red"]


def test_a_turn_is_taken_back_once_however_often_it_is_asked_for(engine, tmp_path):
    """Also while the conversation is being put away."""
    talk = Talk(tmp_path)
    talk.turns = [said("one"), said("two")]
    events = Events(engine, None, tmp_path)

    async def click_twice() -> Turn:
        async with talk._lock:
            first = asyncio.create_task(talk.again(engine.pipe))
            await asyncio.sleep(0)
            with pytest.raises(gr.Error, match="Stop the answer first"):
                events._check_idle(talk)
        return await first

    assert asyncio.run(click_twice()).text == "two"
    assert [turn.text for turn in talk.turns] == ["one"] and not talk.is_answering


def test_a_stopped_message_of_which_nothing_is_whole_is_forgotten(engine, tmp_path):
    talk = Talk(tmp_path)
    shown(talk, engine, said(CIRCLE))
    stopped = shown(talk, engine, said("make the red circle green", steps=100), after_each=talk.stop)
    assert (stopped.parts, stopped.note, stopped.is_remembered) == ([], FORGOTTEN, False)
    answer = shown(talk, engine, said("what colour is the circle?", output="Words"))
    assert [part.text for part in answer.parts] == ["red"]


def test_a_stopped_answer_keeps_what_is_whole(engine, tmp_path):
    talk = Talk(tmp_path)
    request = said("show the steps: a red circle at the top and a blue star at the left on yellow", output="Auto")

    def stop_at_the_first_picture() -> None:
        if talk.pictures:
            talk.stop()

    shown(talk, engine, request, stop_at_the_first_picture)
    assert (request.note, request.is_remembered) == (STOPPED, True)
    assert [type(part) for part in request.parts][:2] == [Words, Picture]
    assert len(talk.pictures) == 1


def test_what_cannot_be_answered_is_told_and_forgotten(engine, tmp_path):
    talk = Talk(tmp_path)
    turn = shown(talk, engine, said("a circle " * 3000))
    assert "positions" in turn.note
    assert not turn.is_remembered
    assert not talk.is_answering
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    turn = shown(talk, engine, Turn("what is it?", [broken], Choices("Words")))
    # Nothing of where it lies is told.
    assert turn.note == "'broken.png' cannot be read as a picture."
    assert not turn.is_remembered


def test_running_again_forgets_the_last_turn_and_keeps_its_picture(engine, tmp_path):
    talk = Talk(tmp_path)
    shown(talk, engine, said(CIRCLE))
    # Also behind a while in which nobody looked.
    asyncio.run(talk.leave())
    again = asyncio.run(talk.again(engine.pipe))
    assert (again.text, talk.turns) == (CIRCLE, [])
    turn = shown(talk, engine, said(CIRCLE))
    assert talk.turns == [turn]
    assert len(talk.pictures) == 2
    # As a first drawing does, not as one behind another.
    pixels = [PIL.Image.open(picture.file).tobytes() for picture in talk.pictures]
    assert pixels[0] == pixels[1]


def test_a_new_conversation_knows_nothing_and_keeps_all_pictures(engine, tmp_path):
    talk = Talk(tmp_path)
    shown(talk, engine, said(CIRCLE))
    asyncio.run(talk.leave())
    asyncio.run(talk.clear())
    shown(talk, engine, said(CIRCLE))
    assert len(talk.turns) == 1
    pixels = [PIL.Image.open(picture.file).tobytes() for picture in talk.pictures]
    assert pixels[0] == pixels[1]


def test_whoever_comes_back_goes_on(engine, tmp_path):
    talk = Talk(tmp_path)
    shown(talk, engine, said(CIRCLE))
    asyncio.run(talk.leave())
    assert talk.is_left
    answer = shown(talk, engine, said("what colour is the circle?", output="Words"))
    assert [part.text for part in answer.parts] == ["red"]
    assert not talk.is_left
    talk.close()
    assert not talk.folder.exists()


def test_a_closed_page_ends_its_answer(engine, tmp_path):
    talk = Talk(tmp_path)

    async def close_early() -> None:
        answers = talk.say(engine, said(CIRCLE, steps=100))
        await anext(answers)
        await answers.aclose()
        await talk.leave()
        assert not talk.is_answering

    asyncio.run(asyncio.wait_for(close_early(), 10))
    assert engine.stats().running == 0

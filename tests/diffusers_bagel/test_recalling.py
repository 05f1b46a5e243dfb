"""Conversations that were led elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from diffusers_bagel import PROTOCOLS, BagelSession
from diffusers_bagel.recalling import Turn, is_as_recalled, kept_bytes, turns_of
from tests.conftest import golden_image

from .conftest import seeded


DRAWING = {"height": 48, "width": 64, "num_inference_steps": 3, "vae_sample_mode": "argmax"}


def led(pipe) -> BagelSession:
    """A session of several turns, with words and pictures."""
    session = BagelSession(pipe)
    session.send([golden_image("wide"), "look"], output="text", max_new_tokens=4, vae_sample_mode="argmax")
    session.send("a circle", output="image", generator=seeded(1), **DRAWING)
    session.send("what is it?", output="text", max_new_tokens=4)
    return session


@pytest.mark.parametrize("output", ["text", "image", "interleaved"])
def test_a_session_goes_on_as_the_one_that_was_led(output, pipe):
    session, other = led(pipe), BagelSession(pipe)
    other.recall(session.messages)
    settings = {"output": output, "max_new_tokens": 6, "max_images": 1, **DRAWING}
    one, two = (each.send("and now?", generator=seeded(3), **settings) for each in (session, other))
    assert one.text == two.text
    for mine, its in zip(one.images, two.images, strict=True):
        assert np.abs(np.asarray(mine, int) - np.asarray(its, int)).max() <= 1
    assert len(other.messages) == len(session.messages)


def test_others_than_the_assistant_are_one_turn():
    text = {"type": "text", "text": "x"}
    messages = [
        {"role": role, "content": "x"} for role in ("system", "user", "assistant", "assistant", "user", "developer")
    ]
    assert turns_of(messages) == [Turn((text, text), (text, text)), Turn((text, text))]
    assert turns_of([{"role": "assistant", "content": "x"}]) == [Turn((), (text,))]


def test_thoughts_tell_for_what_was_thought():
    picture = {"type": "image", "image": None}

    def answer(*parts):
        return Turn((), tuple({"type": "text", "text": part} if isinstance(part, str) else part for part in parts))

    assert answer("x").thought is None
    assert answer("<think>x</think>y").thought == "text"
    assert answer("<think>x</think>", picture).thought == "image"
    assert answer("<think>x</think>y", picture).thought == "text"
    assert answer("<think>x</think>", picture, "x").thought == "text"


def test_what_would_be_recalled_otherwise_is_known(pipe):
    session = BagelSession(pipe)
    session.send("x", output="text", max_new_tokens=4)
    (turn,) = turns_of(session.messages)
    assert is_as_recalled(session, turn)
    assert not is_as_recalled(session, Turn(turn.given, ({"type": "text", "text": "other"},)))
    assert not is_as_recalled(session, Turn(turn.given, turn.answer * 2))
    # It was asked to think, and did not.
    session.send("x", output="text", max_new_tokens=4, think=True)
    assert not is_as_recalled(session, turns_of(session.messages)[-1])


@pytest.mark.parametrize(("resize_before_vit", "is_same"), [(None, True), (True, True), (False, False)])
def test_an_image_that_was_resized_otherwise_is_known(resize_before_vit, is_same, pipe):
    """Also where it has the same size either way."""
    image = golden_image("wide").resize((100, 100))
    session = BagelSession(pipe)
    images_kwargs = {} if resize_before_vit is None else {"resize_before_vit": resize_before_vit}
    session.send([image, "x"], output="text", max_new_tokens=4, images_kwargs=images_kwargs)
    (turn,) = turns_of(session.messages)
    other = BagelSession(pipe)
    other.recall(session.messages)
    grids = [each._said.turns[0][0].vit.grid for each in (session, other)]
    assert grids[0] == grids[1]
    assert is_as_recalled(session, turn) is is_same


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name != "plain"])
def test_a_protocols_own_ways_are_known_to_differ_or_are_recalled(name, pipe):
    session = BagelSession(pipe, name)
    session.send("x", output="interleaved", max_new_tokens=4, max_images=1, generator=seeded(1), **DRAWING)
    (turn,) = turns_of(session.messages)
    other = BagelSession(pipe, name)
    other.recall(session.messages)
    tokens = [
        [list(map(len, track.segments_of(part))) for part in ("full", "no_text", "no_image")]
        for track in (session._said.drawn_from, other._said.drawn_from)
    ]
    assert is_as_recalled(session, turn) is (tokens[0] == tokens[1])


def test_what_a_session_keeps_is_counted(pipe):
    session = BagelSession(pipe)
    assert kept_bytes(session) == 0
    session.send([golden_image("wide"), "look"], output="text", max_new_tokens=4)
    image = golden_image("wide")
    assert kept_bytes(session) > 3 * image.width * image.height
    assert kept_bytes(session.fork()) == kept_bytes(session)

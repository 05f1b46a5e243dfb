"""What each part of a sample becomes: condition or target, clean copy or not, droppable or not."""

from __future__ import annotations

import pytest

from tests.conftest import golden_image, training_samples, turn
from transformers_bagel.segments import sample_segments


SHORT = {"text": "text", "vit_image": "vit", "vae_image": "vae"}
IMAGE, OTHER = golden_image("square"), golden_image("wide")


def seen(sample: dict) -> list[str]:
    """Segments as words: `+` is learned, `?` may be dropped."""
    return [SHORT[segment.type] + "+" * segment.loss + "?" * segment.dropout for segment in sample_segments(sample)]


def image(**overrides) -> dict:
    return {"type": "image", "image": IMAGE, **overrides}


def text(content: str = "x", **overrides) -> dict:
    return {"type": "text", "text": content, **overrides}


# Messages, and what they become.
CONVERSATIONS = {
    "an_answer": ([turn("user", "a"), turn("assistant", "b")], "text text+"),
    "an_answer_about_an_image": ([turn("user", IMAGE, "a"), turn("assistant", "b")], "vit text text+"),
    "a_drawing": ([turn("user", "a"), turn("assistant", IMAGE)], "text? vae+"),
    "a_drawing_without_a_prompt": ([turn("assistant", IMAGE)], "vae+"),
    "a_system_prompt": ([turn("system", "s"), turn("user", "a"), turn("assistant", IMAGE)], "text? text? vae+"),
    "an_edit": ([turn("user", IMAGE, "a"), turn("assistant", OTHER)], "vae? vit? text? vae+"),
    "an_edit_of_two": (
        [turn("user", IMAGE, OTHER, "a"), turn("assistant", OTHER)],
        "vae? vit? vae? vit? text? vae+",
    ),
    "a_drawing_talked_about": (
        [turn("user", "a"), turn("assistant", IMAGE), turn("user", "b"), turn("assistant", "c")],
        # Nothing is drawn after the copy: guidance never drops it.
        "text? vae+ vae vit text text+",
    ),
    "a_drawing_before_a_last_question": (
        [turn("user", "a"), turn("assistant", IMAGE), turn("user", "b")],
        "text? vae+ vae vit text",
    ),
    "a_drawing_edited": (
        [turn("user", "a"), turn("assistant", IMAGE), turn("user", "b"), turn("assistant", OTHER)],
        "text? vae+ vae? vit? text? vae+",
    ),
    "an_interleaved_answer": (
        [turn("user", "a"), turn("assistant", "b", IMAGE, "c", OTHER)],
        "text? text+ vae+ vae? vit? text+ vae+",
    ),
    "two_images_in_one_message": (
        [turn("user", "a"), turn("assistant", IMAGE, OTHER)],
        "text? vae+ vae? vit? vae+",
    ),
    "one_image_twice_in_one_message": (
        [turn("user", "a"), turn("assistant", IMAGE, IMAGE)],
        "text? vae+ vae? vit? vae+",
    ),
    "a_plan_before_the_drawing": ([turn("user", "a"), turn("assistant", "plan", IMAGE)], "text? text+ vae+"),
    "a_question_image_after_the_drawing": (
        # The sample draws, so all its images condition in both ways, wherever they stand.
        [turn("user", "a"), turn("assistant", IMAGE), turn("user", OTHER, "b"), turn("assistant", "c")],
        "text? vae+ vae vit vae vit text text+",
    ),
    "contents_as_strings": (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "text text+",
    ),
    "an_empty_text": ([turn("user", ""), turn("assistant", "b")], "text text+"),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_roles_decide_what_is_learned(name):
    messages, expected = CONVERSATIONS[name]
    assert seen({"messages": messages}) == expected.split()


# Messages with overrides, and what they become.
OVERRIDES = {
    "assistant_text_not_learned": (
        [turn("user", "a"), turn("assistant", text(loss=False), text())],
        "text text text+",
    ),
    "user_text_learned": ([turn("user", text(loss=True))], "text+"),
    "assistant_image_not_learned": (
        # No image is learned, so the sample does not draw: the ViT tokens suffice.
        [turn("assistant", image(loss=False)), turn("assistant", "b")],
        "vit text+",
    ),
    "user_image_learned": ([turn("user", "a", image(loss=True))], "text? vae+"),
    "user_image_learned_and_answered": (
        [turn("user", image(loss=True)), turn("assistant", "b")],
        "vae+ vae vit text+",
    ),
    "condition_without_vae": ([turn("user", image(vae=False), "a"), turn("assistant", IMAGE)], "vit? text? vae+"),
    "condition_without_vit": ([turn("user", image(vit=False), "a"), turn("assistant", IMAGE)], "vae? text? vae+"),
    "condition_without_either": (
        [turn("user", image(vae=False, vit=False), "a"), turn("assistant", IMAGE)],
        "text? vae+",
    ),
    "understanding_with_vae": ([turn("user", image(vae=True), "a"), turn("assistant", "b")], "vae vit text text+"),
    "drawing_given_back_without_vit": (
        [turn("assistant", image(vit=False)), turn("user", "a"), turn("assistant", OTHER)],
        "vae+ vae? text? vae+",
    ),
    "last_drawing_is_never_given_back": (
        [turn("user", "a"), turn("assistant", image(vae=True, vit=True))],
        "text? vae+",
    ),
    "text_never_dropped": ([turn("user", text(dropout=False)), turn("assistant", IMAGE)], "text vae+"),
    "image_never_dropped": (
        [turn("user", image(dropout=False), "a"), turn("assistant", IMAGE)],
        "vae vit text? vae+",
    ),
    "text_dropped_without_drawing": ([turn("user", text(dropout=True)), turn("assistant", "b")], "text? text+"),
    "what_is_learned_is_never_dropped": (
        [turn("user", "a"), turn("assistant", text(dropout=True), image(dropout=True))],
        "text? text+ vae+",
    ),
    "none_is_no_override": (
        # `datasets` gives every part the keys of all parts.
        [
            turn("user", image(text=None, loss=None, vae=None, vit=None, dropout=None), text("a", image=None)),
            turn("assistant", image(text=None, loss=None, vae=None, vit=None, dropout=None)),
        ],
        "vae? vit? text? vae+",
    ),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_parts_override_their_place(name):
    messages, expected = OVERRIDES[name]
    assert seen({"messages": messages}) == expected.split()


def test_contents_keep_their_order():
    (sample,) = training_samples("chat")
    segments = sample_segments(sample)
    texts = [segment.content for segment in segments if segment.type == "text"]
    assert texts == ["a red circle", "here", "make it wide", "what is it?", "a wide circle"]
    images = [segment.content for segment in segments if segment.type != "text"]
    square, wide = (sample["messages"][turn_]["content"][-1]["image"] for turn_ in (1, 3))
    # Drawn, given back as latents, given back as ViT tokens: one image, not copies of it.
    assert [item is square for item in images] == [True] * 3 + [False] * 3
    assert [item is wide for item in images] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("key", ["image", "url", "path", "base64"])
def test_an_image_is_found_under_each_key(key):
    part = {"type": "image", key: "somewhere.png"}
    segments = sample_segments({"messages": [turn("user", part, "a"), turn("assistant", "b")]})
    assert segments[0].content == "somewhere.png"


def test_the_column_images_fills_empty_parts_in_order():
    empty = {"type": "image"}
    sample = {
        "messages": [turn("user", empty, "a", {**empty, "image": None}), turn("assistant", empty)],
        "images": [IMAGE, OTHER, OTHER],
    }
    images = [segment.content for segment in sample_segments(sample) if segment.type == "vae_image"]
    assert [item is IMAGE for item in images] == [True, False, False]
    # The sample still belongs to its user.
    assert sample["messages"][0]["content"][0] == {"type": "image"}
    assert len(sample["images"]) == 3


def test_a_part_with_its_own_image_takes_none_of_the_column():
    sample = {
        "messages": [turn("user", OTHER, {"type": "image"}, "a"), turn("assistant", "b")],
        "images": [IMAGE],
    }
    assert [segment.content is IMAGE for segment in sample_segments(sample)[:2]] == [False, True]


@pytest.mark.parametrize("given", [IMAGE, "somewhere.png"])
def test_the_column_images_may_hold_one_image(given):
    sample = {"messages": [turn("user", {"type": "image"}, "a"), turn("assistant", "b")], "images": given}
    assert sample_segments(sample)[0].content is given


@pytest.mark.parametrize("given", [None, []])
def test_text_samples_of_a_table_with_images(given):
    assert seen({**training_samples("talk")[0], "images": given, "segments": None}) == ["text", "text+"]


@pytest.mark.parametrize(("given", "word"), [([], "fewer"), ([IMAGE], "fewer"), ([IMAGE] * 3, "1 more")])
def test_the_column_images_must_fit(given, word):
    empty = {"type": "image"}
    sample = {"messages": [turn("user", empty, empty), turn("assistant", "b")], "images": given}
    with pytest.raises(ValueError, match=rf"`images` holds {len(given)} images, {word}"):
        sample_segments(sample)


def test_spelled_out_segments_stand_as_they_are():
    sample = {
        "segments": [
            {"type": "vit_image", "image": IMAGE},
            {"type": "text", "text": "a", "dropout": False},
            {"type": "vae_image", "image": IMAGE, "loss": True},
            {"type": "vae_image", "image": IMAGE, "loss": 0},
            {"type": "text", "text": "b", "loss": None},
            {"type": "vae_image", "image": IMAGE, "loss": 1, "dropout": True},
            {"type": "text", "text": "c", "dropout": True},
            {"type": "vit_image", "image": IMAGE},
        ]
    }
    assert seen(sample) == ["vit?", "text", "vae+", "vae?", "text?", "vae+", "text?", "vit"]


REFUSED = {
    "no_dict": ([turn("user", "a")], TypeError, "must be a dict"),
    "no_keys": ({"text": "a"}, ValueError, "either `messages` or `segments`"),
    "both_keys": (
        {"messages": [turn("assistant", "a")], "segments": [text(loss=True)]},
        ValueError,
        "either `messages` or `segments`",
    ),
    "no_messages": ({"messages": []}, ValueError, "empty"),
    "messages_of_a_string": ({"messages": "hello"}, TypeError, "list of messages"),
    "no_target": ({"messages": [turn("user", "a", IMAGE)]}, ValueError, "no target"),
    "all_targets_switched_off": ({"messages": [turn("assistant", text(loss=False))]}, ValueError, "no target"),
    "unknown_role": ({"messages": [turn("robot", "a")]}, ValueError, "unknown role 'robot'"),
    "unknown_part": ({"messages": [turn("assistant", {"type": "audio", "audio": "a"})]}, ValueError, "audio"),
    "image_without_image": (
        {"messages": [turn("user", {"type": "image"}), turn("assistant", "b")]},
        ValueError,
        "image",
    ),
    "text_without_text": ({"messages": [turn("assistant", {"type": "text", "text": None})]}, ValueError, "text"),
    "message_without_content": ({"messages": [{"role": "assistant"}]}, ValueError, "without content"),
    "nothing_said": ({"messages": [{"role": "assistant", "content": None}]}, ValueError, "no target"),
    "segments_of_a_string": ({"segments": "text"}, TypeError, "list of dicts"),
    "no_segments": ({"segments": []}, TypeError, "list of dicts"),
    "unknown_segment": ({"segments": [{"type": "image", "image": IMAGE, "loss": True}]}, ValueError, "vae_image"),
    "segment_without_text": ({"segments": [{"type": "text", "loss": True}]}, ValueError, "without its text"),
    "segment_of_a_number": ({"segments": [{"type": "text", "text": 3, "loss": True}]}, ValueError, "without its text"),
    "segment_without_image": ({"segments": [{"type": "vae_image", "loss": True}]}, ValueError, "without its image"),
    "learned_vit": ({"segments": [{"type": "vit_image", "image": IMAGE, "loss": True}]}, ValueError, "vit_image"),
    "segments_without_target": ({"segments": [text()]}, ValueError, "no target"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_samples_are_refused(name):
    sample, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        sample_segments(sample)

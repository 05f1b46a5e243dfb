"""What follows a part of an answer is learned: a picture, a text, or the end."""

from __future__ import annotations

import json

import pytest
import torch

from tests.conftest import CHECKPOINT, GOLDEN, edges, golden_image, load_model, load_processor, turn
from transformers_bagel import BagelDataCollator
from transformers_bagel.segments import END_OF_TEXT, IGNORED_LABEL, START, VISION_START, sample_segments
from transformers_bagel.training.losses import next_labels


# Fine-tunes that learn what follows a text, and those that do not.
LEARNS = {"zebra": "text", "sot": "text", "canvas": "text", "thinkmorph": "none", "twiff": "none"}
TRACES = {name: json.loads((GOLDEN.parent / "interleave" / f"{name}.json").read_text("utf-8")) for name in LEARNS}
SAMPLES = [(name, index) for name, trace in TRACES.items() for index in range(len(trace["training"]))]
# Tokens of the three images, with their markers.
IMAGES = {
    "vae_image": {42: "wide", 30: "tall", 18: "square"},
    "vit_image": {62: "wide", 42: "tall", 27: "square"},
}
# The fine-tunes train on the ViT's tokens of the image itself, and answer, as we do both, with those of the resized one.
RESIZED = {62: 56}


def as_messages(segments: list[dict]) -> list[dict]:
    """The conversation whose parts are these segments: what is learned the assistant says, all else the user."""
    parts: list[tuple[str, object]] = []
    for index, segment in enumerate(segments):
        kind, before = segment["type"], segments[index - 1] if index else {"type": "text", "loss": 0}
        if kind == "text":
            parts.append(("assistant" if segment["loss"] else "user", segment["text"]))
            continue
        image = golden_image(IMAGES[kind][segment["length"]])
        if segment["loss"]:
            parts.append(("assistant", image))
        elif before["type"] == "text":
            parts.append(("user", {"type": "image", "image": image, "vae": kind == "vae_image"}))
    return [turn(role, part) for role, part in parts]


def joined(messages: list[dict]) -> list[dict]:
    """Messages of one role one after the other as one."""
    result: list[dict] = []
    for message in messages:
        if result and result[-1]["role"] == message["role"]:
            result[-1]["content"] += message["content"]
        else:
            result.append(message)
    return result


@pytest.fixture(scope="module")
def collate(vae):
    trace = TRACES["canvas"]
    sizes = {"size": edges(trace["vit_transform"]), "vae_size": edges(trace["vae_transform"])}
    processor = load_processor(CHECKPOINT, **sizes)

    def collator(**settings) -> BagelDataCollator:
        dropout = dict.fromkeys(("text_dropout", "vit_dropout", "vae_dropout"), 0.0)
        return BagelDataCollator(processor, vae=vae, **dropout | settings)

    return collator


@pytest.fixture(scope="module")
def ids(collate) -> dict[str, int]:
    tokenizer = collate().processor.tokenizer
    return {token: tokenizer.convert_tokens_to_ids(token) for token in (START, VISION_START, END_OF_TEXT)}


@pytest.mark.parametrize("one_turn", [False, True], ids=["a message a part", "one answer"])
@pytest.mark.parametrize(("name", "index"), SAMPLES)
def test_fine_tunes_own_samples(name, index, one_turn, collate, ids):
    """Tokens, positions and labels are those of the fine-tune's own code; it has no label where ours has the end."""
    segments = TRACES[name]["training"][index]["segments"]
    messages = as_messages(segments)
    batch = collate(next_action=LEARNS[name])([{"messages": joined(messages) if one_turn else messages}])
    learns_end = LEARNS[name] == "text"
    labels, start = next_labels(batch["labels"])[0].tolist(), 0
    for segment in segments:
        length = (
            RESIZED.get(segment["length"], segment["length"]) if segment["type"] == "vit_image" else segment["length"]
        )
        own, start = slice(start, start + length), start + length
        first, last = segment["positions"]
        assert batch["position_ids"][0, own][[0, -1]].tolist() == [first, last]
        expected = segment.get("labels", [IGNORED_LABEL] * length)
        if segment["type"] == "text":
            assert batch["input_ids"][0, own].tolist() == segment["token_ids"]
        if segment is segments[-1] and learns_end:
            expected = [*expected[:-1], ids[END_OF_TEXT]]
        assert labels[own] == expected
    assert batch["input_ids"].shape == (1, start + learns_end)


def kinds(batch, ids: dict[str, int]) -> list[str]:
    """What is learned to follow, in order: of the first token of each segment, and of the end."""
    names = {ids[START]: "text", ids[VISION_START]: "picture", ids[END_OF_TEXT]: "end"}
    return [names[label] for label in batch["labels"][0].tolist() if label in names]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["a plan", "square"], ["picture"]),
        (["square", "one thing"], ["end"]),
        (["first", "square", "then", "tall", "done"], ["picture", "picture", "end"]),
        (["so", "and so", "square"], ["text", "picture"]),
        (["only words"], []),
        (["square"], []),
    ],
)
def test_texts_of_answers_with_pictures(parts, expected, collate, ids):
    content = [golden_image(part) if part in ("square", "tall") else part for part in parts]
    batch = collate()([{"messages": [turn("user", "a question"), turn("assistant", *content)]}])
    assert kinds(batch, ids) == expected


def test_an_answer_ends_where_the_user_speaks_again(collate, ids):
    """The end is learned where the next turn begins, whose own token stays what it is."""
    conversation = [turn("user", "draw"), turn("assistant", golden_image("square"), "a square")]
    batch = collate()([{"messages": [*conversation, turn("user", "how many?"), turn("assistant", "one")]}])
    assert kinds(batch, ids) == ["end"]
    place = int((batch["labels"][0] == ids[END_OF_TEXT]).nonzero()[0])
    assert batch["input_ids"][0, place] == ids[START]
    assert ids[END_OF_TEXT] not in batch["input_ids"]


def test_all_actions(collate, ids):
    """What an answer begins with, and what follows a picture that is not drawn here."""
    seen = {"type": "image", "image": golden_image("square"), "loss": False, "vae": False}
    collator = collate(next_action="all")
    assert kinds(collator([{"messages": [turn("user", "how many?"), turn("assistant", "one")]}]), ids) == [
        "text",
        "end",
    ]
    drawn = [turn("user", "draw"), turn("assistant", golden_image("square"))]
    assert kinds(collator([{"messages": drawn}]), ids) == ["picture"]
    told = [turn("user", "draw, then count"), turn("assistant", seen, "one")]
    assert kinds(collator([{"messages": told}]), ids) == ["picture", "text", "end"]
    # A sample may teach nothing but this.
    assert kinds(collator([{"messages": [turn("user", "draw"), turn("assistant", seen)]}]), ids) == ["picture", "end"]


def test_noised_copies_are_announced_once(collate, ids):
    answer = turn("assistant", "first", golden_image("square"), "done")
    batch = collate(noised_copies=3)([{"messages": [turn("user", "draw"), answer]}])
    assert kinds(batch, ids) == ["picture", "end"]


def test_what_follows_a_picture_is_learned_from_its_clean_copy(collate, ids):
    """The last picture of a sample has one only if what follows it is asked for; noised ones announce nothing."""
    last = {"type": "image", "image": golden_image("square"), "next_action": True}
    collator = collate(next_action="all", noised_copies=3)
    assert kinds(collator([{"messages": [turn("user", "draw"), turn("assistant", last)]}]), ids) == ["picture", "end"]
    unseen = {"type": "image", "image": golden_image("square"), "vae": False, "vit": False}
    answer = turn("assistant", unseen, "one thing")
    assert kinds(collator([{"messages": [turn("user", "draw"), answer]}]), ids) == ["picture", "end"]
    noised = {"type": "vae_image", "image": golden_image("square"), "loss": True, "next_action": True}
    with pytest.raises(ValueError, match="noised latents with `next_action`"):
        collator([{"segments": [noised, {"type": "text", "text": "so"}]}])


def test_an_image_that_nobody_sees(collate, ids):
    """It leaves nothing behind which something could be learned, nor does the text before it learn about it."""
    hidden = {"type": "image", "image": golden_image("square"), "vit": False}
    sample = {"messages": [turn("user", hidden, "how many?"), turn("assistant", "one")]}
    assert kinds(collate(next_action="all")([sample]), ids) == ["text", "end"]
    alone = {"messages": [turn("user", hidden), turn("assistant", "one")]}
    assert kinds(collate(next_action="all")([alone]), ids) == ["end"]


def test_the_end_counts_whatever_was_dropped(collate):
    """A sample that is too long is so in every epoch."""
    sample = {"messages": [turn("user", "draw"), turn("assistant", golden_image("square"), "one thing")]}
    collator = collate(next_action="all")
    length = collator.encode(sample, 0).whole_length
    assert length == len(collator.encode(sample, 0))
    assert collate(next_action="all", text_dropout=1.0).encode(sample, 0).whole_length == length


def test_nothing_is_learned_where_the_question_was_dropped(collate, ids):
    """Without what was asked, what follows cannot be known."""
    answer = turn("assistant", golden_image("square"), "one thing")
    sample = {"messages": [turn("user", "draw, then count"), answer]}
    assert kinds(collate(next_action="all")([sample]), ids) == ["picture", "text", "end"]
    assert kinds(collate(next_action="all", text_dropout=1.0)([sample]), ids) == []
    edit = {"messages": [turn("user", "edit", golden_image("wide")), answer]}
    collator = collate(next_action="all", vit_dropout=1.0, vae_dropout=1.0)
    assert kinds(collator([edit]), ids) == ["text", "end"]


def test_spelled_out_segments_may_ask_for_it(collate, ids):
    parts = [
        {"type": "text", "text": "so", "loss": True, "next_action": True},
        {"type": "vae_image", "image": golden_image("square"), "loss": True},
    ]
    assert kinds(collate()([{"segments": parts}]), ids) == ["picture"]
    assert kinds(collate()([{"segments": [{**parts[0], "next_action": None}, parts[1]]}]), ids) == []


def test_loss_of_the_next_action(collate, ids):
    """The label is one more token of the loss of the texts."""
    sample = {"messages": [turn("user", "draw"), turn("assistant", "first", golden_image("square"))]}
    batches = [collate(next_action=choice, vae_sample_mode="argmax")([sample]) for choice in ("none", "text")]
    model = load_model()
    losses = [model(**batch).ce_loss.item() for batch in batches]
    counts = [int((batch["labels"] != IGNORED_LABEL).sum()) for batch in batches]
    assert counts[1] == counts[0] + 1
    with torch.no_grad():
        # Of the text alone, whose last token predicts what follows.
        text = {
            name: batches[1][name][:, : counts[0] + 9] for name in ("input_ids", "mm_token_type_ids", "position_ids")
        }
        place = int((batches[1]["labels"][0] == ids[VISION_START]).nonzero()[0])
        scores = model(**{name: value[:, :place] for name, value in text.items()}).logits[0, -1].float()
    expected = -scores.log_softmax(-1)[ids[VISION_START]]
    assert counts[1] * losses[1] - counts[0] * losses[0] == pytest.approx(float(expected), abs=1e-4)


def test_unknown_choice(collate):
    with pytest.raises(ValueError, match="`next_action` must be one of text, all, none, got 'always'"):
        collate(next_action="always")


def test_a_sample_without_target_is_still_refused():
    with pytest.raises(ValueError, match="no target"):
        sample_segments({"messages": [turn("user", "a question")]})

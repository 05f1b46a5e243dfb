"""A chat reads each turn once, remembers what was said, and survives what it cannot take."""

from __future__ import annotations

import io
import sys

import pytest
import torch

from bagel_cli import main
from bagel_cli.conversation import Conversation
from bagel_cli.files import CommandError, typed_paths
from tests.conftest import CHECKPOINT, golden_image
from transformers_bagel import BagelProcessor


TURNS = [(["square"], "what is it?"), ([], "and its colour?"), (["wide", "tall"], "which of these?"), ([], "why?")]
GREEDY = {"do_sample": False, "max_new_tokens": 6, "raw_tokens": False}


@pytest.mark.parametrize("think", [False, True])
def test_every_turn_is_answered_as_if_all_was_read_at_once(think, model, processor):
    read, features = [], {}
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: read.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    conversation = Conversation(model, processor)
    for names, text in TURNS:
        images = [golden_image(name) for name in names]
        conversation.send(images, text, think=think, **GREEDY)
        for name, value in (processor.image_processor(images, return_tensors="pt") if images else {}).items():
            features[name] = torch.cat([features[name], value]) if name in features else value
        prompt = conversation.ids[:, : conversation.prompt_length]
        counted = len(read)
        expected = model.generate(
            input_ids=prompt,
            mm_token_type_ids=conversation.types[:, : prompt.shape[1]],
            attention_mask=torch.ones_like(prompt),
            pixel_values=features["pixel_values"],
            image_grid_hw=features["image_grid_hw"],
            do_sample=False,
            max_new_tokens=6,
        )
        del read[counted:]
        assert torch.equal(conversation.ids[:, : expected.shape[1]], expected)
    hook.remove()
    # The last token of each answer is read with the next turn.
    assert conversation.ids.shape[1] - 2 <= sum(read) <= conversation.ids.shape[1]
    assert model.get_input_embeddings().num_embeddings > conversation.ids.max()


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(model, processor, monkeypatch):
    def answers(fails: bool) -> torch.Tensor:
        conversation = Conversation(model, processor)
        conversation.send([golden_image("square")], "what is it?", think=False, **GREEDY)
        if fails:
            with monkeypatch.context() as patch:
                patch.setattr(model, "generate", lambda **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    conversation.send([golden_image("wide")], "and this?", think=False, **GREEDY)
            # Of the published sizes, which are too large for the tiny model.
            conversation.processor = BagelProcessor.from_pretrained(CHECKPOINT)
            with pytest.raises(ValueError, match="position table"):
                conversation.send([golden_image("wide")], "x", think=False, **GREEDY)
            conversation.processor = processor
        conversation.send([golden_image("tall")], "why?", think=False, **GREEDY)
        return conversation.ids

    assert torch.equal(answers(fails=True), answers(fails=False))


@pytest.mark.parametrize(
    ("typed", "paths"),
    [
        ("a.png", ["a.png"]),
        ("'my picture.png'", ["my picture.png"]),
        ('"my picture.png" b.png', ["my picture.png", "b.png"]),
        ("my\\ picture.png", ["my picture.png"]),
        ("my picture.png", ["my picture.png"]),
        ("it's mine.png", ["it's mine.png"]),
        ("~/a.png", ["~/a.png"]),
    ],
)
def test_paths_are_typed_as_they_are_or_as_in_a_shell(typed, paths, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my picture.png", "it's mine.png"):
        (tmp_path / name).touch()
    assert typed_paths(typed) == paths


@pytest.mark.parametrize("typed", ["", "'a.png", '"'])
def test_paths_that_cannot_be_read_are_told(typed):
    with pytest.raises(CommandError, match="/image"):
        typed_paths(typed)


def test_a_chat_goes_on_after_a_message_that_cannot_be_taken(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    golden_image("square").save(tmp_path / "my picture.png")
    (tmp_path / "broken.png").write_bytes(b"PNG")
    image = "/image '~/my picture.png'"
    lines = ["hello", "/image ~/broken.png", image, "what?", "and now?", "/image", "/new", image, "what?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    sent = []
    send = Conversation.send
    monkeypatch.setattr(
        Conversation,
        "send",
        lambda self, images, *args, **kwargs: sent.append(len(images)) or send(self, images, *args, **kwargs),
    )
    assert main(["chat", "--model", str(CHECKPOINT), "--max-new-tokens", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count("error: ") == 4 and said.count("position table") == 2 and "broken.png' cannot be read" in said
    assert said.count("> ") == len(lines) + 1
    assert sent == [0, 1, 0, 1]

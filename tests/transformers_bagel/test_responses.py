"""What `generate()` wrote as a message: thoughts, words and pictures apart."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer
from transformers.cli.serving.utils import build_response_parser, parse_assistant_message, response_events_to_chunks

from tests.conftest import CHECKPOINT, conversation, golden_image, load_processor, turn
from transformers_bagel import BagelProcessor
from transformers_bagel.responses import RESPONSE_TEMPLATE


def message(content, thought: str | None = None) -> dict:
    thoughts = {} if thought is None else {"reasoning_content": thought}
    return {"role": "assistant"} | thoughts | {"content": content}


SAID = {
    "words": ("two circles<|im_end|>", message("two circles")),
    "words_without_their_end": ("two circles", message("two circles")),
    "padded_words": ("two circles<|im_end|><|endoftext|><|endoftext|>", message("two circles")),
    "thought": ("<think>I count.</think>two<|im_end|>", message("two", "I count.")),
    "thought_in_lines": ("\n<think>\nI count.\n</think>\n\ntwo\n<|im_end|>\n", message("two\n", "I count.")),
    "words_with_spaces": (" two  circles <|im_end|>", message(" two  circles ")),
    "thought_alone": ("<think>a red circle</think><|im_end|>", message("", "a red circle")),
    "thought_at_its_limit": ("<think>I count. On", message("", "I count. On")),
    "thought_without_its_end": ("<think>I count.<|im_end|><|endoftext|>", message("", "I count.")),
    "nothing": ("<|im_end|>", message("")),
    "several_texts": (
        "<think>one</think>here<|im_end|><|im_start|><think>two</think>there<|im_end|>",
        message("herethere", "one\ntwo"),
    ),
    "picture_that_is_asked_for": (
        "here<|im_end|><|vision_start|>",
        message([{"type": "text", "text": "here"}, {"type": "image"}]),
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_thoughts_and_words_are_told_apart(name, processor):
    text, expected = SAID[name]
    ids = processor.tokenizer(text, return_tensors="pt")["input_ids"].long()
    assert processor.parse_response(text) == expected
    assert processor.parse_response(ids[0]) == processor.parse_response(ids[0].tolist()) == expected
    assert processor.parse_response(ids) == processor.parse_response([text]) == [expected]


def test_a_batch_of_generate_is_one_message_each(processor):
    said = ["<think>I count.</think>two", "three"]
    batch = processor.tokenizer([text + "<|im_end|>" for text in said], padding=True, padding_side="right")
    expected = [message("two", "I count."), message("three")]
    assert processor.parse_response(torch.tensor(batch["input_ids"])) == expected
    assert processor.parse_response(processor.batch_decode(batch["input_ids"], skip_special_tokens=True)) == expected


@pytest.mark.parametrize("wrong", [None, 3, {"sequences": [1]}], ids=str)
def test_what_nobody_said_is_refused(wrong, processor):
    with pytest.raises(TypeError, match="`response`"):
        processor.parse_response(wrong)


def test_a_thought_that_the_caller_began_is_one(processor):
    prompt = processor.apply_chat_template(conversation(["how many?"]), add_generation_prompt=True) + "<think>"
    assert processor.parse_response("I count.</think>two", prefix=prompt) == message("two", "I count.")


@pytest.mark.parametrize("mode", ["text", "image"])
def test_the_template_is_read_back_with_pictures_in_order(mode, processor):
    image = {"type": "image"}
    said = turn("assistant", "here it is", image, "and blue", image, image)
    text = processor.apply_chat_template([said], generation_mode=mode)
    assert processor.parse_response(text) == said
    inputs = processor.apply_chat_template(
        [turn("assistant", "here it is", golden_image("wide"), "and blue")],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        generation_mode=mode,
    )
    assert processor.parse_response(inputs["input_ids"][0]) == turn("assistant", "here it is", image, "and blue")
    thought = processor.parse_response(f"<think>a plan</think>{text}")
    assert thought == said | {"reasoning_content": "a plan"}


class TestItsTemplate:
    def test_is_saved_and_loaded(self, processor, tmp_path):
        assert processor.tokenizer.response_template == RESPONSE_TEMPLATE
        processor.save_pretrained(tmp_path)
        for tokenizer in (load_processor(tmp_path).tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
            assert tokenizer.response_template == RESPONSE_TEMPLATE
            parsed = tokenizer.parse_response("<think>I count.</think>two<|im_end|>", prefix="")
            assert parsed == message("two", "I count.")

    def test_is_given_to_repositories_that_have_none(self, processor, tmp_path):
        processor.save_pretrained(tmp_path)
        file = tmp_path / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        del settings["response_template"]
        file.write_text(json.dumps(settings), encoding="utf-8")
        assert load_processor(tmp_path).parse_response("<think>I count.</think>two") == message("two", "I count.")

    def test_may_be_another(self, processor, tmp_path):
        own = {"start_anchor": "<|im_start|>", "fields": {"answer": {"open": "<answer>", "close": "</answer>"}}}
        other = load_processor()
        other.tokenizer.response_template = own
        other.save_pretrained(tmp_path)
        assert load_processor(tmp_path).parse_response("so <answer>two</answer>") == {"answer": "two"}
        assert processor.parse_response("so <answer>two</answer>", own) == {"answer": "two"}

    @pytest.mark.parametrize("broken", ["<think>", {"fields": {}}, {"fields": {"content": {"open": 3}}}], ids=str)
    def test_is_refused_if_it_is_broken(self, broken, tmp_path):
        tokenizer = load_processor().tokenizer
        tokenizer.response_template = broken
        with pytest.raises(ValueError, match="`response_template`"):
            BagelProcessor(load_processor().image_processor, tokenizer)

    def test_leaves_the_callers_tokenizer_alone(self):
        tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
        before = tokenizer.response_template
        BagelProcessor(load_processor().image_processor, tokenizer)
        assert tokenizer.response_template == before


def test_the_server_of_transformers_parts_thoughts_from_words(processor):
    """What `transformers serve` makes of an answer, whole and as it comes."""
    prompt = processor.apply_chat_template(
        conversation(["how many?"]), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )["input_ids"]
    ids = processor.tokenizer("<think>I count them.</think>two circles<|im_end|>")["input_ids"]
    assert parse_assistant_message(processor, None, ids, prompt) == ("two circles", "I count them.", None)
    parser = build_response_parser(processor, None, prompt)
    chunks = []
    for token in ids:
        chunks += response_events_to_chunks(parser.feed(processor.decode([token])))
    words, thoughts = [], []
    for chunk in chunks:
        (words if type(chunk) is str else thoughts).append(chunk)
    assert ("".join(words), "".join(thoughts)) == ("two circles", "I count them.")

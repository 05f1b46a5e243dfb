"""Messages as clients write them: OpenAI's parts, roles without meaning here, nothing said, images that come apart."""

from __future__ import annotations

import base64
import copy
import io

import pytest
import torch
from transformers import AutoTokenizer

from tests.conftest import CHECKPOINT, conversation, golden_image, load_processor, turn
from transformers_bagel.segments import sample_segments


SQUARE = golden_image("square")


def png_uri() -> str:
    content = io.BytesIO()
    SQUARE.save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


URI = png_uri()
TEXT = {"type": "text", "text": "what?"}
IMAGE = {"type": "image", "image": SQUARE}


def read(processor, messages, **kwargs):
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    )


def is_same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Parts of one message, each of which says what `[IMAGE, TEXT]` says.
SPELLINGS = {
    "openai_chat": [{"type": "image_url", "image_url": {"url": URI, "detail": "low"}}, TEXT],
    "openai_chat_with_a_string": [{"type": "image_url", "image_url": URI}, TEXT],
    "openai_responses": [{"type": "input_image", "image_url": URI}, {"type": "input_text", "text": "what?"}],
    "openai_responses_with_a_dict": [
        {"type": "input_image", "image_url": {"url": URI}},
        {"type": "input_text", "text": "what?"},
    ],
    "transformers_base64": [{"type": "image", "base64": URI.partition(",")[2]}, TEXT],
    "transformers_url": [{"type": "image", "url": URI}, TEXT],
    "table_with_empty_columns": [
        {"type": "image", "image": SQUARE, "url": None, "text": None},
        {"type": "text", "text": "what?", "image": None, "url": None},
    ],
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_message_means_the_same_however_it_is_spelled(spelling, processor):
    messages = [{"role": "user", "content": SPELLINGS[spelling]}]
    before = copy.deepcopy(messages)
    assert is_same(read(processor, messages), read(processor, [turn("user", SQUARE, "what?")]))
    assert messages == before


def test_what_the_assistant_said_may_be_output_text(processor):
    said = [*conversation(["hi"]), {"role": "assistant", "content": [{"type": "output_text", "text": "yes"}]}]
    assert is_same(read(processor, said), read(processor, [*conversation(["hi"]), turn("assistant", "yes")]))


@pytest.mark.parametrize("role", ["developer", "tool", "system"])
def test_a_role_changes_nothing(role, processor):
    messages = [{"role": role, "content": "be brief"}, *conversation(["@square", "what?"])]
    assert is_same(read(processor, messages), read(processor, [turn("user", "be brief", SQUARE, "what?")]))


@pytest.mark.parametrize(
    "silent",
    [
        {"role": "system", "content": ""},
        {"role": "assistant", "content": None},
        {"role": "user", "content": []},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]},
    ],
    ids=["empty_text", "none", "no_parts", "a_tool_call_alone"],
)
def test_a_message_without_content_says_nothing(silent, processor):
    messages = [silent, *conversation(["hi"])]
    assert is_same(read(processor, messages), read(processor, conversation(["hi"])))
    assert read(processor, [silent])["input_ids"].tolist() == [
        processor.tokenizer.convert_tokens_to_ids(["<|im_start|>"])
    ]


def test_the_tokenizer_alone_writes_what_the_processor_writes(processor):
    messages = [
        {"role": "system", "content": ""},
        {"role": "developer", "content": [{"type": "input_text", "text": "be brief"}]},
        {"role": "user", "content": [{"type": "input_image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": None},
    ]
    ours = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert processor.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == ours


def test_the_tokenizer_of_a_saved_processor_has_its_template(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = tokenizer.apply_chat_template(conversation(["hi"]), tokenize=False)
    assert text == "<|im_start|>hi<|im_end|>"


def test_the_template_knows_no_other_parts(processor):
    with pytest.raises(Exception, match="a part must be a text or an image, got video"):
        processor.tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], tokenize=False)


@pytest.mark.parametrize("part", [{"type": "image"}, {"type": "image", "image": None}, {"type": "image_url"}], ids=str)
def test_text_first_and_images_later(part, processor):
    """The recipe of two steps, by which evaluations ask many models."""
    messages = [{"role": "user", "content": [part, TEXT]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[text], images=[[SQUARE]], return_tensors="pt")
    assert is_same(inputs, read(processor, conversation(["@square", "what?"])))
    assert is_same(read(processor, messages, processor_kwargs={"images": [SQUARE]}), inputs)


def test_a_batch_of_texts_first_and_images_later(processor):
    batch = [["@square", "what?"], ["hello"], ["@wide", "and", "@tall", "which?"]]
    filled = [conversation(item) for item in batch]
    empty = [[turn("user", *({"type": "image"} if item[0] == "@" else item for item in own))] for own in batch]
    texts = processor.apply_chat_template(empty, add_generation_prompt=True)
    images = [[golden_image(item[1:]) for item in own if item[0] == "@"] for own in batch]
    inputs = processor(text=texts, images=images, return_tensors="pt")
    assert is_same(inputs, read(processor, filled))


def test_an_image_is_missed_where_its_pixels_are_needed(processor):
    with pytest.raises(ValueError, match="`conversation` holds an image part without its image"):
        read(processor, [{"role": "user", "content": [{"type": "image"}, TEXT]}])


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "picture", "data": URI * 1000}]},
        {"role": "user", "content": [{"type": "image", "image": URI, "url": URI * 1000}]},
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,!" + URI * 1000}}],
        },
        {"role": "user", "text": URI * 1000},
        {"role": URI * 1000, "content": "hi"},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": URI * 1000, "format": "wav"}}]},
    ],
    ids=["unknown_part", "two_images_in_a_part", "broken_uri", "no_content", "role", "audio"],
)
def test_an_error_prints_no_whole_data_uri(message, processor):
    with pytest.raises(ValueError, match="`(conversation|images)`") as raised:
        read(processor, [message])
    assert len(str(raised.value)) < 500


def test_training_reads_the_same_messages():
    openai = [
        {"role": "user", "content": SPELLINGS["openai_responses_with_a_dict"]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "a square"}]},
    ]
    ours = [turn("user", {"type": "image", "image": URI}, "what?"), turn("assistant", "a square")]
    assert sample_segments({"messages": openai}) == sample_segments({"messages": ours})


def test_another_template_gets_strings_as_they_are():
    template = "{% for message in messages %}{{ message.content + '!' }}{% endfor %}"
    processor = load_processor(CHECKPOINT, chat_template=template)
    assert processor.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi!"

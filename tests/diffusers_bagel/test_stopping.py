"""Words that end a text, whatever its tokens are."""

from __future__ import annotations

import pytest
import torch
from transformers import StopStringCriteria

from diffusers_bagel import BagelSession
from diffusers_bagel.stopping import StopAt
from tests.conftest import load_processor


@pytest.mark.parametrize(
    ("prompt", "text", "words", "read"),
    [
        ("", "one two three", ["two"], "one two"),
        ("", "one two three", ["wo", "zero"], "one two"),
        ("", "one two", ["four"], "one two"),
        ("two", "one two three", ["two"], "one two"),
        ("two", " three", ["two"], " three"),
        ("", "a b a b c", ["b a b"], "a b a b"),
        ("", "süß 🙂 more", ["ß 🙂"], "süß 🙂"),
        ("", "a" * 90 + "b" * 90 + "c", ["a" * 60 + "b" * 60], "a" * 90 + "b" * 60),
    ],
)
def test_a_text_ends_with_the_token_that_ends_a_word(prompt, text, words, read):
    tokenizer = load_processor().tokenizer
    start = tokenizer(prompt)["input_ids"] + tokenizer("<|im_start|>")["input_ids"]
    tokens = tokenizer(text)["input_ids"]
    stop = StopAt(words, tokenizer)
    written = [torch.tensor([start + tokens[:count]]) for count in range(1, len(tokens) + 1)]
    ends = [bool(stop(ids, None)) for ids in written]
    library = StopStringCriteria(tokenizer, words)
    assert ends == [bool(library(ids, None)) for ids in written]
    ended = (count for count, is_end in enumerate(ends, 1) if is_end)
    said = tokenizer.decode(tokens[: next(ended, len(tokens))])
    assert said.startswith(read) and len(said) - len(read) < 12
    assert (said == text) == (read == text)


def test_a_session_looks_through_no_vocabulary_for_them(pipe, monkeypatch):
    tokenizer = pipe.processor.tokenizer
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda *_: pytest.fail("The vocabulary was looked through."))
    settings = {"output": "text", "max_new_tokens": 12}
    whole = BagelSession(pipe).send("a", **settings).text
    assert BagelSession(pipe).send("a", stop_strings=whole[:3], **settings).text != whole

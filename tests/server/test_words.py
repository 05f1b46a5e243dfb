"""Words as they come, however they are cut into pieces."""

from __future__ import annotations

import pytest
import torch

from bagel_server.words import StopAt, Stops, Thoughts
from tests.conftest import load_processor
from transformers_bagel.responses import message_of


def pieces(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "tw"], "one "),
        ("one two", ["four"], "one two"),
        ("aab", ["ab"], "a"),
        ("aaa", ["aab"], "aaa"),
        ("abc", ["abc"], ""),
        ("abc", [], "abc"),
    ],
)
def test_a_text_is_cut_off_before_what_stops_it(text, stops, kept, size):
    found = Stops(stops)
    assert "".join([*map(found.put, pieces(text, size)), found.end()]) == kept
    assert found.has_stopped is (kept != text)


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
    ended = (n for n in range(1, len(tokens) + 1) if stop(torch.tensor([start + tokens[:n]]), None).all())
    said = tokenizer.decode(tokens[: next(ended, len(tokens))])
    assert said.startswith(read) and len(said) - len(read) < 12
    assert (said == text) == (read == text)


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize(
    "text",
    [
        "no thoughts <at> all ",
        "<think>a thought</think>words",
        " \n<think>\na thought\n</think>\n\nwords and more",
        "words <think>later</think> words",
        "<think>one</think><think>two</think>",
        "<think>cut off",
        "<think></think>",
        "a < b </think> c",
        "",
    ],
)
def test_thoughts_are_told_from_words_as_a_whole_answer_tells_them(text, size):
    found = Thoughts()
    told = [piece for part in pieces(text, size) for piece in found.put(part)] + list(found.end())
    whole = message_of([{"type": "text", "text": text}])
    assert "".join(words for is_thought, words in told if not is_thought) == whole["content"]
    thoughts = "".join(words for is_thought, words in told if is_thought)
    assert thoughts.replace("\n", "") == whole.get("reasoning_content", "").replace("\n", "")

"""Words as they come, however they are cut into pieces."""

from __future__ import annotations

import pytest

from bagel_server.words import Stops, Thoughts
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

"""Which replica a request belongs to, and the metrics of all of them, without Ray."""

from __future__ import annotations

import json

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bagel_server.replicas import conversation_key, merged_metrics


SYSTEM = {"role": "system", "content": "be brief"}
FIRST = {"role": "user", "content": [{"type": "text", "text": "a red circle"}]}
GOES_ON = [FIRST, {"role": "assistant", "content": "done"}, {"role": "user", "content": "now blue"}]


def key(headers=(), **body) -> str | None:
    return conversation_key(headers, json.dumps(body).encode())


class TestConversation:
    def test_has_the_same_key_at_every_turn(self):
        keys = {key(messages=[SYSTEM, *GOES_ON[:count]], seed=count) for count in (1, 2, 3)}
        assert len(keys) == 1 and None not in keys

    @pytest.mark.parametrize(
        "other",
        [
            {"messages": [FIRST | {"content": "a blue circle"}]},
            {"messages": [SYSTEM, FIRST]},
            {"messages": [FIRST], "instructions": "be brief"},
        ],
        ids=["words", "system", "instructions"],
    )
    def test_has_another_key_if_it_begins_otherwise(self, other):
        assert key(**other) not in (None, key(messages=[FIRST]))

    def test_has_a_key_that_ray_can_encode_whatever_it_is_called(self):
        half_a_character = key(prompt_cache_key="\ud800")
        assert half_a_character.encode() and half_a_character != key(prompt_cache_key="\ud801")
        assert len(key(prompt_cache_key="x" * 10**6)) < 100
        assert key(prompt_cache_key="") is None

    def test_of_responses_has_one_too(self):
        assert key(input="a red circle") == key(input=[{"role": "user", "content": "a red circle"}, *GOES_ON[1:]])
        assert key(input="a red circle") not in (None, key(input="a blue circle"))

    def test_is_what_the_client_says_it_is(self):
        holiday = key(messages=[FIRST], prompt_cache_key="holiday")
        assert holiday == key(messages=[SYSTEM], prompt_cache_key="holiday") != key(messages=[FIRST])
        assert key([(b"x-session-id", b"mine")], messages=[FIRST], prompt_cache_key="holiday") == "mine"

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"[1]",
            b"\xff",
            b"[" * 100_000,
            b'{"prompt": "a red circle"}',
            b'{"messages": [1, "x", null]}',
            b'{"input": 3}',
        ],
        ids=["nothing", "half", "list", "bytes", "deep", "picture", "no_messages", "number"],
    )
    def test_is_none_of_what_is_no_conversation(self, body):
        assert conversation_key([], body) is None


def test_metrics_of_all_replicas_are_one_page():
    page = '# HELP a_total What.\n# TYPE a_total counter\na_total{route="x"} %d\n# HELP b B.\n# TYPE b gauge\nb 1.5\n'
    merged = merged_metrics({"one": page % 2, "two": page % 3}).decode()
    samples = {
        (sample.name, sample.labels["replica"]): sample.value
        for family in text_string_to_metric_families(merged)
        for sample in family.samples
    }
    assert samples == {("a_total", "one"): 2, ("a_total", "two"): 3, ("b", "one"): 1.5, ("b", "two"): 1.5}
    assert merged.count("# TYPE a_total counter") == 1

"""What a server counts."""

from __future__ import annotations

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from .conftest import MODEL, SMALL, client_of, served, user


def samples(url: str) -> dict[tuple[str, ...], float]:
    """The values of samples by their names and labels."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    found = [sample for family in families for sample in family.samples]
    return {(sample.name, *sample.labels.values()): sample.value for sample in found}


def test_requests_tokens_and_what_the_engine_does_are_counted(engine):
    with served(engine) as url:
        client, before = client_of(url), samples(url)
        answer = client.chat.completions.create(model=MODEL, messages=[user("x")], max_tokens=4)
        client.images.generate(prompt="x", extra_body=SMALL)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="other", messages=[user("x")])
        httpx.get(f"{url}/some/path")
        after = samples(url)
        route = "/v1/chat/completions"
        assert after["bagel_http_requests_total", route, "200"] == 1
        assert after["bagel_http_requests_total", route, "404"] == 1
        assert after["bagel_http_requests_total", "other", "404"] == 1
        assert after["bagel_http_seconds_count", route] == 2
        assert after["bagel_first_piece_seconds_count",] == 2
        assert after["bagel_tokens_total", "prompt"] > answer.usage.prompt_tokens
        assert after["bagel_tokens_total", "text"] == 4
        assert after["bagel_tokens_total", "image"] == 12
        for name, count in (("answers", 2), ("pictures", 1), ("steps", 3), ("errors", 0)):
            assert after[f"bagel_engine_{name}_total",] - before[f"bagel_engine_{name}_total",] == count
        assert after["bagel_engine_running",] == after["bagel_engine_waiting",] == 0
        assert after["bagel_session_cache_sessions",] == 1  # a picture of the images interface begins no conversation


def test_each_application_counts_for_itself(engine):
    with served(engine) as one, served(engine) as other:
        client_of(one).models.list()
        assert ("bagel_http_requests_total", "/v1/models", "200") in samples(one)
        assert ("bagel_http_requests_total", "/v1/models", "200") not in samples(other)

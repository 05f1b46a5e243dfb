"""The benchmark of the server knows right answers from wrong ones, and lost requests from those that were told to wait."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from PIL import Image

from bagel_server import Engine
from diffusers_bagel import BagelPipeline
from tests.server.conftest import SHAPES, served


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture(scope="module")
def shapes() -> BagelPipeline:
    pipe = BagelPipeline.from_pretrained(SHAPES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_every_kind_of_answer_is_judged_and_what_the_pipeline_gives_itself_is_not_wrong(shapes):
    from load_clients import Talker, is_answered_by_itself
    from serving import judged

    done, lost = [], []

    async def talk(url: str) -> None:
        async with httpx.AsyncClient(base_url=f"{url}/v1", timeout=60) as http:
            talker = Talker(http, 0, time.monotonic(), done, lost)
            for kind in (talker.draw, talker.edit, talker.ask, talker.ask_in_words, talker.converse):
                await kind()

    engine = Engine(shapes)
    with served(engine, model="shapes") as url:
        asyncio.run(talk(url))
    engine.close()
    assert lost == [] and len(done) == 7
    counts = judged(done, shapes)
    assert sum(count["answers"] for count in counts.values()) == 7
    assert all(count["wrong"] == 0 for count in counts.values())
    # As if none had been what was asked for: the pipeline alone gives the same, and nothing else is excused.
    for asked in done:
        assert is_answered_by_itself(shapes, asked), asked.kind
        other = "a hedgehog" if isinstance(asked.answer, str) else Image.new("RGB", (64, 64), "red")
        if asked.kind in ("drawing", "question"):
            wrong = judged([replace(asked, answer=other, is_right=False)], shapes)
            assert wrong[asked.kind] == {"answers": 1, "not as asked": 1, "wrong": 1}


def test_a_full_server_is_asked_again_and_an_error_is_a_lost_request(monkeypatch):
    from load_clients import Talker

    answers = [httpx.Response(429, headers={"retry-after": "0"}), httpx.Response(500, text="broken")]
    transport = httpx.MockTransport(lambda request: answers.pop(0))

    async def talk() -> Talker:
        async with httpx.AsyncClient(base_url="http://a/v1", transport=transport) as http:
            talker = Talker(http, 0, time.monotonic() + 60, [], [])
            kind = talker.draw

            async def once() -> None:
                talker.deadline = 0.0
                await kind()

            for name in ("draw", "edit", "ask", "ask_in_words", "converse"):
                setattr(talker, name, once)
            await talker.talk()
            return talker

    talker = asyncio.run(talk())
    assert talker.waits == 1 and talker.done == []
    assert talker.lost == ["once: ValueError: 500: broken"]


def test_growth_is_of_the_memory_behind_the_first_minute():
    from serving import growth

    samples = [(float(second), 1000 if second < 60 else 2000 + second) for second in range(300)]
    assert growth(samples, 300) == pytest.approx(2299 / 2062 - 1)
    assert growth(samples[:60], 30) == 0


def test_a_number_is_found_among_the_metrics():
    from serving_process import total

    metrics = "# HELP a_total of b\na_total 3.0\na_total_more 4.0\n"
    assert total(metrics, "a_total") == 3
    with pytest.raises(KeyError, match="b_total"):
        total(metrics, "b_total")

"""Two replicas of bagel-shapes behind one address: what a client sees of them, and of the death of one."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from .conftest import NO_RAY, ROOT


pytest.importorskip("ray", reason=NO_RAY)
pytestmark = pytest.mark.slow

sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples" / "shapes")]

from judge import draw_cases  # noqa: E402  # the scripts are no package
from openai import APIError  # noqa: E402
from replicas import DRAWING, Served, served, wait_for  # noqa: E402


CASES = draw_cases("draw_full", 8, num_things=1)
STREAMED = {"modalities": ["image"], "stream": True, "seed": 0}
LONG = STREAMED | {"extra_body": DRAWING | {"num_inference_steps": 200}}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Served]:
    # Ray asks replicas what they do every ten seconds otherwise.
    interval = dict.fromkeys(
        (f"RAY_SERVE_{kind}_AUTOSCALING_METRIC_PUSH_INTERVAL_S" for kind in ("REPLICA", "HANDLE")), "1"
    )
    scaling = ("max_replicas=2", "target_ongoing_requests=1", "upscale_delay_s=0", "look_back_period_s=2")
    with open(tmp_path_factory.mktemp("ray") / "log", "wb") as log, served(log, *scaling, **interval) as started:
        yield started


def test_a_second_replica_starts_under_load(cluster):
    assert len(cluster.replicas()) == 1

    def ask(number: int) -> None:
        while len(cluster.metrics()["bagel_engine_running"]) < 2:
            cluster.say(f"a large red circle {number}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4), timeout=240))
    assert len(cluster.replicas()) == 2


def test_a_picture_is_right(cluster):
    assert cluster.draw(CASES[0], 0) == "right"


def test_a_stream_comes_as_it_is_made(cluster):
    times, kinds = [], []
    for chunk in cluster.say(CASES[0].prompt, **STREAMED, extra_body=DRAWING):
        times.append(time.monotonic())
        has_image = getattr(chunk.choices[0].delta, "images", None)
        kinds.append("image" if has_image else "progress" if chunk.model_extra.get("progress") else "")
    assert kinds.count("progress") == 24 and kinds.count("image") == 1
    # The first steps were there long before the last.
    assert times[kinds.index("progress") + 4] < times[0] + 0.7 * (times[kinds.index("image")] - times[0])


def test_conversations_stay_with_the_replica_that_read_them(cluster):
    """A turn whose earlier ones are not in the cache of its replica counts as a miss."""
    names = ("bagel_session_cache_hits_total", "bagel_session_cache_misses_total")
    before = [cluster.total(name) for name in names]
    for colour in ("blue", "green", "yellow", "black", "white", "orange"):
        said = [f"just say how many things are in: a red circle and a {colour} star"]
        for question in ("what colour is the circle?", "what colour is the star?"):
            said += [cluster.say(*said).choices[0].message.content, question]
        cluster.say(*said)
    assert [cluster.total(name) - count for name, count in zip(names, before, strict=True)] == [12, 0]


def test_a_stream_that_nobody_reads_any_more_is_cancelled(cluster):
    cancelled = cluster.total("bagel_engine_cancelled_total")
    stream = cluster.say(CASES[0].prompt, **LONG)
    for chunk in stream:
        if chunk.model_extra.get("progress"):
            break
    stream.close()
    wait_for(lambda: cluster.total("bagel_engine_cancelled_total") > cancelled, 20)
    assert cluster.total("bagel_engine_running") == 0


def test_a_replica_is_killed_under_load_and_no_answer_is_wrong(cluster):
    with ThreadPoolExecutor(len(CASES)) as pool:
        answers = [pool.submit(cluster.draw, CASES[number], number) for number in range(len(CASES))]
        wait_for(lambda: min(cluster.metrics()["bagel_engine_running"]) > 0, 20)
        os.kill(killed := min(cluster.replicas()), signal.SIGKILL)
        ended = [answer.result() for answer in answers]
    assert set(ended) <= {"right", "503"} and "right" in ended, ended
    wait_for(lambda: len(cluster.metrics()["bagel_engine_running"]) == 2 and len(cluster.replicas() - {killed}) == 2)
    assert [cluster.draw(CASES[number], number) for number in range(2)] == ["right"] * 2


def test_a_stream_whose_replica_is_killed_ends_with_an_error(cluster):
    replicas = cluster.replicas()
    stream = cluster.say(CASES[0].prompt, **LONG)
    with pytest.raises(APIError, match="The replica that was answering has died"):
        for number, _ in enumerate(stream):
            if number == 3:
                for replica in replicas:
                    os.kill(replica, signal.SIGKILL)


def test_told_to_end_it_finishes_what_runs(cluster):
    wait_for(lambda: cluster.draw(CASES[0], 0) == "right")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(cluster.draw, CASES[1], 1)
        wait_for(lambda: cluster.total("bagel_engine_running") > 0, 20)
        cluster.process.terminate()
        assert answer.result() == "right"
    assert cluster.process.wait(60) == 0

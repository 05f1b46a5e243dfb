"""Two replicas of bagel-shapes behind one address: what a client sees of them, and of the death of one."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import psutil
import pytest
from openai import APIError, InternalServerError, OpenAI
from PIL import Image

from .conftest import NO_RAY, ROOT, SHAPES


pytest.importorskip("ray", reason=NO_RAY)
pytestmark = pytest.mark.slow

sys.path.insert(0, str(ROOT / "examples" / "shapes"))

from judge import draw_cases, is_drawn  # noqa: E402  # the scripts are no package


CASES = draw_cases("draw_full", 8, num_things=1)
REPLICA = "ray::ServeReplica:bagel:Replica"
DRAWING = {"modalities": ["image"], "extra_body": {"size": "64x64", "num_inference_steps": 24, "guidance_scale": 3.0}}


@dataclass
class Cluster:
    """What was started, and a client of it."""

    process: subprocess.Popen
    address: str
    client: OpenAI

    def replicas(self) -> set[int]:
        """The processes that answer."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return {child.pid for child in children if is_replica(child)}

    def metrics(self) -> dict[str, list[float]]:
        """The samples of each metric, one a replica."""
        found: dict[str, list[float]] = {}
        for name, value in re.findall(
            r"^(\w+)\{replica=\"\w+\"\} (\S+)$", self.get("/metrics").text, flags=re.MULTILINE
        ):
            found.setdefault(name, []).append(float(value))
        return found

    def total(self, name: str) -> float:
        return sum(self.metrics()[name])

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.address + path, timeout=30)

    def say(self, *texts: str, **settings):
        """What is answered to the last of several texts, between which the model has spoken."""
        roles = ("user", "assistant")
        messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]
        settings = {"max_tokens": 24, "temperature": 0} | settings
        return self.client.chat.completions.create(model="shapes", messages=messages, **settings)


def is_replica(process: psutil.Process) -> bool:
    try:
        return process.name().startswith("ray::") and process.cmdline()[:1] == [REPLICA]
    except psutil.NoSuchProcess:
        return False


def wait_for(true, seconds: float = 240):
    """The first value that is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if value := true():
                return value
        except (httpx.HTTPError, APIError):
            pass
        time.sleep(0.1)
    raise TimeoutError(f"{true} has not come true in {seconds} s.")


@pytest.fixture(scope="module")
def cluster(environment, tmp_path_factory) -> Iterator[Cluster]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    scaling = [
        "max_replicas=2",
        "target_ongoing_requests=1",
        "upscale_delay_s=0",
        "look_back_period_s=2",
        "num_cpus=0.5",
    ]
    # Ray asks replicas what they do every ten seconds otherwise.
    interval = dict.fromkeys(
        (f"RAY_SERVE_{kind}_AUTOSCALING_METRIC_PUSH_INTERVAL_S" for kind in ("REPLICA", "HANDLE")), "1"
    )
    log = tmp_path_factory.mktemp("ray") / "log"
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "examples" / "serve_ray.py"),
                f"model={SHAPES}",
                "name=shapes",
                "dtype=float32",
                f"port={port}",
                *scaling,
            ],
            env=environment | interval,
            stdout=stream,
            stderr=stream,
        )
    address = f"http://127.0.0.1:{port}"
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client:
        started = Cluster(process, address, client)
        try:
            wait_for(lambda: process.poll() is not None or started.get("/health").status_code == 200, 300)
            assert process.poll() is None, log.read_text()
            yield started
        finally:
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.terminate()
            process.wait(60)
            for child in psutil.wait_procs(children, 10)[1]:
                child.kill()


def picture(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def draw(cluster: Cluster, number: int) -> str:
    """What became of a request: `right`, `wrong`, or the status it failed with."""
    try:
        message = cluster.say(CASES[number].prompt, seed=number, **DRAWING).choices[0].message
    except InternalServerError as error:
        return str(error.status_code)
    return "right" if is_drawn(picture(message.images[0]["image_url"]["url"]), CASES[number]) else "wrong"


def test_a_second_replica_starts_under_load(cluster):
    assert len(cluster.replicas()) == 1

    def ask(number: int) -> None:
        while len(cluster.metrics()["bagel_engine_running"]) < 2:
            cluster.say(f"a large red circle {number}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4), timeout=240))
    assert len(cluster.replicas()) == 2


def test_a_picture_is_right(cluster):
    assert draw(cluster, 0) == "right"


def test_a_stream_comes_as_it_is_made(cluster):
    times, kinds = [], []
    for chunk in cluster.say(CASES[0].prompt, stream=True, **DRAWING):
        times.append(time.monotonic())
        kinds.append(
            "image"
            if getattr(chunk.choices[0].delta, "images", None)
            else "progress"
            if chunk.model_extra.get("progress")
            else ""
        )
    assert kinds.count("progress") == 24 and kinds.count("image") == 1
    # The first steps were there long before the last.
    assert times[kinds.index("progress") + 4] < times[0] + 0.7 * (times[kinds.index("image")] - times[0])


def test_conversations_stay_with_the_replica_that_read_them(cluster):
    before = cluster.metrics()
    for number in range(6):
        said = [f"a large red circle and {number} stars"]
        for question in ("what colour is it?", "what size is it?"):
            said += [cluster.say(*said).choices[0].message.content or "", question]
        cluster.say(*said)
    after = cluster.metrics()
    hits, misses = (
        [new - old for new, old in zip(after[name], before[name], strict=True)]
        for name in ("bagel_session_cache_hits_total", "bagel_session_cache_misses_total")
    )
    assert (sum(hits), sum(misses)) == (12, 0)
    # Of six conversations, all on one replica would be one time in 32.
    assert min(hits) > 0 or min(after["bagel_engine_answers_total"]) > 0


def test_a_stream_that_nobody_reads_any_more_is_cancelled(cluster):
    cancelled = cluster.total("bagel_engine_cancelled_total")
    stream = cluster.say(
        CASES[0].prompt, stream=True, **(DRAWING | {"extra_body": {"size": "64x64", "num_inference_steps": 200}})
    )
    for chunk in stream:
        if chunk.model_extra.get("progress"):
            break
    stream.close()
    start = time.monotonic()
    wait_for(
        lambda: cluster.total("bagel_engine_cancelled_total") > cancelled
        and cluster.total("bagel_engine_running") == 0,
        20,
    )
    print(f"cancelled in {time.monotonic() - start:.2f} s")


def test_a_replica_is_killed_under_load_and_no_answer_is_wrong(cluster):
    with ThreadPoolExecutor(len(CASES)) as pool:
        answers = [pool.submit(draw, cluster, number) for number in range(len(CASES))]
        wait_for(lambda: min(cluster.metrics()["bagel_engine_running"]) > 0, 20)
        os.kill(killed := min(cluster.replicas()), signal.SIGKILL)
        ended = [answer.result() for answer in answers]
    assert set(ended) <= {"right", "503"} and "right" in ended, ended
    wait_for(lambda: len(cluster.metrics()["bagel_engine_running"]) == 2 and len(cluster.replicas() - {killed}) == 2)
    assert [draw(cluster, number) for number in range(2)] == ["right"] * 2


def test_a_stream_whose_replica_is_killed_ends_with_an_error(cluster):
    stream = cluster.say(
        CASES[0].prompt, stream=True, **(DRAWING | {"extra_body": {"size": "64x64", "num_inference_steps": 200}})
    )
    with pytest.raises(APIError, match="The replica that was answering has died"):
        for number, _ in enumerate(stream):
            if number == 3:
                for replica in cluster.replicas():
                    os.kill(replica, signal.SIGKILL)


def test_told_to_end_it_finishes_what_runs(cluster):
    wait_for(lambda: draw(cluster, 0) == "right")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(draw, cluster, 1)
        wait_for(lambda: cluster.total("bagel_engine_running") > 0, 20)
        cluster.process.terminate()
        assert answer.result() == "right"
    assert cluster.process.wait(60) == 0

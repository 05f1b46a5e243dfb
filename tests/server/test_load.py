"""Many requests, and those that nobody waits for any longer."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable

import httpx
import openai
import pytest

from bagel_server import Engine, ServerSettings, create_app

from .conftest import MODEL, client_of, served, user


# Of the tiny model, far longer than a test waits.
LONG = {"num_inference_steps": 200, "height": 128, "width": 128}


def until(is_so: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def long_picture(client: openai.OpenAI, **settings):
    return client.chat.completions.create(
        model=MODEL, messages=[user("x")], modalities=["image"], extra_body=LONG, **settings
    )


def test_of_previews_that_nobody_reads_the_last_are_kept(engine):
    """A client that stops reading until its picture is made."""
    app = create_app(engine, ServerSettings(model=MODEL))
    asked = {"messages": [user("x")], "modalities": ["image"], "stream": True, "preview_every": 1}
    body = json.dumps(asked | {"num_inference_steps": 40, "height": 48, "width": 64}).encode()
    made, sent = engine.stats().pictures, []

    async def receive():
        if not sent and not receive.has_said:
            receive.has_said = True
            return {"type": "http.request", "body": body, "more_body": False}
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message.get("body", b"").decode())
        while len(sent) > 2 and engine.stats().pictures == made:
            await asyncio.sleep(0.01)

    receive.has_said = False
    head = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": head}
    asyncio.run(app(scope, receive, send))
    events = "".join(sent).split("\n\n")
    assert sum('"progress":' in event for event in events) == 40
    assert 1 <= sum('"preview":' in event for event in events) <= 6
    previews = [
        json.loads(event.removeprefix("data: "))["preview"]["step"] for event in events if '"preview":' in event
    ]
    assert previews == sorted(previews) and previews[-1] == 38
    assert sum('"images":' in event for event in events) == 1


@pytest.fixture
def small(pipe):
    """An engine of one place, in which one more may wait."""
    engine = Engine(pipe, max_running=1, max_waiting=1)
    yield engine
    engine.close(0)


def test_a_full_queue_says_when_to_ask_again(small):
    with served(small) as url:
        client = client_of(url)
        first = long_picture(client, stream=True)
        next(first)
        second = long_picture(client, stream=True)
        with pytest.raises(openai.RateLimitError) as raised:
            long_picture(client)
        assert int(raised.value.response.headers["retry-after"]) >= 1
        assert raised.value.body["code"] == "queue_full"
        # Not even a part of a request has a place.
        with pytest.raises(openai.RateLimitError):
            long_picture(client, n=2)
        second.close()
        first.close()
        until(lambda: small.stats().running == small.stats().waiting == 0)
        client.chat.completions.create(model=MODEL, messages=[user("x")], max_tokens=2)


@pytest.mark.parametrize("kind", ["running", "waiting"])
def test_a_closed_stream_frees_its_place_within_a_step(kind, small):
    with served(small) as url:
        client = client_of(url)
        running = long_picture(client, stream=True)
        next(running)
        waiting = long_picture(client, stream=True)
        until(lambda: small.stats().waiting == 1)
        closed, other = (running, waiting) if kind == "running" else (waiting, running)
        steps = small.stats().steps
        closed.close()
        until(lambda: small.stats().cancelled == 1)
        if kind == "running":
            until(lambda: small.stats().waiting == 0)
            assert small.stats().steps - steps < 60
        assert small.stats().waiting == 0 and small.stats().running == 1
        other.close()


@pytest.mark.parametrize("kind", ["chat/completions", "images/generations", "responses"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_dropped_connection_cancels_its_answer(kind, stream, small):
    body = {
        "chat/completions": {"messages": [user("x")], "modalities": ["image"]},
        "images/generations": {"prompt": "x"},
        "responses": {"input": "x", "output": "image"},
    }[kind]
    content = json.dumps(body | LONG | {"stream": stream}).encode()
    with served(small) as url:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_connection(address) as connection:
            head = f"POST /v1/{kind} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + content)
            until(lambda: small.stats().running == 1)
        until(lambda: small.stats().cancelled == 1)
        assert small.stats().running == 0
        assert small.stats().steps < 200


def test_an_answer_has_its_time(pipe):
    engine = Engine(pipe)
    with served(engine, timeout=0.1) as url:
        with pytest.raises(openai.InternalServerError) as raised:
            long_picture(client_of(url))
        assert (raised.value.status_code, raised.value.body["code"]) == (504, "timeout")
        with pytest.raises(openai.APIError, match="longer than the server allows"):
            list(long_picture(client_of(url), stream=True))
        until(lambda: engine.stats().running == 0)
    engine.close()


def test_a_closed_engine_is_told(pipe):
    engine = Engine(pipe)
    with served(engine) as url:
        client = client_of(url)
        assert client.get("/../health", cast_to=object) == {"status": "ok"}
        engine.close()
        with pytest.raises(openai.InternalServerError) as raised:
            client.chat.completions.create(model=MODEL, messages=[user("x")])
        assert (raised.value.status_code, raised.value.body["code"]) == (503, "closing")
        with pytest.raises(openai.InternalServerError) as raised:
            client.get("/../health", cast_to=object)
        assert raised.value.status_code == 503


def test_an_error_of_one_request_is_its_own(pipe, monkeypatch):
    engine = Engine(pipe)
    with served(engine) as url:
        client = client_of(url)
        other = long_picture(client, stream=True)
        next(other)

        def broken(*args, **kwargs):
            raise RuntimeError(f"secret of {__file__}")

        with monkeypatch.context() as patch:
            patch.setattr("bagel_server.generation.tokens_of_turn", broken)
            with pytest.raises(openai.InternalServerError) as raised:
                client.chat.completions.create(model=MODEL, messages=[user("x")], max_tokens=2)
        assert raised.value.status_code == 500
        assert "secret" not in raised.value.response.text and "Traceback" not in raised.value.response.text
        next(other)
        other.close()
        client.chat.completions.create(model=MODEL, messages=[user("x")], max_tokens=2)
    engine.close(0)


def test_requests_are_bounded_in_number(pipe):
    engine = Engine(pipe)
    with served(engine, max_requests=1) as url:
        stream = long_picture(client_of(url), stream=True)
        next(stream)
        with pytest.raises(openai.RateLimitError):
            client_of(url).models.list()
        stream.close()
        until(lambda: engine.stats().running == 0)
        until(lambda: is_listed(url))
    engine.close()


def test_who_reads_nothing_of_an_answer_frees_the_place(engine):
    """The kernel's buffers hide a slow client from a test, so it is one that takes nothing at all."""

    async def stuck(message) -> None:
        await asyncio.Event().wait()

    async def nothing_more():
        return {"type": "http.disconnect"}

    async def ask() -> int:
        app = create_app(engine, ServerSettings(max_requests=1, timeout=0.1))
        scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": [], "query_string": b""}
        with pytest.raises(OSError, match="reads nothing"):
            await asyncio.wait_for(app(scope, nothing_more, stuck), 5)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return (await client.get("/v1/models")).status_code

    assert asyncio.run(ask()) == 200


def is_listed(url: str) -> bool:
    try:
        return bool(client_of(url).models.list().data)
    except openai.RateLimitError:
        return False


def test_several_clients_get_what_each_would_get_alone(engine):
    with served(engine) as url:
        client = client_of(url)

        def ask(word: str) -> str:
            answer = client.chat.completions.create(model=MODEL, messages=[user(word)], max_tokens=8)
            return answer.choices[0].message.content

        words = ["a", "b circle", "c square left of a star", "d"]
        alone = [ask(word) for word in words]
        together: dict[str, str] = {}
        threads = [threading.Thread(target=lambda word=word: together.update({word: ask(word)})) for word in words]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [together[word] for word in words] == alone


@pytest.mark.parametrize("name", ["images", "responses"])
def test_a_stream_that_fails_ends_with_an_event_named_error(name, pipe):
    engine = Engine(pipe)
    with served(engine, timeout=0.1) as url:
        body = {"images": {"prompt": "x"}, "responses": {"input": "x", "tools": [{"type": "image_generation"}]}}[name]
        body |= {"tool_choice": "required"} if name == "responses" else {}
        path = {"images": "images/generations", "responses": "responses"}[name]
        answer = httpx.post(f"{url}/v1/{path}", json=body | LONG | {"stream": True}, timeout=60)
    last = answer.text.rstrip().rpartition("\n\n")[2].splitlines()
    assert last[0] == "event: error"
    assert json.loads(last[1].removeprefix("data: "))["type"] == "error"
    engine.close(0)

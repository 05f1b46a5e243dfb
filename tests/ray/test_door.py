"""What clients see while replicas die or are full: the door, before replicas that are none."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from .conftest import NO_RAY


pytest.importorskip("ray", reason=NO_RAY)

import httpx  # noqa: E402
from ray.exceptions import ActorDiedError  # noqa: E402

from bagel_server import ServerSettings, on_ray  # noqa: E402
from bagel_server.on_ray import Door  # noqa: E402


def response(status: int, body: bytes, kind: str = "application/json") -> list:
    start = {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind.encode())]}
    return [start, {"type": "http.response.body", "body": body, "more_body": False}]


class Parts:
    """A `DeploymentResponseGenerator`: parts of an answer, or the error behind them."""

    def __init__(self, parts: list):
        self.parts = list(parts)
        self.is_cancelled = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.parts:
            raise StopAsyncIteration
        part = self.parts.pop(0)
        if isinstance(part, Exception):
            raise part
        return [part]

    def cancel(self):
        self.is_cancelled = True


class Replicas:
    """A `DeploymentHandle` that answers one call after the other with what it was given."""

    def __init__(self, *answers: list):
        self.left = [Parts(answer) for answer in answers]
        self.given = list(self.left)
        self.keys: list[str] = []
        self.answer = self

    def options(self, stream: bool, session_id: str):
        self.keys.append(session_id)
        return self

    def remote(self, request):
        return self.left.pop(0)


DEAD = ActorDiedError()
FULL = response(429, b'{"error": {}}')
RIGHT = response(200, b'{"choices": []}')
STREAM = response(200, b"data: 1\n\n", "text/event-stream; charset=utf-8")


async def ask(replicas: Replicas, path: str = "/v1/chat/completions", **settings) -> httpx.Response:
    door = Door(replicas, ServerSettings(**settings))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(door), base_url="http://door") as client:
        return await client.post(path, json={"messages": [{"role": "user", "content": "a red circle"}]})


pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_an_answer_is_handed_on():
    replicas = Replicas(RIGHT)
    answer = await ask(replicas)
    assert (answer.status_code, answer.json()) == (200, {"choices": []})


@pytest.mark.parametrize(
    "died", [[DEAD], [RIGHT[0], DEAD], [STREAM[0] | {"headers": []}, DEAD]], ids=["at_once", "within", "early"]
)
async def test_another_replica_answers_for_one_that_died(died):
    replicas = Replicas(died, RIGHT)
    answer = await ask(replicas)
    assert (answer.status_code, answer.json()) == (200, {"choices": []})
    assert replicas.keys[0] == replicas.keys[1] != ""


async def test_the_second_death_is_told_as_503():
    answer = await ask(Replicas([DEAD], [RIGHT[0], DEAD]))
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["error"] == {
        "message": "The replica that was answering has died. Ask again.",
        "type": "server_error",
        "param": None,
        "code": "replica_died",
    }


async def test_a_conversation_whose_replica_is_full_goes_to_any():
    replicas = Replicas(FULL, RIGHT)
    assert (await ask(replicas)).status_code == 200
    assert replicas.keys[0] != "" and replicas.keys[1] == ""


async def test_when_all_are_full_it_is_said():
    assert (await ask(Replicas(FULL, FULL))).status_code == 429


async def test_a_stream_that_was_seen_ends_with_an_error():
    begun = [STREAM[0], STREAM[1] | {"more_body": True}]
    first, second, last = (await ask(Replicas([*begun, DEAD]))).text.strip().split("\n\n")
    assert (first, last) == ("data: 1", "data: [DONE]")
    assert json.loads(second.removeprefix("data: "))["error"]["code"] == "replica_died"


async def test_a_stream_of_named_events_ends_with_one():
    begun = [STREAM[0], STREAM[1] | {"more_body": True}]
    last = (await ask(Replicas([*begun, DEAD]), "/v1/images/generations")).text.strip().split("\n\n")[-1]
    name, data = last.split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["type"] == "error"


async def test_an_error_of_the_application_is_what_a_replica_hands_on(monkeypatch):
    """Starlette answers with a 500 and raises what led to it, for the log."""

    async def fails(scope, receive, send):
        for message in response(500, b"{}"):
            await send(message)
        raise KeyError("broken")

    monkeypatch.setattr(on_ray, "create_app", lambda engine, settings: fails)
    replica = on_ray.Replica(lambda: contextlib.nullcontext(None), ServerSettings())
    messages = [message async for part in replica.answer(on_ray.Request({}, b"")) for message in part]
    assert [message.get("status") for message in messages] == [500, None]


async def test_what_is_too_large_reaches_no_replica():
    replicas = Replicas()
    answer = await ask(replicas, max_body_bytes=10)
    assert answer.status_code == 413
    assert replicas.keys == []


@pytest.mark.parametrize("given", [None, "Bearer wrong", "Basic secret"])
async def test_of_whom_has_no_key_nothing_is_read(given):
    sent, chunks = [], [{"type": "http.request", "body": b"x" * 99, "more_body": True}] * 3

    async def receive():
        return chunks.pop()

    async def send(message):
        sent.append(message)

    headers = [] if given is None else [(b"authorization", given.encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
    await Door(Replicas(), ServerSettings(api_key="secret"))(scope, receive, send)
    assert sent[0]["status"] == 401
    assert json.loads(sent[1]["body"])["error"]["code"] == "invalid_api_key"
    assert len(chunks) == 3


async def test_who_has_the_key_is_let_in_and_health_is_for_all():
    settings = ServerSettings(api_key="secret")
    transport = httpx.ASGITransport(Door(Replicas(RIGHT, RIGHT), settings))
    async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
        answer = await client.post("/v1/chat/completions", json={}, headers={"Authorization": "Bearer secret"})
        assert answer.status_code == 200
        assert (await client.get("/health")).status_code == 200


async def test_the_bodies_that_are_held_together_are_bounded(monkeypatch):
    monkeypatch.setattr(on_ray, "MAX_HELD_BYTES", 150)
    door = Door(Replicas(*[RIGHT] * 4), ServerSettings())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(door), base_url="http://door") as client:
        # One after the other they have room.
        for _ in range(3):
            assert (await client.post("/v1/chat/completions", content=b"x" * 100)).status_code == 200
        answer = await client.post("/v1/chat/completions", content=b"x" * 200)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert (await client.post("/v1/chat/completions", content=b"x" * 100)).status_code == 200


async def test_a_stream_that_is_not_read_is_broken_off(monkeypatch):
    monkeypatch.setattr(on_ray, "MAX_UNSENT_BYTES", 100)
    chunk = {"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True}
    replicas = Replicas([STREAM[0], *[chunk] * 1000])
    (parts,) = replicas.given
    sent, chunks = [], [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive():
        return chunks.pop()

    async def send(message):
        sent.append(message)
        while len(sent) > 1 and not parts.is_cancelled:
            await asyncio.sleep(0)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    async with asyncio.timeout(10):
        await Door(replicas, ServerSettings())(scope, receive, send)
    assert len(parts.parts) > 980
    assert b"read_too_slowly" in sent[-1]["body"] and not sent[-1]["more_body"]
    assert 10 < len(sent) < 20


async def test_json_that_grows_in_memory_is_not_parsed(monkeypatch):
    monkeypatch.setattr(
        on_ray, "conversation_key", lambda headers, body: pytest.fail("It was parsed.") if body else None
    )
    replicas = Replicas(RIGHT)
    transport = httpx.ASGITransport(Door(replicas, ServerSettings(max_characters=1000)))
    async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
        body, kind = b"[" + b"[]," * 70_000, {"Content-Type": "application/json"}
        assert (await client.post("/v1/responses", content=body, headers=kind)).status_code == 413
        assert (await client.post("/v1/images/edits", content=body)).status_code == 200


async def test_nothing_goes_on_behind_an_answer():
    replicas = Replicas(FULL, RIGHT)
    await ask(replicas)
    assert all(parts.is_cancelled for parts in replicas.given)

"""A server among strangers: whatever they send, it says what is wrong with it in OpenAI's words, and keeps no place taken."""

from __future__ import annotations

import json
import random
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse

import pytest

from bagel_server import Engine
from tests.server import attacks, wrong_fields
from tests.server.attack import (
    BASE,
    CHAT,
    DRAW,
    EDIT,
    EDIT_BASE,
    FORM,
    JSON,
    KEY,
    MODEL,
    RESPOND,
    Attack,
    data_url,
    encoded,
    form,
    picture,
    said,
    shown,
)
from tests.server.conftest import served


SEED = 17
BODY_SECONDS = 1.0
MAX_BODY = 8 * 2**20
# Fewer than those who leave in the middle: a place that is not given back would be missed.
MAX_REQUESTS = 40
SETTINGS = {
    "model": MODEL,
    "api_key": KEY,
    "timeout": 30.0,
    "body_timeout": BODY_SECONDS,
    "max_requests": MAX_REQUESTS,
    "max_body_bytes": MAX_BODY,
    "max_new_tokens": 16,
    "max_steps": 4,
}
AUTHORIZED = {"authorization": f"Bearer {KEY}"}


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


class Target:
    """
    A server, spoken to in bytes.

    Args:
        engine (`Engine`): That answers.
        port (`int`)
    """

    def __init__(self, engine: Engine, port: int):
        self.engine, self.port = engine, port

    def connected(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def raw(self, *pieces: bytes, pause: float = 0.0) -> Answer | None:
        """What comes back for these bytes; nothing, if the connection is closed without a word."""
        with self.connected() as connection:
            try:
                for piece in pieces:
                    connection.sendall(piece)
                    time.sleep(pause)
            except (BrokenPipeError, ConnectionResetError):
                pass  # It may answer before it has all.
            try:
                response = HTTPResponse(connection)
                response.begin()
                return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
            except (HTTPException, ConnectionResetError):
                return None

    def ask(self, attack: Attack, authorized: bool = True) -> Answer | None:
        return self.raw(head_of(attack, authorized) + attack.body)

    def is_idle(self) -> bool:
        stats = self.engine.stats()
        metrics = self.raw(b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert metrics is not None
        gauges = re.findall(r"^bagel_engine_(?:running|waiting) ([\d.]+)$", metrics.body.decode(), flags=re.MULTILINE)
        assert len(gauges) == 2
        return not (stats.running or stats.waiting or any(map(float, gauges)))


def head_of(attack: Attack, authorized: bool = True) -> bytes:
    headers = {"Host": "a", "Connection": "close", "Content-Length": str(len(attack.body))}
    headers |= AUTHORIZED if authorized else {}
    lines = [f"{attack.method} {attack.path} HTTP/1.1", *(f"{k}: {v}" for k, v in (headers | attack.headers).items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")


@pytest.fixture(scope="module")
def target(pipe) -> Iterator[Target]:
    engine = Engine(pipe)
    with served(engine, **SETTINGS) as url:
        yield Target(engine, int(url.rpartition(":")[2]))
    engine.close(timeout=5)


@pytest.fixture(autouse=True)
def nothing_is_left(target):
    """Behind every test nobody is answered or waits, and whoever asks rightly is answered."""
    yield
    deadline = time.monotonic() + 10
    while not target.is_idle() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert target.is_idle()
    answer = target.ask(Attack("right", CHAT, encoded(BASE[CHAT])))
    assert answer is not None and answer.status == 200, answer


def fault(attack: Attack, answer: Answer | None) -> str | None:
    """What is wrong with the answer to an attack."""
    if answer is None:
        return "no answer"
    if attack.may_pass and answer.status == 200:
        return None
    if not 400 <= answer.status < 500:
        return f"status {answer.status}"
    if re.search(rb"Traceback|site-packages|\.py\b|/work/|/home/|/root/", answer.body):
        return "a path of the server"
    if answer.status == 405 and "allow" not in answer.headers:
        return "no Allow"
    try:
        error = json.loads(answer.body)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
    except (ValueError, KeyError, TypeError, AssertionError):
        return f"no error of OpenAI: {answer.body[:100]!r}"
    if not (isinstance(error["message"], str) and error["message"] and isinstance(error["type"], str)):
        return f"no message: {error}"
    if len(error["message"]) > 1000:
        return "a message of any length"
    if attack.param and not attack.may_pass and re.split(r"[.\[]", error["param"] or "")[0] != attack.param:
        return f"names {error['param']}, not {attack.param}: {error['message'][:100]}"
    return None


def faults(
    target: Target,
    attacking: Iterable[Attack],
    check: Callable[[Attack, Answer | None], str | None] = fault,
    **how: bool,
):
    """All that went wrong, of several strangers at a time."""

    def tried(attack: Attack) -> str | None:
        found = check(attack, target.ask(attack, **how))
        return found and f"{attack.name}: {found}"

    with ThreadPoolExecutor(4) as pool:
        return [found for found in pool.map(tried, attacking) if found]


def test_these_are_many():
    families = (
        wrong_fields.wrong_fields(),
        wrong_fields.wrong_urls(),
        attacks.wrong_bodies(),
        attacks.wrong_forms(random.Random(SEED)),
        attacks.wrong_images(),
        attacks.wrong_places(),
        attacks.wrong_keys(),
    )
    assert sum(not attack.may_pass for family in families for attack in family) >= 1000


def test_every_field_with_every_wrong_value_is_named(target):
    assert faults(target, wrong_fields.wrong_fields()) == []


def test_urls_of_images_are_followed_nowhere(target):
    assert faults(target, wrong_fields.wrong_urls()) == []


def test_urls_lead_to_no_private_address_where_they_are_allowed(target):
    with served(target.engine, **SETTINGS, allow_image_urls=True) as url:
        open_one = Target(target.engine, int(url.rpartition(":")[2]))
        assert faults(open_one, wrong_fields.wrong_urls()) == []


def test_bodies_that_are_no_json(target):
    assert faults(target, attacks.wrong_bodies()) == []


def test_forms_that_are_none(target):
    assert faults(target, attacks.wrong_forms(random.Random(SEED))) == []


def test_pictures_that_are_none_and_bombs(target):
    assert faults(target, attacks.wrong_images()) == []


def test_pictures_with_other_bytes(target):
    assert faults(target, attacks.broken_images(random.Random(SEED), 90)) == []


def test_requests_with_other_bytes(target):
    assert faults(target, attacks.broken_bodies(random.Random(SEED), 120)) == []


def test_paths_and_methods_that_are_none(target):
    assert faults(target, attacks.wrong_places()) == []


def test_wrong_keys(target):
    def refused(attack: Attack, answer: Answer | None) -> str | None:
        # A path that leads out of `/v1/` may not be found, too.
        if answer is None or answer.status not in (401, 404):
            return f"let in: {answer}"
        return fault(attack, answer)

    assert faults(target, attacks.wrong_keys(), refused, authorized=False) == []


CHUNKED = Attack("chunked", CHAT, headers=JSON | {"Transfer-Encoding": "chunked"})
HEAD = head_of(CHUNKED).replace(b"Content-Length: 0\r\n", b"")


def chunks(content: bytes, size: int) -> bytes:
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


def test_bodies_in_chunks(target):
    good = encoded(BASE[CHAT])
    answer = target.raw(HEAD + chunks(good, 7) + b"0\r\n\r\n")
    assert answer is not None and answer.status == 200
    answer = target.raw(HEAD + chunks(b"[" * (MAX_BODY + 1), 2**16) + b"0\r\n\r\n")
    assert answer is not None and answer.status == 413
    assert fault(CHUNKED, answer) is None


def test_a_body_that_is_too_large_is_not_awaited(target):
    attack = Attack("large", CHAT, headers=JSON | {"Content-Length": str(2**40)})
    answer = target.raw(head_of(attack))
    assert answer is not None and answer.status == 413
    assert fault(attack, answer) is None


BROKEN_HTTP = {
    "no HTTP": b"hello\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "zeros": bytes(1000),
    "another version": b"GET /v1/models HTTP/9.9\r\nHost: a\r\n\r\n",
    "no path": b"GET HTTP/1.1\r\nHost: a\r\n\r\n",
    "a line end in a header": b"GET /v1/models HTTP/1.1\r\nHost: a\r\nA: b\rc\r\n\r\n",
    "a header without a name": b"GET /v1/models HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n",
    "a space in a name": b"GET /v1/models HTTP/1.1\r\nHost: a\r\nA b: c\r\n\r\n",
    "100 KB of a header": b"GET /v1/models HTTP/1.1\r\nHost: a\r\nA: " + b"a" * 100_000 + b"\r\n\r\n",
    "5,000 headers": b"GET /v1/models HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
    "a path of 200 KB": b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "bytes in a path": b"GET /v1/models/\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n",
    "two lengths": head_of(CHUNKED).replace(b"Transfer-Encoding: chunked", b"Content-Length: 5") + b"hello",
    "a length and chunks": head_of(CHUNKED) + b"5\r\nhello\r\n0\r\n\r\n",
    "a length that is none": head_of(CHUNKED).replace(b"Content-Length: 0", b"Content-Length: abc"),
    "a length below zero": head_of(CHUNKED).replace(b"Content-Length: 0", b"Content-Length: -1"),
    "a length in other digits": head_of(CHUNKED).replace(b"Content-Length: 0", b"Content-Length: \xb2"),
    "a chunk that is none": HEAD + b"zz\r\nhello\r\n0\r\n\r\n",
    "a chunk below zero": HEAD + b"-5\r\nhello\r\n0\r\n\r\n",
    "a chunk of any size": HEAD + b"f" * 40 + b"\r\nhello",
    "another coding": head_of(CHUNKED).replace(b"Encoding: chunked", b"Encoding: gzip"),
    "an upgrade": b"GET /v1/models HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
}


def test_what_is_no_http_gets_an_error_or_a_closed_connection(target):
    """What does not become a request cannot get an error of OpenAI's: the HTTP server itself refuses it."""

    def answered(name: str) -> str | None:
        with target.connected() as connection:
            connection.sendall(BROKEN_HTTP[name])
            connection.shutdown(socket.SHUT_WR)
            try:
                came = connection.recv(2**16)
            except ConnectionResetError:
                return None
        ok = not came or re.match(rb"HTTP/1\.[01] 4\d\d ", came)
        return None if ok else f"{name}: {came[:80]!r}"

    with ThreadPoolExecutor(8) as pool:
        assert [found for found in pool.map(answered, BROKEN_HTTP) if found] == []


def test_slow_senders_are_told_and_hold_nothing(target):
    """Stopped in the middle, a byte at a time, and many of them; meanwhile others are answered."""
    content = encoded(BASE[CHAT])
    promised = Attack("slow", CHAT, content)
    head, half = head_of(promised), content[: len(content) // 2]
    cut = form(*EDIT_BASE)
    sent = [
        *[(head, half)] * 10,
        *[(head, *[content[place : place + 1] for place in range(12)])] * 5,
        *[(HEAD, chunks(half, 5))] * 5,
        *[(head_of(Attack("slow", EDIT, cut, headers=dict(FORM))), cut[:100])] * 5,
    ]
    # Who has not even said what he wants holds no place, and is not waited for.
    mute = [target.connected() for _ in range(2 * MAX_REQUESTS)]
    for connection in mute:
        connection.sendall(head[:40])
    with ThreadPoolExecutor(len(sent)) as pool:
        began = time.monotonic()
        answers = [pool.submit(target.raw, *pieces, pause=0.2) for pieces in sent]
        time.sleep(BODY_SECONDS / 2)
        other = target.ask(Attack("right", CHAT, content))
        assert other is not None and other.status == 200
        assert time.monotonic() - began < BODY_SECONDS * 5
        for answer in answers:
            found = answer.result()
            assert found is not None and found.status == 408
            assert fault(promised, found) is None
    assert time.monotonic() - began < BODY_SECONDS * 10
    for connection in mute:
        connection.close()


def test_who_leaves_in_the_middle_holds_nothing(target):
    """Of what is sent, before an answer, and between its pieces."""
    long = BASE[CHAT] | {"max_tokens": 16, "n": 4, "seed": 1}
    requests = [
        Attack("chat", CHAT, encoded(long)),
        Attack("stream", CHAT, encoded(long | {"stream": True})),
        Attack("draw", DRAW, encoded(BASE[DRAW] | {"n": 4, "num_inference_steps": 4})),
        Attack(
            "draw in pieces",
            DRAW,
            encoded(BASE[DRAW] | {"stream": True, "partial_images": 1, "num_inference_steps": 4}),
        ),
        Attack("respond", RESPOND, encoded(BASE[RESPOND] | {"stream": True})),
    ]
    generator = random.Random(SEED)
    for _ in range(2 * MAX_REQUESTS // len(requests)):
        for attack in requests:
            sent = head_of(attack) + attack.body
            with target.connected() as connection:
                connection.sendall(sent[: generator.randrange(1, len(sent))] if generator.random() < 0.3 else sent)
                if generator.random() < 0.5:
                    connection.settimeout(generator.random() / 10)
                    try:
                        connection.recv(100)
                    except TimeoutError:
                        pass


def test_a_full_server_says_when_to_come_again(target):
    """More at a time than may wait: each is answered, or told to come again, and nothing else."""
    asked = Attack("right", CHAT, encoded(BASE[CHAT] | {"n": 8, "max_tokens": 16, "seed": 1}))
    with ThreadPoolExecutor(MAX_REQUESTS) as pool:
        answers = list(pool.map(lambda _: target.ask(asked), range(MAX_REQUESTS)))
    statuses = [answer.status for answer in answers if answer is not None]
    assert len(statuses) == MAX_REQUESTS and set(statuses) == {200, 429}
    for answer in answers:
        if answer.status == 429:
            assert fault(asked, answer) is None
            assert int(answer.headers["retry-after"]) >= 1


STRANGE = (
    *(
        "\0",
        "\n",
        " ",
        "\u202e",
        "\ufeff",
        "\uffff",
        "\U0010ffff",
        "\x1b[31m",
        "\r\n\r\nHTTP/1.1 200",
        "🥯" * 50,
        "a\u0300" * 99,
    ),
    *("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|endoftext|>", "<think></think>", "</think>", "<think>"),
    *("{{ 7 * 7 }}", "{% for %}", "%s%n", "../../etc/passwd", "<script>", "'; DROP TABLE", "$(id)"),
)


def test_strange_words_are_words(target):
    """Whatever somebody says is said, and drawn."""
    asked = [
        *(
            Attack(f"says {w!r:.30}", CHAT, encoded(BASE[CHAT] | {"messages": said({"type": "text", "text": w})}))
            for w in STRANGE
        ),
        *(Attack(f"draws {w!r:.30}", DRAW, encoded(BASE[DRAW] | {"prompt": w})) for w in STRANGE),
        *(
            Attack(
                f"responds {w!r:.30}",
                RESPOND,
                encoded(BASE[RESPOND] | {"input": w, "instructions": w, "max_output_tokens": 1}),
            )
            for w in STRANGE
        ),
    ]

    def answered(attack: Attack, answer: Answer | None) -> str | None:
        return None if answer is not None and answer.status == 200 else str(answer)

    assert faults(target, asked, answered) == []


def test_an_image_of_many_is_named(target):
    """By its place, so that somebody can find it."""
    messages = said({"type": "text", "text": "a"}, shown(data_url(picture())), shown("file:///etc/passwd"))
    answer = target.ask(Attack("third", CHAT, encoded(BASE[CHAT] | {"messages": messages})))
    assert answer is not None
    assert json.loads(answer.body)["error"]["param"].startswith("messages[0].content[2].image_url")

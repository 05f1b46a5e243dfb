# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The server on Ray Serve: a door, and behind it replicas of the same application, each with an engine of its own."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, aclosing, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import ray
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, BackpressureConfig, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.request_router import PendingRequest, RunningReplica
from starlette import requests
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .app import create_app
from .bodies import beside, bounded, check_values
from .engine import Engine
from .errors import ApiError, too_many
from .keys import check_key
from .replicas import conversation_key, merged_metrics
from .settings import ServerSettings
from .sse import error_event, line


logger = logging.getLogger(__name__)

# What a replica needs of a request's scope; the rest belongs to the process that the request came to.
SCOPE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client", "server")
# How an answer fails when its replica dies, and is scaled down, or none is there.
LOST = (RayActorError, RayServeException)
NO_PLACE = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
DIED = ApiError(
    "The replica that was answering has died. Ask again.",
    status=503,
    code="replica_died",
    headers={"Retry-After": "1"},
)
SLOW = ApiError("The stream broke off, because it was read too slowly.", code="read_too_slowly")
# The engine of a replica refuses what is too much for it.
ANY_NUMBER = 100_000
# That the door hands on at a time; as many more wait before it.
MAX_OPEN = 1000
# Of their bodies together, which it holds until they are answered.
MAX_HELD_BYTES = 2**30
# Of a stream that comes faster than its client reads.
MAX_UNSENT_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Request:
    """A request as it goes from the door to a replica."""

    scope: dict[str, Any]
    body: bytes


class Replica:
    """
    The application in a process of its own, which Ray Serve starts, watches and replaces.

    Args:
        engine: Makes a context whose engine ends with it, in that process.
        settings ([`ServerSettings`]): Of the application.
    """

    def __init__(self, engine: Callable[[], AbstractContextManager[Engine]], settings: ServerSettings):
        self._stack = ExitStack()
        self.engine = self._stack.enter_context(engine())
        self.app = create_app(self.engine, settings)
        # A task that nobody holds may be collected while it runs.
        self._running: set[asyncio.Task[None]] = set()

    async def answer(self, request: Request) -> AsyncIterator[list[Message]]:
        """What the application sends, as many messages at a time as are there. Whoever stops listening has hung up."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        hung_up = asyncio.Event()
        said = [{"type": "http.request", "body": request.body, "more_body": False}]

        async def receive() -> Message:
            if said:
                return said.pop()
            await hung_up.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if hung_up.is_set():
                raise OSError("The client has hung up.")
            sent.put_nowait(message)

        async def run() -> None:
            try:
                await self.app(dict(request.scope), receive, send)
            finally:
                sent.put_nowait(None)

        task = asyncio.create_task(run())
        self._running.add(task)
        task.add_done_callback(self._ended)
        try:
            while True:
                messages = [await sent.get()]
                while not sent.empty():
                    messages.append(sent.get_nowait())
                part = [message for message in messages if message is not None]
                if part:
                    yield part
                if part and is_last(part[-1]):
                    return
                if None in messages:
                    await task
                    return
        finally:
            hung_up.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        error = None if task.cancelled() else task.exception()
        # Of one whose client has hung up, nobody wants to know.
        if error is not None and not isinstance(error, (OSError, requests.ClientDisconnect)):
            logger.error("A request failed.", exc_info=error)

    def metrics(self) -> tuple[str, str]:
        """The name of this replica, and its page of metrics."""
        return serve.get_replica_context().replica_id.unique_id, self.app.state.metrics.text().decode()

    def check_health(self) -> None:
        """Ray Serve starts another replica in the place of one that raises here."""
        if self.engine.is_closed:
            raise RuntimeError("The engine has ended.")

    def __del__(self) -> None:
        """Ray Serve calls it when nothing runs any more."""
        self._stack.close()


def is_last(message: Message) -> bool:
    return message["type"] == "http.response.body" and not message.get("more_body", False)


class ConversationRouter(ConsistentHashRouter):
    """Ray Serve's consistent hashing for what belongs to a conversation; all else goes to the replica with the least to do."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None or not pending_request.metadata.session_id:
            return [candidate_replicas]
        return await super().choose_replicas(candidate_replicas, pending_request)


class Door:
    """
    The application that clients see: reads a request, finds the replica that holds its conversation, hands its answer on.

    A request whose replica has died, or has no place, is made once more, of which the client sees nothing. Then it fails with
    503, or with what the replica said. A stream of which the client has seen a part ends with an error instead.

    Args:
        replicas (`DeploymentHandle`): Of [`Replica`].
        settings ([`ServerSettings`]): Of the application.
    """

    def __init__(self, replicas: DeploymentHandle, settings: ServerSettings):
        self.replicas = replicas
        self.settings = settings
        self._held = 0
        self.registry = CollectorRegistry()
        self.again = Counter("bagel_again", "Requests that were made once more.", ["reason"], registry=self.registry)
        self.lost = Counter("bagel_lost", "Answers that failed because replicas died.", registry=self.registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/metrics":
            page = await self._metrics()
            return await page(scope, receive, send)
        chunks: list[bytes] = []
        try:
            # No other place has a body.
            if scope["path"].startswith("/v1/"):
                await self._read(requests.Request(scope, receive), chunks)
            await self._answer(Request({name: scope[name] for name in SCOPE if name in scope}, b"".join(chunks)), send)
        except ApiError as error:
            await error.response(scope, receive, send)
        finally:
            self._held -= sum(map(len, chunks))

    async def _read(self, request: requests.Request, chunks: list[bytes]) -> None:
        """The body of a request, of which only those may hold memory who have the key."""
        check_key(request.headers, self.settings)
        async for chunk in bounded(request, self.settings):
            if self._held + len(chunk) > MAX_HELD_BYTES:
                raise too_many()
            chunks.append(chunk)
            self._held += len(chunk)
        # No second copy is held.
        chunks[:] = [b"".join(chunks)]
        if is_json(request.scope["headers"]):
            check_values(chunks[0], self.settings)

    async def _metrics(self) -> Response:
        pages = await self.replicas.broadcast("metrics").results_async(return_exceptions=True)
        # One that is dying has no page.
        alive = dict(page for page in pages if not isinstance(page, LOST))
        return Response(merged_metrics(alive) + generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    async def _answer(self, request: Request, send: Send) -> None:
        headers = request.scope["headers"]
        body = request.body if is_json(headers) else b""
        key = await beside(body, conversation_key, headers, body)
        try:
            if await self._hand_on(request, key, send, is_last_try=False):
                return
            # Its own replica is full.
            key = None
            self.again.labels("full").inc()
        except LOST as error:
            logger.warning("A replica died, and another one answers: %s", error)
            self.again.labels("died").inc()
        try:
            await self._hand_on(request, key, send, is_last_try=True)
        except LOST as error:
            logger.warning("A second replica died: %s", error)
            self.lost.inc()
            await DIED.response(request.scope, no_more, send)

    async def _hand_on(self, request: Request, key: str | None, send: Send, is_last_try: bool) -> bool:
        """Whether the answer was sent on: one that only says that there is no place is not, but for the last try."""
        parts: Any = self.replicas.options(stream=True, session_id=key or "").answer.remote(request)
        try:
            messages = one_by_one(parts)
            start = await anext(messages)
            if start["status"] in NO_PLACE and not is_last_try:
                return False
            if dict(start["headers"]).get(b"content-type", b"").startswith(b"text/event-stream"):
                await self._stream(start, messages, send, are_named=request.scope["path"] != "/v1/chat/completions")
            else:
                # Before all of it is there nothing is sent, so that another replica can still answer.
                for message in [start, *[message async for message in messages]]:
                    await send(message)
            return True
        finally:
            parts.cancel()

    async def _stream(
        self, start: Message, messages: AsyncGenerator[Message, None], send: Send, are_named: bool
    ) -> None:
        await send(start)
        try:
            async with aclosing(read_ahead(messages)) as read:
                async for message in read:
                    await send(message)
        except ApiError as error:
            await send(broken_off(error, are_named))
        except LOST as error:
            logger.warning("A replica died in the middle of a stream: %s", error)
            self.lost.inc()
            await send(broken_off(DIED, are_named))


async def one_by_one(parts: DeploymentResponseGenerator[list[Message]]) -> AsyncGenerator[Message, None]:
    """The messages of an answer, which is cancelled when nobody wants more of them."""
    try:
        async for part in parts:
            for message in part:
                yield message
    finally:
        parts.cancel()


async def read_ahead(messages: AsyncGenerator[Message, None]) -> AsyncGenerator[Message, None]:
    """
    The same messages, counted as they come: Ray brings them to this process at once, however slowly they are taken.

    Raises:
        ApiError: behind those that were there, if there were too many.
    """
    came: asyncio.Queue[Message | Exception | None] = asyncio.Queue()
    unsent = 0

    async def read() -> None:
        nonlocal unsent
        try:
            async with aclosing(messages):
                async for message in messages:
                    came.put_nowait(message)
                    unsent += len(message.get("body", b""))
                    if unsent > MAX_UNSENT_BYTES:
                        raise SLOW
            came.put_nowait(None)
        except Exception as error:
            came.put_nowait(error)

    task = asyncio.create_task(read())
    try:
        while (message := await came.get()) is not None:
            if isinstance(message, Exception):
                raise message
            yield message
            unsent -= len(message.get("body", b""))
    finally:
        task.cancel()


def is_json(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a body is to be read as JSON."""
    return dict(headers).get(b"content-type", b"").lower().startswith(b"application/json")


async def no_more() -> Message:
    """`receive` of a request that was read."""
    return {"type": "http.disconnect"}


def broken_off(error: ApiError, are_named: bool) -> Message:
    """The end of a stream by an error, as the application sends one."""
    body = line(error_event(error, are_named)).encode() + (b"" if are_named else b"data: [DONE]\n\n")
    return {"type": "http.response.body", "body": body, "more_body": False}


def application(
    engine: Callable[[], AbstractContextManager[Engine]],
    settings: ServerSettings,
    replicas: int | AutoscalingConfig = 1,
    num_cpus: float = 1,
    num_gpus: float = 0,
) -> serve.Application:
    """
    What `ray.serve.run`, and the import path of a Ray Serve config file, take.

    Args:
        engine: Makes a context whose engine ends with it: that of a replica, in the replica's process.
        settings ([`ServerSettings`]): Of each replica.
        replicas (`int` or `AutoscalingConfig`, *optional*, defaults to 1): How many, or by what Ray decides how many.
        num_cpus (`float`, *optional*, defaults to 1), num_gpus (`float`, *optional*, defaults to 0): Of each replica.
    """
    scaling: dict[str, Any] = (
        {"num_replicas": replicas} if isinstance(replicas, int) else {"autoscaling_config": replicas}
    )
    behind = serve.deployment(
        max_ongoing_requests=ANY_NUMBER,
        # What runs is finished before a replica goes.
        graceful_shutdown_timeout_s=settings.timeout,
        request_router_config=RequestRouterConfig(request_router_class=ConversationRouter),  # type: ignore[arg-type]
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
        **scaling,
    )(Replica)

    def build_door() -> ASGIApp:
        return Starlette(routes=[Mount("/", Door(serve.get_deployment_handle(Replica.__name__), settings))])

    door = serve.deployment(
        name=Door.__name__,
        max_ongoing_requests=MAX_OPEN,
        max_queued_requests=MAX_OPEN,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        graceful_shutdown_timeout_s=settings.timeout,
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress(build_door)())
    return door.bind(behind.bind(engine, settings))


@contextmanager
def cluster(num_cpus: int) -> Iterator[None]:
    """
    The cluster of `RAY_ADDRESS`, or one of this machine that ends with the block.

    Args:
        num_cpus (`int`): That a cluster of this machine has.
    """
    if "RAY_ADDRESS" in os.environ:
        ray.init()
    else:
        # Requests and answers are in the object store for a moment only.
        ray.init(num_cpus=num_cpus, include_dashboard=False, object_store_memory=200 * 2**20)
    try:
        yield
    finally:
        ray.shutdown()


def run(app: serve.Application, host: str, port: int) -> None:
    """
    Serve on the cluster until SIGTERM or SIGINT, then finish what runs.

    Args:
        app (`serve.Application`): See [`application`].
        host (`str`), port (`int`): Where requests come to.

    Raises:
        RuntimeError: if no replica can start.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(app, name="bagel")
        print(f"http://{host}:{port}/v1", flush=True)
        stop.wait()
        # First those who answer, which finishes what runs, and then those who listen.
        serve.delete("bagel")
    finally:
        serve.shutdown()

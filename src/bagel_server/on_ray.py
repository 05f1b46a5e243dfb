# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The server on Ray Serve: a door, and behind it replicas of the same application, each with an engine of its own."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.request_router import PendingRequest, RunningReplica
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .replicas import conversation_key, merged_metrics


logger = logging.getLogger(__name__)

# What a replica needs of a request's scope; the rest belongs to the process that the request came to.
SCOPE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client", "server")
# How an answer fails when its replica dies, and is scaled down, or none is there.
LOST = (RayActorError, RayServeException)
NO_PLACE = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
DIED = "The replica that was answering has died. Ask again."


@dataclass(frozen=True)
class Request:
    """A request as it goes from the door to a replica."""

    scope: dict[str, Any]
    body: bytes


class Replica:
    """
    The application in a process of its own, which Ray Serve starts, watches and replaces.

    Args:
        build: Makes the application, in that process.
    """

    def __init__(self, build: Callable[[], ASGIApp]):
        self.app = build()
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
        task.add_done_callback(self._running.discard)
        try:
            is_whole = False
            while not is_whole:
                messages = [await sent.get()]
                while not sent.empty():
                    messages.append(sent.get_nowait())
                if messages[-1] is None:
                    messages.pop()
                    # Its error, if there was one.
                    await task
                yield messages
                is_whole = not messages or is_last(messages[-1])
        finally:
            hung_up.set()

    async def metrics(self, request: Request) -> tuple[str, str]:
        """The name of this replica, and its page of metrics."""
        messages = [message async for part in self.answer(request) for message in part]
        page = b"".join(message.get("body", b"") for message in messages)
        return serve.get_replica_context().replica_id.unique_id, page.decode()


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
        max_body (`int`): Most bytes of a request.
    """

    def __init__(self, replicas: DeploymentHandle, max_body: int):
        self.replicas = replicas
        self.max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await self._read(receive)
        if body is None:
            refused = refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The request must have at most {self.max_body} bytes."
            )
            return await refused(scope, receive, send)
        request = Request({name: scope[name] for name in SCOPE if name in scope}, body)
        if scope["path"] == "/metrics":
            page = await self._metrics(request)
            return await page(scope, receive, send)
        await self._answer(request, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body, unless it is too large."""
        body, more = bytearray(), True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.max_body:
                return None
        return bytes(body)

    async def _metrics(self, request: Request) -> Response:
        pages = await self.replicas.broadcast("metrics", request).results_async()
        return Response(merged_metrics(dict(pages)), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _answer(self, request: Request, send: Send) -> None:
        key = conversation_key(request.scope["headers"], request.body)
        try:
            if await self._hand_on(request, key, send, is_last_try=False):
                return
            # Its own replica is full.
            key = None
        except LOST as error:
            logger.warning("A replica died, and another one answers: %s", error)
        try:
            await self._hand_on(request, key, send, is_last_try=True)
        except LOST as error:
            logger.warning("A second replica died: %s", error)
            refused = refusal(HTTPStatus.SERVICE_UNAVAILABLE, DIED, {"Retry-After": "1"})
            await refused(request.scope, no_more, send)

    async def _hand_on(self, request: Request, key: str | None, send: Send, is_last_try: bool) -> bool:
        """Whether the answer was sent on: one that only says that there is no place is not, but for the last try."""
        parts = self.replicas.options(stream=True, session_id=key or "").answer.remote(request)
        try:
            messages = one_by_one(parts)
            start = await anext(messages)
            if start["status"] in NO_PLACE and not is_last_try:
                return False
            if dict(start["headers"]).get(b"content-type", b"").startswith(b"text/event-stream"):
                await self._stream(start, messages, send)
            else:
                # Before all of it is there nothing is sent, so that another replica can still answer.
                for message in [start, *[message async for message in messages]]:
                    await send(message)
            return True
        finally:
            parts.cancel()

    async def _stream(self, start: Message, messages: AsyncIterator[Message], send: Send) -> None:
        await send(start)
        try:
            async for message in messages:
                await send(message)
        except LOST as error:
            logger.warning("A replica died in the middle of a stream: %s", error)
            event = f"data: {json.dumps(error_body(HTTPStatus.SERVICE_UNAVAILABLE, DIED))}\n\n"
            await send({"type": "http.response.body", "body": event.encode(), "more_body": False})


async def one_by_one(parts: DeploymentResponseGenerator) -> AsyncIterator[Message]:
    async for part in parts:
        for message in part:
            yield message


async def no_more() -> Message:
    """`receive` of a request that was read."""
    return {"type": "http.disconnect"}


def error_body(status: HTTPStatus, message: str) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def refusal(status: HTTPStatus, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(error_body(status, message), status, headers)


def application(
    build: Callable[[], ASGIApp],
    replicas: int | AutoscalingConfig,
    max_body: int,
    max_requests: int,
    num_cpus: float = 1,
    num_gpus: float = 0,
) -> serve.Application:
    """
    What `ray.serve.run` takes.

    Args:
        build: Makes the application of one replica, in the replica's process.
        replicas (`int` or `AutoscalingConfig`): How many, or by what Ray decides how many.
        max_body (`int`): Most bytes of a request.
        max_requests (`int`): Most requests that a replica gets at a time: enough that it refuses some itself.
        num_cpus, num_gpus (`float`): That Ray keeps for each replica.
    """
    scaling = {"num_replicas": replicas} if isinstance(replicas, int) else {"autoscaling_config": replicas}
    behind = serve.deployment(
        Replica,
        max_ongoing_requests=max_requests,
        request_router_config=RequestRouterConfig(request_router_class=ConversationRouter),
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
        **scaling,
    )

    def build_door() -> ASGIApp:
        return Starlette(routes=[Mount("/", Door(serve.get_deployment_handle(Replica.__name__), max_body))])

    door = serve.deployment(
        serve.ingress(build_door)(),
        name=Door.__name__,
        max_ongoing_requests=100_000,
        ray_actor_options={"num_cpus": 0},
    )
    return door.bind(behind.bind(build))
